"""In a process that only imports ptqd, diffusers loads what ptqd saved."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import quick_recipe, tiny_pipeline
from ptqd import Sampling, quantize
from tiny import CASES

STORED = Path(__file__).parent.parent / "data" / "stored" / "corrected"
CODE = """
import sys, ptqd
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
denoiser = getattr(pipe, "unet", None) or pipe.transformer
print(type(pipe).__name__, sum(hasattr(module, "codes") for module in denoiser.modules()) > 0)
"""


def loaded(folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, folder], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_diffusers_loads_a_quantized_pipeline_of_its_own(name: str, tmp_path: Path) -> None:
    pipe = CASES[name].build()
    recipe = quick_recipe("w8a8")
    quantize(pipe, recipe, Sampling(steps=2, samples=2, call=CASES[name].call)).save_pretrained(tmp_path)
    assert loaded(tmp_path) == f"{type(pipe).__name__} True"


def test_diffusers_loads_a_quantized_pipeline_of_ptqds() -> None:
    assert type(tiny_pipeline()).__name__ == "LatentClassPipeline"
    assert loaded(STORED) == "LatentClassPipeline True"
