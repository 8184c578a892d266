"""The table of ``ptqd quantize --explain``."""

from collections.abc import Sequence

from rich.table import Table

from ptqd.experiments.report.rendering import FOLDED, KEPT, cell
from ptqd.quantization.explain import LayerReport


def layer_table(reports: Sequence[LayerReport]) -> Table:
    """A line for each layer, that first whose error the denoiser's output shows most."""
    title = "layers, that first whose error the denoiser's output shows most"
    if any(report.stream for report in reports):
        title += "; * reads sums of layers' outputs without a norm"
    table = Table(title=title)
    for name in ("layer", "weights", "activations", "methods"):
        table.add_column(name, **FOLDED)
    for name in ("MACs", "range", "own error", "at the output"):
        table.add_column(name, justify="right", **KEPT)
    total = sum(report.macs for report in reports) or 1
    for report in reports:
        span = "as it comes" if report.range is None else f"{report.range[0]:.3g} to {report.range[1]:.3g}"
        span += f" ({report.ranges} by step)" if report.ranges > 1 else ""
        name = f"{report.name} *" if report.stream else report.name
        table.add_row(
            *map(
                cell, (report.name + " *" * report.stream, report.weights, report.activations, " ".join(report.methods))
            ),
            f"{report.macs / 1e6:.1f} M ({report.macs / total:.1%})",
            span,
            f"{100 * report.error:.2g}%",
            f"{100 * report.effect:.2g}%",
        )
    return table
