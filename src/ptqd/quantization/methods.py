"""The methods a recipe can name, in order: what each is told, and what is allowed.

``smooth`` and ``svd`` change what is quantized, so they come first; the others choose codes.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ptqd.errors import InputError
from ptqd.quantization.numerics.affine import MAX_BITS, WIDE, Grid, check_weight_bits
from ptqd.quantization.numerics.rotation import MOST_CHANNELS

MOST = 10_000_000  # of anything that a method counts
SMOOTHED = 64  # rows that smoothing is searched on
OBSERVED = 1024  # rows that ranges are found on, where steps are drawn


@dataclass(frozen=True)
class Method:
    """Base of the options of every method; a subclass with a name is known to recipes by it.

    Attributes:
        name: in recipes.
        changes_layers: whether it changes what is quantized, before ranges are fixed; others choose codes.
    """

    name: ClassVar[str] = ""
    changes_layers: ClassVar[bool] = False
    registered: ClassVar[dict[str, type["Method"]]] = {}

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            Method.registered[cls.name] = cls

    def rows(self, *, dynamic: bool) -> int:
        """How many rows of the denoiser's calls it needs, where activations' ranges are dynamic or not."""
        return 0


@dataclass(frozen=True)
class Widen(Method):
    """Give more bits to the operands whose rounding moves the denoiser's output most for what they cost.

    See :mod:`ptqd.quantization.widen`.

    Attributes:
        bits: that an activation gets.
        weight_bits: that a weight gets, where it has fewer.
        budget: bit operations of the whole denoiser, at most so many times those before.
        inputs: rows of the denoiser's calls that the effect on the output is estimated on.
    """

    name: ClassVar[str] = "wide"
    changes_layers: ClassVar[bool] = True
    bits: int = 16
    weight_bits: int = 8
    budget: float = 1.25
    inputs: int = 16

    def __post_init__(self) -> None:
        _ = Grid(self.bits, symmetric=False)
        check_weight_bits(self.weight_bits)
        if not 1 <= self.budget < math.inf:
            raise InputError(f"budget must be at least 1, this many times the bit operations; got {self.budget}")
        _check_count("inputs", self.inputs)

    def rows(self, *, dynamic: bool) -> int:
        """The inputs that effects are estimated on."""
        return self.inputs


@dataclass(frozen=True)
class Smooth(Method):
    """SmoothQuant (Xiao et al., arXiv 2211.10438, eq. 4): move outliers from activations to weights.

    Attributes:
        alpha: the exponent in ``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)``; searched for each layer, for the least
            error of its output, where it is none.
        rotate: try with each of these also a Hadamard rotation of groups of at most so many input channels, and without
            any of them (ConvRot, arXiv 2512.03673); not where it is 0.
    """

    name: ClassVar[str] = "smooth"
    changes_layers: ClassVar[bool] = True
    alpha: float | None = None
    rotate: int = 0

    def __post_init__(self) -> None:
        if self.rotate and not 2 <= self.rotate <= MOST_CHANNELS:
            raise InputError(f"rotate must be 2 to {MOST_CHANNELS} channels; got {self.rotate}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be between 0 and 1; got {self.alpha}")

    def rows(self, *, dynamic: bool) -> int:
        """A batch; and what static ranges are observed on again, behind the smoothing."""
        return SMOOTHED if dynamic else OBSERVED


@dataclass(frozen=True)
class ConvRot(Method):
    """ConvRot (arXiv 2512.03673): inputs and weights are rotated by a regular Hadamard matrix, without smoothing.

    Attributes:
        group: of input channels, at most: a power of 4. A layer has the largest that divides its channels.
    """

    name: ClassVar[str] = "convrot"
    changes_layers: ClassVar[bool] = True
    group: int = 256

    def __post_init__(self) -> None:
        if self.group not in (4, 16, 64, 256):
            raise InputError(f"group must be 4, 16, 64 or 256 channels; got {self.group}")

    def rows(self, *, dynamic: bool) -> int:
        """What static ranges are observed on again, behind the rotation."""
        return 0 if dynamic else OBSERVED


@dataclass(frozen=True)
class LowRank(Method):
    """SVDQuant (Li et al., arXiv 2411.05007, eq. 4): a branch of low rank takes what is hardest to quantize.

    Attributes:
        rank: of the branch; at most a quarter of a layer's smaller side.
        bits: of the branch's weights and of what comes into its two products: 16, or integers of 2 to 8 with ranges as
            they come (LoRaQ, arXiv 2604.18117, has 8).
        by_layer: choose each layer's rank, for the bit operations that this rank would cost in all of them
            (:mod:`ptqd.quantization.branch_ranks`).
        inputs: rows of the denoiser's calls that it is chosen on.
    """

    name: ClassVar[str] = "svd"
    changes_layers: ClassVar[bool] = True
    rank: int = 16
    bits: int = WIDE
    by_layer: bool = False
    inputs: int = 16

    def __post_init__(self) -> None:
        _check_count("rank", self.rank)
        _check_count("inputs", self.inputs)
        if self.bits != WIDE and not 2 <= self.bits <= MAX_BITS:
            raise InputError(f"bits of a branch must be 2 to {MAX_BITS}, or {WIDE}; got {self.bits}")

    def rows(self, *, dynamic: bool) -> int:
        """The inputs that ranks are chosen on."""
        return self.inputs if self.by_layer else 0


@dataclass(frozen=True)
class Gptq(Method):
    """GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): round column by column, the rest makes up for it.

    Asymmetric (GPTAQ, Li et al., arXiv 2504.02692) it makes up for the layers before as well: layer by layer the weight
    goes towards the one that gives, on what comes from behind rounded layers, full precision's output.

    Attributes:
        order: columns by falling activation energy (act-order), not as they come.
        damping: share of the mean diagonal that is added to the Hessian's.
        inputs: rows of the denoiser's batch that Hessians are taken on.
        asymmetric: how far it goes there, from 0 to 1.
    """

    name: ClassVar[str] = "gptq"
    order: bool = True
    damping: float = 0.01
    inputs: int = 256
    asymmetric: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.asymmetric <= 1:
            raise InputError(f"asymmetric must be between 0 and 1; got {self.asymmetric}")
        if not 0 < self.damping < math.inf:
            raise InputError(f"damping must be positive and finite; got {self.damping}")
        _check_count("inputs", self.inputs)

    def rows(self, *, dynamic: bool) -> int:
        """The inputs that Hessians are taken on."""
        return self.inputs


@dataclass(frozen=True)
class Learned(Method):
    """What learned rounding is told.

    Attributes:
        iterations: optimiser steps of each unit.
        batch: rows of the denoiser's batch that a step sees.
        inputs: rows that are learned from, drawn by the recipe's calibration.
        rate: Adam's learning rate of the rounding.
        scale_rate: of the activations' log scale; 0 leaves them as they were found. Of ``distill``: of all log scales
            with 16 levels, and less in proportion for more levels.
        drop: share of activations left in full precision while learning (QDrop, Wei et al., arXiv 2203.05740).
    """

    iterations: int = 150
    batch: int = 32
    inputs: int = 512
    rate: float = 1e-2
    scale_rate: float = 1e-3
    drop: float = 0.5

    unit: ClassVar[Literal["layer", "block", "model"]]

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "inputs"):
            _check_count(name, getattr(self, name))
        if not 0 <= self.drop < 1:
            raise InputError(f"drop must be in [0, 1); got {self.drop}")
        if not (0 < self.rate < math.inf and 0 <= self.scale_rate < math.inf):
            raise InputError(f"learning rates must be positive and finite; got {self.rate} and {self.scale_rate}")
        if self.batch > self.inputs:
            raise InputError(f"a batch of {self.batch} needs as many inputs; there are {self.inputs}")

    def rows(self, *, dynamic: bool) -> int:
        """The inputs that are learned from."""
        return self.inputs


@dataclass(frozen=True)
class AdaRound(Learned):
    """AdaRound (Nagel et al., arXiv 2004.10568, eq. 21 to 25): learn each weight's rounding, layer by layer."""

    name: ClassVar[str] = "adaround"
    unit: ClassVar[Literal["layer", "block", "model"]] = "layer"
    scale_rate: float = 0.0
    drop: float = 0.0


