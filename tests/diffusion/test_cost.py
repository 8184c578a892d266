import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import quick_recipe
from ptqd import InputError, PrecisionPlan, QuantSpec, Recipe, Sampling, apply_plan
from ptqd.diffusion import Macs, call_macs, run_batch, run_macs, with_components
from ptqd.experiments import bare_denoiser, denoiser_config, one_call
from ptqd.experiments.count_cost import count_cost
from ptqd.experiments.meta_pipeline import meta_pipeline
from ptqd.quantization import (
    Bits,
    Cost,
    Memory,
    cost_of,
    disk_bytes,
    insert_quantizers,
    layer_bits,
    memory_bytes,
    run_cost,
)
from ptqd.quantization.modules import AttentionProducts, QuantConv, QuantLinear
from ptqd.quantization.modules.attention import quantize_attention
from tiny import CASES


def test_a_hand_count() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 5 * 5, 10))
    assert call_macs(model, torch.zeros(2, 3, 5, 5)) == {"0": 2 * 8 * 25 * 27, "2": 2 * 10 * 200}


def test_grouped_and_strided_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 5, 1, stride=2))
    assert call_macs(model, torch.zeros(1, 4, 7, 7)) == {"0": 6 * 25 * 2 * 9, "1": 5 * 9 * 6}


def test_attention_products_by_hand() -> None:
    attention = Attention(16, cross_attention_dim=6, heads=2, dim_head=8)
    with torch.device("meta"):
        x, context = torch.zeros(3, 9, 16), torch.zeros(3, 5, 6)
    macs = call_macs(attention.to("meta"), x, encoder_hidden_states=context)
    assert macs == {
        "to_q": 3 * 9 * 16 * 16,
        "to_k": 3 * 5 * 6 * 16,
        "to_v": 3 * 5 * 6 * 16,
        "to_out.0": 3 * 9 * 16 * 16,
        "qk": 3 * 9 * 5 * 16,
        "pv": 3 * 9 * 5 * 16,
    }


def test_bits_of_layers_and_products() -> None:
    w4, a8 = QuantSpec(4), QuantSpec(8, symmetric=False)
    model: Any = nn.Module()
    model.conv, model.linear = QuantConv(nn.Conv2d(4, 6, 3), w4, a8), QuantLinear(nn.Linear(6, 5), w4, a8)
    model.plain, model.attention = nn.Linear(2, 2), Attention(16, heads=2, dim_head=8)
    quantize_attention(model.attention, AttentionProducts(QuantSpec(4, symmetric=False), 8))
    layers = ("conv", "linear", "plain", "attention.qk", "attention.pv", "nowhere.matmul")
    bits = layer_bits(model, Macs(layers, torch.ones(2, 6, dtype=torch.float64)))
    assert bits.left[0].tolist() == [4, 4, 32, 4, 8, 32]
    assert bits.right[1].tolist() == [8, 8, 32, 4, 4, 32]
    macs = Macs(("conv",), torch.tensor([[10.0], [30.0]], dtype=torch.float64))
    cost = Cost(
        macs,
        Bits(torch.full((2, 1), 4.0), torch.tensor([[4.0], [8.0]]), torch.zeros(1), torch.ones(2, 1)),
        0,
        Memory(0, 0),
    )
    assert cost.bops.tolist() == [[160.0], [960.0]]
    assert (cost.total, cost.ratio) == (1120, 40 * 1024 / 1120)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_agrees_with_a_real_run(pipe: Any, guidance: float) -> None:
    run = Sampling(steps=2, samples=1, batch=1, call={"class_labels": [1], "guidance_scale": guidance})
    pipe = with_components(pipe, unet=copy.deepcopy(pipe.unet))
    pipe.unet.set_attn_processor(AttnProcessor())  # torch counts plain products, not the CPU's fused ones
    with FlopCounterMode(display=False) as counter:
        run_batch(pipe, run, range(1), "latent")
    macs = run_macs(pipe, run)
    assert 2 * macs.total == counter.get_total_flops()
    assert macs.counts.shape[0] == 2


