"""The stages of a run for one way of sampling: each returns its value, and reads a file only where it was skipped."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.correction.scheduler import apply_correction
from ptqd.correction.search import CorrectionSearch, fit_along_runs, search_correction
from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.macs import FULL_BITS, Macs, run_macs
from ptqd.diffusion.offload import execution_device
from ptqd.diffusion.pipeline_parts import denoiser_of, scheduler_of
from ptqd.diffusion.sampling import Sampling, guidance_of
from ptqd.diffusion.trajectory import final_samples
from ptqd.errors import InputError
from ptqd.experiments.layout import RunLayout
from ptqd.experiments.plan_request import (
    PlanRequest,
    load_widths,
    make_plan,
    plan_figures,
    trajectory_images,
)
from ptqd.experiments.results import (
    FULL_PRECISION,
    Interval,
    PlanFigures,
    PlanOutcome,
    Row,
    RowKey,
    SamplerSettings,
    StepRow,
)
from ptqd.experiments.sharding import (
    judged,
    labels_of,
    measure_shards,
    measure_width_shards,
    observe_images,
    sample_images,
)
from ptqd.files import write_json, write_tensors
from ptqd.loading import load, place
from ptqd.metrics.evaluator import Evaluator, with_intervals
from ptqd.metrics.images import open_images
from ptqd.mixed_precision.problem import check_can_hold, planning_problem
from ptqd.noise.regression import Estimate
from ptqd.noise.stats import NoiseStats
from ptqd.progress import busy
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.bops import cost_of, disk_bytes
from ptqd.quantization.quantize import quantize
from ptqd.quantization.recipe import Recipe
from ptqd.run_folder import RunFolder, whole_file
from ptqd.schema import read_as

logger = logging.getLogger(__name__)

REACHED = 32  # samples that a plan is held to its expectation by
NEAREST = 0.9  # of them; the others may have gone astray
T = TypeVar("T")


def settings_of(pipe: DiffusionPipeline, sampling: Sampling) -> SamplerSettings:
    """How rows of a pipeline are sampled, as tables say it."""
    scheduler = type(scheduler_of(pipe)).__name__
    return SamplerSettings(scheduler, sampling.steps, sampling.eta, guidance_of(pipe, sampling))


class Stages:
    """What is made in a run folder for one way of sampling.

    Args:
        pipe: full precision.
        sampling: how it samples.
        folder: where results are kept.
        judge: what images are judged by.
        keep_images: whether images are kept, and not only what the judge sees of them.
        progress: show bars.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        sampling: Sampling,
        folder: RunFolder,
        judge: Evaluator,
        *,
        keep_images: bool,
        progress: bool,
    ) -> None:
        self.pipe, self.sampling, self.folder, self.judge = pipe, sampling, folder, judge
        self.keep_images, self.progress = keep_images, progress
        self.made_from = {"pipeline": pipeline_fingerprint(pipe), "ptqd": version("ptqd")}
        self.settings = settings_of(pipe, sampling)
        self.layout = RunLayout(self.settings)
        self.macs: Macs = run_macs(pipe, sampling)
        self.seconds: dict[str, float] = {}

    def quantized(self, key: RowKey, recipe: Recipe) -> DiffusionPipeline:
        """The pipeline of a recipe."""
        inputs = {**self.made_from, "recipe": recipe.to_dict(), "setting": self._sampling_facts(samples=0)}

        def build(path: Path, scratch: Path) -> DiffusionPipeline | None:
            pipe = quantize(self.pipe, recipe, self.sampling, scratch=scratch, progress=self.progress)
            if not processes.is_main():
                return None
            pipe.save_pretrained(path)
            return pipe

        return self._value(self.layout.quantized(key), inputs, build, self._load_pipeline, shared=True)

    def planned(
        self, key: RowKey, quantized: DiffusionPipeline, request: PlanRequest, samples: int
    ) -> tuple[DiffusionPipeline, PlanFigures, str]:
        """A pipeline whose bits follow a plan, what the plan was chosen among, and where its sample's steps are."""
        if request.hold or request.hold_deep:
            check_can_hold(quantized, deep=request.hold_deep)
        run = self.sampling.replace(samples=samples)
        inputs = {**self.made_from, "setting": run.to_dict(), "quantized": pipeline_fingerprint(quantized)}

        def measure_all(path: Path, scratch: Path) -> None:
            title = self._title(f"measuring widths of {self.layout.root}/{key.recipe}")
            measure_width_shards(self.pipe, quantized, run, path, scratch, title=title)

        stats = self._value(self.layout.widths(key), inputs, measure_all, load_widths, shared=True)

        def build(path: Path, scratch: Path) -> tuple[DiffusionPipeline, PlanFigures] | None:
            plan, problem = make_plan(self.pipe, quantized, run, request, stats, progress=self.progress)
            planned = apply_plan(quantized, plan, self.pipe)
            problem = problem or planning_problem(
                self.pipe,
                quantized,
                run,
                stats,
                hold=request.holds,
                hold_deep=request.holds_deep,
                progress=self.progress,
            )
            if not processes.is_main():
                return None
            figures = plan_figures(planned, problem, stats, self.macs)
            planned.save_pretrained(path)
            plan.save(path / "plan.toml")
            write_json(path / "plan.json", figures.to_dict())
            return planned, figures

        def read(path: Path) -> tuple[DiffusionPipeline, PlanFigures]:
            return self._load_pipeline(path), PlanFigures.load(path / "plan.json")

        def picture(path: Path, scratch: Path) -> None:
            images = trajectory_images(self.pipe, run)
            write_tensors(path, {} if images is None else {"images": images}, {"ptqd.samples": "steps"})

        facts = {**inputs, "plan": request.to_dict()}
        pipe, figures = self._value(self.layout.planned(key), facts, build, read, shared=True)
        pictures = self.layout.trajectory()
        self._value(pictures, {**self.made_from, "setting": run.to_dict()}, picture, whole_file)
        return pipe, figures, pictures

    def noise(self, key: RowKey, quantized: DiffusionPipeline, fingerprint: str, samples: int) -> NoiseStats:
        """Statistics of a quantized pipeline."""
        run = self.sampling.replace(samples=samples)
        inputs = {**self.made_from, "setting": run.to_dict(), "quantized": fingerprint}

        def build(path: Path, scratch: Path) -> NoiseStats | None:
            title = self._title(f"measuring {self.layout.root}/{key.quantized}")
            return measure_shards(self.pipe, quantized, run, path, scratch, title=title)

        return self._value(self.layout.noise(key), inputs, build, NoiseStats.load, shared=True)

    def reached(self, key: RowKey, quantized: DiffusionPipeline, stats: NoiseStats) -> PlanOutcome | None:
        """What a plan's expectation is of, on measured seeds: final samples that CNC and BC correct.

        None where they cannot be followed, or noise undoes the output.
        """
        if not len(stats.finals):
            return None
        indices = stats.final_indices[:REACHED]
        inputs = {"noise": self.folder.key(self.layout.noise(key)), "checked": indices.tolist()}

        def build(path: Path, scratch: Path) -> PlanOutcome:
            try:
                corrected = apply_correction(quantized, stats, ("cnc", "bc"))
            except InputError as error:
                logger.info("what the plan's expectation comes to is not known: %s", error)
                outcome = PlanOutcome(0, Interval(None, None, None), None)
            else:
                with busy(self._title(f"holding the plan of {self.layout.root}/{key.quantized} to its expectation")):
                    run = self.sampling.with_seed_for("measuring")
                    parts = indices.split(self.sampling.batch)
                    ends = [final_samples(corrected, run, part.tolist()) for part in parts]
                off = (torch.cat(ends).cpu().double() - stats.finals[: len(indices)]).square().flatten(1).mean(1)
                outcome = plan_outcome(float(stats.finals.double().var()), off)
            write_json(path, asdict(outcome))
            return outcome

        return self._value(self.layout.reached(key), inputs, build, lambda path: read_as(path, PlanOutcome))

    def search(
        self, key: RowKey, quantized: DiffusionPipeline, stats: NoiseStats, methods: Sequence[str]
    ) -> tuple[CorrectionSearch, str]:
        """A correction that runs give: ``auto``'s, or that of named methods; and the key of its file."""
        name = self.layout.search(key, methods)
        inputs = {"noise": self.folder.key(self.layout.noise(key)), "checked": stats.final_indices.tolist()}

        def build(path: Path, scratch: Path) -> CorrectionSearch | None:
            with busy(self._title(f"choosing a correction for {self.layout.root}/{key.quantized}")):
                if tuple(methods) == ("auto",):
                    choice = search_correction(quantized, stats, self.sampling)
                else:
                    choice = fit_along_runs(quantized, stats, self.sampling, methods)
            if not processes.is_main():
                return None
            write_json(path, choice.to_dict())
            return choice

        return self._value(name, inputs, build, CorrectionSearch.load, shared=True), self.folder.key(name)

    def samples(self, key: RowKey, pipe: DiffusionPipeline, inputs: Mapping[str, object]) -> str:
        """Images of a pipeline; where none are kept, what the judge saw of them. Returns their path in the folder."""
        run, keep = self.sampling, self.keep_images
        name = self.layout.samples(key)

        def build(path: Path, scratch: Path) -> None:
            title = self._title(f"sampling {Path(name).parent}")
            sample_images(pipe, run, path, scratch, title=title, judge=None if keep else self.judge, keep=keep)

        facts = {**self.made_from, **inputs, "setting": self._sampling_facts(run.samples)}
        if not keep:
            facts["networks"] = self.judge.networks_key
        self._value(name, facts, build, whole_file, shared=True)
        return name

    def row(self, model: str, key: RowKey, pipe: DiffusionPipeline, images: str, bops: int) -> Row:
        """The row of a pipeline's samples: what they are worth and what they cost."""
        full = None if key.is_full_precision else self.layout.samples(FULL_PRECISION)
        observed, metrics_file, metrics = self._metrics(images, full)
        stages = {images, observed, metrics_file}
        return Row(
            model=model,
            settings=self.settings,
            key=key,
            sampling=self.sampling.to_dict(),
            samples=self.sampling.samples,
            metrics=metrics,
            inception=self.judge.inception,
            bops=bops,
            bops_ratio=self.full_bops / bops,
            bytes=disk_bytes(pipe),
            seconds=sum(self.folder.seconds(name) for name in stages),
            images=images,
            observed=observed,
        )

    @property
    def full_bops(self) -> int:
        """Bit operations of one sample in full precision."""
        return self.macs.total * FULL_BITS**2

    def bops(self, pipe: DiffusionPipeline) -> int:
        """Bit operations of one sample of a quantized pipeline."""
        return cost_of(pipe, self.macs).total

    def step_rows(self, key: RowKey, stats: NoiseStats) -> list[StepRow]:
        """What was measured, step by step."""
        fit, repeated = stats.fit(), stats.residual_correlation()
        names = ("k", "variance", "r2", "snr", "skewness", "kurtosis")
        rows = []
        for i, t in enumerate(stats.timesteps.tolist()):
            correlation = repeated[i, i - 1].item() if i else None
            rows.append(
                StepRow(
                    settings=self.settings,
                    recipe=key.quantized,
                    samples=stats.samples,
                    step=i,
                    timestep=t,
                    **{name: _at(getattr(fit, name), i) for name in names},
                    bias=tuple(_at(fit.bias, (i, c)) for c in range(fit.bias.value.shape[1])),
                    normality_p=fit.normality[i].item(),
                    autocorrelation=Interval(correlation, correlation, correlation),
                )
            )
        return rows

    def _metrics(self, images: str, full: str | None) -> tuple[str, str, dict[str, Interval]]:
        """Where a set's features and metrics are, and the metrics."""
        observed = self._observed(images, full)
        pair = None if full is None else (self._observed(full, None), full)
        inputs: dict[str, Any] = {"observed": self.folder.key(observed), "judge": self.judge.key}
        if pair is not None:
            inputs["full"] = [self.folder.key(name) for name in pair]
        name = str(Path(images).with_name("metrics.json"))

        def build(path: Path, scratch: Path) -> dict[str, Interval]:
            labels = labels_of(self.sampling, range(self.sampling.samples))
            paths = None if pair is None else (self.folder.folder / pair[0], self.folder.folder / pair[1])
            with busy(self._title(f"evaluating {Path(images).parent}")):
                statistics = judged(
                    self.folder.folder / observed, self.folder.folder / images, self.judge, labels, paths
                )
                intervals = with_intervals(statistics, labels)
            write_json(path, {name: asdict(metric) for name, metric in intervals.items()})
            return {name: Interval.of(**asdict(metric)) for name, metric in intervals.items()}

        def read(path: Path) -> dict[str, Interval]:
            return read_as(path, dict[str, Interval])

        return observed, name, self._value(name, inputs, build, read)

    def _observed(self, samples: str, full: str | None) -> str:
        """Where the judge's features of samples are, with their distance to full-precision images of the same seeds."""
        if not self.keep_images:
            return samples
        inputs = {"images": self.folder.key(samples), "networks": self.judge.networks_key}
        inputs |= {} if full is None else {"full": self.folder.key(full)}
        name = str(Path(samples).with_name("observed.safetensors"))

        def build(path: Path, scratch: Path) -> None:
            images = open_images(self.folder.folder / samples, grey=False)
            same_seed = None if full is None else open_images(self.folder.folder / full, grey=False)
            title = self._title(f"looking at {samples}")
            observe_images(images, self.judge, self.sampling, path, scratch, title=title, same_seed=same_seed)

        self._value(name, inputs, build, whole_file, shared=True)
        return name

    def _value(
        self,
        name: str,
        inputs: Mapping[str, object],
        build: Callable[[Path, Path], T | None],
        read: Callable[[Path], T],
        *,
        shared: bool = False,
    ) -> T:
        value = self.folder.value(name, inputs, build, read, shared=shared)
        self.seconds[name] = self.folder.seconds(name)
        return value

    def _load_pipeline(self, path: Path) -> DiffusionPipeline:
        denoiser = denoiser_of(self.pipe)
        device = execution_device(denoiser)
        return place(load(path, dtype=denoiser.dtype), device or self.pipe.device, offload=device is not None)

    def _title(self, text: str) -> str | None:
        return text if self.progress else None

    def _sampling_facts(self, samples: int) -> dict[str, Any]:
        return {**self.sampling.to_dict(), "samples": samples}


def plan_outcome(variance: float, errors: torch.Tensor) -> PlanOutcome:
    """Signal-to-noise ratios of samples with squared errors (N,)."""

    def decibels(error: float) -> float:
        return 10 * math.log10(variance / max(error, 1e-300))

    nearest = errors.sort().values[: math.ceil(NEAREST * len(errors))]
    mean, half = float(nearest.mean()), 1.96 * float(nearest.std()) / len(nearest) ** 0.5
    low = decibels(mean + half) if math.isfinite(half) else None
    high = decibels(mean - half) if mean > half else None
    return PlanOutcome(len(errors), Interval.of(decibels(mean), low, high), decibels(float(errors.mean())))


def _at(estimate: Estimate, index: object) -> Interval:
    value, low, high = (torch.as_tensor(getattr(estimate, name)[index]).item() for name in ("value", "low", "high"))
    return Interval.of(value, low, high)
