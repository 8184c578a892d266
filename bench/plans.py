"""The paper's two settings with bits by step, on fashion-ldm: what a plan costs in quality, over many samples.

    python bench/plans.py --out DIR --setting a      # 20 steps, eta 0, guidance 3
    python bench/plans.py --out DIR --setting b      # 250 steps, eta 1, guidance 1.5; hours
    python bench/plans.py --out DIR --setting b --engine openvino
    python bench/plans.py --out DIR --table

Rows, all from the same seeds: full precision; the plan for 19.9 times fewer bit operations (activations of 4 to 8 bits
by step and group of layers, weights of 4 to 8 bits by layer), plain and with auto; 4-bit weights with activations of 4
or 8 bits by the paper's rule, with the paper's ablation; and W8A8, rounded to nearest and -best, at all steps, at
fewer, the others held, and with the deep part of the network held at most of them, with auto. With --engine all
pipelines, full precision's too, sample in it, but for those that hold the deep part. Distances are in features of the
classifier that ships with ptqd, to the test images; intervals, also of the ratio to full precision, are the bootstrap's
over samples, drawn for both together. The same command resumes; --rows names some, so that processes can share them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

import ptqd
from ptqd.diffusion.sampling import Sampling
from ptqd.engines.export import export
from ptqd.experiments import MEASURED, load_images, sample_images
from ptqd.files import read_json, write_json
from ptqd.metrics import (
    FashionClassifier,
    Metric,
    Reference,
    Statistic,
    extract,
    frechet_statistic,
    mean_metric,
    paired_frechet_statistic,
    psnr,
)
from ptqd.mixed_precision.paper_rule import paper_plan
from ptqd.mixed_precision.solver import search_plan
from ptqd.noise.stats import NoiseStats
from ptqd.quantization import plan_of, run_cost
from ptqd.run_folder import RunFolder
from ptqd.zoo import CLASSIFIER, REFERENCE

CALL = {"class_labels": list(range(10))}
SETTINGS = {
    "a": Sampling(20, 0.0, 5000, 100, 0, {**CALL, "guidance_scale": 3.0}),
    "b": Sampling(250, 1.0, 5000, 100, 0, {**CALL, "guidance_scale": 1.5}),
}
WEIGHTS = (4, 5, 6, 7, 8)
HELD = (20, 25, 32, 40, 50, 60, 80, 100)
DEEP = (25, 32, 40, 50)
BEST_HELD = (20, 25, 32, 40)
PLANS: dict[str, tuple[str, float | None]] = {
    "budget": ("w8a4+5+6+7+8", 19.9),
    "paper": ("w4a4+8", None),
    "w8a8": ("w8a8", 1.0),
    **{f"held-{times}x": ("w8a8", float(times)) for times in HELD},
    "w8a8-best": ("w8a8-best", 1.0),
    **{f"deep-{times}x": ("w8a8-best", float(times)) for times in DEEP},
    **{f"best-held-{times}x": ("w8a8-best", float(times)) for times in BEST_HELD},
}
ROWS = {
    "full precision": ("", ()),
    "19.9x plan": ("budget", ()),
    "19.9x plan, auto": ("budget", ("auto",)),
    "w4, a4/a8": ("paper", ()),
    "w4, a4/a8, cnc": ("paper", ("cnc",)),
    "w4, a4/a8, cnc+bc": ("paper", ("cnc", "bc")),
    "w4, a4/a8, cnc+bc+vsc": ("paper", ("cnc", "bc", "vsc")),
    "w4, a4/a8, joint+vsc": ("paper", ("joint", "vsc")),
    "w4, a4/a8, auto": ("paper", ("auto",)),
    "w8a8, auto": ("w8a8", ("auto",)),
    **{f"w8a8, held, {times}x": (f"held-{times}x", ("auto",)) for times in HELD},
    "w8a8-best": ("w8a8-best", ()),
    "w8a8-best, auto": ("w8a8-best", ("auto",)),
    **{f"w8a8-best, deep held, {times}x": (f"deep-{times}x", ("auto",)) for times in DEEP},
    **{f"w8a8-best, held, {times}x": (f"best-held-{times}x", ("auto",)) for times in BEST_HELD},
}


def is_quantized(pipe: Any) -> bool:
    return "quantization_config" in pipe.unet.config


class Setting:
    def __init__(self, name: str, folder: Path, engine: str = "") -> None:
        self.name, self.run, self.folder, self.engine = name, SETTINGS[name], RunFolder(folder / name), engine
        self.pipe = ptqd.load("fashion-ldm")

    def inputs(self, **own: object) -> dict[str, object]:
        """What a file in the folder is made from."""
        return {**own, "engine": self.engine}

    def sampled(self, pipe: Any) -> Any:
        """A pipeline as it samples: in the engine, if there is one and it can."""
        if not self.engine or (is_quantized(pipe) and plan_of(pipe).shallow):
            return pipe
        one = self.run.replace(samples=self.run.batch)
        return export(pipe, one, self.engine, Path(mkdtemp())).pipeline

    def quantized(self, recipe: str) -> Any:
        """A recipe's pipeline, which several plans are of."""
        run = self.run.replace(samples=MEASURED, batch=64)

        def build(path: Path, scratch: Path) -> None:
            ptqd.quantize(self.pipe, recipe, run).save_pretrained(path)

        return ptqd.load(self.folder.stage(f"quantized/{recipe}", {"recipe": recipe}, build))

    def planned(self, kind: str) -> Any:
        """The pipeline with its plan; the plan is made once."""
        run, (recipe, budget) = self.run.replace(samples=MEASURED, batch=64), PLANS[kind]

        def build(path: Path, scratch: Path) -> None:
            quantized = self.quantized(recipe)
            if recipe.startswith("w8a8"):
                widths = {8: ptqd.measure(self.pipe, quantized, run)}
            else:
                widths = ptqd.measure_widths(self.pipe, quantized, run)
            if budget is None:
                plan = paper_plan(widths)
            elif recipe.startswith("w8a8"):
                timesteps = widths[8].measured_on.model_timesteps
                plan = ptqd.PrecisionPlan.uniform(timesteps, 8)
                if budget > 1:
                    deep = kind.startswith("deep")
                    plan = search_plan(self.pipe, quantized, run, widths, budget=budget, hold=not deep, hold_deep=deep)
            else:
                plan = search_plan(self.pipe, quantized, run, widths, budget=budget, weight_bits=WEIGHTS)
            ptqd.apply_plan(quantized, plan, self.pipe).save_pretrained(path)

        return self.sampled(ptqd.load(self.folder.stage(f"{kind}/planned", self.inputs(kind=kind), build)))

    def stats(self, kind: str, planned: Any) -> NoiseStats:
        run = self.run.replace(samples=MEASURED, batch=64)

        def build(path: Path, scratch: Path) -> None:
            ptqd.measure(self.pipe, planned, run).save(path)

        return NoiseStats.load(self.folder.stage(f"{kind}/noise.safetensors", self.inputs(kind=kind), build))

    def corrected(self, kind: str, methods: tuple[str, ...]) -> Any:
        planned = self.planned(kind)
        if not methods:
            return planned
        stats = self.stats(kind, planned)
        if methods != ("auto",):
            return ptqd.correct(planned, stats, methods)

        def build(path: Path, scratch: Path) -> None:
            choice = ptqd.search_correction(planned, stats, self.run.replace(samples=MEASURED, batch=64))
            write_json(path, choice.to_dict())

        chosen = read_json(self.folder.stage(f"{kind}/auto.json", self.inputs(kind=kind), build))
        return ptqd.correct(planned, ptqd.CorrectionSearch.from_dict(chosen).correction)

    def images(self, row: str, samples: int) -> torch.Tensor:
        kind, methods = ROWS[row]
        run = self.run.replace(samples=samples)

        def build(path: Path, scratch: Path) -> None:
            pipe = self.corrected(kind, methods) if kind else self.sampled(self.pipe)
            sample_images(pipe, run, path, scratch, title=f"{self.name}: {row}")

        return load_images(self.folder.stage(file_name(row), self.inputs(row=row, samples=samples), build))


