"""The entry point: parses, runs one verb, and says what went wrong in one line."""

import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from ptqd_cli.console import Output

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
    "push",
    "bench",
    "report",
    "compare",
    "run",
    "reproduce",
    "demo",
)
_COUNTED = "steps eta guidance samples batch seed measured groups repeats threads classes"
COUNTS = tuple(f"--{name}" for name in _COUNTED.split())  # options that take a number
BROKEN_PIPE = 141  # as of what SIGPIPE ends
SHARED = ("run", "demo", "reproduce", "quantize", "measure", "plan", "correct", "sample", "evaluate")  # by processes


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
        console=Output(),
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
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that has not all letters
    try:
        status = _main(_with_values(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # who read has enough
        status = BROKEN_PIPE
    except OSError as error:
        status = _refuse(f"standard output: {error.strerror or error}")
    if status in (2, BROKEN_PIPE):
        _forget_output()
    return status


def _forget_output() -> None:
    """Nothing is said of what standard output refused as Python ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(words: list[str]) -> int:
    verb = words[0] if words and words[0] in VERBS else None
    if words in ([], ["-h"]):
        words = ["--help"]
    for before, word in zip(("", *words), words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if not word or (equals and not value):
            return _refuse(f"the value of {option or 'the first argument'} is empty; is a variable unset?")
        if option in COUNTS and any(c.isdecimal() and not c.isascii() for c in value):
            return _refuse(f"{option} {value!r} is no number in the digits 0 to 9")
    try:
        app = application(VERBS if verb is None else (verb,))
        result = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _refuse(str(error))
    return result if isinstance(result, int) else 0


def _refuse(message: str) -> int:
    from ptqd.names import shown

    with suppress(OSError):
        print(f"ptqd: {shown(' '.join(message.split()))}", file=sys.stderr, flush=True)
    return 2


def _with_values(words: Sequence[str]) -> list[str]:
    """The words with ``hub`` behind an ``--lpips`` that has no value of its own."""
    complete: list[str] = []
    for word, following in zip_longest(words, words[1:]):
        complete.append(word)
        if word == "--lpips" and (following is None or following.startswith("-")):
            complete.append("hub")
    return complete


class _Log(logging.Formatter):
    """What is logged, on one line, whatever names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        from ptqd.names import shown_lines

        return shown_lines(super().format(record))


def _run(options: Any, diagnostics: Diagnostics) -> int:
    try:
        from ptqd.errors import InputError
        from ptqd.processes import check_launcher
    except (ImportError, OSError, MemoryError) as error:
        if diagnostics.traceback:
            traceback.print_exc()
        return _refuse(
            f"torch or diffusers cannot be loaded ({error}); is there memory enough, are they installed whole?"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(_Log("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if diagnostics.verbose else logging.WARNING, handlers=[handler], force=True)
    verb = type(options).__name__.lower()
    try:
        if check_launcher() > 1 and verb not in SHARED:
            raise InputError(f"this verb is for one process; processes share {', '.join(SHARED)}")
        return options.run() or 0
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _refuse("interrupted; the same command resumes where it stopped") and 130
    except Exception as error:
        if diagnostics.traceback:
            traceback.print_exc()
        return _refuse(_explained(error))


def _explained(error: Exception) -> str:
    """What a person can do about an error; a bug is called one."""
    from ptqd.errors import PtqdError, lack_of

    lack = lack_of(error)
    if lack is not None:
        return str(lack)
    if isinstance(error, PtqdError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file, or standard output'}: {error.strerror}; check the disk and the path"
    return (
        f"a bug in ptqd, or in a library it calls: {type(error).__name__}: {str(error)[:400]}; --traceback shows "
        "where: please report it"
    )
