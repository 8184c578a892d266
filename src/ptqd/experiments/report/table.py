"""A report's rows as text: for the terminal, and for the page."""

from collections.abc import Sequence

from rich.table import Table

from ptqd.experiments.report.rendering import FOLDED, KEPT, cell, markdown_cell
from ptqd.experiments.results import Interval, Row, by_settings
from ptqd.metrics.registry import METRICS


def correction_label(correction: str) -> str:
    """``+CNC +BC`` of ``"cnc+bc"``.

    >>> correction_label("cnc+bc"), correction_label("none"), correction_label("auto")
    ('+CNC +BC', 'none', 'auto')
    """
    return correction if correction in ("none", "auto") else " ".join(f"+{m.upper()}" for m in correction.split("+"))


def metric_columns(rows: Sequence[Row], *, details: bool = False) -> list[str]:
    """The metrics that at least one row has, in the table's order; details only if wanted."""
    shown = [name for name, spec in METRICS.items() if details or not spec.detail or any(row.inception for row in rows)]
    return [name for name in shown if any(name in row.metrics for row in rows)]


def metric_title(name: str, *, inception: bool) -> str:
    """A column's title: FID, sFID and KID only of Inception's features."""
    spec = METRICS[name]
    return spec.inception_title or spec.title if inception else spec.title


def metric_cell(metric: Interval | None, name: str) -> tuple[str, str]:
    """A metric's value and the half width of its 95 % interval, as text."""
    if metric is None or metric.value is None:
        return "-", ""
    factor, digits = METRICS[name].factor, METRICS[name].digits
    value = f"{metric.value * factor:.{digits}f}"
    if metric.low is None or metric.high is None:
        return value, ""
    return value, f"±{(metric.high - metric.low) / 2 * factor:.{digits}f}"


def cost_cells(row: Row) -> tuple[str, str, str, str]:
    """Bit operations (G an image), their ratio to FP32, weights on disk (KB), seconds."""
    giga = row.bops / 1e9
    return (
        f"{giga:,.0f}" if giga >= 100 else f"{giga:.3g}",
        f"{row.bops_ratio:.1f}x",
        f"{row.bytes / 1e3:,.0f}",
        f"{row.seconds:.0f}",
    )


COST_COLUMNS = ("GBOPs an image", "fewer", "denoiser KB", "s")
NARROW = ("psnr", "frechet_distance_to_full_precision", "lpips", "latent_distance")  # what fits 100 columns
NARROW_METRICS = 2


def markdown_table(rows: Sequence[Row]) -> str:
    """One Markdown table of all settings."""
    metrics, inception = metric_columns(rows), all(row.inception for row in rows)
    head = ["recipe", "correction", *(metric_title(m, inception=inception) for m in metrics), *COST_COLUMNS]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for text, group in by_settings(rows):
        lines.append([text, *[""] * (len(head) - 1)])
        for row in group:
            cells = [" ".join(metric_cell(row.metrics.get(m), m)).strip() for m in metrics]
            lines.append([row.key.quantized, correction_label(row.key.correction), *cells, *cost_cells(row)])
    escaped = [lines[0], lines[1], *([*map(markdown_cell, line)] for line in lines[2:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def terminal_table(rows: Sequence[Row], *, wide: bool = False) -> Table:
    """One table of all settings: what fits 100 columns, or every metric and cost."""
    samples = sorted({row.samples for row in rows})
    table = Table(title=cell(f"{rows[0].model}: {'/'.join(map(str, samples))} samples a row, 95 % intervals"))
    table.add_column("recipe", **FOLDED)
    table.add_column("correction", **FOLDED)
    metrics, inception = metric_columns(rows), all(row.inception for row in rows)
    costs: tuple[str, ...] = COST_COLUMNS
    if not wide:
        metrics = [name for name in NARROW if name in metrics][:NARROW_METRICS] or metrics[:NARROW_METRICS]
        costs = ("fewer BOPs", "KB")
    for name in [*(metric_title(m, inception=inception) for m in metrics), *costs]:
        table.add_column(name, justify="right", **KEPT)
    for text, group in by_settings(rows):
        table.add_section()
        table.add_row(cell(text, "bold"))
        for row in group:
            cells = [" ".join(metric_cell(row.metrics.get(m), m)).strip() for m in metrics]
            cost = cost_cells(row) if wide else cost_cells(row)[1:3]
            table.add_row(cell(row.key.quantized), cell(correction_label(row.key.correction)), *cells, *cost)
    return table
