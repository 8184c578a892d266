"""The paper's claims on the twins of reproduce/, from their run folders: what docs/claims says.

    for f in reproduce/*.toml; do ptqd run $f --twin --out twins/$(basename $f .toml); done
    python bench/claims.py twins

Differences are paired over the same seeds, with 95 % intervals; * where an interval does not hold 0.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptqd.experiments import Report, StepRow, judged
from ptqd.experiments.report.pictures import step_plots
from ptqd.metrics import FashionClassifier, Statistic, intervals, load_reference
from ptqd.metrics.evaluator import Evaluator
from ptqd.zoo import CLASSIFIER, REFERENCE

METRICS = {
    "psnr": ("PSNR", "+.2f"),
    "frechet_distance_to_full_precision": ("Frechet to FP", "+.3f"),
    "frechet_distance": ("Frechet", "+.2f"),
    "spatial_frechet_distance": ("spatial Frechet", "+.2f"),
}
SHOWN = {"imagenet-20-w4a8": "steps-eta0.png", "imagenet-250-w4a8": "steps-eta1.png"}


def by_step(steps: Sequence[StepRow], recipe: str) -> None:
    mine = [step for step in steps if step.recipe == recipe]
    k = np.array([[getattr(step.k, part) for part in ("value", "low", "high")] for step in mine])
    r2 = np.array([step.r2.value for step in mine])
    snr = np.array([step.snr.value for step in mine])
    kurtosis = np.array([step.kurtosis.value for step in mine])
    skewness = np.array([step.skewness.value for step in mine])
    normal = np.array([step.normality_p for step in mine])
    repeats = np.array([step.autocorrelation.value for step in mine[1:]], dtype=float)
    told = (k[:, 1] > 0) | (k[:, 2] < 0)
    first, middle, last = 0, len(mine) // 2, len(mine) - 1
    places = ("at first", "in the middle", "at last")
    slopes = ", ".join(f"{k[i, 0]:+.3f} {name}" for i, name in zip((first, middle, last), places, strict=True))
    print(f"  {recipe}: k {slopes}, clear of 0 in {told.mean():.0%} of steps")
    print(f"    R2 {r2[first]:.3f}, {r2[middle]:.3f}, {r2[last]:.3f}, at most {r2.max():.3f}")
    print(
        f"    residual, medians: |skewness| {np.median(abs(skewness)):.2f}, excess kurtosis {np.median(kurtosis):.2f}, "
        f"{kurtosis.max():.1f} at most; normal (D'Agostino-Pearson p > 0.05) in {(normal > 0.05).mean():.0%}"
    )
    print(f"    residual's correlation with the step before {np.median(repeats):.2f} (median)")
    late = snr[-max(1, len(snr) // 10) :].mean()
    print(
        f"    SNR {snr[first]:.0f} at first, {snr.max():.0f} at most, {snr[last]:.1f} at last; mean of the last tenth "
        f"{late:.1f}, of the others {snr[: -max(1, len(snr) // 10)].mean():.1f}"
    )


def corrections(found: Mapping[str, Mapping[str, Statistic]], labels: torch.Tensor, names: Sequence[str]) -> None:
    for before, after in pairwise(names):
        paired = intervals({name: found[after][name].minus(found[before][name]) for name in METRICS}, labels)
        cells = []
        for name, (title, form) in METRICS.items():
            metric = paired[name]
            sure = "*" if metric.low > 0 or metric.high < 0 else ""
            cells.append(f"{title} {metric.value:{form}} +- {(metric.high - metric.low) / 2:{form[1:]}}{sure}")
        print(f"    {before} -> {after}: {', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figures", type=Path, help="folder for the figures of the steps")
    args = parser.parse_args()
    classifier: Any = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    judge = Evaluator(classifier, load_reference(REFERENCE, classifier))
    for folder in sorted(path.parent for path in args.folder.glob("*/report.html")):
        report = Report.load(folder)
        rows, settings = report.rows, report.rows[0].settings
        print(f"{folder.name}: {settings.steps} steps, eta {settings.eta:g}, guidance {settings.guidance:g}")
        full = (folder / rows[0].observed, folder / rows[0].images)
        recipes = list(dict.fromkeys(row.key.quantized for row in rows if not row.key.is_full_precision))
        for recipe in recipes:
            by_step(report.steps, recipe)
            row = next(r for r in rows if r.key.quantized == recipe)
            values = {name: row.metrics[name].value for name in METRICS}
            print(
                f"    {row.bops_ratio:.1f}x fewer bit operations; uncorrected: PSNR {values['psnr']:.2f}, "
                f"Frechet to FP {values['frechet_distance_to_full_precision']:.3f}"
            )
            names = [r.key.correction for r in rows if r.key.quantized == recipe and r.key.correction != "auto"]
            labels = torch.arange(rows[0].samples) % 10
            found = {
                r.key.correction: judged(folder / r.observed, folder / r.images, judge, labels, full)
                for r in rows
                if r.key.quantized == recipe
            }
            corrections(found, labels, names)
            corrections(found, labels, ("none", "auto"))
            corrections(found, labels, ("cnc+bc+vsc", "auto"))
        if args.figures is not None and folder.name in SHOWN:
            (args.figures / SHOWN[folder.name]).write_bytes(step_plots(report.steps)[0][1])


if __name__ == "__main__":
    main()
