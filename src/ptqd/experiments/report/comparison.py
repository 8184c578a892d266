"""Compared runs as a table: for the terminal, Markdown, HTML and LaTeX."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ptqd.experiments.compare import ComparedRow
from ptqd.experiments.report.rendering import KEPT, environment, latex_text, markdown_cell
from ptqd.experiments.report.rendering import cell as rich_cell
from ptqd.experiments.report.table import (
    COST_COLUMNS,
    correction_label,
    cost_cells,
    metric_cell,
    metric_columns,
    metric_title,
)
from ptqd.experiments.results import Interval, by_settings
from ptqd.metrics.registry import METRICS

NOTE = (
    "Second lines: the paired difference to the row in brackets and its 95 % interval over the same seeds; "
    "* where that does not hold 0."
)


@dataclass(frozen=True)
class Cell:
    """A value, below it its difference, and whether that is for the better, the worse, or cannot be told."""

    value: str
    difference: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Section:
    """The rows of one setting."""

    title: str
    rows: list[list[Cell]]


def sections(rows: Sequence[ComparedRow], *, details: bool = False) -> tuple[list[str], list[Section]]:
    """Head and sections of what :func:`ptqd.experiments.compare.compare_runs` returns."""
    plain = [row.row for row in rows]
    metrics, inception = metric_columns(plain, details=details), all(row.inception for row in plain)
    several = any(row.run for row in rows)
    head = ["run"] * several + [
        "recipe",
        "correction",
        *(f"{metric_title(name, inception=inception)} ({METRICS[name].better})" for name in metrics),
        *COST_COLUMNS,
    ]
    parts = []
    for title, group in by_settings(rows):
        lines = []
        for row in group:
            names = [row.run] * several + [row.row.key.quantized, correction_label(row.row.key.correction)]
            if row.chosen:
                names[-1] = f"[{names[-1]}]"
            lines.append(
                [Cell(text) for text in names]
                + [_compared(row, name) for name in metrics]
                + [Cell(text) for text in cost_cells(row.row)]
            )
        parts.append(Section(title, lines))
    return head, parts


def _compared(row: ComparedRow, name: str) -> Cell:
    value = " ".join(metric_cell(row.row.metrics.get(name), name)).strip()
    metric = row.differences.get(name)
    if metric is None or metric.value is None or metric.low is None or metric.high is None:
        return Cell(value)
    clear = not metric.low <= 0 <= metric.high
    ends = (metric.value, metric.low, metric.high)
    shift, *interval = (metric_cell(Interval(end, None, None), name)[0] for end in ends)
    difference = f"{'' if shift.startswith('-') else '+'}{shift} [{', '.join(interval)}]{'*' if clear else ''}"
    better = (metric.value < 0) == (METRICS[name].better == "lower")
    return Cell(value, difference, ("better" if better else "worse") if clear else "")


def terminal(rows: Sequence[ComparedRow]) -> Iterator[Table]:
    """For rich, a table for each setting: what is better in green, what is worse in red."""
    head, parts = sections(rows)
    for section in parts:
        table = Table(title=rich_cell(section.title), caption=rich_cell(NOTE))
        for i, name in enumerate(head):
            table.add_column(rich_cell(name), justify="right" if i >= len(head) - len(COST_COLUMNS) else "left", **KEPT)
        for row in section.rows:
            table.add_row(*(_rich(cell) for cell in row))
        yield table


def _rich(cell: Cell) -> Text:
    colour = {"better": "green", "worse": "red"}.get(cell.verdict, "")
    value, below = rich_cell(cell.value), rich_cell(cell.difference, colour)
    return Text.assemble(value, "\n", below) if cell.difference else value


def markdown(rows: Sequence[ComparedRow]) -> str:
    """One table; what is better is bold, what is worse in italics."""
    marks = {"better": "**", "worse": "_"}

    def text(cell: Cell) -> str:
        mark, value = marks.get(cell.verdict, ""), markdown_cell(cell.value)
        return f"{value}<br>{mark}{markdown_cell(cell.difference)}{mark}" if cell.difference else value

    head, parts = sections(rows)
    lines = [[markdown_cell(name) for name in head], ["---"] * len(head)]
    for section in parts:
        lines.append([f"**{markdown_cell(section.title)}**", *[""] * (len(head) - 1)])
        lines += [[text(cell) for cell in row] for row in section.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{NOTE}\n"


def page(rows: Sequence[ComparedRow]) -> str:
    """A page of its own."""
    head, parts = sections(rows, details=True)
    text: str = environment().get_template("comparison.html").render(head=head, sections=parts, note=NOTE)
    return text + "\n"


def latex(rows: Sequence[ComparedRow]) -> str:
    """A tabular for booktabs and makecell; what is better is bold, what is worse in italics."""
    marks = {"better": r"\textbf{%s}", "worse": r"\textit{%s}"}

    def text(cell: Cell) -> str:
        if not cell.difference:
            return f"{{{latex_text(cell.value)}}}"  # braces: a row that begins with a bracket
        below = marks.get(cell.verdict, "%s") % latex_text(cell.difference)
        return rf"\makecell[l]{{{latex_text(cell.value)}\\{below}}}"

    head, parts = sections(rows)
    own = environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>"
    )
    own.filters |= {"latex": latex_text, "cell": text}
    table: str = own.get_template("comparison.tex").render(head=head, sections=parts, note=NOTE)
    return table + "\n"
