"""Peak memory of measuring, against the number of samples, on fashion-ldm at W4A8: 64 and 1024 samples.

    python bench/memory.py

Each number of samples runs in a process of its own; the peak is the resident set's, as the system reports it. Measuring
goes as in ``ptqd run``: batch by batch, what is there written after each.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def measured(samples: int) -> None:
    import torch

    import ptqd
    from ptqd.experiments import measure_shards

    call = {"class_labels": list(range(10)), "guidance_scale": 3.0}
    run = ptqd.Sampling(10, 0.0, samples, 64, 0, call)
    pipe = ptqd.load("fashion-ldm")
    quantized = ptqd.quantize(pipe, "w4a8", run)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder) / "noise.safetensors", Path(folder) / "scratch"
        scratch.mkdir()
        measure_shards(pipe, quantized, run, path, scratch, title=None)
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.__version__, before, peak, size)


def main() -> None:
    peaks = {}
    for samples in (64, 1024):
        done = subprocess.run([sys.executable, __file__, str(samples)], check=True, capture_output=True, text=True)
        version, before, peak, size = done.stdout.split()
        peaks[samples] = int(peak)
        print(
            f"{samples:5d} samples: peak {int(peak) / 1024:.0f} MiB ({int(before) / 1024:.0f} before measuring), "
            f"statistics {int(size) / 1e6:.1f} MB",
            flush=True,
        )
    print(f"1024 against 64: {peaks[1024] / peaks[64]:.3f} x (torch {version}, 10 steps, batch 64)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measured(int(sys.argv[1]))
    else:
        main()
