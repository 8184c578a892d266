"""Do intervals hold what they say, and what do they cost?

    python bench/intervals.py coverage     # 200 repetitions with a known answer
    python bench/intervals.py cost         # 50,000 x 2048 features; four minutes of two cores

Coverage: two pipelines of the same seeds make Gaussian features (16 wide, correlated between the two), so the true
Frechet distances to a Gaussian reference are known. In how many of 200 repetitions does the 95 % interval of a
distance, of the paired difference and of the relative difference hold the truth? With classes that take turns, their
means apart, intervals are drawn within classes.

Cost: a Frechet distance against the matrix products and eigenvalues that it cannot do without, and 200 draws of the
bootstrap against one value; peak memory of a process for features mapped from disk, by their number.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open

from ptqd.files import write_tensors
from ptqd.metrics import ROWS, Metric, Moments, extrapolated_frechet, frechet_distance, frechet_statistic

REPETITIONS, WIDTH, CLASSES = 200, 16, 10


def coverage(samples: int, apart: float) -> list[str]:
    """Lines of one setting: how far apart class means are."""
    random = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    mix, other = (normal(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(2))
    means = apart * normal(CLASSES, WIDTH)
    shift = 0.3 * normal(WIDTH)
    spread = (means - means.mean(0)).T @ (means - means.mean(0)) / CLASSES
    reference = torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64) + spread
    noisy = 0.3  # standard deviation of what the second pipeline adds
    eye = torch.eye(WIDTH, dtype=torch.float64)
    true_a = frechet_distance(means.mean(0) + shift, mix.T @ mix + spread, *reference)
    both = mix + 0.2 * other
    true_b = frechet_distance(means.mean(0) + 1.2 * shift, both.T @ both + noisy**2 * eye + spread, *reference)
    truths = {
        "distance": true_a,
        "extrapolated distance": true_a,
        "difference": true_b - true_a,
        "relative": true_b / true_a - 1,
    }
    held = dict.fromkeys(truths, 0)
    classes = torch.arange(samples) % CLASSES
    strata = classes if apart else None
    centre = means[classes]
    errors = {"plain": 0.0, "extrapolated": 0.0}
    for _ in range(REPETITIONS):
        z = normal(samples, WIDTH)
        a = z @ mix + shift + centre
        b = z @ both + 1.2 * shift + noisy * normal(samples, WIDTH) + centre
        x, y = frechet_statistic(a, *reference), frechet_statistic(b, *reference)
        line = extrapolated_frechet(x, a, *reference)
        found: dict[str, Metric] = {
            "distance": x.interval(strata),
            "extrapolated distance": line.interval(strata),
            "difference": y.minus(x).interval(strata),
            "relative": y.above(x).interval(strata),
        }
        for name, metric in found.items():
            held[name] += metric.low <= truths[name] <= metric.high
        errors["plain"] += (x.value - true_a) / REPETITIONS
        errors["extrapolated"] += (line.value - true_a) / REPETITIONS
    shares = ", ".join(f"{name} {100 * count / REPETITIONS:.1f} %" for name, count in held.items())
    bias = ", ".join(f"{name} {value:+.4f}" for name, value in errors.items())
    return [
        f"{samples} samples, classes {'apart' if apart else 'alike'}: held {shares}; "
        f"true distance {true_a:.3f}, mean error {bias}"
    ]


def seconds(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started


def bare(features: torch.Tensor, covariance: torch.Tensor) -> None:
    """The products and eigenvalues of a Frechet distance, and nothing else."""
    outer = torch.zeros_like(covariance)
    for part in features.split(ROWS):
        x = part.double()
        outer.addmm_(x.T, x)
    values, vectors = torch.linalg.eigh(outer)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    torch.linalg.eigvalsh(root @ covariance @ root)


def cost(count: int, width: int) -> None:
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    reference = Moments.of(torch.randn(4 * width, width, generator=torch.Generator().manual_seed(1)))
    mean, covariance = reference.mean, reference.covariance

    def value() -> float:
        own = Moments.of(features)
        return frechet_distance(own.mean, own.covariance, mean, covariance)

    bare(features[:ROWS], covariance)  # warm
    least, single = (min(seconds(run) for _ in range(2)) for run in (lambda: bare(features, covariance), value))
    drawn = seconds(lambda: frechet_statistic(features, mean, covariance).interval(draws=200))
    print(f"{count} x {width} features, {torch.get_num_threads()} threads: bare matrix work {least:.1f} s")
    print(f"  Frechet distance {single:.1f} s, {single / least:.2f} x the bare work")
    print(f"  with 200 draws of the bootstrap {drawn:.1f} s, {drawn / single:.2f} x the single value")


def memory(folder: Path, count: int, width: int) -> None:
    """Peak memory of a process that maps features from disk."""
    path = folder / f"{count}.safetensors"
    write_tensors(path, {"features": torch.randn(count, width, dtype=torch.float32).half()}, {})
    command = [sys.executable, __file__, "peak", str(path)]
    print(f"  {count} features mapped from disk: {subprocess.check_output(command, text=True).strip()}", flush=True)


def peak(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        features = file.get_tensor("features")
        width = features.shape[1]
        mean, covariance = torch.zeros(width), torch.eye(width)
        frechet_statistic(features, mean, covariance).interval(draws=200)
        with Path("/proc/self/status").open() as status:  # pages of the file itself can be dropped at any time
            shared = next(int(line.split()[1]) for line in status if line.startswith("RssFile"))
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak {whole / 1024:.0f} MB, of which {shared / 1024:.0f} MB are pages of files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("coverage", "cost", "peak"))
    parser.add_argument("path", type=Path, nargs="?")
    args = parser.parse_args()
    if args.what == "peak":
        peak(args.path)
    elif args.what == "coverage":
        for apart in (0.0, 2.0):
            for samples in (300, 1000):
                print("\n".join(coverage(samples, apart)), flush=True)
    else:
        cost(50_000, 2048)
        with TemporaryDirectory() as folder:
            for count in (12_500, 50_000):
                memory(Path(folder), count, 2048)


if __name__ == "__main__":
    main()