@pytest.mark.parametrize("name", list(CASES))
def test_every_pipeline_is_counted_without_its_numbers(name: str) -> None:
    """At least what a real run does (the CPU's fused attention is not seen there), guidance included."""
    case = CASES[name]
    pipe = case.build()
    run = Sampling(case.steps, case.eta, 1, 1, 0, {**case.call, **(case.guidance or {})})
    macs = run_macs(pipe, run)
    assert len(macs.counts) == 3
    assert bool((macs.counts.sum(1) > 0).all())
    with FlopCounterMode(display=False) as counter:
        run_batch(pipe, run, range(1), "latent")  # text encoders and the like are in it
    products = sum(
        float(column.sum())
        for layer, column in zip(macs.layers, macs.counts.T, strict=True)
        if layer.endswith((".qk", ".pv", ".matmul"))
    )
    assert macs.total - products <= counter.get_total_flops() / 2
    if case.guidance is not None:
        single = run_macs(pipe, run.replace(call=dict(case.call)))
        assert macs.total >= single.total


def test_guidance_doubles_and_bits_divide(pipe: Any, qpipe: Any) -> None:
    run = Sampling(steps=3, call={"class_labels": [1], "guidance_scale": 1.0})
    once = run_cost(pipe, run).total
    assert run_cost(pipe, run.replace(call={"class_labels": [1], "guidance_scale": 2.0})).total == 2 * once
    assert 16 < run_cost(qpipe, run).ratio < 32  # w4a8 is 32 times fewer, but for the layers and products at 8 x 8


def test_bytes(pipe: Any, qpipe: Any) -> None:
    full = disk_bytes(pipe.unet)
    assert full == memory_bytes(pipe.unet) == 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert 4 < full / disk_bytes(qpipe.unet) < 8
    assert memory_bytes(qpipe.unet) > full  # a simulation holds floats beside the codes


@pytest.mark.parametrize(
    ("name", "parameters", "tera"),
    [
        ("ldm4-imagenet", 400_920_579, 102.20),
        ("ldm4-bedrooms", 274_056_163, None),
        ("ldm8-churches", 294_966_916, None),
    ],
)
def test_the_published_architectures(name: str, parameters: int, tera: float | None) -> None:
    """Parameters of the published checkpoints to the last one; 102.20 T leaves the attention products out."""
    config = denoiser_config(name)
    assert config is not None
    model = bare_denoiser(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    macs = one_call(config, model)
    without = sum(n for layer, n in macs.items() if not layer.endswith((".qk", ".pv")))
    if tera is not None:
        assert without * 1024 / 1e12 == pytest.approx(tera, rel=5e-4)
        assert round(without / 1e9, 1) == 99.8


def test_twelve_billion_parameters_take_no_memory() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).eval()
        tokens, text = 4096, 512
        macs = call_macs(
            model,
            hidden_states=torch.zeros(1, tokens, 64),
            encoder_hidden_states=torch.zeros(1, text, 4096),
            pooled_projections=torch.zeros(1, 768),
            timestep=torch.zeros(1),
            img_ids=torch.zeros(tokens, 3),
            txt_ids=torch.zeros(text, 3),
            guidance=torch.zeros(1),
        )
        insert_quantizers(model, Recipe.parse("w4a4+8"))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    cost = cost_of(model, Macs.of([macs]))
    assert cost.parameters == 11_901_408_320
    products = 57 * 2 * (tokens + text) ** 2 * 3072
    assert sum(n for layer, n in macs.items() if layer.endswith((".qk", ".pv"))) == products
    assert 5.9e9 < cost.disk < 6.1e9  # half a byte a weight


