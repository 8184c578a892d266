"""Compared runs as a table: for the terminal, Markdown, HTML and LaTeX."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ptqd.experiments.report.table import (
    COST_COLUMNS,
    METRICS,
    by_setting,
    correction_label,
    cost_cells,
    metric_cell,
    metric_columns,
    metric_title,
)

NOTE = (
    "Second lines: the paired difference to the row in brackets and its 95 % interval over the same seeds; "
    "* where that does not hold 0."
)
_ENDS = ("value", "low", "high")


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


def sections(rows: Sequence[Mapping[str, Any]], *, details: bool = False) -> tuple[list[str], list[Section]]:
    """Head and sections of what :func:`ptqd.experiments.compare.compare_runs` found."""
    metrics = metric_columns(rows, details=details)
    several = any(row["run"] for row in rows)
    head = ["run"] * several + [
        "recipe",
        "correction",
        *(f"{metric_title(rows, name)} ({METRICS[name][1]})" for name in metrics),
        *COST_COLUMNS,
    ]
    found = []
    for title, group in by_setting(rows):
        lines = []
        for row in group:
            names = [row["run"]] * several + [row["recipe"], correction_label(row["correction"])]
            if row["chosen"]:
                names[-1] = f"[{names[-1]}]"
            lines.append(
                [Cell(text) for text in names]
                + [_compared(row, name) for name in metrics]
                + [Cell(text) for text in cost_cells(row)]
            )
        found.append(Section(title, lines))
    return head, found


def _compared(row: Mapping[str, Any], name: str) -> Cell:
    value = " ".join(metric_cell(row, name)).strip()
    metric = row["differences"].get(name)
    if metric is None:
        return Cell(value)
    low, high = metric["low"], metric["high"]
    told = not low <= 0 <= high
    shift, *ends = (metric_cell({"metrics": {name: {**metric, "value": metric[end]}}}, name)[0] for end in _ENDS)
    difference = f"{'' if shift.startswith('-') else '+'}{shift} [{', '.join(ends)}]{'*' if told else ''}"
    better = (metric["value"] < 0) == (METRICS[name][1] == "lower")
    return Cell(value, difference, ("better" if better else "worse") if told else "")


def terminal(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """For rich, a table for each setting: what is better in green, what is worse in red."""
    head, found = sections(rows)
    for section in found:
        table = Table(title=section.title, caption=NOTE)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i >= len(head) - len(COST_COLUMNS) else "left")
        for row in section.rows:
            table.add_row(*(_rich(cell) for cell in row))
        yield table


def _rich(cell: Cell) -> str:
    value, difference = escape(cell.value), escape(cell.difference)
    colour = {"better": "green", "worse": "red"}.get(cell.verdict)
    below = f"[{colour}]{difference}[/]" if colour else difference
    return f"{value}\n{below}" if difference else value


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table; what is better is bold, what is worse in italics."""
    marks = {"better": "**", "worse": "_"}

    def text(cell: Cell) -> str:
        mark, value = marks.get(cell.verdict, ""), cell.value.replace("|", r"\|")
        return f"{value}<br>{mark}{cell.difference}{mark}" if cell.difference else value

    head, found = sections(rows)
    lines = [head, ["---"] * len(head)]
    for section in found:
        lines.append([f"**{section.title}**", *[""] * (len(head) - 1)])
        lines += [[text(cell) for cell in row] for row in section.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{NOTE}\n"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """A page of its own."""

    def text(cell: Cell) -> str:
        below = f'<br><span class="{cell.verdict}">{html.escape(cell.difference)}</span>' if cell.difference else ""
        return html.escape(cell.value) + below

    head, found = sections(rows, details=True)
    lines = [_html_row(head, "th", html.escape)]
    for section in found:
        lines.append(f'<tr><th class="setting" colspan="{len(head)}">{html.escape(section.title)}</th></tr>')
        lines += [_html_row(row, "td", text) for row in section.rows]
    style = (
        "body{font:15px system-ui,sans-serif;margin:2rem}table{border-collapse:collapse}"
        "td,th{padding:.35rem .8rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top;white-space:nowrap}"
        ".setting{padding-top:1.2rem}.better{color:#087a2e}.worse{color:#b3261e}"
    )
    body = f"<h1>Compared</h1>\n<table>\n{chr(10).join(lines)}\n</table>\n<p>{NOTE}</p>"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Compared</title><style>{style}</style>'
        f"<body>{body}</body></html>\n"
    )


def _html_row(cells: Sequence[Any], tag: str, text: Callable[[Any], str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{text(cell)}</{tag}>' for cell in cells)}</tr>"


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "±": r"$\pm$",
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
}


def latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """A tabular for booktabs and makecell; what is better is bold, what is worse in italics."""
    marks = {"better": r"\textbf{%s}", "worse": r"\textit{%s}"}

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(c, c) for c in text)

    def text(cell: Cell) -> str:
        if not cell.difference:
            return f"{{{escaped(cell.value)}}}"  # braces: a row that begins with a bracket
        below = marks.get(cell.verdict, "%s") % escaped(cell.difference)
        return rf"\makecell[l]{{{escaped(cell.value)}\\{below}}}"

    head, found = sections(rows)
    lines = [rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", " & ".join(map(escaped, head)) + r" \\"]
    for section in found:
        lines += [r"\midrule", rf"\multicolumn{{{len(head)}}}{{l}}{{\textbf{{{escaped(section.title)}}}}} \\"]
        lines += [" & ".join(text(cell) for cell in row) + r" \\" for row in section.rows]
    lines += [r"\bottomrule", r"\end{tabular}", f"% {NOTE}"]
    return "\n".join(lines) + "\n"
