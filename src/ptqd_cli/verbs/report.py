"""``ptqd report``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ptqd_cli.options import tell


@Parameter(name="*")
@dataclass(frozen=True)
class Report:
    """Write a run folder's report.html and print its table."""

    folder: Annotated[Path, Parameter(name="run", help="run folder with a report.json")]
    _: KW_ONLY
    markdown: Annotated[bool, Parameter(help="print the table as Markdown")] = False
    wide: Annotated[bool, Parameter(help="print every metric and cost")] = False

    def run(self) -> None:
        """Render the report that is there."""
        from ptqd import processes
        from ptqd.experiments import results
        from ptqd.experiments.report.table import markdown_table
        from ptqd_cli.show_report import show_page, show_report

        if not processes.is_main():
            return
        report = results.Report.load(self.folder)
        if self.markdown:
            show_page(report, self.folder, may_fail=True, quiet=True)
            tell(markdown_table(report.rows))
        else:
            show_report(report, self.folder, wide=self.wide, may_fail=True)
