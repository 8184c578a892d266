"""What a result was made of, and whether it comes out again."""

import platform
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline

import ptqd
from ptqd import processes
from ptqd.diffusion.fingerprints import pipeline_fingerprint
from ptqd.diffusion.pipeline_parts import scheduler_of
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import ArtifactError, InputError
from ptqd.experiments.experiment import PACKAGES, Experiment, run_experiment
from ptqd.experiments.plan_request import PlanRequest
from ptqd.experiments.results import MANIFEST, Interval, Report, SamplerSettings
from ptqd.files import read_json, write_json
from ptqd.metrics.evaluator import Evaluator
from ptqd.names import check_label, inside
from ptqd.quantization.recipe import Recipe
from ptqd.schema import check_version, typed

FORMAT = 1


class SchedulerFacts(msgspec.Struct, frozen=True, rename={"kind": "class"}):
    """A scheduler's class, and its configuration."""

    kind: str
    config: dict[str, Any]


@dataclass(frozen=True)
class SettingFacts:
    """A way to sample: its arguments as :meth:`ptqd.Sampling.to_dict` gives them; the names of those that are one value
    for all samples, and of those that JSON cannot hold.
    """

    run: dict[str, Any]
    shared: tuple[str, ...]
    opaque: tuple[str, ...]

    @classmethod
    def of(cls, sampling: Sampling) -> "SettingFacts":
        """Of a way to sample."""
        given = {**sampling.call, **sampling.shared}
        opaque = tuple(name for name, value in given.items() if not _is_plain(value))
        return cls(sampling.to_dict(), tuple(n for n, v in given.items() if isinstance(v, tuple)), opaque)

    def sampling(self) -> Sampling:
        """As it was.

        Raises:
            InputError: it had arguments that JSON cannot hold.
        """
        if self.opaque:
            raise InputError(
                f"the manifest cannot hold {', '.join(self.opaque)}, which is no number or text; run "
                "ptqd.run_experiment with the same arguments instead"
            )
        sampling: Sampling = typed(self.run, Sampling, "the manifest's setting")
        call, shared = (
            {name: tuple(v) if name in self.shared and isinstance(v, list) else v for name, v in given.items()}
            for given in (sampling.call, sampling.shared)
        )
        return sampling.replace(call=call, shared=shared)


@dataclass(frozen=True)
class JudgeFacts:
    """What a run was judged by: in words, by a hash, and how it was asked for."""

    name: str
    key: str
    options: dict[str, str | None]


@dataclass(frozen=True)
class FigureRow:
    """The figures of a row."""

    setting: SamplerSettings
    recipe: str
    correction: str
    samples: int
    metrics: dict[str, Interval]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.setting.scheduler}, {self.setting.steps} steps, eta {self.setting.eta:g}: {self.key[-1]}"

    @property
    def key(self) -> tuple[SamplerSettings, str]:
        """What no other row of a run has."""
        return self.setting, f"{self.recipe} {self.correction}"


@dataclass(frozen=True)
class Manifest:
    """All that the figures of a run follow from, and the figures.

    Attributes:
        format: of this schema.
        model: as it was named.
        weights: hashes of the pipeline's parts.
        scheduler: class and configuration.
        settings: with their seeds.
        recipes: plain, by name.
        measured: samples that statistics were taken on.
        corrections: of each recipe.
        plan: what was asked for; None without.
        images: whether they were kept.
        judge: None without.
        statistics: hashes of the measured statistics.
        code: hash of this package's source.
        packages: their versions.
        hardware: what it ran on.
        figures: of each row.
    """

    format: int
    model: str
    weights: Any
    scheduler: SchedulerFacts
    settings: tuple[SettingFacts, ...]
    recipes: dict[str, dict[str, Any]]
    measured: int
    corrections: tuple[tuple[str, ...], ...]
    plan: dict[str, Any] | None
    judge: JudgeFacts | None
    statistics: dict[str, str]
    code: str
    packages: dict[str, str]
    hardware: dict[str, str | int]
    figures: tuple[FigureRow, ...]
    images: bool = True

    def experiment(self) -> Experiment:
        """What was run.

        Raises:
            InputError: it cannot be run again: a name, a value or a method that no run has.
        """
        for name in self.recipes:
            check_label(name, "the manifest")
        experiment = Experiment(
            model=self.model,
            settings=tuple(setting.sampling() for setting in self.settings),
            recipes={
                label: Recipe.from_dict(v, f"the manifest's recipe {label!r}") for label, v in self.recipes.items()
            },
            measured=self.measured,
            corrections=self.corrections,
            plan=None if self.plan is None else PlanRequest.from_dict(self.plan),
            images=self.images,
        )
        experiment.check()
        return experiment

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """A manifest, from its file or its run folder.

        Raises:
            InputError: it is missing, something else, or of another format.
        """
        path = path / MANIFEST if path.is_dir() else path
        values = read_json(path)
        if not isinstance(values, dict) or "figures" not in values:
            raise InputError(f"{path} is no manifest; 'ptqd run' writes one into its run folder")
        check_version(values, FORMAT, f"{path}, a manifest,", key="format")
        manifest: Manifest = typed(values, cls, str(path), "copy it again, or run 'ptqd run' again")
        manifest.experiment()
        return manifest


