"""A model's options as a flat mapping, each of which is asked for once; what nobody asked for is an error."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptqd.errors import InputError
from ptqd.files import read_json, read_toml


def read_flags(path: Path) -> dict[str, Any]:
    """Options from a JSON or TOML file.

    Raises:
        InputError: it is neither, or holds no mapping.
    """
    values = read_json(path) if path.suffix == ".json" else read_toml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} should map the names of options to values; it holds {type(values).__name__}")
    return values


class Flags:
    """Options by name.

    Args:
        values: of them.
        where: they come from, for messages.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.left, self.where = dict(values), where

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def wrong(self, name: str, wanted: str, value: object) -> InputError:
        """An error about a value."""
        return InputError(f"{self.where}: {name} should be {wanted}; it is {value!r}")

    def yes(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.left.pop(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def whole(self, name: str, default: int | None, least: int = 1) -> int:
        """A whole number, which has to be there where there is no default."""
        value = self._given(name, default)
        if type(value) is not int or value < least:
            raise self.wrong(name, f"a whole number of at least {least}", value)
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(name, "a number above 0", value)
        return float(value)

    def text(self, name: str, default: str | None, known: Iterable[str] | None = None) -> str:
        """A text, one of those that are known."""
        value = self._given(name, default)
        if not isinstance(value, str) or (known is not None and value not in known):
            raise self.wrong(name, "a text" if known is None else " or ".join(map(repr, known)), value)
        return value

    def numbers(self, name: str, default: Iterable[float] | None, *, whole: bool = True) -> tuple[float, ...]:
        """Numbers above 0, as a list or as a text with commas."""
        value = self._given(name, default)
        items = value.split(",") if isinstance(value, str) else value
        try:
            found = tuple(float(item) for item in items)
        except (TypeError, ValueError):
            found = ()
        if not found or not all(0 < x < math.inf and (x == int(x) or not whole) for x in found):
            kind = "whole numbers" if whole else "numbers"
            raise self.wrong(name, f"{kind} above 0, such as '1,2,3,4'", value)
        return found

    def refuse_unless(self, name: str, wanted: object, why: str) -> None:
        """An option of which only one value is supported."""
        value = self.left.pop(name, wanted)
        if value != wanted:
            raise InputError(f"{self.where}: {name} {value!r} is not supported, only {wanted!r}: {why}")

    def ignore(self, *names: str) -> None:
        """Options that training alone used, or one run of sampling."""
        for name in names:
            self.left.pop(name, None)

    def done(self, what: str) -> None:
        """Nothing is left.

        Raises:
            InputError: an option that is not known.
        """
        if self.left:
            raise InputError(f"{self.where}: {next(iter(self.left))!r} is no option of {what} that is known here")

    def _given(self, name: str, default: object) -> Any:
        value = self.left.pop(name, default)
        if value is None:
            raise InputError(f"{self.where} lacks {name}")
        return value