@dataclass(frozen=True)
class Brecq(Learned):
    """BRECQ (Li et al., arXiv 2102.05426) with QDrop: the same, block by block, and activations' scales with it."""

    name: ClassVar[str] = "brecq"
    unit: ClassVar[Literal["layer", "block", "model"]] = "block"


@dataclass(frozen=True)
class Distill(Learned):
    """The whole denoiser at once, taught by its full-precision self, through straight-through rounding.

    Weights move from where they were rounded; scales of weights and activations (LSQ, Esser et al., arXiv 1902.08153)
    move with them. It takes a training step's memory.
    """

    name: ClassVar[str] = "distill"
    unit: ClassVar[Literal["layer", "block", "model"]] = "model"
    iterations: int = 300
    batch: int = 64
    inputs: int = 4096
    rate: float = 3e-3
    scale_rate: float = 3e-3
    drop: float = 0.0


METHODS = Method.registered


def check_order(methods: tuple[Method, ...]) -> None:
    """Refuse a method that is named twice, or that comes too late.

    Raises:
        InputError: either of these.
    """
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the method {name!r} is named twice; name it once")
    if "wide" in names[1:]:
        raise InputError("'wide' decides what the other methods work on; name it first")
    for before, after in itertools.pairwise(methods):
        if after.changes_layers and not before.changes_layers:
            raise InputError(f"{after.name!r} changes what {before.name!r} quantizes; name it before")
    if "convrot" in names and "smooth" in names:
        raise InputError("'convrot' rotates without smoothing; leave out what smooths too: smooth, rotate, best")
    if "svd" in names and "convrot" in names and names.index("svd") < names.index("convrot"):
        raise InputError("'convrot' changes what 'svd' splits; name it before")
    if "svd" in names and "smooth" in names and names.index("svd") < names.index("smooth"):
        raise InputError("'smooth' changes what 'svd' splits; name it before")


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= MOST:
        raise InputError(f"{name} must be at least 1, and at most {MOST:,}; got {value}")
