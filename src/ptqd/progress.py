"""Progress bars, on stderr."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")

console = Console(stderr=True)


def track(items: Sequence[T], title: str | None) -> Iterator[T]:
    """Iterate, under a progress bar where there is a title and a terminal."""
    shown = title is not None and console.is_terminal
    yield from rich_track(items, title or "", console=console, transient=True) if shown else items


def busy(title: str | None) -> AbstractContextManager[Any]:
    """A spinner for the block's time, where there is a title and a terminal."""
    return nullcontext() if title is None or not console.is_terminal else console.status(title)
