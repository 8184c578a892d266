"""Progress bars, on stderr."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")

console = Console(stderr=True)


def track(items: Sequence[T], title: str | None) -> Iterator[T]:
    """Iterate, under a progress bar where there is a title."""
    yield from items if title is None else rich_track(items, title, console=console, transient=True)
