"""What a run folder holds: its layout, and the report's rows as typed values that are read strictly.

``report.json`` has a version; the rows of version 1, which had a label where version 2 has a key, are still read.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from ptqd.correction.gate import StepGate
from ptqd.correction.search import NUMBERS, Trial
from ptqd.diffusion.sampling import MOST_SAMPLES, Sampling
from ptqd.errors import ArtifactError, InputError
from ptqd.files import read_json, write_json
from ptqd.metrics.registry import METRICS
from ptqd.names import inside
from ptqd.run_folder import read_record
from ptqd.schema import check_version, nan_for_null, read_as, typed

VERSION = 2
REPORT, PAGE, MANIFEST = "report.json", "report.html", "manifest.json"


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval; None where there is none."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float | None, low: float | None, high: float | None) -> "Interval":
        """With None for what is infinite or NaN, as JSON has it."""
        return cls(*(x if x is not None and math.isfinite(x) else None for x in (value, low, high)))


@dataclass(frozen=True)
class SamplerSettings:
    """How the rows of a table were sampled.

    Attributes:
        scheduler: the class's name.
        steps: denoising steps.
        eta: noise of DDIM's step.
        guidance: guidance scale; None where the pipeline has none.
    """

    scheduler: str
    steps: int
    eta: float
    guidance: float | None

    @property
    def folder(self) -> str:
        """A short name that is also a folder's."""
        guidance = "" if self.guidance is None else f"-g{_exact(self.guidance)}"
        return f"{self.scheduler.removesuffix('Scheduler').lower()}{self.steps}-eta{_exact(self.eta)}{guidance}"

    @property
    def heading(self) -> str:
        """In words.

        >>> SamplerSettings("DDIMScheduler", 20, 0.0, 3.0).heading
        'DDIM, 20 steps, eta 0, guidance 3'
        """
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.scheduler.removesuffix('Scheduler')}, {self.steps} steps, eta {self.eta:g}{guidance}"


def _exact(value: float) -> str:
    """A number as short as tells it from others."""
    text = f"{value:g}"
    return text if float(text) == value else repr(float(value))


@dataclass(frozen=True)
class RowKey:
    """What was done to the pipeline of a row.

    Attributes:
        recipe: its name; ``"fp32"`` for full precision.
        plan: the name of the plan that its bits follow; None where they follow none.
        methods: of its correction; ``("auto",)`` for one that was searched.
    """

    recipe: str
    plan: str | None = None
    methods: tuple[str, ...] = ()

    @property
    def quantized(self) -> str:
        """Recipe and plan, for people."""
        return self.recipe if self.plan is None else f"{self.recipe} {self.plan}"

    @property
    def correction(self) -> str:
        """``"none"``, ``"cnc"``, ``"cnc+bc"``, ``"auto"`` ..."""
        return "+".join(self.methods) or "none"

    @property
    def name(self) -> str:
        """How a row is called on a command line: recipe, plan and correction."""
        return f"{self.quantized} {self.correction}"

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing was quantized."""
        return self.recipe == FULL_PRECISION.recipe


FULL_PRECISION = RowKey("fp32")


@dataclass(frozen=True)
class Row:
    """One row of a report: a pipeline, its samples, what they are worth and what they cost.

    Attributes:
        model: the pipeline's name.
        settings: how it was sampled.
        key: what was done to it.
        sampling: all of :class:`ptqd.Sampling`, as plain values.
        samples: how many.
        metrics: by name.
        inception: whether distances are of Inception's features.
        bops: bit operations of one sample.
        bops_ratio: how many times fewer than in full precision.
        bytes: of the denoiser's saved tensors.
        seconds: that sampling and evaluating took.
        images: path of the samples inside the run folder.
        observed: path of their features inside the run folder.
    """

    model: str
    settings: SamplerSettings
    key: RowKey
    sampling: dict[str, Any]
    samples: int
    metrics: dict[str, Interval]
    inception: bool
    bops: int
    bops_ratio: float
    bytes: int
    seconds: float
    images: str
    observed: str

    def as_sampled(self) -> Sampling:
        """How it was sampled.

        Raises:
            ArtifactError: an old report, whose stages' records are gone, does not say.
        """
        if not self.sampling:
            raise ArtifactError(f"how {self.images} was sampled is not known any more; run 'ptqd run' again")
        sampling: Sampling = typed(self.sampling, Sampling, f"how {self.images} was sampled", "run 'ptqd run' again")
        return sampling


@dataclass(frozen=True)
class StepRow:
    """What was measured at one step of a quantized pipeline; see :meth:`ptqd.NoiseStats.fit`."""

    settings: SamplerSettings
    recipe: str
    samples: int
    step: int
    timestep: float
    k: Interval
    variance: Interval
    r2: Interval
    snr: Interval
    skewness: Interval
    kurtosis: Interval
    bias: tuple[Interval, ...]
    normality_p: float | None
    autocorrelation: Interval


@dataclass(frozen=True)
class ChoiceRow:
    """What a search for a correction tried, and what each step keeps; see :class:`ptqd.CorrectionSearch`."""

    settings: SamplerSettings
    recipe: str
    taken: str
    trials: tuple[Trial, ...]
    steps: tuple[StepGate, ...]
    checked: int


@dataclass(frozen=True)
class PlanPoint:
    """A plan's bit operations, as how many times fewer, and the expected quality of its samples in dB."""

    ratio: float
    db: float | None
    bits: int | None = None


