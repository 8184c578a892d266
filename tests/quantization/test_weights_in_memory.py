"""A denoiser that holds codes alone computes what one with float weights does, in their memory."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline

from conftest import quick_recipe
from ptqd import InputError, PrecisionPlan, Recipe, Sampling, apply_plan, keep_weights, load, quantize
from ptqd.diffusion import run_batch
from ptqd.diffusion.plain_copy import weights_elsewhere
from ptqd.quantization import weights_in_memory
from ptqd.quantization.calibration import as_calibrated
from ptqd.quantization.sites import quantized_layers

quantize_module = importlib.import_module("ptqd.quantization.quantize")
RUN = Sampling(3, 1.0, samples=4, batch=4, call={"class_labels": [0, 1], "guidance_scale": 2.0})


def latents(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, RUN, range(2), "latent"))


def floats(pipe: Any) -> int:
    return sum(layer.weight.numel() for _, layer in quantized_layers(pipe.unet))


@pytest.fixture(scope="module", params=["w4a8-affine", "w3a8-svd2x8-split", "wmxfp4a8", "w4a8-g8"])
def made(request: pytest.FixtureRequest, pipe: Any) -> Any:
    return quantize(pipe, quick_recipe(request.param), RUN)


def test_outputs_are_the_same(made: Any, tmp_path: Path) -> None:
    want = latents(made)
    made.save_pretrained(tmp_path)
    packed, plain = load(tmp_path, weights="codes"), load(tmp_path)
    assert floats(packed) == 0 < floats(plain)
    assert torch.equal(latents(packed), want)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert floats(twin) == 0
        assert torch.equal(latents(twin), want)
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(latents(load(tmp_path / "again")), want)
    keep_weights(packed, "floats")
    assert floats(packed) == floats(plain)
    assert torch.equal(latents(packed), want)
    keep_weights(plain, "codes")
    assert floats(plain) == 0
    assert torch.equal(latents(plain), want)


def test_of_another_type(made: Any, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    packed, plain = (load(tmp_path, dtype=torch.bfloat16, weights=kind) for kind in ("codes", "floats"))
    assert {layer.weight.dtype for _, layer in quantized_layers(packed.unet)} == {torch.bfloat16}
    assert torch.equal(latents(packed), latents(plain))
    for pipe in (packed, plain):
        pipe.to(torch.float32)
    assert floats(packed) == 0
    assert torch.equal(latents(packed), latents(plain))


def test_a_large_denoiser_holds_codes_by_itself(
    made: Any, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.save_pretrained(tmp_path)
    size = 4 * floats(load(tmp_path))
    monkeypatch.setattr(weights_in_memory, "LARGE", size)
    assert floats(load(tmp_path)) == 0
    assert floats(DiffusionPipeline.from_pretrained(tmp_path)) == 0
    assert floats(load(tmp_path, dtype=torch.bfloat16)) > 0  # half of the bytes
    monkeypatch.setattr(weights_in_memory, "LARGE", size + 1)
    assert floats(load(tmp_path)) > 0
    with pytest.raises(InputError, match="'codes', 'floats' or 'auto'"):
        load(tmp_path, weights="packed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'codes', 'floats' or 'auto'"):
        keep_weights(pipe, "int4")  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_compiles_whole(pipe: Any) -> None:
    packed = quantize(pipe, quick_recipe("w4a8"), RUN)
    want = latents(packed)
    keep_weights(packed, "codes")
    packed.unet.compile(fullgraph=True, backend="eager")
    assert torch.equal(latents(packed), want)


def test_a_plan_for_the_weights_leaves_codes(pipe: Any) -> None:
    packed, plain = quantize(pipe, quick_recipe("w8a8"), RUN), quantize(pipe, quick_recipe("w8a8"), RUN)
    keep_weights(packed, "codes")
    pipe.scheduler.set_timesteps(RUN.steps)
    timesteps = tuple(float(t) for t in pipe.scheduler.timesteps)
    names = [name for name, layer in quantized_layers(plain.unet) if name not in ("conv_in", "conv_out")]
    plan = PrecisionPlan.uniform(timesteps, 8).replace(weights=dict.fromkeys(names[:3], 4))
    found, want = apply_plan(packed, plan, pipe), apply_plan(plain, plan, pipe)
    assert torch.equal(latents(found), latents(want))
    assert floats(found) == 0


@pytest.mark.parametrize(
    "text",
    [
        *("w4a8-smooth-gptq", "w4a4-convrot-time"),
        *(pytest.param(t, marks=pytest.mark.slow) for t in ("w4a4-rotate-svd2-gptq", "w4a8-ranks", "w3a8-brecq")),
    ],
)
def test_a_large_model_is_quantized_from_the_weights_it_has(
    pipe: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fast(text)
    want = quantize(pipe, recipe, RUN)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    monkeypatch.setattr(weights_in_memory, "LARGE", 0)
    seen: list[set[int]] = []
    original = quantize_module._Quantizing._find_ranges

    def watched(self: Any, model: Any, *args: Any) -> None:
        own = {layer.weight.untyped_storage().data_ptr() for _, layer in quantized_layers(model)}
        seen.append(own - {p.untyped_storage().data_ptr() for p in self.full.parameters()})
        original(self, model, *args)

    monkeypatch.setattr(quantize_module._Quantizing, "_find_ranges", watched)
    found: Any = quantize(pipe, recipe, RUN)
    assert floats(found) == 0
    assert seen == [set()]  # smoothed and split, no layer had float weights of its own
    assert torch.equal(latents(found), latents(want))
    assert all(torch.equal(value, pipe.unet.state_dict()[name]) for name, value in before.items())
    shared = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert not shared & {p.untyped_storage().data_ptr() for p in found.unet.parameters()}
    found.save_pretrained(tmp_path)
    assert torch.equal(latents(load(tmp_path)), latents(want))


def fast(text: str) -> Recipe:
    values = quick_recipe(text).to_dict()
    few = {"gptq": {"inputs": 8}, "brecq": {"inputs": 8, "iterations": 4, "batch": 4}}
    values["methods"] = [method | few.get(method["name"], {}) for method in values["methods"]]
    return Recipe.from_dict(values)


def test_an_offloaded_model_is_quantized_from_the_weights_it_has(pipe: Any) -> None:
    want = quantize(pipe, quick_recipe("w4a8"), RUN)
    offloaded = cpu_offload(copy.deepcopy(pipe.unet), torch.device("cpu"))
    twin = copy.copy(pipe)
    twin.register_modules(unet=offloaded)
    calibrated: Any = as_calibrated(offloaded)
    kept = {tensor.untyped_storage().data_ptr() for tensor in weights_elsewhere(offloaded).values()}
    assert {p.untyped_storage().data_ptr() for p in calibrated.parameters() if p.ndim > 1} <= kept
    assert torch.equal(latents(quantize(twin, quick_recipe("w4a8"), RUN)), latents(want))