def run_with_manifest(
    pipe: DiffusionPipeline, experiment: Experiment, folder: Path, judge: Evaluator | None, *, progress: bool = True
) -> tuple[Report, Manifest]:
    """Run an experiment, and write ``manifest.json`` beside its report: all that its figures follow from.

    Returns:
        The report, and the manifest: hashes of the weights, the code and the measured statistics; recipes, settings
        with their seeds, the scheduler's configuration, packages, hardware; and the figures.
    """
    report = run_experiment(pipe, experiment, folder, judge, progress=progress)
    scheduler: Any = scheduler_of(pipe)
    statistics = [name for name in sorted(report.stages) if name.endswith("noise.safetensors")]
    manifest = Manifest(
        format=FORMAT,
        model=experiment.model,
        weights=pipeline_fingerprint(pipe),
        scheduler=SchedulerFacts(type(scheduler).__name__, dict(scheduler.config)),
        settings=tuple(map(SettingFacts.of, experiment.settings)),
        recipes={label: recipe.to_dict() for label, recipe in experiment.recipes.items()},
        measured=experiment.measured,
        corrections=experiment.corrections,
        plan=None if experiment.plan is None else experiment.plan.to_dict(),
        images=experiment.images,
        judge=None if judge is None else JudgeFacts(judge.name, judge.key, dict(judge.options)),
        statistics={name: sha256((folder / name).read_bytes()).hexdigest() for name in statistics},
        code=code_hash(),
        packages={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        hardware=hardware(pipe.device),
        figures=tuple(
            FigureRow(row.settings, row.key.quantized, row.key.correction, row.samples, row.metrics)
            for row in report.rows
        ),
    )
    if processes.is_main():
        write_json(inside(folder, MANIFEST, "the run folder"), msgspec.to_builtins(manifest, enc_hook=str))
    return report, manifest


def code_hash() -> str:
    """A hash of the package's source files."""
    root = Path(ptqd.__file__).parent
    result = sha256()
    for path in sorted(root.rglob("*.py")):
        result.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """What it runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {
        "device": device.type,
        "name": name,
        "threads": threads,
        "processes": processes.count(),
        "system": platform.system(),
    }


@dataclass(frozen=True)
class Figure:
    """One figure, as it was and as it came out again."""

    row: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    again: float | None

    @property
    def agrees(self) -> bool:
        """Whether it came out again within its interval; without one, exactly."""
        if self.low is None or self.high is None or self.again is None:
            return self.again == self.value
        return self.low <= self.again <= self.high

    @property
    def verdict(self) -> str:
        """In words."""
        return "the same" if self.again == self.value else "agrees" if self.agrees else "DIFFERS"


@dataclass(frozen=True)
class Reproduction:
    """A manifest's figures, run again.

    Attributes:
        figures: each metric of each row.
        changed: what is not as it was, in words: packages, code, hardware.
    """

    figures: tuple[Figure, ...]
    changed: tuple[str, ...]


def reproduce(
    manifest: Manifest,
    pipe: DiffusionPipeline,
    folder: Path,
    judge: Evaluator | None,
    *,
    progress: bool = True,
) -> Reproduction:
    """Run a manifest's experiment again and hold its figures against those that are written there.

    Args:
        manifest: by :meth:`Manifest.load`.
        pipe: the pipeline it names.
        folder: a run folder of its own.
        judge: what it was judged by.
        progress: show bars.

    Raises:
        InputError: other weights, another scheduler or another judge than the manifest's.
    """
    scheduler: Any = scheduler_of(pipe)
    made_with = manifest.scheduler.kind
    _same("scheduler", type(scheduler).__name__, made_with, f"run it with --scheduler {made_with}")
    _same("weights", pipeline_fingerprint(pipe), manifest.weights, "load the pipeline that it was made with")
    required = manifest.judge and manifest.judge.key
    _same("judge", judge and judge.key, required, "judge by what it was judged by")
    _, again = run_with_manifest(pipe, manifest.experiment(), folder, judge, progress=progress)
    rows = {row.key: row for row in again.figures}
    figures = []
    for before in manifest.figures:
        after = rows.get(before.key)
        missing = sorted(set(before.metrics) - set(() if after is None else after.metrics))
        if after is None or missing:
            what = "a row" if after is None else f"a figure, {missing[0]},"
            raise ArtifactError(
                f"the manifest has {what} that its own experiment does not: {before.name}; copy it again"
            )
        for name, metric in before.metrics.items():
            values = (metric.value, metric.low, metric.high, after.metrics[name].value)
            figures.append(Figure(before.name, name, *values))
    return Reproduction(tuple(figures), tuple(_changes(manifest, again)))


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)


def _same(what: str, found: object, wanted: object, remedy: str) -> None:
    if found != wanted:
        raise InputError(f"{what}: {found} instead of the manifest's {wanted}; {remedy}")


def _changes(before: Manifest, after: Manifest) -> list[str]:
    result = [
        f"{name} {mine.get(name)} instead of {value}"
        for theirs, mine in ((before.packages, after.packages), (before.hardware, after.hardware))
        for name, value in theirs.items()
        if mine.get(name) != value
    ]
    if before.code != after.code:
        result.append("other source code of ptqd")
    return result
