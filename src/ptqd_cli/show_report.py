"""What a run ends with: its page, and its table in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from ptqd_cli.options import show

if TYPE_CHECKING:
    from ptqd.experiments.results import Report


def show_report(report: "Report", folder: Path, *, wide: bool = False) -> None:
    """Print the table, and write ``report.html``."""
    from ptqd.experiments.report.speed import speed_table
    from ptqd.experiments.report.table import terminal_table
    from ptqd.experiments.results import REPORT

    show(terminal_table(report.rows, wide=wide), width=200 if wide else 100)
    if report.speed is not None:
        show(speed_table(report.speed), width=160)
    print(folder / REPORT)
    show_page(report, folder)


def show_page(report: "Report", folder: Path) -> None:
    """Write ``report.html``, and say where it is, or what it lacks."""
    from ptqd.errors import MissingDependencyError
    from ptqd.experiments.report.page import write_page
    from ptqd.progress import busy

    try:
        with busy("writing the report"):
            page = write_page(report, folder)
    except MissingDependencyError as error:
        print(f"no page: {error}")
    else:
        print(page)