def test_a_skeleton_costs_what_the_pipeline_does(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    run = Sampling(steps=3, samples=1, call={"class_labels": [1], "guidance_scale": 2.0})
    bare = meta_pipeline(tmp_path)
    assert all(p.is_meta for part in bare.components.values() if isinstance(part, nn.Module) for p in part.parameters())
    mine, theirs = run_macs(bare, run), run_macs(pipe, run)
    assert mine.layers == theirs.layers
    assert torch.equal(mine.counts, theirs.counts)


@pytest.mark.parametrize("name", ["sd1", "flux", "pixart-sigma", "sd-img2img"])
def test_pipelines_are_counted_from_their_folders(name: str, tmp_path: Path) -> None:
    """The last two need their weights: one looks at its prompt's mask, one encodes a picture."""
    case = CASES[name]
    pipe = case.build()
    pipe.save_pretrained(tmp_path)
    run = Sampling(case.steps, case.eta, 1, 1, 0, {**case.call, **(case.guidance or {})})
    found = count_cost(str(tmp_path), None, None, lambda _: run)
    assert torch.equal(found.macs.counts, run_macs(pipe, run).counts)


def test_cost_under_a_recipe_and_a_plan(pipe: Any, run: Sampling, tmp_path: Path) -> None:
    from ptqd import quantize

    pipe.save_pretrained(tmp_path / "model")
    recipe = quick_recipe("w4a4+8")
    quantized = quantize(pipe, recipe, run)
    pipe.scheduler.set_timesteps(run.steps)
    plan = PrecisionPlan.uniform([float(t) for t in pipe.scheduler.timesteps], 8)
    plan = plan.replace(bits=((4,), (4,), (8,), (8,)))
    plan.save(tmp_path / "plan.toml")
    planned = apply_plan(quantized, plan)
    found = count_cost(str(tmp_path / "model"), "w4a4+8", tmp_path / "plan.toml", lambda _: run)
    loaded = run_cost(planned, run)
    assert torch.equal(found.bops, loaded.bops)
    assert (found.parameters, found.disk) == (loaded.parameters, loaded.disk)
    planned.save_pretrained(tmp_path / "planned")  # a quantized pipeline is counted as it is
    assert torch.equal(count_cost(str(tmp_path / "planned"), None, None, lambda _: run).bops, loaded.bops)
    heavier = plan.replace(weights={"conv_out": 5, "mid_block.resnets.0.conv1": 8})
    heavier.save(tmp_path / "heavier.toml")
    weighted = count_cost(str(tmp_path / "model"), "w4a4+8", tmp_path / "heavier.toml", lambda _: run)
    again = run_cost(apply_plan(quantized, heavier, pipe), run)
    assert torch.equal(weighted.bops, again.bops)
    assert weighted.disk == again.disk != found.disk
    plan.replace(weights={"nowhere": 4}).save(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="'nowhere', which is no quantized layer"):
        count_cost(str(tmp_path / "model"), "w4a4+8", tmp_path / "nowhere.toml", lambda _: run)
    steps = found.bops.sum(1)
    assert steps[0] == steps[1] < steps[2] == steps[3]
    with pytest.raises(InputError, match="the plan is for 4 steps, the run takes 5"):
        count_cost(str(tmp_path / "model"), "w4a4+8", tmp_path / "plan.toml", lambda _: run.replace(steps=5))
    with pytest.raises(InputError, match="give --recipe too"):
        count_cost(str(tmp_path / "model"), None, tmp_path / "plan.toml", lambda _: run)
    with pytest.raises(InputError, match="is no pipeline whose cost can be counted"):
        count_cost(str(tmp_path / "nowhere"), None, None, lambda _: run)


def test_a_denoiser_that_looks_at_numbers_is_counted_for_real(pipe: Any, qpipe: Any) -> None:
    run = Sampling(steps=2, samples=1, call={"class_labels": [1], "guidance_scale": 2.0})
    for each in (pipe, qpipe):
        peeking = with_components(each, unet=copy.deepcopy(each.unet))
        kind = type(peeking.unet)

        def forward(self: Any, sample: torch.Tensor, *args: Any, kind: Any = kind, **kwargs: Any) -> Any:
            assert float(sample.abs().max().item()) > 0
            return kind.forward(self, sample, *args, **kwargs)

        peeking.unet.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
        want, got = run_macs(each, run), run_macs(peeking, run)
        assert dict(zip(got.layers, got.counts.T.tolist(), strict=True)) == dict(
            zip(want.layers, want.counts.T.tolist(), strict=True)
        )
        assert torch.equal(layer_bits(peeking.unet, got).left.sum(), layer_bits(each.unet, want).left.sum())


def test_a_denoiser_whose_call_is_not_in_its_configuration() -> None:
    for config in (
        {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1},
        {"_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [32] * 4},  # how long a prompt?
    ):
        model = bare_denoiser(config)
        with pytest.raises(InputError, match="give the whole pipeline's folder"):
            one_call(config, model)
    with pytest.raises(InputError, match="refuses the configuration"):
        bare_denoiser({"_class_name": "UNet2DModel", "down_block_types": ["Nope"], "block_out_channels": [32]})
    with pytest.raises(InputError, match="diffusers has no denoiser 'DDIMScheduler'"):
        bare_denoiser({"_class_name": "DDIMScheduler"})
    with pytest.raises(InputError, match="diffusers has no denoiser 'Nope'"):
        bare_denoiser({"_class_name": "Nope"})