@dataclass(frozen=True)
class PlanFigures:
    """A plan, and what it was chosen among; lists over steps, but for ``groups`` and the points.

    ``shallow`` are the steps that hold the deep part of the network; ``expected_db`` is the SNR of the final sample
    that the plan was chosen by, in dB.
    """

    made: dict[str, Any]
    timesteps: tuple[float, ...]
    widths: tuple[int, ...]
    snr: dict[str, tuple[float | None, ...]]
    forward_snr: tuple[float | None, ...] | None
    groups: tuple[str, ...]
    bits: tuple[tuple[int, ...], ...]
    weights: dict[str, int]
    share: tuple[float, ...]
    ratio: float
    pareto: tuple[PlanPoint, ...]
    uniform: tuple[PlanPoint, ...]
    paper: PlanPoint | None
    expected_db: float | None = field(default=None, kw_only=True)
    shallow: tuple[int, ...] = field(default=(), kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> "PlanFigures":
        """From a JSON file of :meth:`to_dict`.

        Raises:
            ArtifactError: it does not fit.
        """
        return read_as(path, cls)


@dataclass(frozen=True)
class PlanOutcome:
    """What came of a plan's expectation, in dB: final samples that CNC and BC correct, against full precision.

    Attributes:
        samples: how many.
        nearest_db: of the nine tenths that stay nearest, with its 95 % interval.
        all_db: of all; few that go astray are most of it.
    """

    samples: int
    nearest_db: Interval
    all_db: float | None


@dataclass(frozen=True)
class PlanRow(PlanFigures):
    """A plan of a recipe, and where the pictures of its sample's steps are in the run folder.

    ``reached`` is what came of ``expected_db``.
    """

    settings: SamplerSettings
    recipe: str
    pictures: str
    reached: PlanOutcome | None = field(default=None, kw_only=True)

    @property
    def outcome(self) -> str:
        """What was expected of the final sample, and what came, as a sentence; empty where neither is known."""
        if self.expected_db is None:
            return ""
        sentence = f"{self.recipe}, {self.settings.heading}: the plan expects an SNR of {self.expected_db:.1f} dB"
        came = self.reached
        if came is None or came.nearest_db.value is None or came.all_db is None:
            return f"{sentence}."
        nearest = came.nearest_db
        low, high = (f"{end:.1f}" if end is not None else "?" for end in (nearest.low, nearest.high))
        return (
            f"{sentence} of samples that CNC and BC correct; it is {nearest.value:.1f} dB ({low} to {high}) of nine "
            f"tenths of {came.samples} samples, those that stay nearest, and {came.all_db:.1f} dB of all."
        )


@dataclass(frozen=True)
class SpeedRow:
    """Seconds an image of one engine, of the whole pipeline, and what it takes."""

    engine: str
    precision: str
    seconds: float
    all_seconds: tuple[float, ...]
    of_torch: float
    of_fastest: float
    peak: int
    bytes: int
    bytes_of_full: float
    psnr: float | None


@dataclass(frozen=True)
class SpeedReport:
    """What ``ptqd bench`` measured, and what it could not run and why."""

    title: str
    rows: tuple[SpeedRow, ...]
    without: dict[str, str]


@dataclass(frozen=True)
class PublishedRow:
    """A published figure beside the one of the same row; ``ours`` is None where there is none."""

    recipe: str
    correction: str
    metric: str
    published: float
    source: str
    ours: Interval | None
    inception: bool


@dataclass
class Report:
    """Everything that a run found.

    Attributes:
        rows: one a pipeline.
        steps: one a step of a quantized pipeline.
        choices: one a searched correction.
        plans: one a plan.
        stages: seconds by the stage's name.
        judge: what images are judged by, in words; None without.
        notes: for people.
        versions: of packages, and what it ran on.
        speed: seconds an image by engine; None where nothing was timed.
        published: of a study.
        version: of this schema.
    """

    rows: list[Row] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    choices: list[ChoiceRow] = field(default_factory=list)
    plans: list[PlanRow] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    judge: str | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str | int] = field(default_factory=dict)
    speed: SpeedReport | None = None
    published: list[PublishedRow] = field(default_factory=list)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write ``report.json`` into a run folder, atomically."""
        write_json(inside(folder, REPORT, "the run folder"), msgspec.to_builtins(self))

    @classmethod
    def load(cls, folder: Path) -> "Report":
        """Read a run folder's ``report.json``.

        Raises:
            InputError: there is none with rows, or it is of a newer version.
            ArtifactError: it does not fit its schema.
        """
        path = folder / REPORT
        plain = read_json(path)
        if not isinstance(plain, dict) or not plain.get("rows"):
            raise InputError(f"{path} is no report with rows; write one with 'ptqd run'")
        remedy = "run 'ptqd run' again: finished stages are kept"
        if "version" in plain:
            check_version(plain, VERSION, str(path))
        if plain.get("version", 1) == 1:
            try:
                plain = _upgraded(plain, folder)
            except (KeyError, TypeError, AttributeError) as error:
                raise ArtifactError(f"{path} is damaged ({error!r}); {remedy}") from error
        plain = plain | {"choices": nan_for_null(plain.get("choices", []), NUMBERS)}
        report: Report = typed(plain, cls, str(path), remedy)
        report._check(folder)
        return report

    def _check(self, folder: Path) -> None:
        """Refuse paths that lead out of the run folder, and plans whose lists do not fit together."""
        where = str(folder / REPORT)
        for row in self.rows:
            told = row.sampling.get("samples", row.samples)
            if told != row.samples or not 1 <= row.samples <= MOST_SAMPLES:
                raise ArtifactError(f"{where}: a row of {row.samples} samples cannot be; run 'ptqd run' again")
            inside(folder, row.images, where)
            if row.observed:
                inside(folder, row.observed, where)
            for name in (row.key.recipe, row.key.plan, *row.key.methods):
                if name is not None and not name:
                    raise ArtifactError(f"{where} has a row without a name; run 'ptqd run' again")
        for plan in self.plans:
            inside(folder, plan.pictures, where)
            steps, widths = len(plan.bits), [str(width) for width in plan.widths]
            lists = [plan.timesteps, plan.share, plan.forward_snr, *plan.snr.values()]
            fits = steps > 0 and all(values is None or len(values) == steps for values in lists)
            if not fits or set(plan.snr) != set(widths) or {len(row) for row in plan.bits} != {len(plan.groups)}:
                raise ArtifactError(f"{where}: the lists of the plan of {plan.recipe!r} differ in length")
        unknown = {figure.metric for figure in self.published} - set(METRICS)
        if unknown:
            raise ArtifactError(
                f"{where} has the metric {min(unknown)!r}, which this ptqd does not know; use a newer one"
            )


def _upgraded(plain: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A report of version 1: rows had labels, and how they were sampled stood in their stages' records."""

    def settings(entry: Mapping[str, object]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name != "setting"} | {"settings": entry["setting"]}

    rows = []
    for row in plain["rows"]:
        record = read_record(folder, row["images"])
        sampling = {} if record is None else record.inputs["setting"]
        methods = [] if row["correction"] == "none" else row["correction"].split("+")
        key = {"recipe": row["recipe"], "plan": None, "methods": methods}
        remaining = {name: value for name, value in settings(row).items() if name not in ("recipe", "correction")}
        rows.append({"observed": "", "inception": False} | remaining | {"key": key, "sampling": sampling})
    speed = plain.get("speed")
    if speed is not None:
        renamed = [
            {"precision" if name == "numbers" else name: value for name, value in row.items()} for row in speed["rows"]
        ]
        plain = {**plain, "speed": {**speed, "rows": renamed}}
    lists = {name: list(map(settings, plain[name])) for name in ("steps", "choices", "plans")}
    return {**plain, **lists, "rows": rows, "version": VERSION}


