import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from conftest import quick_recipe, tiny_pipeline
from ptqd import InputError, LatentClassPipeline, QuantSpec, Recipe, Rule, Sampling, load, measure, quantize
from ptqd.diffusion import fingerprint, run_batch
from ptqd.diffusion.macs import Macs
from ptqd.quantization import coverage_of, disk_bytes, run_cost
from ptqd.quantization.bops import layer_bits
from ptqd.quantization.modules import AttentionProducts, LayerOptions, QuantConv, QuantLinear
from ptqd.quantization.sites import quantized_sites


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(attention=True)


@pytest.fixture(scope="module")
def qpipe(pipe: Any, run: Sampling) -> Any:
    return quantize(pipe, recipe(calibration_samples=4), run)


def recipe(text: str = "w4a8", **changes: Any) -> Recipe:
    return Recipe.from_dict({**Recipe.parse(text).to_dict(), "calibration_samples": 2, **changes})


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w3a6"])
def test_a_saved_pipeline_loads_bit_identical(pipe: Any, run: Sampling, tmp_path: Path, text: str) -> None:
    quantized = quantize(pipe, recipe(text), run)
    quantized.save_pretrained(tmp_path / "out")
    want = run_batch(quantized, run, range(4), "latent")
    for again in (load(tmp_path / "out"), LatentClassPipeline.from_pretrained(tmp_path / "out")):
        assert torch.equal(run_batch(again, run, range(4), "latent"), want)
        assert fingerprint(again.unet) == fingerprint(quantized.unet)
        assert coverage_of(again) == coverage_of(quantized)


def test_size_on_disk_is_the_claimed_size(pipe: Any, qpipe: Any, tmp_path: Path) -> None:
    qpipe.save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    codes = [v for k, v in load_file(path).items() if k.endswith(".codes")]
    sizes = {
        n: m.weight.numel() for n, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    }
    edges = ("conv_in", "conv_out")
    want = sum(math.ceil(count * (8 if name in edges else 4) / 8) for name, count in sizes.items())
    assert sum(v.numel() for v in codes) == want
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size - header == disk_bytes(qpipe.unet)


def test_every_layer_is_quantized_and_the_original_untouched(pipe: Any, qpipe: Any) -> None:
    before = fingerprint(tiny_pipeline(attention=True).unet)
    assert fingerprint(pipe.unet) == before
    names = {type(m) for m in [site.module for site in quantized_sites(qpipe.unet)]}
    assert names == {QuantConv, QuantLinear, AttentionProducts}
    assert not [m for m in qpipe.unet.modules() if type(m) in (torch.nn.Conv2d, torch.nn.Linear)]
    assert qpipe.unet.conv_in.weights.bits == 8
    assert qpipe.unet.conv_out.input.spec.bits == 8
    assert qpipe.unet.mid_block.resnets[0].conv1.weights.bits == 4
    assert qpipe.vae is pipe.vae
    assert isinstance(qpipe, LatentClassPipeline)


def test_more_bits_are_closer_to_full_precision(pipe: Any, run: Sampling) -> None:
    eight, four, two = (
        measure(pipe, quantize(pipe, recipe(text, calibration_samples=10), run), run).fit().snr.value
        for text in ("w8a8", "w4a8", "w2a4")
    )
    assert bool((eight > 1.5 * four).all())
    assert bool((four > 5 * two).all())


def test_rules(pipe: Any, run: Sampling) -> None:
    rules = [{"match": "conv_in", "skip": True}, {"match": "down_blocks.*", "weight_bits": 6, "activation_bits": 5}]
    quantized = quantize(pipe, recipe(rules=rules, attention=False), run)
    assert type(quantized.unet.conv_in) is torch.nn.Conv2d
    assert quantized.unet.down_blocks[0].resnets[0].conv1.weights.bits == 6
    assert quantized.unet.down_blocks[0].resnets[0].conv1.input.spec.bits == 5
    assert coverage_of(quantized).skipped == (("conv_in", "rule 'conv_in'"),)
    assert not [m for m in quantized.unet.modules() if isinstance(m, AttentionProducts)]


def test_a_rule_that_matches_nothing_is_an_error(pipe: Any, run: Sampling) -> None:
    with pytest.raises(InputError, match="match='nowhere' matches no layer"):
        quantize(pipe, Recipe(rules=(Rule("nowhere"),)), run)


def test_nan_weights_are_named(run: Sampling) -> None:
    broken = tiny_pipeline()
    broken.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"unet\.mid_block\.resnets\.0\.conv1\.weight holds NaN"):
        quantize(broken, "w8a8", run)


