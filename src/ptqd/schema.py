"""The one strict reader of what files say: plain values become the classes that are worked with, or one error."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from ptqd.errors import ArtifactError
from ptqd.files import read_json

T = TypeVar("T")

AGAIN = "run the command that wrote it again"


def typed(values: object, kind: type[T], where: str, remedy: str = AGAIN) -> T:
    """Plain values as a class, a mapping or a sequence of some, strict about their types.

    Args:
        values: as JSON has them.
        kind: dataclass, or a type such as ``dict[str, Interval]``.
        where: they come from, for messages.
        remedy: what to do about damage.

    Raises:
        ArtifactError: a key is missing or of another type.
    """
    try:
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged or of another version ({error}); {remedy}") from error


def read_as(path: Path, kind: type[T], remedy: str = AGAIN) -> T:
    """A JSON file as a class; see :func:`typed`."""
    return typed(read_json(path), kind, str(path), remedy)


def check_version(values: object, known: int, where: str, *, key: str = "version") -> None:
    """Refuse plain values of a newer version.

    Raises:
        ArtifactError: they are, or say no version.
    """
    version = values.get(key) if isinstance(values, Mapping) else None
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{where} is of another version of ptqd (its {key} is {version!r}); {AGAIN}")
    if version > known:
        raise ArtifactError(f"{where} is of {key} {version}; this ptqd reads up to {known}: use a newer one")


def nan_for_null(values: object, names: Sequence[str]) -> Any:
    """Plain values with NaN where files have null, as JSON has no number for what is infinite or NaN.

    Args:
        values: nested lists and mappings.
        names: keys of numbers.
    """
    if isinstance(values, list | tuple):
        return [nan_for_null(value, names) for value in values]
    if isinstance(values, Mapping):
        return {
            key: math.nan if value is None and key in names else nan_for_null(value, names)
            for key, value in values.items()
        }
    return values


def numbers(values: object, where: str, depth: int = 3) -> Any:
    """Nested lists of finite numbers, even in shape, as tuples.

    Raises:
        ArtifactError: anything else.
    """
    if isinstance(values, list | tuple) and depth:
        rows = tuple(numbers(value, where, depth - 1) for value in values)
        if len({len(row) if isinstance(row, tuple) else -1 for row in rows}) > 1:
            raise ArtifactError(f"{where} has rows of different lengths; {AGAIN}")
        return rows
    if isinstance(values, bool) or not isinstance(values, int | float) or not abs(values) < 1e300:
        raise ArtifactError(f"{where} must be numbers, evenly nested; got {str(values)[:60]!r}: {AGAIN}")
    return values


def shape_of(values: Any) -> tuple[int, ...]:
    """Of what :func:`numbers` gave."""
    return (len(values), *(shape_of(values[0]) if values else ())) if isinstance(values, tuple) else ()


def check_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[Any, ...]], where: str, *, finite: bool = True
) -> None:
    """Refuse tensors that are missing, or of another shape, or hold NaN or infinite values.

    Args:
        tensors: by name.
        shapes: of those that have to be there; a size that is text stands for the same number wherever it stands, and
            None for any number.
        where: they come from.
        finite: False lets NaN and infinite values pass.

    Raises:
        ArtifactError: so they are.
    """
    sizes: dict[str, int] = {}
    for name, wanted in shapes.items():
        if name not in tensors:
            raise ArtifactError(f"{where} lacks {name}; {AGAIN}")
        shape = tuple(tensors[name].shape)
        fits = len(shape) == len(wanted) and all(_fits(*pair, sizes) for pair in zip(shape, wanted, strict=True))
        if not fits:
            known = [sizes.get(size, size) if isinstance(size, str) else size for size in wanted]
            text = ", ".join("any" if size is None else str(size) for size in known)
            raise ArtifactError(f"{where}: {name} is of shape {shape} instead of ({text}); {AGAIN}")
        if finite and tensors[name].is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            raise ArtifactError(f"{where}: {name} holds NaN or infinite values; {AGAIN}")


def _fits(size: int, wanted: Any, sizes: dict[str, int]) -> bool:
    if wanted is None:
        return True
    return bool(sizes.setdefault(wanted, size) == size if isinstance(wanted, str) else size == wanted)
