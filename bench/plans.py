"""The paper's two settings with bits by step, on fashion-ldm: what a plan costs in quality, over many samples.

    python bench/plans.py --out DIR --setting a      # 20 steps, eta 0, guidance 3
    python bench/plans.py --out DIR --setting b      # 250 steps, eta 1, guidance 1.5; hours
    python bench/plans.py --out DIR --table

Rows, all from the same seeds: full precision; the plan for 19.9 times fewer bit operations (activations of 4 to 8 bits by
step and group of layers, weights of 4 to 8 bits by layer), plain and with auto; and 4-bit weights with activations of 4
or 8 bits by the paper's rule, with the paper's ablation. Distances are in the features of the classifier that ships with
ptqd, to the test images; intervals, also of the ratio to full precision, are the jackknife's over samples, left out of
both together. The same command resumes; --rows names some, so that processes can share them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ptqd
from ptqd.cost import run_cost
from ptqd.evaluate.features import Reference, extract
from ptqd.evaluate.metrics import Metric, frechet_distance, jackknife_metric, mean_metric, psnr
from ptqd.evaluate.moments import Moments
from ptqd.experiment import MEASURED, load_images, sample_images
from ptqd.files import read_json, write_json
from ptqd.noise import NoiseStats
from ptqd.plan import StepPlan
from ptqd.planning.paper import paper_rule
from ptqd.planning.solver import plan_steps
from ptqd.sampling import Sampling
from ptqd.stages import RunFolder
from ptqd.zoo import CLASSIFIER, REFERENCE
from ptqd.zoo.classifier import FashionClassifier

CALL = {"class_labels": list(range(10))}
SETTINGS = {
    "a": Sampling(20, 0.0, 5000, 100, 0, {**CALL, "guidance_scale": 3.0}),
    "b": Sampling(250, 1.0, 5000, 100, 0, {**CALL, "guidance_scale": 1.5}),
}
BUDGET = 19.9
WEIGHTS = (4, 5, 6, 7, 8)
PLANS = {"budget": "w8a4+5+6+7+8", "paper": "w4a4+8"}
ROWS = {
    "full precision": ("", ()),
    "19.9x plan": ("budget", ()),
    "19.9x plan, auto": ("budget", ("auto",)),
    "w4, a4/a8": ("paper", ()),
    "w4, a4/a8, cnc": ("paper", ("cnc",)),
    "w4, a4/a8, cnc+bc": ("paper", ("cnc", "bc")),
    "w4, a4/a8, cnc+bc+vsc": ("paper", ("cnc", "bc", "vsc")),
    "w4, a4/a8, auto": ("paper", ("auto",)),
}


class Setting:
    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.run, self.folder = name, SETTINGS[name], RunFolder(folder / name)
        self.pipe = ptqd.load("fashion-ldm")

    def planned(self, kind: str) -> Any:
        """The pipeline with its plan; the plan is made once."""
        run = self.run.replace(samples=MEASURED, batch=64)

        def build(path: Path, scratch: Path) -> None:
            quantized = ptqd.quantize(self.pipe, PLANS[kind], run)
            stats = ptqd.measure_widths(self.pipe, quantized, run)
            if kind == "budget":
                plan = plan_steps(self.pipe, quantized, run, stats, budget=BUDGET, weight_bits=WEIGHTS)
            else:
                plan = paper_rule(stats)
            ptqd.apply_plan(quantized, plan, self.pipe).save_pretrained(path)

        return ptqd.load(self.folder.stage(f"{kind}/planned", {"kind": kind}, build))

    def stats(self, kind: str, planned: Any) -> NoiseStats:
        run = self.run.replace(samples=MEASURED, batch=64)

        def build(path: Path, scratch: Path) -> None:
            ptqd.measure(self.pipe, planned, run).save(path)

        return NoiseStats.load(self.folder.stage(f"{kind}/noise.safetensors", {"kind": kind}, build))

    def corrected(self, kind: str, methods: tuple[str, ...]) -> Any:
        planned = self.planned(kind)
        if not methods:
            return planned
        stats = self.stats(kind, planned)
        if methods != ("auto",):
            return ptqd.correct(planned, stats, methods)

        def build(path: Path, scratch: Path) -> None:
            choice = ptqd.fit_auto(planned, stats, self.run.replace(samples=MEASURED, batch=64))
            write_json(path, choice.to_dict())

        chosen = read_json(self.folder.stage(f"{kind}/auto.json", {"kind": kind}, build))
        return ptqd.correct(planned, ptqd.Choice.from_dict(chosen).correction)

    def images(self, row: str, samples: int) -> torch.Tensor:
        kind, methods = ROWS[row]
        run = self.run.replace(samples=samples)

        def build(path: Path, scratch: Path) -> None:
            pipe = self.corrected(kind, methods) if kind else self.pipe
            sample_images(pipe, run, path, scratch, title=f"{self.name}: {row}")

        name = f"{row.replace('/', '').replace(', ', '-').replace(' ', '-')}/samples.safetensors"
        return load_images(self.folder.stage(name, {"row": row, "samples": samples}, build))


class Distances:
    """Frechet distances of one row and of full precision to the test images, with their ratio."""

    def __init__(self, judge: FashionClassifier, images: torch.Tensor, full: torch.Tensor) -> None:
        reference = Reference.load(REFERENCE)
        mine, theirs = extract(judge, images), extract(judge, full)
        to = {
            "frechet": (mine.pooled, theirs.pooled, reference.mean, reference.covariance),
            "spatial": (mine.spatial, theirs.spatial, reference.spatial_mean, reference.spatial_covariance),
        }
        self.metrics: dict[str, Metric] = {}
        for name, (a, b, mean, covariance) in to.items():
            whole, whole_full = Moments.of(a), Moments.of(b)
            pairs: list[tuple[float, float]] = []

            def statistic(
                left_out: torch.Tensor | None,
                a: torch.Tensor = a,
                b: torch.Tensor = b,
                whole: Moments = whole,
                whole_full: Moments = whole_full,
                mean: torch.Tensor = mean.double(),
                covariance: torch.Tensor = covariance.double(),
                pairs: list[tuple[float, float]] = pairs,
            ) -> float:
                x, y = whole, whole_full
                if left_out is not None:
                    x, y = x - Moments.of(a[left_out]), y - Moments.of(b[left_out])
                pair = tuple(frechet_distance(m.mean, m.covariance, mean, covariance) for m in (x, y))
                pairs.append((pair[0], pair[1]))
                return 100 * (pair[0] / pair[1] - 1)

            self.metrics[f"{name} above"] = jackknife_metric(len(a), statistic)
            values = iter([mine for mine, _ in pairs])
            self.metrics[name] = jackknife_metric(len(a), lambda left_out, values=values: next(values))
        x, y = Moments.of(mine.pooled), Moments.of(theirs.pooled)
        self.to_full = frechet_distance(x.mean, x.covariance, y.mean, y.covariance)
        self.psnr = mean_metric(psnr(images / 255, full / 255))


def table(folder: Path) -> Iterator[str]:
    judge = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    yield f"fashion-ldm, statistics of {MEASURED}, torch {torch.__version__}; 95 % intervals; '% above' is to full precision"
    for name in SETTINGS:
        setting, run = Setting(name, folder), SETTINGS[name]
        yield f"\n{run.steps} steps, eta {run.eta:g}, guidance {run.call['guidance_scale']:g}"
        full = load_images(folder / name / "full-precision" / "samples.safetensors")
        ratios = {kind: run_cost(setting.planned(kind), run).ratio for kind in PLANS}
        for kind in PLANS:
            plan = StepPlan.from_dict(setting.planned(kind).unet.hf_quantizer.quantization_config.plan)
            mean = sum(sum(row) / len(row) for row in plan.bits) / plan.steps
            made = {k: v for k, v in plan.made.items() if k != "widths"}
            yield f"  plan {kind}: {PLANS[kind]}, {ratios[kind]:.2f}x; mean bits over steps and groups {mean:.2f}; {made}"
        for row, (kind, _) in ROWS.items():
            path = folder / name / row.replace("/", "").replace(", ", "-").replace(" ", "-") / "samples.safetensors"
            if not path.exists():
                continue
            images = load_images(path)
            found = Distances(judge, images, full[: len(images)])
            cells = "".join(
                f"  {metric:8s} {m.value:6.3f} ± {(m.high - m.low) / 2:.3f} ({a.value:+6.2f} ± {(a.high - a.low) / 2:.2f} % above)"
                for metric in ("frechet", "spatial")
                for m, a in [(found.metrics[metric], found.metrics[f"{metric} above"])]
            )
            quality = f"  to FP {found.to_full:.4f}  PSNR {found.psnr.value:5.2f} ± {(found.psnr.high - found.psnr.low) / 2:.2f}"
            ratio = ratios[kind] if kind else 1.0
            yield f"  {row:24s} {len(images):5d} samples  {ratio:5.2f}x{cells}{quality if kind else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        for line in table(args.out):
            print(line, flush=True)
        return
    setting = Setting(args.setting, args.out)
    for row in args.rows:
        setting.images(row, args.samples)


if __name__ == "__main__":
    main()
