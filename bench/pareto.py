"""Quality against bit operations, measured: uniform widths, the paper's rule and budgeted plans, on fashion-ldm.

    python bench/pareto.py --out pareto.jsonl                                # half an hour of one core; it resumes
    python bench/pareto.py --out pareto.jsonl --table --figure docs/plans/pareto.png

Every pipeline is measured as it runs and corrected by CNC and BC from its own statistics, so that bits are compared and
not corrections. Judged against the full-precision samples of the same seeds: PSNR, and the final latents' squared
distance, beside what the derivation in docs/plans expects of the same statistics. Then, in pairs and with 95 %
intervals over samples: the budgeted plan against the paper's rule at the same bit operations or fewer, and the rule
against uniform widths at the same bit operations, between widths on a line over the logarithm of the cost.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from grid import drawn

import ptqd
from ptqd.diffusion import run_macs
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import MEASURED
from ptqd.mixed_precision import planning_problem, solve
from ptqd.mixed_precision.contributions import contributions
from ptqd.quantization import at_width, cost_of

SAMPLES = 250
CALL = {"class_labels": list(range(10))}
SETTINGS = {
    "20 steps, eta 0, guidance 3": Sampling(20, 0.0, SAMPLES, 50, 0, {**CALL, "guidance_scale": 3.0}),
    "50 steps, eta 1, guidance 1.5": Sampling(50, 1.0, SAMPLES, 50, 0, {**CALL, "guidance_scale": 1.5}),
}
WIDTHS = (4, 5, 6, 7, 8)
SETS = ((4, 8), (4, 6, 8), WIDTHS)  # for the paper's rule
BUDGETS = (18.0, 19.9, 25.0, 32.0, 40.0, 50.0)
RECIPES = ("w8a4+5+6+7+8", "w4a4+5+6+7+8")


def candidates(title: str, recipe: str, pipe: Any) -> Iterator[tuple[str, Any]]:
    """Named pipelines, uniform widths first."""
    run = SETTINGS[title].replace(samples=MEASURED, batch=64)
    quantized = ptqd.quantize(pipe, recipe, run)
    stats = ptqd.measure_widths(pipe, quantized, run)
    for bits in WIDTHS:
        yield f"uniform {bits}", at_width(quantized, bits)
    fixed, macs = planning_problem(pipe, quantized, run, stats), run_macs(pipe, run)
    for widths in SETS:
        name = "/".join(map(str, widths)) if widths != WIDTHS else "4..8"
        ruled = ptqd.apply_plan(quantized, ptqd.paper_plan({b: stats[b] for b in widths}))
        yield f"rule {name}", ruled
        budget = cost_of(ruled.unet, macs).ratio
        yield f"budget as rule {name}", ptqd.apply_plan(quantized, solve(fixed, budget=budget).plan)
    if recipe.startswith("w8"):
        free = planning_problem(pipe, quantized, run, stats, weight_bits=WIDTHS)
        for budget in BUDGETS:
            yield f"budget {budget:g}, weights too", ptqd.apply_plan(quantized, solve(free, budget=budget).plan, pipe)


def measure_all(path: Path) -> None:
    done = {(row["setting"], row["recipe"], row["name"]) for row in rows(path)}
    pipe = ptqd.load("fashion-ldm")
    for title, run in SETTINGS.items():
        latents, images = drawn(pipe, run)
        macs = run_macs(pipe, run)
        for recipe in RECIPES:
            for name, candidate in candidates(title, recipe, pipe):
                if (title, recipe, name) in done:
                    continue
                stats = ptqd.measure(pipe, candidate, run.replace(samples=MEASURED, batch=64))
                final, pictures = drawn(ptqd.correct(candidate, stats, ("cnc", "bc")), run)
                mse = (pictures - images).double().square().flatten(1).mean(1)
                row = {
                    "setting": title,
                    "recipe": recipe,
                    "name": name,
                    "ratio": cost_of(candidate.unet, macs).ratio,
                    "expected": float(contributions(stats).sum()),
                    "without_answer": float((stats.response.outputs[-1].square() * stats.fit().variance.value).sum()),
                    "psnr": (-10 * mse.clamp(min=1e-10).log10()).tolist(),
                    "log_error": (final - latents).square().flatten(1).mean(1).log().tolist(),
                }
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(title, recipe, name, flush=True)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean(values: torch.Tensor) -> str:
    return f"{values.mean():+6.2f} ± {1.96 * values.std() / math.sqrt(len(values)):.2f}"


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield f"fashion-ldm, {SAMPLES} samples, statistics of {MEASURED}, torch {torch.__version__}; CNC and BC everywhere"
    for title in SETTINGS:
        for recipe in RECIPES:
            mine = {r["name"]: r for r in found if r["setting"] == title and r["recipe"] == recipe}
            if not mine:
                continue
            yield f"\n{title}, {recipe}"
            for name, row in mine.items():
                psnr, error = torch.tensor(row["psnr"]).mean(), torch.tensor(row["log_error"])
                line = (
                    f"  {name:28s} {row['ratio']:6.2f}x  PSNR {psnr:6.2f} dB  squared distance {error.exp().mean():.5f}"
                )
                line += f" (geometric {error.mean().exp():.5f})  expected {row['expected']:.5f}"
                yield f"{line}, were the network not to answer {row['without_answer']:.3g}"
            psnrs = {name: torch.tensor(row["psnr"]) for name, row in mine.items()}
            for name in [n for n in mine if n.startswith("rule")]:
                gained = psnrs[f"budget as {name}"] - psnrs[name]
                line = f"  PSNR, {name}: budget gains {mean(gained)} dB"
                line += (
                    f"; the rule gains {mean(psnrs[name] - between(mine, mine[name]['ratio']))} dB on uniform widths"
                )
                yield line


def between(mine: dict[str, dict[str, Any]], ratio: float) -> torch.Tensor:
    """Each sample's PSNR at uniform widths of that cost."""
    uniform = sorted((r for n, r in mine.items() if n.startswith("uniform")), key=lambda r: r["ratio"])
    for cheap, dear in zip(uniform[1:], uniform, strict=False):
        if dear["ratio"] <= ratio <= cheap["ratio"]:
            weight = math.log(ratio / dear["ratio"]) / math.log(cheap["ratio"] / dear["ratio"])
            return torch.tensor(dear["psnr"]) * (1 - weight) + torch.tensor(cheap["psnr"]) * weight
    return torch.tensor(uniform[-1]["psnr"])


