"""Progress on stderr: a bar on a terminal; in a log, a line a minute."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track as rich_track

from ptqd import processes

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 60.0

console = Console(stderr=True)


def track(items: Sequence[T], title: str | None) -> Iterator[T]:
    """Iterate and show how far it got; nothing is shown where there is no title, and by the main process alone."""
    if title is None or not processes.is_main():
        yield from items
    elif console.is_terminal:
        yield from rich_track(items, title, console=console, transient=True)
    else:
        last = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - last >= SECONDS_BETWEEN_LINES:
                last = now
                console.print(f"{title}: {done} of {len(items)}", highlight=False)
            yield item


def busy(title: str | None) -> AbstractContextManager[Any]:
    """A spinner for the block's time, where there is a title and a terminal."""
    shown = title is not None and console.is_terminal and processes.is_main()
    return console.status(str(title)) if shown else nullcontext()
