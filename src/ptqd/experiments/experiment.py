"""The main job: quantize, measure, correct, sample, evaluate, for some recipes and ways to sample, in a run folder."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.correction.fit import METHODS, along_runs, split_methods
from ptqd.correction.scheduler import apply_correction
from ptqd.correction.search import MIN_CHECKED, CorrectionSearch
from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.sampling import MOST_SAMPLES, Sampling
from ptqd.errors import InputError
from ptqd.experiments.plan_request import PlanRequest
from ptqd.experiments.results import FULL_PRECISION, REPORT, ChoiceRow, PlanRow, Report, Row, RowKey
from ptqd.experiments.sharding import few_samples
from ptqd.experiments.stages import Stages, settings_of
from ptqd.loading import load
from ptqd.metrics.evaluator import Evaluator
from ptqd.names import folder_name, inside
from ptqd.noise.stats import NoiseStats
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

    def check(self) -> None:
        """Refuse, before a model is loaded or anything is sampled, what cannot be run.

        Raises:
            InputError: an unknown correction or methods that do not go together, too few samples for a search, recipes
                of one name, recipes or a plan that do not fit the steps, or nothing to run.
        """
        if not self.settings:
            raise InputError("an experiment needs a way to sample; give one in settings")
        check_names(list(self.recipes))
        for methods in self.corrections:
            check_methods(methods)
        for sampling in self.settings:
            for name, recipe in self.recipes.items():
                recipe.check_steps(sampling.steps, name)
                if self.plan is not None:
                    self.plan.check(recipe, None)
        if self.measured < 1 or self.measured > MOST_SAMPLES:
            raise InputError(f"--measured must be 1 to {MOST_SAMPLES:,}; got {self.measured}")
        if any(by_runs(methods) for methods in self.corrections) and self.measured < MIN_CHECKED:
            raise InputError(
                f"auto and trajectory run whole trajectories of the measured samples, and {self.measured} are too few; "
                f"measure at least {MIN_CHECKED}, or name methods, such as cnc,bc"
            )
        if any(self.corrections) and self.measured < 2:
            raise InputError("statistics of 1 sample give no correction; measure at least two samples")


def check_names(names: Sequence[str]) -> None:
    """Refuse recipes whose results would share a folder, on any disk.

    Raises:
        InputError: two names that are one, or differ in case alone, or one that full precision has.
    """
    taken = {"full-precision", FULL_PRECISION.recipe}
    for name in names:
        if name.casefold() in taken:
            raise InputError(f"two recipes are called {name!r}; give their files names of their own")
        folder_name(name)
        taken.add(name.casefold())


def named_recipes(texts: Sequence[str]) -> dict[str, Recipe]:
    """Recipes from shorthand or TOML files, by what they are called.

    Raises:
        InputError: two of one name, or a recipe that cannot be read.
    """
    named = [(Path(text).stem, text) for text in texts]
    check_names([name for name, _ in named])
    return {name: Recipe.parse(text) for name, text in named}


def run_experiment(
    pipe: DiffusionPipeline,
    experiment: Experiment,
    folder: str | Path,
    judge: Evaluator | None = None,
    *,
    progress: bool = True,
) -> Report:
    """Run all of it into ``folder``; what is there already, from the same inputs, is kept.

    Several processes (:mod:`ptqd.processes`) share measuring and sampling, with the same results as one; ``folder``
    has to be one that all of them see.

    Args:
        pipe: full precision.
        experiment: what is run.
        folder: where; it is made.
        judge: what images are judged by; without one by their distances to full precision.
        progress: show bars.

    Returns:
        The report, as also written to ``folder/report.json``: rows, per-step statistics, stages' seconds, versions.

    Raises:
        InputError: an unknown correction, too few samples for a search, a plan that does not fit, or no images and
            nothing that looks at them.
    """
    folder, judge = Path(folder), judge or Evaluator()
    if not experiment.images and judge.extractor is None:
        raise InputError("without images something has to look at them as they come; give a judge with an extractor")
    experiment.check()
    folders = [settings_of(pipe, sampling).folder for sampling in experiment.settings]
    for name in folders:
        if folders.count(name) > 1:
            raise InputError(
                f"two ways to sample would share the folder {name}; run them into run folders of their own"
            )
    run_folder = RunFolder(folder)
    hardware: dict[str, str | int] = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    versions: dict[str, str | int] = {name: version(name) for name in PACKAGES}
    report = Report(judge=judge.name or None, versions=versions | {"python": platform.python_version()} | hardware)
    note = few_samples(min((sampling.samples for sampling in experiment.settings), default=1), judge)
    if note is not None:
        report.notes.append(note)
    for sampling in experiment.settings:
        stages = Stages(pipe, sampling, run_folder, judge, keep_images=experiment.images, progress=progress)
        for row in _rows(experiment, stages, report):
            report.rows.append(row)
            report.stages |= stages.seconds
            if processes.is_main():
                report.save(folder)  # a long run can be read before its end
    return report


def _rows(experiment: Experiment, stages: Stages, report: Report) -> Iterator[Row]:
    """The rows of one way of sampling: full precision, then every recipe with every correction.

    What else was found, steps, choices and plans, is added to the report.
    """
    for recipe in experiment.recipes.values():
        if experiment.plan is not None:
            experiment.plan.check(recipe, len(stages.macs.counts))
    reference = stages.samples(FULL_PRECISION, stages.pipe, {})
    yield stages.row(experiment.model, FULL_PRECISION, stages.pipe, reference, stages.full_bops)
    for name, recipe in experiment.recipes.items():
        key = RowKey(name, None if experiment.plan is None else experiment.plan.name)
        quantized = stages.quantized(key, recipe)
        if experiment.plan is not None:
            quantized, figures, pictures = stages.planned(key, quantized, experiment.plan, experiment.measured)
        fingerprint = pipeline_fingerprint(quantized)
        stats = stages.noise(key, quantized, fingerprint, experiment.measured)
        if experiment.plan is not None:
            row = {"settings": stages.settings, "recipe": key.quantized, "pictures": pictures}
            row["reached"] = stages.reached(key, quantized, stats)
            report.plans.append(PlanRow(**row, **vars(figures)))  # type: ignore[arg-type]
        report.steps += stages.step_rows(key, stats)
        bops = stages.bops(quantized)
        images, before = reference, None
        for methods in experiment.corrections:
            own = RowKey(key.recipe, key.plan, methods)
            if before is None or methods != (*before, "vsc") or stats.response.draws:  # else the images are the same
                inputs = {"recipe": recipe.to_dict(), "methods": methods, "quantized": fingerprint}
                corrected = quantized
                if by_runs(methods):
                    choice, inputs[",".join(methods)] = stages.search(key, quantized, stats, methods)
                    if methods == AUTO:
                        report.choices.append(_choice_row(stages, key, choice))
                    corrected = apply_correction(quantized, choice.correction)
                elif methods:
                    corrected = apply_correction(quantized, stats, methods)
                    inputs["noise"] = stages.folder.key(stages.layout.noise(key))
                images = stages.samples(own, corrected, inputs)
            before = methods
            yield stages.row(experiment.model, own, quantized, images, bops)


def _choice_row(stages: Stages, key: RowKey, choice: CorrectionSearch) -> ChoiceRow:
    return ChoiceRow(stages.settings, key.quantized, choice.name, choice.trials, choice.steps, choice.checked)


def pipeline_of(folder: Path, row: Row) -> DiffusionPipeline:
    """The pipeline that a run folder's row was sampled with, its correction included.

    Args:
        folder: that :func:`run_experiment` wrote.
        row: of its report.

    Raises:
        InputError: what the run kept of it is gone.
    """
    if row.key.is_full_precision:
        return load(row.model)
    made, where = PurePosixPath(row.images).parent.parent, str(folder / REPORT)  # of this recipe, with its plan

    def part(name: str) -> Path:
        return inside(folder, str(made / name), where)

    path = part("planned")
    if not path.is_dir():
        path = part("quantized")
    if not path.is_dir():
        raise InputError(f"{path.parent} holds no quantized pipeline; run it again with 'ptqd run'")
    pipe, methods = load(path), row.key.methods
    if by_runs(methods):
        return apply_correction(pipe, CorrectionSearch.load(part(f"{','.join(methods)}.json")).correction)
    return apply_correction(pipe, NoiseStats.load(part("noise.safetensors")), methods) if methods else pipe


def by_runs(methods: Sequence[str]) -> bool:
    """Whether a correction is one that whole trajectories give."""
    return tuple(methods) == AUTO or along_runs(methods)


def check_methods(methods: Sequence[str]) -> None:
    """Corrections are known ones.

    Raises:
        InputError: one that is not, auto beside others, or methods that do not go together.
    """
    for method in methods:
        if method not in METHODS and tuple(methods) != AUTO:
            raise InputError(f"unknown correction {method!r}; known are auto, alone, and {', '.join(METHODS)}")
    if tuple(methods) != AUTO:
        split_methods(methods)
