"""The table of ``ptqd quantize --explain``."""

from collections.abc import Sequence

from rich.table import Table

from ptqd.experiments.report.rendering import FOLDED, KEPT, cell
from ptqd.quantization.explain import LayerReport


def layer_table(reports: Sequence[LayerReport]) -> Table:
    """A line for each layer, worst first."""
    table = Table(title="layers, the one whose own output errs most first")
    for name in ("layer", "weights", "activations", "methods"):
        table.add_column(name, **FOLDED)
    for name in ("MACs", "range", "error"):
        table.add_column(name, justify="right", **KEPT)
    total = sum(report.macs for report in reports) or 1
    for report in reports:
        span = "as it comes" if report.range is None else f"{report.range[0]:.3g} to {report.range[1]:.3g}"
        span += f" ({report.ranges} by step)" if report.ranges > 1 else ""
        table.add_row(
            *map(cell, (report.name, report.weights, report.activations, " ".join(report.methods))),
            f"{report.macs / 1e6:.1f} M ({report.macs / total:.1%})",
            span,
            f"{report.error:.2%}",
        )
    return table
