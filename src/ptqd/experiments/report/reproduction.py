"""Figures that were run again, as a table."""

from rich.table import Table

from ptqd.experiments.manifest import Reproduction
from ptqd.experiments.report.rendering import FOLDED, KEPT, cell, number


def reproduction_table(found: Reproduction) -> Table:
    """Every figure: as it was, its interval, as it came out again, and what that says."""
    table = Table()
    for name in ("row", "metric"):
        table.add_column(name, **FOLDED)
    for name in ("was", "95 % interval", "is", ""):
        table.add_column(name, justify="right", **KEPT)
    row = ""
    for figure in found.figures:
        if figure.row != row:
            table.add_section()
        interval = "" if figure.low is None or figure.high is None else f"{figure.low:.4g} to {figure.high:.4g}"
        name = figure.metric.replace("_", " ")
        colour = "green" if figure.agrees else "red"
        table.add_row(
            "" if figure.row == row else cell(figure.row),
            cell(name),
            number(figure.value, ".6g"),
            interval,
            number(figure.again, ".6g"),
            cell(figure.verdict, colour),
        )
        row = figure.row
    return table
