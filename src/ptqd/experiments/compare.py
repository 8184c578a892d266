"""Run folders side by side: every row against one of them, on the same seeds."""

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ptqd.errors import InputError
from ptqd.experiments.results import row_name, rows_of, sampling_of
from ptqd.experiments.sharding import is_observed, judged, labels_of, observe_images
from ptqd.metrics.bootstrap import Statistic, intervals
from ptqd.metrics.evaluator import Judge, with_intervals
from ptqd.metrics.images import open_images

SEEDS = ("seed", "samples", "call")  # what two rows have to share to be paired


def compare_runs(folders: Sequence[Path], judge: Judge | None, against: str | None = None) -> list[dict[str, Any]]:
    """The rows of some runs, each with its paired difference to one row of the same setting.

    Args:
        folders: that ``ptqd run`` wrote. Rows are told apart by the folder's name where there is more than one.
        judge: what rows are judged by; none compares by what needs no network.
        against: ``"RECIPE CORRECTION"``, after ``"RUN "`` where there are several runs; by default the first
            row that is not full precision.

    Returns:
        The reports' rows, plain values, with ``run``, ``metrics`` judged again by this judge, ``differences`` in those
        that both rows have, ``against``, the other row's name, and ``chosen``, whether it is that row itself.

    Raises:
        InputError: no report, no such row, samples that are gone, two folders of one name, rows that do not share
            their seeds, or a row that cannot be compared in anything.
    """
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two run folders are called {name!r}; give them names of their own")
    rows = [row for folder in folders for row in rows_of(folder.resolve(), len(folders) > 1)]
    found: list[dict[str, Any]] = []
    for setting in list(dict.fromkeys(_key(row["setting"]) for row in rows)):
        found += _compared([row for row in rows if _key(row["setting"]) == setting], judge or Judge(), against)
    return found


def _key(setting: dict[str, Any]) -> str:
    return str(sorted(setting.items()))


def _compared(rows: list[dict[str, Any]], judge: Judge, against: str | None) -> list[dict[str, Any]]:
    """The rows of one setting."""
    quantized = [row for row in rows if row["recipe"] != "fp32"]
    names = [row_name(row) for row in rows]
    if against is not None and against not in names:
        raise InputError(f"there is no row {against!r}; there are {', '.join(names)}")
    chosen = rows[names.index(against)] if against is not None else (quantized or rows)[0]
    _check_seeds(rows)
    with TemporaryDirectory() as scratch:
        found_all = [_statistics(row, rows, judge, Path(scratch)) for row in rows]
    base = found_all[rows.index(chosen)]
    if not base:
        raise InputError(
            f"{row_name(chosen)!r} is judged by nothing; compare with another row, or give a --judge other than none"
        )
    run = sampling_of(chosen)
    strata = labels_of(run, run.samples)
    found = []
    for row, mine in zip(rows, found_all, strict=True):
        paired = {name: mine[name].minus(base[name]) for name in mine if name in base and row is not chosen}
        found.append(
            {name: value for name, value in row.items() if name != "folder"}
            | {
                "metrics": {name: asdict(metric) for name, metric in with_intervals(mine, strata).items()},
                "differences": {name: asdict(metric) for name, metric in intervals(paired, strata).items()},
                "against": row_name(chosen),
                "inception": judge.inception,
                "chosen": row is chosen,
            }
        )
    return found


def _statistics(row: dict[str, Any], rows: list[dict[str, Any]], judge: Judge, scratch: Path) -> dict[str, Statistic]:
    """One row's; those to full precision are to its own run's."""
    full = next((r for r in rows if r["recipe"] == "fp32" and r["folder"] == row["folder"]), None)
    full = None if full is row else full
    labels = labels_of(sampling_of(row), row["samples"])
    pair = None if full is None else (_observed(full, None, judge, scratch), full["folder"] / full["images"])
    return judged(_observed(row, full, judge, scratch), row["folder"] / row["images"], judge, labels, pair)


def _observed(row: dict[str, Any], full: dict[str, Any] | None, judge: Judge, scratch: Path) -> Path:
    """What a judge sees of a row: what its run kept of that, else by looking at its images again."""
    kept = row["folder"] / row.get("observed", "")
    if is_observed(kept, judge):
        return Path(kept)
    name = str(row["folder"] / row["images"])
    made = scratch / f"{sha256(name.encode()).hexdigest()}.safetensors"
    if not made.exists():
        images = [open_images(r["folder"] / r["images"], grey=False) for r in (row, full) if r is not None]
        same_seed = images[1] if len(images) > 1 else None
        parts = scratch / f"{made.stem}-parts"
        observe_images(images[0], judge, sampling_of(row), made, parts, title=None, same_seed=same_seed)
    return made


def _check_seeds(rows: list[dict[str, Any]]) -> None:
    first = sampling_of(rows[0]).to_dict()
    for row in rows[1:]:
        mine = sampling_of(row).to_dict()
        for name in SEEDS:
            if mine[name] != first[name]:
                raise InputError(
                    f"{row['folder']} and {rows[0]['folder']} cannot be paired: {name} is {mine[name]} in one and "
                    f"{first[name]} in the other; sample both alike"
                )
