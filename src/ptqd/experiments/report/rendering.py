"""Templates, where jinja2 is installed."""

from typing import TYPE_CHECKING, Any

from ptqd.errors import MissingDependencyError

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
    return Environment(
        loader=loader, autoescape=select_autoescape(("html",)), trim_blocks=True, lstrip_blocks=True, **options
    )
