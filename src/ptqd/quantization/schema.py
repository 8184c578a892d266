"""Frozen dataclasses from plain values, strict about keys and types; of several dataclasses ``name`` says which."""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from ptqd.errors import InputError

T = TypeVar("T")


def build(cls: type[T], values: object, where: str) -> T:
    """A dataclass from plain values: nested, strict about keys and types."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a table; got {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise InputError(f"{where} has the unknown key {key!r}; known are {', '.join(known)}")
    converted = {k: _convert(hints[k], v, f"{where}, key {k!r}") for k, v in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:  # a required key is missing
        raise InputError(f"{where}: {str(error).split(') ')[-1]}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _convert(hint: object, value: object, where: str) -> Any:  # noqa: PLR0911  # a case for each kind of hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "registered"):  # a base class whose subclasses are known by name
        return _one_of(hint.registered, value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list; got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        kinds: dict[str, Any] = {getattr(kind, "name", ""): kind for kind in args if dataclasses.is_dataclass(kind)}
        if kinds:
            return _one_of(kinds, value, where)
        literal = [kind for kind in args if typing.get_origin(kind) is Literal]
        if literal:
            return None if value is None else _convert(literal[0], value, where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} must be one of {', '.join(map(repr, args))}; got {value!r}")
        return value
    allowed = args if origin is types.UnionType else (hint,)
    if type(value) is int and abs(value) >= 1 << 63:
        raise InputError(f"{where} is too large a number")
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed and not (value is None and type(None) in allowed):
        names = " or ".join("none" if a is type(None) else a.__name__ for a in allowed)
        raise InputError(f"{where} must be {names}; got {value!r}")
    return value


def _one_of(kinds: dict[str, Any], value: Any, where: str) -> Any:
    """The dataclass that a table's ``name`` asks for."""
    if not isinstance(value, dict) or "name" not in value:
        raise InputError(f"{where} must be a table with a name, one of {', '.join(kinds)}; got {value!r}")
    if not isinstance(value["name"], str) or value["name"] not in kinds:
        raise InputError(f"{where} has the unknown name {value['name']!r}; known are {', '.join(kinds)}")
    return build(kinds[value["name"]], {k: v for k, v in value.items() if k != "name"}, where)