def above(features: torch.Tensor, full: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> list[Metric]:
    """Frechet distance of features (N, D) to a reference, and by how many percent it is above full precision's."""
    mine, theirs = (frechet_statistic(x, mean, covariance) for x in (features, full))
    share = mine.above(theirs)
    classes = torch.arange(len(features)) % 10  # they take turns
    return [
        mine.interval(classes),
        Statistic(100 * share.value, 100 * share.influence).interval(classes),
    ]


def plus_minus(metric: Metric, digits: int) -> str:
    return f"{metric.value:.{digits}f} ± {(metric.high - metric.low) / 2:.{digits}f}"


def file_name(row: str) -> str:
    return f"{row.replace('/', '').replace(', ', '-').replace(' ', '-')}/samples.safetensors"


def table(folder: Path) -> Iterator[str]:
    judge, reference = FashionClassifier.from_pretrained(CLASSIFIER).float().eval(), Reference.load(REFERENCE)
    yield f"fashion-ldm, statistics of {MEASURED}, torch {torch.__version__}; 95 % intervals"
    yield "Frechet and spatial Frechet distance (sFID's construction) to the test images, and above full precision"
    for name, run in SETTINGS.items():
        if not (folder / name).exists():
            continue
        setting = Setting(name, folder)
        yield f"\n{run.steps} steps, eta {run.eta:g}, guidance {run.call['guidance_scale']:g}"
        ratios = {"": 1.0}
        for kind, (recipe, _) in PLANS.items():
            if not (folder / name / kind / "planned").exists():
                continue
            planned = setting.planned(kind)
            plan, ratios[kind] = plan_of(planned), run_cost(planned, run).ratio
            made = ", ".join(f"{k} {v}" for k, v in plan.made.items())
            shallow = f", {len(plan.shallow)} of them the outer blocks alone" if plan.shallow else ""
            mean, calls = sum(sum(row) / len(row) for row in plan.bits) / plan.steps, plan.held.count(False)
            fewer = any(plan.held) or plan.shallow
            what = f"{calls} steps computed{shallow}" if fewer else f"{mean:.2f} bits over steps and groups"
            yield f"  plan '{kind}' of {recipe}: {ratios[kind]:.2f}x, {what}; {made}"
        full = load_images(folder / name / file_name("full precision"))
        for row, (kind, _) in ROWS.items():
            if not (folder / name / file_name(row)).exists():
                continue
            images = load_images(folder / name / file_name(row))
            same = full[: len(images)]
            mine, theirs = extract(judge, images), extract(judge, same)
            pooled = above(mine.pooled, theirs.pooled, reference.mean, reference.covariance)
            spatial = above(mine.spatial, theirs.spatial, reference.spatial_mean, reference.spatial_covariance)
            line = f"  {row:22s} {len(images):5d} samples {ratios[kind]:6.2f}x"
            for label, (value, relative) in (("Frechet", pooled), ("spatial", spatial)):
                line += f"  {label} {plus_minus(value, 3)}"
                line += f" ({plus_minus(relative, 2)} %)" if kind else ""
            if kind:
                line += f"  to FP {paired_frechet_statistic(mine.pooled, theirs.pooled).value:.4f}"
                line += f"  PSNR {plus_minus(mean_metric(psnr(images / 255, same / 255)), 2)}"
            yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--engine", default="", choices=("", "openvino", "onnxruntime"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        for line in table(args.out):
            print(line, flush=True)
        return
    setting = Setting(args.setting, args.out, args.engine)
    for row in args.rows:
        setting.images(row, args.samples)


if __name__ == "__main__":
    main()
