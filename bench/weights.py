"""What a quantized denoiser holds in memory: codes alone, or float weights beside them; and what a call takes.

    python bench/weights.py          # ten minutes of a core, 6 GB

A UNet of LDM-4's widths on 64 x 64 places with random weights, rounded to nearest. Each way of loading is a process of
its own: resident memory after a call of one row, without what the C library keeps for later, and the peak until then,
above what it was before the pipeline was loaded. A call's seconds are the median of several, in turn in one process.
Linux only.
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
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import ptqd
from ptqd import Recipe, Sampling

KINDS = ("floats", "codes")
RUN = Sampling(2, 0.0, 1, 1)
ROUNDS = 5


def pipeline() -> Any:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=64,
        block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=32,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False))


def resident() -> float:
    return float(psutil.Process().memory_info().rss) / 1e6


def loaded(folder: str, kind: Any) -> None:
    """In a process of its own: megabytes before and after loading, and at the most in a call."""
    before = resident()
    pipe: Any = ptqd.load(folder, weights=kind)
    with torch.no_grad():
        pipe.unet(torch.randn(1, 3, 64, 64), 500)  # files are mapped: what is not used is not there yet
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the call left, which the C library would use again
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(before, resident(), int(line.split()[1]) / 1e3)


@torch.no_grad()
def call_seconds(pipe: Any, rows: int) -> dict[str, float]:
    x = torch.randn(rows, 3, 64, 64)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    outputs = {}
    for number in range(ROUNDS + 1):
        for kind in KINDS:
            ptqd.keep_weights(pipe, kind)  # type: ignore[arg-type]
            start = time.perf_counter()
            outputs[kind] = pipe.unet(x, 500).sample
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
