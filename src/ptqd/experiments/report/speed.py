"""The table of ``ptqd bench``, and of the report's seconds an image."""

from rich.table import Table

from ptqd.experiments.report.rendering import FOLDED, KEPT, cell
from ptqd.experiments.results import SpeedReport, SpeedRow

COLUMNS = (
    "engine",
    "precision",
    "s/image",
    "range",
    "x torch FP32",
    "x fastest FP32",
    "peak MB",
    "denoiser MB",
    "of FP32",
    "PSNR to FP dB",
)


def speed_cells(row: SpeedRow) -> list[str]:
    """A row's cells, in the columns' order."""
    psnr = row.psnr
    return [
        row.engine,
        row.precision,
        f"{row.seconds:.4f}",
        f"{min(row.all_seconds):.4f} to {max(row.all_seconds):.4f}",
        f"{row.of_torch:.2f}",
        f"{row.of_fastest:.2f}",
        f"{row.peak / 1e6:.0f}",
        f"{row.bytes / 1e6:.1f}",
        f"{row.bytes_of_full:.1%}",
        "" if psnr is None else f"{psnr:.1f}",
    ]


def speed_table(report: SpeedReport) -> Table:
    """A line for each engine and kind of numbers."""
    table = Table(title=cell(report.title))
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right", **(FOLDED if i < 2 else KEPT))
    for row in report.rows:
        table.add_row(*map(cell, speed_cells(row)))
    return table
