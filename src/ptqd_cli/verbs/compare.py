"""``ptqd compare``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ptqd_cli.options import JudgeOptions, show, tell


@Parameter(name="*")
@dataclass(frozen=True)
class Compare:
    """Compare the rows of run folders, on the same seeds: one table with paired differences and cost."""

    folders: Annotated[tuple[Path, ...], Parameter(name="run", help="run folders with a report.json, sampled alike")]
    _: KW_ONLY
    against: Annotated[
        str | None,
        Parameter(
            help="row that others are compared with: 'w4a8 none', after the folder's name where there are several"
        ),
    ] = None
    judging: JudgeOptions = JudgeOptions()
    format: Literal["terminal", "markdown", "html", "latex"] = "terminal"
    out: Annotated[Path | None, Parameter(help="file to write (default: standard output)")] = None
    json: Annotated[Path | None, Parameter(help="file to write all values to")] = None

    def run(self) -> None:
        """Compare, and print or write the table."""
        import msgspec

        from ptqd.errors import InputError
        from ptqd.experiments.compare import check_rows, compare_runs
        from ptqd.experiments.report import comparison
        from ptqd.files import write_json, write_text
        from ptqd.outputs import check_file, check_files, is_json_of, is_text_of
        from ptqd.progress import busy

        if not self.folders:
            raise InputError("give a run folder with a report.json")
        if self.out is not None and self.format == "terminal":
            raise InputError("--out goes with --format markdown, html or latex")
        check_files({"--out": self.out, "--json": self.json}, self.folders)
        check_file(self.json, is_json_of("differences", "against", each=True), "result of 'ptqd compare'")
        check_file(self.out, is_text_of(comparison.NOTE), "table of 'ptqd compare'")
        check_rows(self.folders, self.against)
        judge = self.judging.load("fashion")
        with busy("comparing"):
            rows = compare_runs(self.folders, judge, self.against)
        if self.json is not None:
            write_json(self.json, msgspec.to_builtins(rows))
        if self.format == "terminal":
            show(*comparison.terminal(rows), width=240)
            return
        text = {"markdown": comparison.markdown, "html": comparison.page, "latex": comparison.latex}[self.format](rows)
        if self.out is None:
            tell(text, end="")
        else:
            write_text(self.out, text)