def figure(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    sheet, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for axis, title in zip(axes, SETTINGS, strict=True):
        for recipe, colour in zip(RECIPES, ("tab:blue", "tab:orange"), strict=True):
            mine = [r for r in found if r["setting"] == title and r["recipe"] == recipe]
            for start, style, label in (
                ("uniform", "s-", f"{recipe[:2]}, uniform widths"),
                ("rule", "^", f"{recipe[:2]}, the paper's rule"),
                ("budget as", "o", f"{recipe[:2]}, budgeted at the rule's cost"),
            ):
                points = sorted((r["ratio"], sum(r["psnr"]) / SAMPLES) for r in mine if r["name"].startswith(start))
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5, alpha=0.8)
            free = sorted((r["ratio"], sum(r["psnr"]) / SAMPLES) for r in mine if r["name"].endswith("too"))
            if free:
                axis.plot(*zip(*free, strict=True), "o-", color="tab:green", label="budgeted, weights by layer too")
        axis.set_title(title)
        axis.set_xlabel("times fewer bit operations than FP32")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("PSNR to full precision, dB")
    axes[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if not args.table and args.figure is None:
        measure_all(args.out)
    if args.table:
        print("\n".join(table(rows(args.out))))
    if args.figure is not None:
        figure(rows(args.out), args.figure)


if __name__ == "__main__":
    main()
