"""Names and figures as each kind of page has them: names are data there, never markup."""

import math
import re
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ptqd.errors import MissingDependencyError
from ptqd.names import short, shown

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(**options: Any) -> "Environment":
    """An environment for this package's templates; HTML is escaped.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, select_autoescape
    except ImportError as error:
        raise MissingDependencyError("pages need jinja2, which is not installed: pip install 'ptqd[report]'") from error
    loader = PackageLoader("ptqd.experiments.report")
    options.setdefault("finalize", lambda value: shown(value) if type(value) is str else value)
    return Environment(
        loader=loader, autoescape=select_autoescape(("html",)), trim_blocks=True, lstrip_blocks=True, **options
    )


KEPT: dict[str, Any] = {"no_wrap": True}  # of a column of figures, which are never cut
FOLDED: dict[str, Any] = {"overflow": "fold"}  # of a column of names, which take more lines


def cell(text: object, style: str = "") -> Text:
    """Text of a rich table, or its title."""
    return Text(shown(text), style)


def markdown_cell(text: object) -> str:
    r"""Text of a Markdown table.

    >>> markdown_cell("a|b <i>_c_")
    'a\\|b &lt;i&gt;\\_c\\_'
    """
    plain = shown(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\|*_`#~]|\](?=\()", lambda found: f"\\{found[0]}", plain)


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "±": r"$\pm$",
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def latex_text(text: object) -> str:
    """Text of a LaTeX table."""
    return "".join(_LATEX.get(c, c) for c in shown(text))


def plot_text(text: object) -> str:
    """Text in a plot: no mathematics, not too long, and shown in a legend whatever it begins with."""
    plain = short(str(text)).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def number(value: float | None, form: str) -> str:
    """A figure; a dash where there is none.

    >>> number(1.5, ".2f"), number(None, ".2f")
    ('1.50', '-')
    """
    return "-" if value is None or not math.isfinite(value) else format(value, form)
