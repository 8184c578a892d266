"""A Recipe: how many bits, where, and how the ranges are found."""

import dataclasses
import json
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

from ptqd.affine import Grid
from ptqd.errors import InputError
from ptqd.observers import RangeMethod

T = TypeVar("T")


@dataclass(frozen=True)
class Quantizer:
    """One kind of quantizer.

    Attributes:
        bits: 2 to 8.
        symmetric: signed grid around zero, or unsigned with a zero point.
        range: how the range is found: ``"minmax"``, ``"percentile"`` or ``"pnorm"``.
        percentile: share of values inside the range, for ``"percentile"``.
        p: the norm, for ``"pnorm"``.
    """

    bits: int = 8
    symmetric: bool = True
    range: RangeMethod = "pnorm"
    percentile: float = 99.9
    p: float = 2.4

    def __post_init__(self) -> None:
        _ = self.grid
        if not 0 < self.percentile <= 100:
            raise InputError(f"percentile must be in (0, 100]; got {self.percentile}")
        if self.p <= 0:
            raise InputError(f"p must be positive; got {self.p}")

    @property
    def grid(self) -> Grid:
        """The integers it rounds to."""
        return Grid(self.bits, self.symmetric)


@dataclass(frozen=True)
class Rule:
    """Other bits for the layers whose dotted name matches; the last rule that matches a layer wins.

    Attributes:
        match: a shell pattern over module names, such as ``"conv_in"`` or ``"*.to_k"``.
        weight_bits: bits instead of the recipe's.
        activation_bits: bits instead of the recipe's.
        skip: leave the layer in full precision.
        optional: the rule may match no layer, which is an error otherwise.
    """

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    skip: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.activation_bits):
            if bits is not None:
                Grid(bits, symmetric=True)


_UNETS, _TRANSFORMERS = ("conv_in", "conv_out"), ("*_embed.proj", "x_embedder", "proj_in", "proj_out", "proj_out_2")
FIRST_AND_LAST = tuple(Rule(name, 8, 8, optional=True) for name in (*_UNETS, *_TRANSFORMERS))


@dataclass(frozen=True)
class Recipe:
    """How a denoiser is quantized.

    Weights have one scale per output channel; activations one per tensor. ``"w4a8"`` is shorthand for a recipe:
    4-bit weights, 8-bit activations, attention products included, first and last layer at 8 bits. ``"w4a4+8"`` has
    ranges for 4-bit activations too, so that a :class:`ptqd.StepPlan` can choose between them step by step.

    Attributes:
        weights: of convolutions and linear layers.
        activations: inputs of these layers, and the operands of the attention products.
        attention: quantize the products q.k and p.v as well.
        step_bits: further widths that activations get ranges for; a plan chooses among these and ``activations.bits``.
            A rule's ``activation_bits`` are not for a plan to change.
        softmax_bits: of the attention probabilities (Q-Diffusion, arXiv 2302.04304, keeps them at 8 or more).
        calibration_samples: samples whose whole trajectories the activation ranges are found on.
        rules: exceptions by layer name.

    >>> Recipe.parse("w4a8").weights.bits
    4
    """

    weights: Quantizer = field(default_factory=Quantizer)
    activations: Quantizer = field(default_factory=lambda: Quantizer(symmetric=False))
    step_bits: tuple[int, ...] = ()
    attention: bool = True
    softmax_bits: int = 8
    calibration_samples: int = 32
    rules: tuple[Rule, ...] = FIRST_AND_LAST

    def __post_init__(self) -> None:
        for bits in (self.softmax_bits, *self.step_bits):
            Grid(bits, symmetric=False)
        if self.calibration_samples < 1:
            raise InputError(f"calibration_samples must be at least 1; got {self.calibration_samples}")

    @classmethod
    def parse(cls, text: "str | Path | Recipe") -> "Recipe":
        """A recipe from a shorthand (``"w4a8"``), a TOML file's path, or a recipe itself.

        Raises:
            InputError: neither of these, or an unknown key or a value of the wrong type in the file.
        """
        if isinstance(text, Recipe):
            return text
        short = re.fullmatch(r"w(\d+)a(\d+(?:\+\d+)*)", str(text))
        if short:
            *fewer, most = sorted({int(bits) for bits in short[2].split("+")})
            return cls(Quantizer(int(short[1])), Quantizer(most, symmetric=False), tuple(fewer))
        path = Path(text)
        if path.suffix != ".toml":
            raise InputError(f"recipe {str(text)!r} is neither a shorthand such as 'w4a8' nor the path of a .toml file")
        if not path.is_file():
            raise InputError(f"recipe file {path} does not exist")
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"recipe file {path} is not TOML: {error}") from error
        return cls.from_dict(values, f"recipe file {path}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "Recipe":
        """A recipe from plain values, as :meth:`to_dict` gives them; unknown keys are errors."""
        return _build(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @property
    def name(self) -> str:
        """Shorthand of its main bit widths."""
        return f"w{self.weights.bits}a{'+'.join(map(str, self.widths))}"

    @property
    def widths(self) -> tuple[int, ...]:
        """The activation bits that ranges are found for, ascending."""
        return tuple(sorted({self.activations.bits, *self.step_bits}))

    def rule_for(self, layer: str) -> Rule | None:
        """The last rule that matches a layer's dotted name."""
        return next((rule for rule in reversed(self.rules) if fnmatchcase(layer, rule.match)), None)


def _build(cls: type[T], values: Any, where: str) -> T:
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


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list; got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where} must be one of {', '.join(map(repr, args))}; got {value!r}")
        return value
    allowed = args if origin is types.UnionType else (hint,)
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed and not (value is None and type(None) in allowed):
        names = " or ".join("none" if a is type(None) else a.__name__ for a in allowed)
        raise InputError(f"{where} must be {names}; got {value!r}")
    return value