def test_a_pixel_space_unet(pixel_pipe: DDIMPipeline, tmp_path: Path) -> None:
    run = Sampling(steps=3, samples=2, batch=2)
    quantized = quantize(pixel_pipe, recipe("w8a8"), run)
    quantized.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is DDIMPipeline
    assert (run_batch(again, run, range(2)) == run_batch(quantized, run, range(2))).all()
    assert DiffusionPipeline.from_pretrained(tmp_path) is not None


def test_a_file_that_lacks_codes_is_named(qpipe: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    qpipe.save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    for name in ("conv_in.codes", "conv_in.input.scale", "conv_norm_out.weight"):
        save_file({k: v for k, v in whole.items() if k != name}, path, {"format": "pt"})
        with pytest.raises(InputError, match=re.escape(name)):
            load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines(run: Sampling, tmp_path: Path, dtype: torch.dtype) -> None:
    half = tiny_pipeline().to(dtype)
    quantized = quantize(half, recipe("w8a8"), run)
    want = run_batch(quantized, run, range(2), "latent")
    assert want.dtype == dtype
    quantized.save_pretrained(tmp_path)
    got = run_batch(load(tmp_path, dtype=dtype), run, range(2), "latent")
    assert torch.equal(got, want)


def test_what_ptqd_did_not_quantize_has_no_coverage(pipe: Any) -> None:
    with pytest.raises(InputError, match="quantize it with ptqd first"):
        coverage_of(pipe)


def test_explain_ranks_layers_by_what_their_error_does_to_the_output(pipe: Any, run: Sampling) -> None:
    from ptqd.quantization.explain import explain

    rules = [{"match": "conv_out", "weight_bits": 2}]
    values = {**Recipe.parse("w8a8-split-time-gptq").to_dict(), "calibration_samples": 4, "rules": rules}
    quantized = quantize(pipe, Recipe.from_dict(values), run)
    reports = explain(pipe, quantized, run)
    assert {report.name for report in reports} == {
        name.removesuffix(".products") for name in coverage_of(quantized).quantized
    }
    assert reports[0].name == "conv_out"
    assert reports[0].weights == "int2"
    assert reports[0].error > 10 * reports[-1].error
    assert all(a.effect >= b.effect for a, b in itertools.pairwise(reports))
    streams = {report.name for report in reports if report.stream}
    assert {"up_blocks.0.resnets.0.conv_shortcut.hidden", "up_blocks.0.resnets.0.conv_shortcut.skip"} <= streams
    assert not {name for name in streams if name.endswith((".conv1", ".conv2", ".to_q", ".proj_in"))}
    by_name = {report.name: report for report in reports}
    assert by_name["time_embedding.linear_1"].methods == ("exact",)
    assert by_name["time_embedding.linear_1"].ranges == run.steps
    assert by_name["conv_in"].methods == ("gptq",)
    whole = by_name["up_blocks.0.resnets.0.conv_shortcut.hidden"], by_name["up_blocks.0.resnets.0.conv_shortcut.skip"]
    macs = run_cost(quantized, run).macs
    assert sum(report.macs for report in reports) == pytest.approx(macs.total, rel=0.01)
    assert whole[0].range != whole[1].range
    assert by_name["up_blocks.0.attentions.0.transformer_blocks.0.attn1"].weights == ""


def test_a_split_pipeline_costs_the_same_and_a_low_rank_branch_costs_more(pipe: Any, run: Sampling) -> None:
    costs = {}
    for recipe in ("w4a4", "w4a4-split", "w4a4-svd8", "w4a4-svd8x8"):
        costs[recipe] = run_cost(quantize(pipe, quick_recipe(recipe), run), run)
    assert costs["w4a4-split"].total == costs["w4a4"].total
    assert costs["w4a4-split"].macs.total == costs["w4a4"].macs.total
    assert costs["w4a4-svd8"].total > costs["w4a4"].total
    assert costs["w4a4-svd8"].disk > costs["w4a4-svd8x8"].disk > costs["w4a4"].disk
    beside = [costs[recipe].total - costs["w4a4"].total for recipe in ("w4a4-svd8", "w4a4-svd8x8")]
    assert beside[0] == pytest.approx(4 * beside[1])


def test_a_rotation_costs_its_additions() -> None:
    """32 bit operations for each of log2(16) additions of an input, beside 4 x 4 bits for each of its products."""
    conv, extras = nn.Conv2d(16, 8, 3, stride=2, padding=1), LayerOptions(smooth=True, rotate=16)
    layer = QuantConv(conv, QuantSpec(4), QuantSpec(4, symmetric=False), (), extras)
    model = nn.Sequential(layer)
    macs = Macs(("0",), torch.ones(1, 1, dtype=torch.float64))
    before = layer_bits(model, macs).beside
    layer.set_rotation(16)
    assert float(before) == 0
    assert float(layer_bits(model, macs).beside) == pytest.approx(4 * 32 / (8 * 9 / 4))
