"""Rows of run folders: found, named, and how they were sampled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.files import read_json


def row_name(row: dict[str, Any]) -> str:
    """How a row is named: recipe and correction, after its run where there are several."""
    return " ".join(part for part in (row.get("run", ""), row["recipe"], row["correction"]) if part)


def rows_of(folder: Path, several: bool = False) -> list[dict[str, Any]]:
    """The rows of a run folder's report, each with its ``folder``, and with the name of its ``run`` among several.

    Raises:
        InputError: there is no report with rows.
    """
    report = read_json(folder / "report.json")
    if not isinstance(report, dict) or not report.get("rows"):
        raise InputError(f"{folder / 'report.json'} is no report with rows; write one with 'ptqd run'")
    return [{**row, "run": folder.name if several else "", "folder": folder} for row in report["rows"]]


def chosen_rows(folder: Path, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Rows of a run folder, of one setting.

    Args:
        folder: that ``ptqd run`` wrote.
        names: recipe and correction of each, after the setting where several have it; without them the last row of
            each recipe, which its correction is for, in the first setting.

    Raises:
        InputError: there is no such row, or several are called so, or there is nothing but full precision.
    """
    rows = [row for row in rows_of(folder) if row["recipe"] != "fp32"]
    if not rows:
        raise InputError(f"{folder} has no row of a quantized pipeline")
    if names is None:
        return list({row["recipe"]: row for row in rows if _setting(row) == _setting(rows[0])}.values())
    chosen = []
    for name in names:
        found = [row for row in rows if name in (row_name(row), f"{_setting(row)} {row_name(row)}")]
        if len(found) != 1:
            known = ", ".join(repr(f"{_setting(row)} {row_name(row)}") for row in found or rows)
            raise InputError(f"{len(found) or 'no'} rows of {folder} are called {name!r}; there are {known}")
        chosen += found
    if len({_setting(row) for row in chosen}) > 1:
        raise InputError(f"rows of different settings are not compared; choose from one: {_setting(chosen[0])}")
    return chosen


def _setting(row: dict[str, Any]) -> str:
    return str(Path(row["images"]).parts[0])


def sampling_of(row: dict[str, Any]) -> Sampling:
    """How a row was sampled, as its stage's record says."""
    record = read_json(row["folder"] / ".stages" / f"{row['images']}.json")
    return Sampling(**record["inputs"]["setting"])
