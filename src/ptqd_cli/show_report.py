"""What a run ends with: its page, and its table in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from ptqd_cli.options import show

if TYPE_CHECKING:
    from ptqd.experiments.results import Report


def show_report(report: "Report", folder: Path, *, wide: bool = False) -> None:
    """Write ``report.html`` and print the table."""
    from ptqd.experiments.report.page import write_page
    from ptqd.experiments.report.speed import speed_table
    from ptqd.experiments.report.table import terminal_table
    from ptqd.experiments.results import REPORT
    from ptqd.progress import busy

    with busy("writing the report"):
        page = write_page(report, folder)
    show(terminal_table(report.rows, wide=wide), width=200 if wide else 100)
    if report.speed is not None:
        show(speed_table(report.speed), width=160)
    print(f"{folder / REPORT}\n{page}")
