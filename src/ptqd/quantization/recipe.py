"""A Recipe: how many bits, where, and how the ranges are found."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ptqd.errors import InputError
from ptqd.files import read_toml
from ptqd.quantization.methods import (
    METHODS,
    Brecq,
    ConvRot,
    Distill,
    Gptq,
    Learned,
    LowRank,
    Method,
    Smooth,
    Widen,
    check_order,
)
from ptqd.quantization.numerics.affine import MAX_BITS, WIDE, Grid, check_weight_bits
from ptqd.quantization.numerics.formats import BLOCKS, FORMAT_BITS, Format
from ptqd.quantization.numerics.range_search import RangeMethod
from ptqd.quantization.schema import build

UNSAID: Any = None  # bits that are not said: 8, or those of the format
MOST = 1_000_000  # of anything that a recipe counts
CalibrationSteps = Literal["uniform", "ptq4dm", "error"]
LayerType = Literal["conv", "linear", "attention"]


@dataclass(frozen=True)
class QuantSpec:
    """One kind of quantizer.

    Attributes:
        bits: 2 to 8 of weights, 2 to 16 of activations; those of the format where it is none of integers. 8 where
            they are not said.
        symmetric: signed grid around zero, or unsigned with a zero point; of integers.
        range: how the range of integers is found: ``"minmax"``, ``"percentile"`` or ``"pnorm"``.
        percentile: share of values inside the range, for ``"percentile"``.
        p: the norm, for ``"pnorm"``.
        format: ``"int"``, ``"e4m3"``, ``"e5m2"``, ``"mxfp4"`` or ``"nvfp4"``.
        group: of weights: inputs that share a scale; all of a row where it is 0.
        dynamic: of activations: the range of each token of a linear layer or attention, of each sample of a
            convolution, found as it comes (ViDiT-Q, Zhao et al., arXiv 2406.02540). Blocks of ``mxfp4`` and ``nvfp4``
            always are.
    """

    bits: int = UNSAID
    symmetric: bool = True
    range: RangeMethod = "pnorm"
    percentile: float = 99.9
    p: float = 2.4
    format: Format = "int"
    group: int = 0
    dynamic: bool = False

    def __post_init__(self) -> None:
        natural = FORMAT_BITS.get(self.format)
        if natural is None:
            object.__setattr__(self, "bits", MAX_BITS if self.bits is UNSAID else self.bits)
            _ = self.grid
        elif self.bits not in (UNSAID, natural):
            raise InputError(f"{self.format} has {natural} bits; got {self.bits}")
        else:
            object.__setattr__(self, "bits", natural)
        if not 0 <= self.group <= MOST:
            raise InputError(f"group must be at least 1, or 0 for whole rows; got {self.group}")
        if not 0 < self.percentile <= 100:
            raise InputError(f"percentile must be in (0, 100]; got {self.percentile}")
        if not 0 < self.p < math.inf:
            raise InputError(f"p must be positive and finite; got {self.p}")

    @property
    def grid(self) -> Grid:
        """The integers it rounds to; of a floating-point format, those that its codes take."""
        return Grid(self.bits, self.symmetric and self.format == "int")

    def of(self, bits: int) -> "QuantSpec":
        """The same with integers of other bits."""
        return replace(self, bits=bits, format="int")


@dataclass(frozen=True)
class Rule:
    """Something else for the layers whose dotted name and type match; the last rule that matches a layer wins.

    Attributes:
        match: a shell pattern over module names, such as ``"conv_in"`` or ``"*.to_k"``; an attention's own name is that
            of its products.
        weight_bits: integers of these bits instead of the recipe's.
        activation_bits: integers of these bits instead of the recipe's.
        skip: leave the layer in full precision.
        optional: the rule may match no layer, which is an error otherwise.
        type: ``"conv"``, ``"linear"`` or ``"attention"``; any where it is none.
        group: of the weights, instead of the recipe's.
        dynamic: of the activations, instead of the recipe's.
        without: methods of the recipe that pass these layers over.
        rank: of the low-rank branch, where the recipe has one, instead of the recipe's; 0 for no branch.
    """

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    skip: bool = False
    optional: bool = False
    type: LayerType | None = None
    group: int | None = None
    dynamic: bool | None = None
    without: tuple[str, ...] = ()
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and not 0 <= self.rank <= MOST:
            raise InputError(f"the rank of a rule is 0 to {MOST:,}; got {self.rank}")
        if self.weight_bits is not None:
            check_weight_bits(self.weight_bits)
        if self.activation_bits is not None:
            _ = Grid(self.activation_bits, symmetric=True)
        for name in self.without:
            if name not in METHODS:
                raise InputError(f"unknown method {name!r}; known are {', '.join(METHODS)}")

    def matches(self, name: str, kind: LayerType) -> bool:
        """Whether it is for a layer."""
        return self.type in (None, kind) and fnmatchcase(name, self.match)


_UNETS, _TRANSFORMERS = ("conv_in", "conv_out"), ("*_embed.proj", "x_embedder", "proj_in", "proj_out", "proj_out_2")
FIRST_AND_LAST = tuple(Rule(name, 8, 8, optional=True) for name in (*_UNETS, *_TRANSFORMERS))
UNCLIPPED = tuple(rule if rule.match == "conv_out" else replace(rule, dynamic=True) for rule in FIRST_AND_LAST)
"""The same, the first layer's range found as it comes: a sample with a larger value than any calibration sample,
clipped at every step, would run away (docs/quantizers). The last linear layer's too, as all linear ones'."""
BY_TOKEN = (
    Rule("*", type="linear", dynamic=True, optional=True),
    Rule("*", type="attention", dynamic=True, optional=True),
)
"""Ranges of each token as it comes, which engines have for linear layers and attention; not for convolutions."""


@dataclass(frozen=True)
class Recipe:
    """How a denoiser is quantized.

    Weights have one scale per output channel; activations one per tensor. ``"w4a8"`` is shorthand for a recipe:
    4-bit weights, 8-bit activations, attention products included, first and last layer at 8 bits. ``"w4a4+8"`` has
    ranges for 4-bit activations too, so that a :class:`ptqd.PrecisionPlan` can choose between them step by step.
    Formats, ranges and methods follow, as in ``"w8a8-dynamic"``, ``"w4a4-svd"`` and ``"w4a8-brecq"``.

    Attributes:
        weights: of convolutions and linear layers.
        activations: inputs of these layers, and the operands of the attention products.
        attention: quantize the products q.k and p.v as well.
        step_bits: further widths that activations get ranges for; a plan chooses among these and ``activations.bits``.
            A rule's ``activation_bits`` are not for a plan to change.
        softmax_bits: of the attention probabilities, 2 to 16 (Q-Diffusion, arXiv 2302.04304, has 8 and 16).
        calibration_samples: samples whose whole trajectories everything is found on.
        calibration_rows: of the denoiser's calls that these give at least: a model of few steps gets more samples.
        rules: exceptions by layer name and type.
        split_shortcuts: the halves of a skip connection's concatenation get ranges, of activations and weights, of
            their own (Q-Diffusion, section 4.2).
        time_embedding: layers that see nothing but the timestep are calibrated exactly on the run's steps: a range for
            each, and weights rounded for these inputs (TFMQ-DM, Huang et al., arXiv 2311.16503).
        step_ranges: groups of neighbouring steps with activation ranges of their own.
        calibration_steps: which steps' inputs are learned from, and ranges found on: ``"uniform"``, all alike
            (Q-Diffusion); ``"ptq4dm"``, normally distributed around two fifths of the way to the data's end (PTQ4DM,
            Shang et al., arXiv 2211.15736, section 3.3); ``"error"``, half of them in proportion to the error measured
            with weights and activations rounded to nearest.
        methods: in order; see :mod:`ptqd.quantization.methods`.

    >>> Recipe.parse("w4a8").weights.bits
    4
    """

    weights: QuantSpec = field(default_factory=QuantSpec)
    activations: QuantSpec = field(default_factory=lambda: QuantSpec(symmetric=False))
    step_bits: tuple[int, ...] = ()
    attention: bool = True
    softmax_bits: int = 8
    calibration_samples: int = 32
    calibration_rows: int = 0
    rules: tuple[Rule, ...] = FIRST_AND_LAST
    split_shortcuts: bool = False
    time_embedding: bool = False
    step_ranges: int = 1
    calibration_steps: CalibrationSteps = "uniform"
    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        Grid(self.softmax_bits, symmetric=False)
        for bits in self.step_bits:
            Grid(bits, symmetric=False)
        for name in ("calibration_samples", "step_ranges"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"{name} must be at least 1, and at most {MOST:,}; got {getattr(self, name)}")
        if not 0 <= self.calibration_rows <= MOST:
            raise InputError(f"calibration_rows must be 0 to {MOST:,}; got {self.calibration_rows}")
        if len({*self.step_bits, self.activations.bits}) <= len(self.step_bits):
            widths = "+".join(map(str, sorted((*self.step_bits, self.activations.bits))))
            raise InputError(f"the activations' widths {widths} name one twice; name each once")
        check_weight_bits(self.weights.bits)
        if self.weights.dynamic:
            raise InputError("weights do not change from call to call; dynamic is for activations")
        if self.activations.group:
            raise InputError("group is for weights; activations have mxfp4 and nvfp4 for blocks")
        if self.step_bits and (self.activations.format != "int" or self.activations.dynamic):
            raise InputError("several widths of activations need integers with ranges found beforehand")
        if self.step_ranges > 1 and (self.activations.format in BLOCKS or self.activations.dynamic):
            raise InputError(
                "ranges by step are for activations whose range is found beforehand; leave step_ranges at 1"
            )
        learned = [method.name for method in self.methods if isinstance(method, Learned)]
        if learned and self.weights.format != "int":
            raise InputError(f"{learned[0]!r} learns to round to integers; {self.weights.format} can have gptq")
        check_order(self.methods)
        self._check_rules()

    def check_steps(self, steps: int, where: str = "the recipe") -> None:
        """Refuse a run that has fewer steps than the recipe has groups of steps with ranges of their own.

        Raises:
            InputError: so it is.
        """
        if self.step_ranges > steps:
            raise InputError(
                f"{where} has ranges for {self.step_ranges} groups of steps, and the run takes {steps}; lower "
                "step_ranges (the number behind 'steps' in a shorthand), or take more steps"
            )

    def uncalibrated(self) -> "Recipe":
        """The same with ranges of activations that are found for each token as it comes, so that it needs no samples.

        Raises:
            InputError: it has methods, several widths, or ranges by step, which are found in calibration.
        """
        named = [*(method.name for method in self.methods)]
        named += ["split_shortcuts"] * self.split_shortcuts + ["time_embedding"] * self.time_embedding
        named += ["step_bits"] * bool(self.step_bits) + ["step_ranges"] * (self.step_ranges > 1)
        named += ["rules that say dynamic = false"] * any(rule.dynamic is False for rule in self.rules)
        if named:
            raise InputError(
                f"the recipe has {', '.join(named)}, which need calibration: quantize the pipeline with ptqd.quantize, "
                "or take a recipe of bits alone, such as 'w8a8'"
            )
        dynamic = self.activations.format not in BLOCKS
        return replace(self, activations=replace(self.activations, dynamic=dynamic))

    def _check_rules(self) -> None:
        named = [method.name for method in self.methods]
        for rule in self.rules:
            for name in rule.without:
                if name not in named:
                    raise InputError(
                        f"the rule match={rule.match!r} is without {name!r}, which is not among the methods"
                    )

    @classmethod
    def parse(cls, text: "str | Path | Recipe") -> "Recipe":
        """A recipe from a shorthand (``"w4a8"``), a TOML file's path, or a recipe itself.

        Raises:
            InputError: neither of these, or an unknown key or a value of the wrong type in the file.
        """
        if isinstance(text, Recipe):
            return text
        if re.fullmatch(_SHORT, str(text)):
            return _from_shorthand(str(text))
        path = Path(text)
        if path.suffix != ".toml":
            raise InputError(
                f"recipe {str(text)!r} is neither a shorthand such as 'w4a8' or 'w4a8-brecq' nor a .toml file's path"
            )
        if not path.is_file():
            raise InputError(f"recipe file {path} does not exist")
        return cls.from_dict(read_toml(path, "recipe file "), f"recipe file {path}")

    @classmethod
    def from_dict(cls, values: object, where: str = "recipe") -> "Recipe":
        """A recipe from plain values, as :meth:`to_dict` gives them; unknown keys are errors."""
        return build(cls, values, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for values, method in zip(plain["methods"], self.methods, strict=True):
            values["name"] = method.name
        return plain

    @property
    def name(self) -> str:
        """Shorthand of its main bit widths."""
        weights, activations = self.weights, self.activations
        left = weights.bits if weights.format == "int" else weights.format
        right = "+".join(map(str, self.widths)) if activations.format == "int" else activations.format
        return f"w{left}a{right}"

    @property
    def widths(self) -> tuple[int, ...]:
        """The activation bits that ranges are found for, ascending."""
        return tuple(sorted({self.activations.bits, *self.step_bits}))

    def rule_for(self, names: str | Iterable[str], kind: LayerType) -> Rule | None:
        """The last rule that matches a layer, by any of the dotted names it goes by."""
        known = (names,) if isinstance(names, str) else tuple(names)
        return next((rule for rule in reversed(self.rules) if any(rule.matches(name, kind) for name in known)), None)

    def rule_of(self, names: Iterable[str], kind: LayerType, **changes: Any) -> Rule:
        """A rule for one layer, by the last of its dotted names: what holds of it now, and some changes."""
        known = tuple(names)
        name = known[-1]
        pattern = name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
        now = self.rule_for(known, kind) or Rule(pattern)
        return replace(now, match=pattern, type=None, optional=False, **changes)

    def quantizers_for(self, rule: Rule | None) -> tuple[QuantSpec, QuantSpec, tuple[int, ...]]:
        """The quantizers of a layer's weights and activations, and the activations' widths, under a rule."""
        weights, activations, widths = self.weights, self.activations, self.widths
        if rule is None:
            return weights, activations, widths
        if rule.weight_bits is not None:
            weights = weights.of(rule.weight_bits)
        if rule.group is not None:
            weights = replace(weights, group=rule.group)
        if rule.activation_bits is not None:
            activations, widths = activations.of(rule.activation_bits), ()
        if rule.dynamic is not None:
            activations, widths = replace(activations, dynamic=rule.dynamic), ()
        return weights, activations, widths


_NUMBERS = "|".join(FORMAT_BITS)
_SHORT = rf"w([0-9]{{1,9}}|{_NUMBERS})a([0-9]{{1,9}}(?:\+[0-9]{{1,9}})*|{_NUMBERS})((?:-[a-z0-9]+)*)"
_UNET_BASE = {"split_shortcuts": True, "softmax_bits": WIDE}
WORDS: dict[str, dict[str, Any]] = {
    "best": {
        "split_shortcuts": True,
        "time_embedding": True,
        "calibration_samples": 64,
        "calibration_rows": 256,
        "rules": (*BY_TOKEN, *UNCLIPPED),
        "methods": (Widen(), Smooth(), Gptq(), Distill()),
    },
    "unclipped": {"rules": UNCLIPPED},
    "split": {"split_shortcuts": True},
    "time": {"time_embedding": True},
    "ptq4dm": {"calibration_steps": "ptq4dm"},
    "qdiffusion": {**_UNET_BASE, "methods": (Brecq(drop=0.0),)},
    "tfmq": {**_UNET_BASE, "time_embedding": True, "methods": (Brecq(drop=0.0),)},
}
"""What a word of a shorthand sets. Besides: ``affine`` for weights with a zero point; ``dynamic``; a method's name,
``svd`` bringing ``smooth`` along; ``svd32`` for its rank, ``svd32x8`` in 8 bits, ``ranks`` for one of each layer;
``gptaq``, asymmetric GPTQ; ``g64`` for groups of 64 weights; ``steps8`` for ranges by 8 groups of steps. Published
recipes: ``ptq4dm``, ``qdiffusion``, ``tfmq`` and, a method's name as well, ``brecq``; ``comfy`` for ComfyUI's."""
GPTAQ = "gptaq"  # a word: asymmetric GPTQ
COMFY = "comfy"  # a word: what ComfyUI computes of quantized linear layers, its activations by token as they come
RANKS = "ranks"  # a word: each layer's branch has a rank of its own
ROTATED = 64  # channels of a group, at most
_AFFINE = ("affine", "brecq", "ptq4dm", "qdiffusion", "tfmq")
"""Words that integer weights have a zero point with; the published recipes all have one for each output channel."""


_OTHERS = ("affine", "dynamic", "g64", "steps8", "rotate64", "svd32", "svd32x8", RANKS, GPTAQ, COMFY)


def _methods_of(word: str) -> tuple[Method, ...]:
    """The method that a word of a shorthand names, or none."""
    if word == GPTAQ:
        return (Gptq(asymmetric=0.5),)
    sized = re.fullmatch(r"(rotate|svd)(?:([0-9]{1,9})(?:x([0-9]{1,2}))?)?", word)
    if sized is None:
        return (METHODS[word](),) if word in METHODS else ()
    numbers: dict[str, Any] = {
        name: int(text) for name, text in zip(("rank", "bits"), sized.groups()[1:], strict=True) if text
    }
    if sized[1] == "svd":
        return (LowRank(**numbers),)
    if "bits" in numbers:
        return ()
    if numbers.get("rank") == 0:
        raise InputError("rotate must be 2 channels at least; without the word nothing is rotated")
    return (Smooth(rotate=numbers.get("rank", ROTATED)),)


def _by_layer(methods: Sequence[Method]) -> tuple[Method, ...]:
    """Methods whose branch has a rank of its own in each layer; one of 16 where there is none."""
    named = any(isinstance(method, LowRank) for method in methods)
    return tuple(
        replace(method, by_layer=True) if isinstance(method, LowRank) else method
        for method in (*methods, *(() if named else (LowRank(),)))
    )


def _check_comfy(text: str, weights: QuantSpec, activations: QuantSpec, methods: Sequence[str]) -> None:
    """Refuse what ComfyUI does not compute.

    Raises:
        InputError: so it is.
    """
    other = {weights.format, activations.format} != {"int"} or activations.bits > MAX_BITS
    if other or {Smooth.name, LowRank.name} & set(methods):
        raise InputError(
            f"recipe {text!r}: ComfyUI has integers of 8 bits and fewer, and neither smoothing nor branches; leave "
            "'comfy' out, or those: w8a8-comfy-gptq, w4a4-comfy-convrot-gptq"
        )


def _first_and_last(weights: QuantSpec, activations: QuantSpec) -> tuple[Rule, ...]:
    """The rules that keep the first and the last layer in 8 bits, where others have less."""
    narrow = min(weights.bits, activations.bits) < MAX_BITS or "int" in (weights.format, activations.format)
    return FIRST_AND_LAST if narrow else ()


def _from_shorthand(text: str) -> Recipe:
    """A recipe from what :data:`_SHORT` matches."""
    result = re.fullmatch(_SHORT, text)
    assert result is not None
    number, widths, words = result.groups()
    step_bits: list[int] = []
    if widths in FORMAT_BITS:
        activations = QuantSpec(format=widths)
    else:
        *step_bits, most = sorted(int(bits) for bits in widths.split("+"))
        activations = QuantSpec(most, symmetric=False)
    said = words.split("-")[1:]
    if number in FORMAT_BITS and "affine" in said:
        raise InputError(f"recipe {text!r}: {number} has no zero point; affine is for integer weights")
    symmetric = not any(word in _AFFINE for word in said)
    weights = QuantSpec(format=number) if number in FORMAT_BITS else QuantSpec(int(number), symmetric)
    values: dict[str, Any] = {"methods": ()}
    for word in (word for word in said if word not in ("affine", RANKS)):
        numbered, methods = re.fullmatch(r"(g|steps)([0-9]{1,9})", word), _methods_of(word)
        if word in ("dynamic", COMFY):
            activations = replace(activations, dynamic=True, symmetric=activations.symmetric or word == COMFY)
        elif numbered and numbered[1] == "g":
            weights = replace(weights, group=int(numbered[2]))
        elif numbered:
            values["step_ranges"] = int(numbered[2])
        elif methods or word in WORDS:
            named = {method.name for method in values["methods"]} if word in WORDS else set()
            more = tuple(m for m in methods or WORDS[word].get("methods", ()) if m.name not in named)
            rotates = any(isinstance(m, Smooth) and m.rotate for m in more)  # which smooths too
            before = (m for m in values["methods"] if not (rotates and m == Smooth()))
            values |= {**WORDS.get(word, {}), "methods": (*before, *more)}
        else:
            known = ", ".join([*WORDS, *METHODS, *_OTHERS])
            raise InputError(f"recipe {text!r}: unknown word {word!r}; known are {known}")
    if RANKS in said:
        values["methods"] = _by_layer(values["methods"])
    names = [method.name for method in values["methods"]]
    if LowRank.name in names and not {Smooth.name, ConvRot.name} & set(names):
        values["methods"] = (Smooth(), *values["methods"])
    first = [Widen.name, Smooth.name, ConvRot.name, LowRank.name]  # what others quantize is decided by these

    def place(method: Method) -> int:
        return first.index(method.name) if method.name in first else len(first) + 1 - method.changes_layers

    values["methods"] = tuple(sorted(values["methods"], key=place))
    chosen = values.pop("rules", _first_and_last(weights, activations))
    if COMFY in said:
        _check_comfy(text, weights, activations, names)
        values["attention"], chosen = False, (*chosen, Rule("*", type="conv", skip=True, optional=True))
    chosen = tuple(replace(rule, group=0) if rule.weight_bits and weights.group else rule for rule in chosen)
    return Recipe(weights, activations, tuple(step_bits), rules=chosen, **values)
