"""Run folders side by side: every row against one of them, on the same seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from ptqd.errors import InputError
from ptqd.experiments.results import REPORT, Interval, Report, Row, SamplerSettings
from ptqd.experiments.sharding import is_observed, judged, labels_of, observe_images
from ptqd.metrics.bootstrap import Statistic, intervals
from ptqd.metrics.evaluator import Evaluator, with_intervals
from ptqd.metrics.images import open_images
from ptqd.names import inside

SEEDS = ("seed", "samples", "call")  # what two rows have to share to be paired


@dataclass(frozen=True)
class ComparedRow:
    """A row beside another one of the same settings.

    Attributes:
        row: of the report, its metrics judged again.
        run: the run folder's name, where there are several; else empty.
        differences: of metrics that both rows have, paired by seed.
        against: the other row's name.
        chosen: whether it is that row itself.
    """

    row: Row
    run: str
    differences: dict[str, Interval]
    against: str
    chosen: bool

    @property
    def settings(self) -> SamplerSettings:
        """How it was sampled."""
        return self.row.settings


@dataclass(frozen=True)
class _Entry:
    """A row and where it comes from."""

    row: Row
    folder: Path
    run: str

    @property
    def name(self) -> str:
        return f"{self.run} {self.row.key.name}".strip()

    @property
    def images(self) -> Path:
        return inside(self.folder, self.row.images, str(self.folder / REPORT))


def compare_runs(
    folders: Sequence[str | Path], judge: Evaluator | None = None, against: str | None = None
) -> list[ComparedRow]:
    """The rows of some runs, each with its paired difference to one row of the same settings.

    Args:
        folders: that ``ptqd run`` wrote. Rows are told apart by the folder's name where there is more than one.
        judge: what rows are judged by; none compares by what needs no network.
        against: ``"RECIPE CORRECTION"``, after ``"RUN "`` where there are several runs; by default the first
            row that is not full precision.

    Raises:
        InputError: no report, no such row, samples that are gone, two folders of one name, rows that do not share
            their seeds, or a row that cannot be compared in anything.
    """
    entries = check_rows([Path(folder) for folder in folders], against)
    compared: list[ComparedRow] = []
    for settings in dict.fromkeys(entry.row.settings for entry in entries):
        compared += _compared([e for e in entries if e.row.settings == settings], judge or Evaluator(), against)
    return compared


def check_rows(folders: Sequence[Path], against: str | None) -> list["_Entry"]:
    """The rows of some runs, before anything is looked at; see :func:`compare_runs`.

    Raises:
        InputError: no report, no such row, or two folders of one name.
    """
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two run folders are called {name!r}; give them names of their own")
    entries = [
        _Entry(row, folder.resolve(), name if len(folders) > 1 else "")
        for folder, name in zip(folders, names, strict=True)
        for row in Report.load(folder.resolve()).rows
    ]
    if against is not None and against not in [entry.name for entry in entries]:
        raise InputError(f"there is no row {against!r}; there are {', '.join(entry.name for entry in entries)}")
    return entries


def _compared(entries: list[_Entry], judge: Evaluator, against: str | None) -> list[ComparedRow]:
    """The rows of one way of sampling."""
    quantized = [entry for entry in entries if not entry.row.key.is_full_precision]
    names = [entry.name for entry in entries]
    if against is not None and against not in names:
        raise InputError(f"there is no row {against!r}; there are {', '.join(names)}")
    chosen = entries[names.index(against)] if against is not None else (quantized or entries)[0]
    _check_seeds(entries)
    with TemporaryDirectory() as scratch:
        statistics = [_statistics(entry, entries, judge, Path(scratch)) for entry in entries]
    base = statistics[entries.index(chosen)]
    if not base:
        raise InputError(
            f"{chosen.name!r} is judged by nothing; compare with another row, or give a --judge other than none"
        )
    run = chosen.row.as_sampled()
    strata = labels_of(run, range(run.samples))
    compared = []
    for entry, mine in zip(entries, statistics, strict=True):
        paired = {name: mine[name].minus(base[name]) for name in mine if name in base and entry is not chosen}
        metrics = {name: Interval.of(**asdict(metric)) for name, metric in with_intervals(mine, strata).items()}
        differences = {name: Interval.of(**asdict(metric)) for name, metric in intervals(paired, strata).items()}
        row = replace(entry.row, metrics=metrics, inception=judge.inception)
        compared.append(ComparedRow(row, entry.run, differences, chosen.name, entry is chosen))
    return compared


def _statistics(entry: _Entry, entries: list[_Entry], judge: Evaluator, scratch: Path) -> dict[str, Statistic]:
    """One row's; those to full precision are to its own run's."""
    full = next((e for e in entries if e.row.key.is_full_precision and e.folder == entry.folder), None)
    full = None if full is entry else full
    labels = labels_of(entry.row.as_sampled(), range(entry.row.samples))
    pair = None if full is None else (_observed(full, None, judge, scratch), full.images)
    return judged(_observed(entry, full, judge, scratch), entry.images, judge, labels, pair)


def _observed(entry: _Entry, full: _Entry | None, judge: Evaluator, scratch: Path) -> Path:
    """The features of a row's images: what its run kept, else by looking at its images again."""
    if entry.row.observed:
        kept = inside(entry.folder, entry.row.observed, str(entry.folder / REPORT))
        if is_observed(kept, judge):
            return kept
    output = scratch / f"{sha256(str(entry.images).encode()).hexdigest()}.safetensors"
    if not output.exists():
        images = [open_images(e.images, grey=False) for e in (entry, full) if e is not None]
        same_seed = images[1] if len(images) > 1 else None
        parts = scratch / f"{output.stem}-parts"
        observe_images(images[0], judge, entry.row.as_sampled(), output, parts, title=None, same_seed=same_seed)
    return output


def _check_seeds(entries: list[_Entry]) -> None:
    first = entries[0].row.as_sampled().to_dict()
    for entry in entries[1:]:
        for name in SEEDS:
            if (mine := entry.row.as_sampled().to_dict())[name] != first[name]:
                raise InputError(
                    f"{entry.folder} and {entries[0].folder} cannot be paired: {name} is {mine[name]} in "
                    f"one and {first[name]} in the other; sample both alike"
                )
