"""The main job: quantize, measure, correct, sample, evaluate, for some recipes and settings, in one run folder."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.correction.fit import METHODS
from ptqd.correction.scheduler import correct
from ptqd.correction.search import Choice, fit_auto
from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.macs import FULL_BITS, Macs, run_macs
from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.diffusion.sampling import Sampling, guidance_of
from ptqd.errors import InputError
from ptqd.experiments.plan_request import (
    PlanRequest,
    load_widths,
    make_plan,
    plan_facts,
    trajectory_images,
)
from ptqd.experiments.sharding import (
    few_samples,
    judged,
    labels_of,
    measure_shards,
    measure_width_shards,
    observe_images,
    sample_images,
)
from ptqd.files import read_json, write_json, write_tensors
from ptqd.loading import load
from ptqd.metrics.evaluator import Judge, with_intervals
from ptqd.metrics.images import open_images
from ptqd.mixed_precision.problem import planning_problem
from ptqd.noise.regression import Estimate
from ptqd.noise.stats import NoiseStats
from ptqd.progress import busy
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.bops import cost_of, disk_bytes
from ptqd.quantization.quantize import quantize
from ptqd.quantization.recipe import Recipe
from ptqd.run_folder import RunFolder

AUTO = ("auto",)
DEFAULT: tuple[tuple[str, ...], ...] = ((), AUTO)
ABLATION: tuple[tuple[str, ...], ...] = ((), ("cnc",), ("cnc", "bc"), ("cnc", "bc", "vsc"), AUTO)
MEASURED = 64  # samples on the plateau of bench/samples.txt
PACKAGES = ("ptqd", "torch", "diffusers", "accelerate", "safetensors", "scipy", "numpy")


@dataclass(frozen=True)
class Experiment:
    """What is run.

    Attributes:
        model: its name in the report.
        settings: how it samples; each is sampled in full precision once.
        recipes: by the names that their rows have.
        measured: samples the statistics are taken on; their seeds are not those of the images.
        corrections: rows for each recipe: methods as :func:`ptqd.fit_correction` takes them, or ``("auto",)``.
        plan: bits by step, for recipes of several widths.
        images: whether images are kept; else what the judge sees of them as they come, but for the first few, and there
            are no distances that need images of the same seeds.
    """

    model: str
    settings: tuple[Sampling, ...]
    recipes: Mapping[str, Recipe]
    measured: int = MEASURED
    corrections: tuple[tuple[str, ...], ...] = DEFAULT
    plan: PlanRequest | None = None
    images: bool = True


def named_recipes(texts: Sequence[str]) -> dict[str, Recipe]:
    """Recipes from shorthand or TOML files, by what they are called.

    Raises:
        InputError: two of one name, or a recipe that cannot be read.
    """
    found: dict[str, Recipe] = {}
    for text in texts:
        name = Path(text).stem
        if name in ("full-precision", "fp32", *found):
            raise InputError(f"two recipes are called {name!r}; give their files names of their own")
        found[name] = Recipe.parse(text)
    return found


def run_experiment(
    pipe: DiffusionPipeline, experiment: Experiment, folder: Path, judge: Judge | None, *, progress: bool = True
) -> dict[str, Any]:
    """Run all of it into ``folder``; what is there already, from the same inputs, is kept.

    Several processes (:mod:`ptqd.processes`) share measuring and sampling, with the same results as one; ``folder``
    has to be one that all of them see.

    Returns:
        The report, as also written to ``folder/report.json``: rows, per-step statistics, stages' seconds, versions.
    """
    judge = judge or Judge()
    if not experiment.images and judge.extractor is None:
        raise InputError("without images something has to look at them as they come; give a judge with an extractor")
    for methods in experiment.corrections:
        check_methods(methods)
    run_folder = RunFolder(folder)
    report: dict[str, Any] = {
        "rows": [],
        "steps": [],
        "choices": [],
        "plans": [],
        "stages": {},
        "judge": judge.name or None,
        "notes": [],
        "versions": {name: version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    for setting in experiment.settings:
        for _ in _Setting(pipe, experiment, setting, run_folder, judge, progress, report).rows():
            if processes.is_main():
                write_json(folder / "report.json", report)  # a long run can be read before its end
    return report


def pipeline_of(folder: Path, row: Mapping[str, Any]) -> DiffusionPipeline:
    """The pipeline that a run folder's row was sampled with, its correction included.

    Args:
        folder: that :func:`run_experiment` wrote.
        row: of its report.

    Raises:
        InputError: what the run kept of it is gone.
    """
    if row["recipe"] == "fp32":
        return load(row["model"])
    prefix = folder / setting_name(row["setting"]) / row["recipe"].replace(" ", "-")
    kept = [prefix / name for name in ("planned", "quantized") if (prefix / name).is_dir()]
    if not kept:
        raise InputError(f"{prefix} holds no quantized pipeline; run it again with 'ptqd run'")
    pipe, methods = load(kept[0]), tuple(filter(None, row["correction"].removeprefix("none").split("+")))
    if methods == AUTO:
        return correct(pipe, Choice.from_dict(read_json(prefix / "auto.json")).correction)
    return correct(pipe, NoiseStats.load(prefix / "noise.safetensors"), methods) if methods else pipe


def check_methods(methods: Sequence[str]) -> None:
    """Corrections are known ones.

    Raises:
        InputError: one that is not, or auto beside others.
    """
    for method in methods:
        if method not in METHODS and tuple(methods) != AUTO:
            raise InputError(f"unknown correction {method!r}; known are auto, alone, and {', '.join(METHODS)}")


def setting_name(facts: Mapping[str, Any]) -> str:
    """A short name that is also a folder's: scheduler, steps, eta and guidance."""
    guidance = "" if facts["guidance"] is None else f"-g{facts['guidance']:g}"
    return f"{facts['scheduler'].removesuffix('Scheduler').lower()}{facts['steps']}-eta{facts['eta']:g}{guidance}"


