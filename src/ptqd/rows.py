"""Rows of run folders: found, named, and how they were sampled."""

from pathlib import Path
from typing import Any

from ptqd.errors import InputError
from ptqd.files import read_json
from ptqd.sampling import Sampling


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


def one_row(folder: Path, name: str | None) -> dict[str, Any]:
    """One row of a run folder; without a name the last of its last recipe, which its correction is for.

    Raises:
        InputError: there is no such row, or several are called so.
    """
    rows = rows_of(folder)
    if name is None:
        return rows[-1]
    found = [row for row in rows if name in (row_name(row), f"{_setting(row)} {row_name(row)}")]
    if len(found) == 1:
        return found[0]
    names = ", ".join(repr(f"{_setting(row)} {row_name(row)}") for row in found or rows)
    raise InputError(f"{len(found) or 'no'} rows of {folder} are called {name!r}; there are {names}")


def _setting(row: dict[str, Any]) -> str:
    return str(Path(row["images"]).parts[0])


def sampling_of(row: dict[str, Any]) -> Sampling:
    """How a row was sampled, as its stage's record says."""
    record = read_json(row["folder"] / ".stages" / f"{row['images']}.json")
    return Sampling(**record["inputs"]["setting"])
