"""Progress on stderr: a bar on a terminal; in a log, a line a minute."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track as rich_track

from ptqd import processes
from ptqd.names import shown

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0

console = Console(stderr=True)


def track(items: Sequence[T], title: str | None) -> Iterator[T]:
    """Iterate and show how far it got; nothing is shown where there is no title, and by the main process alone."""
    if title is None or not processes.is_main():
        yield from items
    elif console.is_terminal:
        yield from rich_track(items, escape(shown(title)), console=console, transient=True)
    else:
        last = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                console.print(f"{shown(title)}: {done} of {len(items)}", highlight=False, markup=False, emoji=False)
            yield item


def announce(text: str) -> None:
    """A line, by the main process alone."""
    if processes.is_main():
        console.print(shown(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def busy(title: str | None) -> AbstractContextManager[Any]:
    """A spinner for the block's time, where there is a title and a terminal."""
    if title is None or not console.is_terminal or not processes.is_main():
        return nullcontext()
    return console.status(escape(shown(title)))