def correction_name(methods: Sequence[str]) -> str:
    """``"none"``, ``"cnc"``, ``"cnc+bc"`` ..."""
    return "+".join(methods) or "none"


class _Setting:
    """One setting's rows: full precision, then every recipe with every correction."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        experiment: Experiment,
        setting: Sampling,
        folder: RunFolder,
        judge: Judge,
        progress: bool,
        report: dict[str, Any],
    ) -> None:
        self.pipe, self.experiment, self.setting, self.folder = pipe, experiment, setting, folder
        self.judge, self.progress, self.report = judge, progress, report
        self.device = pipe.device
        self.source = {
            "pipeline": pipeline_fingerprint(pipe),
            "ptqd": version("ptqd"),
        }
        self.facts = {
            "steps": setting.steps,
            "eta": setting.eta,
            "guidance": guidance_of(pipe, setting),
            "scheduler": type(pipe.scheduler).__name__,
        }
        self.name = setting_name(self.facts)
        self.macs: Macs = run_macs(pipe, setting)
        self.full_bops = self.macs.total * FULL_BITS**2

    def rows(self) -> Iterator[None]:
        """Add row after row to the report."""
        rows: list[dict[str, Any]] = self.report["rows"]
        for recipe in self.experiment.recipes.values():
            if self.experiment.plan is not None:
                self.experiment.plan.check(recipe, len(self.macs.counts))
        reference = self._sample("full-precision", self.pipe, {})
        rows.append(self._row("fp32", "none", reference, None, self.full_bops, self._bytes(self.pipe)))
        yield
        for label, recipe in self.experiment.recipes.items():
            prefix = f"{self.name}/{label}"
            quantized = self._quantized(prefix, recipe)
            if self.experiment.plan is not None:
                label = f"{label} {self.experiment.plan.name}"  # noqa: PLW2901
                quantized = self._planned(prefix, label, quantized, self.experiment.plan)
                prefix = f"{self.name}/{label.replace(' ', '-')}"
            fingerprint = pipeline_fingerprint(quantized)
            stats = self._measured(prefix, quantized, fingerprint)
            self.report["steps"].extend(self._step_rows(label, stats))
            bops = cost_of(getattr(quantized, denoiser_name(quantized)), self.macs).total
            images, before = reference, None
            for methods in self.experiment.corrections:
                if before is None or methods != (*before, "vsc") or stats.response.draws:
                    inputs: dict[str, Any] = {"recipe": recipe.to_dict(), "methods": methods}
                    inputs["quantized"] = fingerprint
                    corrected = quantized
                    if methods == AUTO:
                        corrected = correct(quantized, self._chosen(prefix, label, quantized, stats).correction)
                        inputs["auto"] = self.folder.key(f"{prefix}/auto.json")
                    elif methods:
                        corrected = correct(quantized, stats, methods)
                        inputs["noise"] = self.folder.key(f"{prefix}/noise.safetensors")
                    images = self._sample(f"{label.replace(' ', '-')}/{correction_name(methods)}", corrected, inputs)
                before = methods
                size = self._bytes(quantized)
                rows.append(self._row(label, correction_name(methods), images, reference, bops, size))
                yield

    def _quantized(self, prefix: str, recipe: Recipe) -> DiffusionPipeline:
        inputs = {**self.source, "recipe": recipe.to_dict(), "setting": self._run_facts(samples=0)}

        def build(path: Path, scratch: Path) -> None:
            made = quantize(self.pipe, recipe, self.setting, scratch=scratch, progress=self.progress)
            made.save_pretrained(path)

        path = self._stage(f"{prefix}/quantized", inputs, build)
        return load(path).to(self.device)

    def _measured(self, prefix: str, quantized: DiffusionPipeline, fingerprint: str) -> NoiseStats:
        run = self.setting.replace(samples=self.experiment.measured)
        inputs = {**self.source, "setting": run.to_dict(), "quantized": fingerprint}

        def build(path: Path, scratch: Path) -> None:
            measure_shards(
                self.pipe, quantized, run, path, scratch, title=f"measuring {prefix}" if self.progress else None
            )

        return NoiseStats.load(self._stage(f"{prefix}/noise.safetensors", inputs, build, shared=True))

    def _planned(self, prefix: str, label: str, quantized: DiffusionPipeline, plan: PlanRequest) -> DiffusionPipeline:
        run = self.setting.replace(samples=self.experiment.measured)
        inputs = {**self.source, "setting": run.to_dict(), "quantized": pipeline_fingerprint(quantized)}

        def measure_all(path: Path, scratch: Path) -> None:
            title = f"measuring widths of {prefix}" if self.progress else None
            measure_width_shards(self.pipe, quantized, run, path, scratch, title=title)

        stats = load_widths(self._stage(f"{prefix}/widths", inputs, measure_all, shared=True))
        inputs = {**inputs, "plan": plan.facts()}
        name = f"{self.name}/{label.replace(' ', '-')}"

        def build(path: Path, scratch: Path) -> None:
            chosen, problem = make_plan(self.pipe, quantized, run, plan, stats, progress=self.progress)
            planned = apply_plan(quantized, chosen, self.pipe)
            planned.save_pretrained(path)
            chosen.save(path / "plan.toml")
            problem = problem or planning_problem(self.pipe, quantized, run, stats, progress=self.progress)
            write_json(path / "plan.json", plan_facts(planned, problem, stats, self.macs))

        def picture(path: Path, scratch: Path) -> None:
            images = trajectory_images(self.pipe, run)
            write_tensors(path, {} if images is None else {"images": images}, {"ptqd.samples": "steps"})

        folder = self._stage(f"{name}/planned", inputs, build)
        pictures = self._stage(f"{self.name}/steps.safetensors", {**self.source, "setting": run.to_dict()}, picture)
        facts = read_json(folder / "plan.json")
        self.report["plans"].append(
            {"setting": self.facts, "recipe": label, "pictures": str(pictures.relative_to(self.folder.folder)), **facts}
        )
        return load(folder).to(self.device)

    def _chosen(self, prefix: str, label: str, quantized: DiffusionPipeline, stats: NoiseStats) -> Choice:
        inputs = {"noise": self.folder.key(f"{prefix}/noise.safetensors"), "checked": stats.final_indices.tolist()}

        def build(path: Path, scratch: Path) -> None:
            with busy(f"choosing a correction for {prefix}" if self.progress else None):
                write_json(path, fit_auto(quantized, stats, self.setting).to_dict())

        choice = Choice.from_dict(read_json(self._stage(f"{prefix}/auto.json", inputs, build)))
        facts = {name: value for name, value in choice.to_dict().items() if name != "correction"}
        self.report["choices"].append({"setting": self.facts, "recipe": label, "taken": choice.name, **facts})
        return choice

    def _sample(self, what: str, pipe: DiffusionPipeline, inputs: Mapping[str, Any]) -> Path:
        """Samples; where no images are kept, what the judge saw of them."""
        run, keep = self.setting, self.experiment.images
        name = f"{self.name}/{what}/samples.safetensors"

        def build(path: Path, scratch: Path) -> None:
            title = f"sampling {self.name} {what}" if self.progress else None
            sample_images(pipe, run, path, scratch, title=title, judge=None if keep else self.judge, keep=keep)

        facts = {**self.source, **inputs, "setting": self._run_facts(run.samples)}
        if not keep:
            facts["networks"] = self.judge.networks_key
        return self._stage(name, facts, build, shared=True)

    def _observed(self, samples: Path, full: Path | None) -> Path:
        """What the judge sees of samples, and of their distance to full-precision images of the same seeds."""
        if not self.experiment.images:
            return samples
        inputs = {"images": self._key(samples), "networks": self.judge.networks_key}
        inputs |= {} if full is None else {"full": self._key(full)}
        path = samples.with_name("observed.safetensors")

        def build(path: Path, scratch: Path) -> None:
            images = open_images(samples, grey=False)
            same_seed = None if full is None else open_images(full, grey=False)
            title = f"looking at {self._name(samples)}" if self.progress else None
            observe_images(images, self.judge, self.setting, path, scratch, title=title, same_seed=same_seed)

        return self._stage(self._name(path), inputs, build, shared=True)

    def _row(
        self, recipe: str, correction: str, images: Path, reference: Path | None, bops: int, size: int
    ) -> dict[str, Any]:
        observed = self._observed(images, reference)
        full = None if reference is None else (self._observed(reference, None), reference)
        inputs: dict[str, Any] = {"observed": self._key(observed), "judge": self.judge.key}
        if full is not None:
            inputs["full"] = [self._key(path) for path in full]

        def build(path: Path, scratch: Path) -> None:
            labels = labels_of(self.setting, self.setting.samples)
            with busy(f"evaluating {self._name(images.parent)}" if self.progress else None):
                found = with_intervals(judged(observed, images, self.judge, labels, full), labels)
            write_json(path, {name: asdict(metric) for name, metric in found.items()})

        made = self._stage(self._name(images.with_name("metrics.json")), inputs, build)
        metrics = read_json(made)
        note = few_samples(self.setting.samples, self.judge)
        if note is not None and note not in self.report["notes"]:
            self.report["notes"].append(note)
        return {
            "model": self.experiment.model,
            "setting": self.facts,
            "recipe": recipe,
            "correction": correction,
            "samples": self.setting.samples,
            "metrics": metrics,
            "inception": self.judge.inception,
            "bops": bops,
            "bops_ratio": self.full_bops / bops,
            "bytes": size,
            "seconds": sum(self.folder.seconds(self._name(path)) for path in {images, observed, made}),
            "images": self._name(images),
            "observed": self._name(observed),
        }

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder.folder))

    def _key(self, path: Path) -> str:
        return self.folder.key(self._name(path))

    def _step_rows(self, recipe: str, stats: NoiseStats) -> list[dict[str, Any]]:
        fit, repeated = stats.fit(), stats.residual_correlation()
        names = ("k", "variance", "r2", "snr", "skewness", "kurtosis")
        return [
            {
                "setting": self.facts,
                "recipe": recipe,
                "samples": stats.samples,
                "step": i,
                "timestep": t,
                **{name: _at(getattr(fit, name), i) for name in names},
                "bias": [_at(fit.bias, (i, c)) for c in range(fit.bias.value.shape[1])],
                "normality_p": fit.normality[i].item(),
                "autocorrelation": dict.fromkeys(("value", "low", "high"), repeated[i, i - 1].item() if i else None),
            }
            for i, t in enumerate(stats.timesteps.tolist())
        ]

    def _stage(self, name: str, inputs: Mapping[str, Any], build: Any, *, shared: bool = False) -> Path:
        path = self.folder.stage(name, inputs, build, shared=shared)
        self.report["stages"][name] = self.folder.seconds(name)
        return path

    def _run_facts(self, samples: int) -> dict[str, Any]:
        return {**self.setting.to_dict(), "samples": samples}

    def _bytes(self, pipe: DiffusionPipeline) -> int:
        return disk_bytes(getattr(pipe, denoiser_name(pipe)))


def _at(estimate: Estimate, index: Any) -> dict[str, float]:
    return {name: getattr(estimate, name)[index].item() for name in ("value", "low", "high")}
