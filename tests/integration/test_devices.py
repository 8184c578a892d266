"""What touches a device, on the GPU where there is one (``make test-gpu``), beside the same on the CPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptqd import (
    PrecisionPlan,
    Recipe,
    Sampling,
    apply_plan,
    correct,
    explain,
    keep_weights,
    load,
    measure,
    measure_widths,
    quantize,
    search_correction,
)
from ptqd.diffusion import run_batch
from ptqd.quantization.sites import quantized_layers

DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
RUN = Sampling(3, 1.0, samples=8, batch=4, call={"class_labels": [0, 1], "guidance_scale": 2.0})
LEARNED = {"iterations": 4, "batch": 4, "inputs": 8}
CHANGES = {"gptq": {"inputs": 8}, "distill": LEARNED, "brecq": LEARNED, "wide": {"inputs": 4}}


def quick(text: str) -> Recipe:
    values = {**Recipe.parse(text).to_dict(), "calibration_samples": 2, "calibration_rows": 0}
    values["weights"]["range"] = values["activations"]["range"] = "minmax"
    values["methods"] = [method | CHANGES.get(method["name"], {}) for method in values["methods"]]
    return Recipe.from_dict(values)


def latents(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, RUN, range(2), "latent")).cpu()


def near(found: torch.Tensor, want: torch.Tensor, share: float = 0.05) -> bool:
    return float((found - want).norm()) < share * float(want.norm())


@pytest.fixture
def there(pipe: Any) -> Any:
    """The pipeline on the device."""
    return copy.deepcopy(pipe).to(DEVICE)


RECIPES = [
    "w8a8",
    "w4a8-dynamic",
    "w4a8-smooth-gptq",
    "w4a8-rotate-svd2x8",
    "wmxfp4a8",
    "w4a8-time-steps2",
    "w4a4-best",
]


@pytest.mark.parametrize("text", RECIPES)
def test_quantized_there(there: Any, pipe: Any, text: str, tmp_path: Path) -> None:
    quantized: Any = quantize(there, quick(text), RUN)
    assert {layer.codes.device.type for _, layer in quantized_layers(quantized.unet)} == {DEVICE}
    want = latents(quantized)
    quantized.save_pretrained(tmp_path)
    assert near(latents(load(tmp_path)), want)  # on the CPU
    assert torch.equal(latents(load(tmp_path).to(DEVICE)), want)
    if text == "w8a8":
        assert near(want, latents(quantize(pipe, quick(text), RUN)))
    keep_weights(quantized, "codes")
    assert torch.equal(latents(quantized), want)


def test_measured_corrected_and_planned_there(there: Any) -> None:
    quantized = quantize(there, quick("w4a8"), RUN)
    stats = measure(there, quantized, RUN)
    corrected = correct(quantized, stats, methods=("cnc", "bc"))
    assert latents(corrected).isfinite().all()
    found = search_correction(quantized, stats, RUN)
    assert latents(correct(quantized, found.correction)).isfinite().all()
    wide = quantize(there, quick("w4a4+8"), RUN)
    assert set(measure_widths(there, wide, RUN)) == {4, 8}
    timesteps = tuple(stats.timesteps.tolist())
    planned = apply_plan(wide, PrecisionPlan(timesteps, ((4,), (8,), (8,))), there)
    assert latents(planned).isfinite().all()
    assert explain(there, quantized, RUN)


def test_in_half_precision_there(there: Any) -> None:
    quantized = quantize(there, quick("w8a8"), RUN)
    want = latents(quantized)
    half = copy.deepcopy(quantized).to(dtype=torch.bfloat16)
    assert near(latents(half).float(), want, 0.2)


@pytest.mark.parametrize(
    "part", ["quick", *(pytest.param(part, marks=pytest.mark.slow) for part in ("offloaded", "there"))]
)
def test_on_a_device_that_stands_in_for_a_gpu(part: str) -> None:
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, str(folder / "on_a_card.py"), part], {**os.environ, "PYTHONPATH": paths}
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert made.returncode == 0, made.stderr[-3000:]
