"""Files for other programs hold a denoiser's codes, read back by readers that are not ptqd's."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from safetensors.numpy import load_file, save_file
from torch import nn

import tiny
from comfy_reader import computed, read_comfy, unpack
from conftest import quick_recipe
from ptqd import InputError, PrecisionPlan, Recipe, Rule, Sampling, apply_plan, export_checkpoint, quantize
from ptqd.diffusion import run_batch
from ptqd.diffusion.pipeline_parts import denoiser_of
from ptqd.diffusion.timesteps import Call
from ptqd.engines.native_names import SWAPPED, native_leaf, native_names
from ptqd.quantization.sites import activation_quantizers, quantized_layers
from ptqd_cli.main import main


def pipeline(name: str) -> Any:
    """A tiny pipeline whose layers have inputs that are multiples of 64."""
    torch.manual_seed(3)
    pipe: Any = tiny.CASES[name].build()
    if name == "flux":
        config = {**pipe.transformer.config, "num_attention_heads": 4, "guidance_embeds": True}
        pipe.register_modules(transformer=diffusers.FluxTransformer2DModel.from_config(config).eval())
    else:
        config = {**pipe.unet.config, "block_out_channels": (64, 64), "norm_num_groups": 8}
        pipe.register_modules(unet=diffusers.UNet2DConditionModel.from_config(config).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_of(name: str) -> Sampling:
    return Sampling(2, 0.0, 1, 1, call=tiny.CASES[name].call)


@pytest.fixture(scope="module", params=["flux", "sd1"])
def made(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, pipeline(request.param)


@pytest.mark.parametrize("text", ["w8a8-comfy", "w4a4-comfy-convrot-gptq", "w4a8-comfy-convrot"])
def test_comfy_computes_what_the_simulation_does(made: tuple[str, Any], text: str, tmp_path: Path) -> None:
    name, pipe = made
    quantized = quantize(pipe, quick_recipe(text, 1), run_of(name))
    written = export_checkpoint(quantized, "comfy", tmp_path / "model.safetensors")
    read, model = read_comfy(tmp_path / "model.safetensors"), denoiser_of(quantized)
    own = dict(quantized_layers(model))
    forms = dict(written.quantized)
    assert set(forms) | {each for each, _ in written.floating} == set(own)
    names = set(load_file(tmp_path / "model.safetensors"))
    extra = {key for key in names if key.endswith((".weight_scale", ".comfy_quant"))}
    assert names - extra == set(plain_checkpoint(denoiser_of(pipe)))
    assert not written.lost or text == "w4a4-comfy-convrot-gptq"  # some layers have 8 bits there
    assert ("convrot_w4a4" in forms.values()) == text.startswith("w4")
    seen = 0
    for theirs, ours in native_names(model).items():
        parts = [own[each] for each in ours if each in forms]
        if not parts:
            assert theirs not in read
            continue
        codes, scale, marker = read[theirs]
        x = torch.randn(5, parts[0].columns, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            want = torch.cat([part(x) - (0 if part.bias is None else part.bias) for part in parts], 1).numpy()
        if theirs == SWAPPED:
            want = np.concatenate(np.split(want, 2, 1)[::-1], 1)
        if marker["format"] == "int8_tensorwise" and parts[0].input.bits < 8:
            continue  # ComfyUI has 8 bits there: closer to full precision
        found = computed(x.numpy(), codes, scale, marker)
        # a rotation's order of summing may move a number that lies between two codes
        assert np.mean(np.abs(found - want) > 1e-5 * np.abs(want).max()) < 0.02
        seen += 1
    assert seen > 4


def test_comfy_kitchen_reads_it(made: tuple[str, Any], tmp_path: Path) -> None:
    kitchen: Any = pytest.importorskip("comfy_kitchen.tensor")
    name, pipe = made
    quantized = quantize(pipe, quick_recipe("w4a4-comfy-convrot", 1), run_of(name))
    export_checkpoint(quantized, "comfy", tmp_path / "model.safetensors")
    layouts = {"int8_tensorwise": "TensorWiseINT8Layout", "convrot_w4a4": "TensorCoreConvRotW4A4Layout"}
    found = set()
    for codes, scale, marker in read_packed(tmp_path / "model.safetensors"):
        kind = getattr(kitchen, layouts[marker["format"]])
        given = {key: value for key, value in marker.items() if key in kind.Params.__dataclass_fields__}
        wide = codes.shape[1] * (2 if marker["format"] == "convrot_w4a4" else 1)
        params = kind.Params(scale=scale, orig_dtype=torch.float32, orig_shape=(len(codes), wide), **given)
        weight = kitchen.QuantizedTensor(codes, layouts[marker["format"]], params)
        x = torch.randn(3, wide, generator=torch.Generator().manual_seed(1))
        plain = {**marker, "linear_dtype": "int4"}  # its reference on a CPU rounds activations to 4 bits
        unpacked = unpack(codes.numpy()) if marker["format"] == "convrot_w4a4" else codes.numpy()
        want = computed(x.numpy(), unpacked, scale.numpy().ravel(), plain)
        got = nn.functional.linear(x, weight).float().numpy()
        assert np.mean(np.abs(got - want) > 1e-3 * np.abs(want).max()) < 0.02
        found.add(marker["format"])
    assert found == set(layouts)


def read_packed(path: Path) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    tensors = load_file(path)
    names = [key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")]
    return [
        (
            torch.from_numpy(tensors[f"{name}.weight"]),
            torch.from_numpy(tensors[f"{name}.weight_scale"]),
            json.loads(tensors[f"{name}.comfy_quant"].tobytes()),
        )
        for name in names
    ]


def test_widths_by_layer_and_what_is_lost(made: tuple[str, Any], tmp_path: Path) -> None:
    name, pipe = made
    quantized = quantize(pipe, quick_recipe("w8a8-gptq" if name == "sd1" else "w8a8", 1), run_of(name))
    layers = [each for each, layer in quantized_layers(denoiser_of(quantized)) if layer.kind == "linear"]
    pipe.scheduler.set_timesteps(2, **({"mu": 1.0} if name == "flux" else {}))
    timesteps = tuple(float(t) for t in pipe.scheduler.timesteps)
    narrow = next(each for each in layers if each.endswith(("to_out.0", "ff.net.2")))
    plan = PrecisionPlan.uniform(timesteps, 8).replace(weights={narrow: 4})
    planned = apply_plan(quantized, plan, pipe)
    written = export_checkpoint(planned, "comfy", tmp_path / "model.safetensors")
    codes = {
        each: read_comfy(tmp_path / "model.safetensors")[theirs][0]
        for theirs, ours in native_names(denoiser_of(planned)).items()
        for each in ours
        if each in dict(written.quantized)
    }
    assert int(np.abs(codes[narrow]).max()) <= 8
    assert max(int(np.abs(each).max()) for each in codes.values()) > 100
    assert any("round activations" in what for what in written.lost)
    assert any("the plan's bits" in what for what in written.lost)
    reasons = {reason for _, reason in written.floating}
    assert "attention products" in reasons
    assert ("a convolution" in reasons) == (name == "sd1")


@pytest.mark.parametrize("text", ["w8a16", "w4a16-gptq"])
def test_diffusers_loads_gguf(made: tuple[str, Any], text: str, tmp_path: Path) -> None:
    name, pipe = made
    recipe = quick_recipe(text, 1)
    recipe = dataclasses.replace(recipe, rules=(*recipe.rules, Rule("*ff.net*", group=32)))
    quantized: Any = quantize(pipe, recipe, run_of(name))
    written = export_checkpoint(quantized, "gguf", tmp_path / "model.gguf")
    model: Any = denoiser_of(quantized)
    model.save_config(tmp_path)
    loaded = type(model).from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    forms = {form for _, form in written.quantized}
    assert ("Q4_0" in forms) == text.startswith("w4")
    assert len(written.quantized) > 4
    call = first_call(quantized, run_of(name))
    for _, quantizer in activation_quantizers(model):
        quantizer.bypass()  # which GGUF has in floating point
    with torch.no_grad():
        found, want = loaded(*call[0], **call[1])[0], model(*call[0], **call[1])[0]
    assert float((found - want).norm()) < 1e-3 * float(want.norm())  # scales are rounded to half precision
    assert any("the bits of activations" in what for what in written.lost)


def first_call(pipe: Any, run: Sampling) -> Call:
    calls: list[Any] = []
    hook = denoiser_of(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    run_batch(pipe, run, range(1), "latent")
    hook.remove()
    return calls[0]  # type: ignore[no-any-return]


def plain_checkpoint(model: nn.Module) -> dict[str, torch.Tensor]:
    own, result = dict(model.named_modules()), {}
    for theirs, ours in native_names(model).items():
        modules = [own[each] for each in ours if each in own]
        for leaf, _ in modules[0].named_parameters(recurse=False) if modules else ():
            value = torch.cat([module.get_parameter(leaf) for module in modules])
            value = torch.cat(value.chunk(2)[::-1]) if theirs == SWAPPED else value
            result[f"{theirs}.{native_leaf(theirs, leaf)}"] = value
    return result


def test_the_authors_names_of_flux_are_those_diffusers_converts() -> None:
    with torch.device("meta"):
        model: Any = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    for number, module in enumerate(model.modules()):
        for key, value in list(module.named_parameters(recurse=False)):
            same = torch.full((1,) * value.ndim, number, dtype=torch.int8).expand(value.shape)
            module._parameters[key] = nn.Parameter(same, requires_grad=False)
    back = convert_flux_transformer_checkpoint_to_diffusers(plain_checkpoint(model))
    own = model.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_authors_names_of_unets_are_those_diffusers_converts(kind: str) -> None:
    changes: dict[str, Any] = {}
    if kind == "sdxl":
        down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        changes = {"down_block_types": down, "up_block_types": up, "block_out_channels": (32, 32, 64)}
        changes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
        changes |= {"projection_class_embeddings_input_dim": 80, "transformer_layers_per_block": [1, 2, 2]}
    sizes: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
    model: Any = diffusers.UNet2DConditionModel(**(sizes | changes))
    back = convert_ldm_unet_checkpoint(plain_checkpoint(model), dict(model.config))
    own = model.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[key], back[key]) for key in own)


def test_a_file_of_somebody_else_is_kept(made: tuple[str, Any], tmp_path: Path) -> None:
    name, pipe = made
    quantized = quantize(pipe, quick_recipe("w8a8-comfy", 1), run_of(name))
    for kind, ending in (("comfy", "safetensors"), ("gguf", "gguf")):
        path = tmp_path / f"model.{ending}"
        if kind == "comfy":
            save_file({"precious": np.zeros(3, np.float32)}, path)
        else:
            path.write_bytes(b"GGUF and something else")
        before = path.read_bytes()
        with pytest.raises(InputError, match="is there already and is no"):
            export_checkpoint(quantized, kind, path)  # type: ignore[arg-type]
        assert path.read_bytes() == before
        path.unlink()
        for _ in range(2):
            export_checkpoint(quantized, kind, path)  # type: ignore[arg-type]


def test_buffers_are_written_and_additions_refused(tmp_path: Path) -> None:
    pipe: Any = tiny.CASES["sd3"].build()
    pipe.set_progress_bar_config(disable=True)
    quantized: Any = quantize(pipe, quick_recipe("w8a16", 1), run_of("sd3"))
    export_checkpoint(quantized, "gguf", tmp_path / "model.gguf")
    quantized.transformer.save_config(tmp_path)
    loaded = type(quantized.transformer).from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert torch.equal(loaded.pos_embed.pos_embed, pipe.transformer.pos_embed.pos_embed)
    quantized.transformer.added = nn.Linear(2, 2)
    with pytest.raises(InputError, match="was changed since it was made: its 'added"):
        export_checkpoint(quantized, "gguf", tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize("name", ["wan", "lcm"])
def test_gguf_holds_five_dimensions_and_names_that_the_authors_have_not(name: str, tmp_path: Path) -> None:
    if name == "lcm":
        pipe: Any = tiny.stable_diffusion()
        pipe.register_modules(unet=tiny.unet(time_cond_proj_dim=8))
        kind, part, run = diffusers.UNet2DConditionModel, "unet", Sampling(2, 0.0, 1, 1, call={"prompt": ["a"]})
    else:
        pipe, part, run = tiny.CASES[name].build(), "transformer", run_of(name)
        kind = diffusers.WanTransformer3DModel
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "model")
    quantized = quantize(pipe, quick_recipe("w8a16", 1), run)
    export_checkpoint(quantized, "gguf", str(tmp_path / "model.gguf"))
    loaded = kind.from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path / "model"),
        subfolder=part,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    want = sum(p.numel() for p in getattr(pipe, part).parameters())
    assert sum(math.prod(getattr(p, "quant_shape", p.shape)) for p in loaded.parameters()) == want


def test_no_gguf_is_written_that_nothing_reads(tmp_path: Path) -> None:
    quantized = quantize(tiny.CASES["ddpm"].build(), quick_recipe("w8a8", 1), Sampling(2, 0.0, 1, 1))
    with pytest.raises(InputError, match="diffusers reads no UNet2DModel from a file"):
        export_checkpoint(quantized, "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said(made: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    def full(writer: Any) -> None:
        raise OSError("2304 requested and 768 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    name, pipe = made
    quantized = quantize(pipe, quick_recipe("w8a16", 1), run_of(name))
    with pytest.raises(InputError, match="No space left on device"):
        export_checkpoint(quantized, "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(made: tuple[str, Any], tmp_path: Path) -> None:
    _, plain = made
    with pytest.raises(InputError, match="is not quantized; quantize it with ptqd first"):
        export_checkpoint(plain, "comfy", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"ends in \.safetensors; name it so"):
        export_checkpoint(plain, "comfy", tmp_path / "model.gguf")
    with pytest.raises(InputError, match="unknown format 'onnx'; known are comfy, gguf"):
        export_checkpoint(plain, "onnx", tmp_path / "model.onnx")  # type: ignore[arg-type]
    other = quantize(tiny.CASES["ddpm"].build(), quick_recipe("w8a8", 1), Sampling(2, 0.0, 1, 1))
    with pytest.raises(InputError, match="does not know the names of UNet2DModel"):
        export_checkpoint(other, "comfy", tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="'convrot' rotates without smoothing"):
        Recipe.parse("w4a4-convrot-smooth")
    for text in ("w8a16-comfy", "wmxfp4amxfp4-comfy", "w4a4-comfy-best", "w4a4-comfy-svd"):
        with pytest.raises(InputError, match="neither smoothing nor branches"):
            Recipe.parse(text)
    assert [method.name for method in Recipe.parse("w4a4-convrot-svd2").methods] == ["convrot", "svd"]


def test_a_rotation_survives_saving(made: tuple[str, Any], tmp_path: Path) -> None:
    from ptqd import load

    name, pipe = made
    quantized = quantize(pipe, quick_recipe("w4a4-comfy-convrot", 1), run_of(name))
    quantized.save_pretrained(tmp_path)
    want, found = (run_batch(each, run_of(name), range(1), "latent") for each in (quantized, load(tmp_path)))
    assert torch.equal(torch.as_tensor(want), torch.as_tensor(found))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "sd1"
    quantize(pipeline(name), quick_recipe("w4a4-comfy-convrot", 1), run_of(name)).save_pretrained(tmp_path / "folder")
    words = ["export", str(tmp_path / "folder"), "--out", str(tmp_path / "model.safetensors"), "--to", "comfy"]
    done = subprocess.run([sys.executable, "-m", "ptqd", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "as convrot_w4a4" in done.stdout + done.stderr
    assert main([*words, "--steps", "3"]) == 2
    assert "for --to comfy nothing is sampled; leave --steps and the like out" in capsys.readouterr().err
    assert read_comfy(tmp_path / "model.safetensors")