class _HasSettings(Protocol):
    @property
    def settings(self) -> SamplerSettings: ...


Entry = TypeVar("Entry", bound=_HasSettings)


def by_settings(entries: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    """Entries grouped by how they were sampled, in order: the heading, and the group."""
    for heading in dict.fromkeys(entry.settings.heading for entry in entries):
        yield heading, [entry for entry in entries if entry.settings.heading == heading]


def select_rows(report: Report, folder: Path, names: Sequence[str] | None) -> list[Row]:
    """Rows of quantized pipelines that were sampled alike.

    Args:
        report: of the run folder.
        folder: for messages.
        names: recipe and correction of each, after the settings where several have it; without them the last row of
            each recipe, which its correction is for, of the first settings.

    Raises:
        InputError: there is no such row, or several are called so, or there is nothing but full precision.
    """
    rows = [row for row in report.rows if not row.key.is_full_precision]
    if not rows:
        raise InputError(f"{folder} has no row of a quantized pipeline")
    if names is None:
        return list({row.key.quantized: row for row in rows if row.settings == rows[0].settings}.values())
    selected = []
    for name in names:
        matches = [row for row in rows if name in (row.key.name, f"{row.settings.folder} {row.key.name}")]
        if len(matches) != 1:
            known = ", ".join(repr(f"{row.settings.folder} {row.key.name}") for row in matches or rows)
            raise InputError(f"{len(matches) or 'no'} rows of {folder} are called {name!r}; there are {known}")
        selected += matches
    if len({row.settings for row in selected}) > 1:
        first = selected[0].settings.folder
        raise InputError(f"rows of different settings are not compared; choose from one: {first}")
    return selected
