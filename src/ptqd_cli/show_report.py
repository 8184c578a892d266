"""What a run ends with: its page, and its table in the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from ptqd_cli.options import show, tell

if TYPE_CHECKING:
    from ptqd.experiments.results import Report


def show_report(report: "Report", folder: Path, *, wide: bool = False, may_fail: bool = False) -> None:
    """Print the table, and write ``report.html``; see :func:`show_page`."""
    from ptqd.experiments.report.speed import speed_table
    from ptqd.experiments.report.table import terminal_table
    from ptqd.experiments.results import REPORT

    show(terminal_table(report.rows, wide=wide), width=200 if wide else 100)
    for plan in report.plans:
        if plan.outcome:
            tell(plan.outcome)
    if report.speed is not None:
        show(speed_table(report.speed), width=160)
    tell(str(folder / REPORT))
    show_page(report, folder, may_fail=may_fail)


def show_page(report: "Report", folder: Path, *, may_fail: bool = False, quiet: bool = False) -> None:
    """Write ``report.html``, and say where it is, or what it lacks.

    Args:
        report: of the run.
        folder: where it goes.
        may_fail: the folder may be one that only can be read, or somebody else's; that is said.
        quiet: say it on standard error, and nothing where all is well.
    """
    from ptqd.errors import InputError, MissingDependencyError
    from ptqd.experiments.report.page import write_page
    from ptqd.outputs import say
    from ptqd.progress import busy

    kinds = (MissingDependencyError, InputError) if may_fail else (MissingDependencyError,)
    try:
        with busy("writing the report"):
            page = write_page(report, folder)
    except kinds as error:
        (say if quiet else tell)(f"no page: {error}")
    else:
        if not quiet:
            tell(str(page))
