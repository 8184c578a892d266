"""LDM-4 on ImageNet at full size, with random weights, through every stage on this machine: time and peak memory.

    python bench/ldm4.py

Each stage is a command in a process of its own; its peak is the resident set's, as the system reports it. Rounded to
nearest, two calibration samples, two measured samples, two steps, guidance 1.5.
"""

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from convert import random_checkpoint

from ptqd.zoo import CONFIGS

RECIPE = "calibration_samples = 2\n[weights]\nbits = 4\n[activations]\nbits = 8\n"
RUN = ["--steps", "2", "--batch", "1", "--guidance", "1.5"]
LIMIT, SMALL = 8e9, 0.135


def stage(what: str, *words: object) -> None:
    command = [sys.executable, "-m", "ptqd", *map(str, words)]
    before = time.monotonic()
    child = os.posix_spawn(sys.executable, command, {**os.environ, "PYTHONWARNINGS": "ignore"})
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{what}: status {status}")
    peak = usage.ru_maxrss * 1024
    verdict = "within" if peak <= LIMIT else "BEYOND"
    print(f"  {what:10s} {time.monotonic() - before:6.0f} s  peak {peak / 1e9:.2f} GB, {verdict} 8 GB", flush=True)


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "unet").glob("*.safetensors"))


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        random_checkpoint("ldm4-imagenet", folder / "model.ckpt")
        (folder / "w4a8.toml").write_text(RECIPE)
        print(f"LDM-4 on ImageNet, random weights, torch {torch.__version__}, {torch.get_num_threads()} threads")
        stage("convert", "convert", folder / "model.ckpt", CONFIGS["ldm4-imagenet"], folder / "fp")
        (folder / "model.ckpt").unlink()
        quantized, noise, corrected = folder / "q", folder / "noise.safetensors", folder / "corrected"
        stage("quantize", "quantize", folder / "fp", "--recipe", folder / "w4a8.toml", "--out", quantized, *RUN)
        stage("measure", "measure", folder / "fp", quantized, "--out", noise, "--samples", 2, *RUN)
        stage("correct", "correct", quantized, noise, "--methods", "cnc,bc", "--out", corrected)
        stage("sample", "sample", corrected, "--out", folder / "samples", "--samples", 2, *RUN)
        full, packed = weights(folder / "fp"), weights(quantized)
        verdict = "at most" if packed <= SMALL * full else "MORE than"
        print(f"  UNet on disk: {packed / 1e6:.1f} of {full / 1e6:.1f} MB, {packed / full:.2%}; {verdict} {SMALL:.1%}")


if __name__ == "__main__":
    main()
