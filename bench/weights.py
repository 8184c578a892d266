"""What a quantized denoiser holds in memory: codes alone, or float weights beside them; and what a call takes.

    python bench/weights.py          # ten minutes of a core, 8 GB

LDM-4's UNet for ImageNet, 400.9 M parameters, on 64 x 64 places with random weights, rounded to nearest. Each way of
loading is a process of its own: resident memory after a call of one row, without what the C library keeps for later,
and the peak until then, above what it was before the pipeline was loaded, its small first stage included. A call's
seconds are the median of several, in turn in one process. Linux only.
"""

import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import ptqd
from ptqd import Recipe, Sampling, count_cost, zoo
from ptqd.diffusion.compvis.pipeline import blank

KINDS = ("floats", "codes")
RUN = Sampling(2, 0.0, 1, 1, call={"class_labels": [0]})
ROUNDS = 5


def pipeline() -> Any:
    torch.manual_seed(0)
    pipe: Any = blank(zoo.CONFIGS["ldm4-imagenet"])  # without numbers
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to_empty(device="cpu").eval()
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            for buffer in part.buffers():
                buffer.zero_()
    return pipe


def arguments(rows: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    return torch.randn(rows, 3, 64, 64), 500, torch.randn(rows, 1, 512)


def resident() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def loaded(folder: str, kind: Any) -> None:
    """In a process of its own: megabytes before and after loading, and at the most in a call."""
    before = resident()
    pipe: Any = ptqd.load(folder, weights=kind)
    with torch.no_grad():
        pipe.unet(*arguments(1))  # files are mapped: what is not used is not there yet
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the call left, which the C library would use again
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(before, resident(), int(line.split()[1]) * 1024 / 1e6)


@torch.no_grad()
def call_seconds(pipe: Any, rows: int) -> dict[str, float]:
    given = arguments(rows)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    outputs = {}
    for number in range(ROUNDS + 1):
        for kind in KINDS:
            ptqd.keep_weights(pipe, kind)  # type: ignore[arg-type]
            start = time.perf_counter()
            outputs[kind] = pipe.unet(*given).sample
            if number:  # the first allocates
                taken[kind].append(time.perf_counter() - start)
    assert torch.equal(*outputs.values())
    return {kind: statistics.median(values) for kind, values in taken.items()}


def main() -> None:
    full = pipeline()
    floats = sum(p.numel() * p.element_size() for p in full.unet.parameters()) / 1e6
    print(
        f"UNet of {floats / 4:.0f} M parameters, {floats:.0f} MB in float32; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    for text in ("w4a8", "w8a8"):
        values = {**Recipe.parse(text).to_dict(), "calibration_samples": 1}
        values["weights"]["range"] = values["activations"]["range"] = "minmax"
        with tempfile.TemporaryDirectory() as folder:
            ptqd.quantize(full, Recipe.from_dict(values), RUN).save_pretrained(folder)
            told = count_cost(folder, sampling=RUN).memory
            print(
                f"  {text}: ptqd cost says {told.resident / 1e6:.0f} MB of the denoiser, {told.disk / 1e6:.0f} on disk"
            )
            for kind in KINDS:
                done = subprocess.run(
                    [sys.executable, __file__, folder, kind], check=True, capture_output=True, text=True
                )
                before, after, peak = map(float, done.stdout.split())
                share = (after - before) / floats
                print(
                    f"  {text}, {kind:6s}  holds {after - before:6.0f} MB, {share:6.1%} of the float weights; "
                    f"peak of a call {peak - before:6.0f} MB",
                    flush=True,
                )
            pipe = ptqd.load(folder)
        for rows in (1, 4):
            spent = call_seconds(pipe, rows)
            ratio = spent["codes"] / spent["floats"]
            print(f"  {text}, {rows} rows: a call with codes takes {ratio:.2f} x the time with floats", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        loaded(*sys.argv[1:])
    else:
        main()
