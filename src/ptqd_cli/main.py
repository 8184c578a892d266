"""The entry point: parses, runs one verb, and says what went wrong in one line."""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

VERBS = (
    "convert",
    "quantize",
    "measure",
    "correct",
    "plan",
    "cost",
    "sample",
    "evaluate",
    "export",
    "bench",
    "report",
    "compare",
    "run",
    "reproduce",
    "demo",
)
SHARED = ("run", "demo", "reproduce", "measure", "plan", "sample", "evaluate")  # by several processes


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What is said beside the results.

    Attributes:
        verbose: log what is done.
        traceback: where an error came from.
    """

    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"), help="log what is done")] = False
    traceback: Annotated[bool, Parameter(help="of an error, where it came from")] = False


DIAGNOSTICS = Diagnostics()


def application(verbs: Sequence[str] = VERBS) -> App:
    """The command line with some of its verbs."""
    app = App(
        name="ptqd",
        help="Quantize any diffusion model and correct its sampler.",
        version=_version,
        default_parameter=Parameter(negative="", allow_repeating=True),
        help_format="plaintext",
    )
    for verb in verbs:
        kind = getattr(importlib.import_module(f"ptqd_cli.verbs.{verb}"), verb.capitalize())
        app.command(_command(kind), name=verb, help=kind.__doc__)
    return app


def _command(kind: Any) -> Any:
    """A verb's dataclass as a command."""

    def command(options: Any, diagnostics: Any = DIAGNOSTICS) -> int:
        return _run(options, diagnostics)

    if all(field.default is not MISSING for field in fields(kind)):  # cyclopts wants a default where all have one
        command.__defaults__ = (kind(), DIAGNOSTICS)
    command.__annotations__ = {"options": kind, "diagnostics": Diagnostics, "return": int}
    return command


def _version() -> str:
    from importlib.metadata import version

    return version("ptqd")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for anything the user can mend, said in one line."""
    words = _with_values(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words and words[0] in VERBS else None
    if words in ([], ["-h"]):
        words = ["--help"]
    try:
        app = application(VERBS if verb is None else (verb,))
        result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"ptqd: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def _with_values(words: Sequence[str]) -> list[str]:
    """The words with ``hub`` behind an ``--lpips`` that has no value of its own."""
    complete: list[str] = []
    for word, following in zip_longest(words, words[1:]):
        complete.append(word)
        if word == "--lpips" and (following is None or following.startswith("-")):
            complete.append("hub")
    return complete


def _run(options: Any, diagnostics: Diagnostics) -> int:
    from ptqd.errors import InputError, PtqdError

    logging.basicConfig(
        level=logging.INFO if diagnostics.verbose else logging.WARNING, format="%(name)s: %(message)s", force=True
    )
    verb = type(options).__name__.lower()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and verb not in SHARED:
            raise InputError(f"this verb is for one process; processes share {', '.join(SHARED)}")
        return options.run() or 0
    except KeyboardInterrupt:
        print("ptqd: interrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    except (PtqdError, OSError) as error:
        if diagnostics.traceback:
            traceback.print_exc()
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and not isinstance(error, PtqdError):
            message = f"{error.filename or 'a file'}: {error.strerror or error}; check the disk and the path"
        print(f"ptqd: {message}", file=sys.stderr)
        return 2
