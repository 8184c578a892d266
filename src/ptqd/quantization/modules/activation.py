"""Activation quantizers: one tensor rounded, by a range that was observed or as it comes.

The range may depend on the step: a quantizer then has several, and a ``StepIndex`` says which one holds, for the whole
batch or for each of its rows.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import nn

from ptqd.diffusion.step_state import StepIndex
from ptqd.errors import InputError
from ptqd.quantization.numerics.affine import MAX_BITS, Grid, affine_parameters, fake_quantize
from ptqd.quantization.numerics.formats import BLOCKS, LARGEST, fake_blocks, round_float
from ptqd.quantization.numerics.observer import NOT_FINITE, Observer
from ptqd.quantization.numerics.range_search import find_range
from ptqd.quantization.recipe import QuantSpec


class Mode(Enum):
    """What a quantizer does with what it is given.

    ``BYPASS`` and ``OBSERVE`` give it back untouched, the latter after showing it to the observers; ``ROUND`` rounds.
    """

    BYPASS = "bypass"
    OBSERVE = "observe"
    ROUND = "round"

    @property
    def is_calibrating(self) -> bool:
        """Whether weights are in full precision still."""
        return self is not Mode.ROUND


class BitWidth:
    """Which of its widths a quantizer rounds to now; the quantizers of one group of layers share one.

    Attributes:
        index: into the quantizer's widths.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index


class KeptInFloat32(nn.Module):
    """A module whose scales stay in float32 when it is cast: half precision has not the range for them."""

    kept: ClassVar[tuple[str, ...]] = ("scale",)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self


class ActivationQuantizer(KeptInFloat32):
    """Rounds a tensor to one format.

    Args:
        spec: the format, and how its range is found.
        widths: all bits that it can round to, ascending, each with a range of its own; ``spec.bits`` is one of them,
            and the one it starts at.
        axis: where the channels are.
        ranges: how many it has, by step.
        rowwise: a dynamic range is of each sample, not of each token or place: what a convolution larger than 1 x 1,
            or the second operand of a product, needs.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self, spec: QuantSpec, widths: Sequence[int] = (), *, axis: int = -1, ranges: int = 1, rowwise: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.axis, self.rowwise = spec, axis, rowwise
        self.widths = tuple(widths) or (spec.bits,)
        self.active = BitWidth(self.widths.index(spec.bits))
        self.step = StepIndex()
        shape = (len(self.widths),) if ranges == 1 else (ranges, len(self.widths))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.mode = Mode.ROUND
        self.observers: list[Observer] = []
        self.learner: Callable[[torch.Tensor], torch.Tensor] | None = None  # rounds instead, while it learns
        self._numbers: list[list[tuple[float, float, Grid]]] = []

    @property
    def bits(self) -> int:
        """What it rounds to now."""
        return self.widths[self.active.index]

    @property
    def grids(self) -> list[Grid]:
        """Of each width."""
        return [Grid(bits, self.spec.symmetric and self.spec.format == "int") for bits in self.widths]

    @property
    def ranges(self) -> int:
        """How many ranges it has, by step."""
        return len(self.scale) if self.scale.ndim == 2 else 1

    @property
    def is_static(self) -> bool:
        """Whether its range is found in calibration, from what observers saw; others are computed from each input."""
        return not self.spec.dynamic and self.spec.format not in BLOCKS

    def observe(self, observers: Sequence[Observer] | None = None) -> None:
        """Start to collect the ranges; outputs are the inputs, untouched.

        Args:
            observers: one for each range, that may have seen something already; new ones without.
        """
        self.mode = Mode.OBSERVE
        fresh = [Observer() for _ in range(self.ranges)] if self.is_static else []
        self.observers = fresh if observers is None else list(observers)

    def bypass(self) -> None:
        """Give inputs back untouched and collect nothing; what was observed stays."""
        self.mode = Mode.BYPASS

    def set_static_range(self, values: torch.Tensor) -> None:
        """Find the range of each step from what comes there (T, n), instead of observing it."""
        scales, zeros = (t.view(self.ranges, -1) for t in (self.scale, self.zero_point))
        for i, grid in enumerate(self.grids):
            if self.spec.format == "int":
                low, high = find_range(values, grid, self.spec.range, percentile=self.spec.percentile, p=self.spec.p)
                scale, zero = affine_parameters(low, high, grid)
                scales[:, i], zeros[:, i] = scale.to(scales.device), zero.to(zeros.device)
            else:
                largest = values.abs().amax(1)
                scales[:, i] = torch.where(largest > 0, largest / LARGEST[self.spec.format], 1.0).to(scales.device)
        self.observers = []
        self.refresh()

    def freeze(self) -> None:
        """Fix scale and zero point of every range and width from what was observed, and start to round.

        A range whose steps were never seen gets that of all the others.

        Raises:
            InputError: nothing was observed.
        """
        if self.mode is Mode.ROUND:
            raise InputError("freeze() needs observe() and at least one forward pass before it")
        if self.observers:
            seen = [observer for observer in self.observers if observer.low <= observer.high]
            whole = self.observers[0] if len(seen) == len(self.observers) else Observer.merged(seen)
            for s, observer in enumerate(self.observers):
                self._fix(s, observer if observer.low <= observer.high else whole)
        self.mode, self.observers = Mode.ROUND, []
        self.refresh()

    def _fix(self, s: int, observer: Observer) -> None:
        spec = self.spec
        scales, zeros = (t.view(self.ranges, -1) for t in (self.scale, self.zero_point))
        for i, grid in enumerate(self.grids):
            if spec.format != "int":
                low, high = observer.range(grid, "minmax", spec.percentile, spec.p)
                largest = torch.maximum(-low, high)
                scales[s, i] = largest / LARGEST[spec.format] if largest > 0 else 1.0
            else:
                low, high = observer.range(grid, spec.range, spec.percentile, spec.p)
                scales[s, i], zeros[s, i] = affine_parameters(low, high, grid)

    def refresh(self) -> None:
        """Derive plain numbers from the buffers anew, after they changed: ``torch.compile`` traces through these."""
        if self.scale.is_meta:
            self._numbers = []
            return
        both = (t.view(self.ranges, -1).tolist() for t in (self.scale, self.zero_point))
        self._numbers = [
            list(zip(scales, map(float, zeros), self.grids, strict=True)) for scales, zeros in zip(*both, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself while observing or bypassed, else rounded to the active width's grid; any shape."""
        if self.mode is not Mode.ROUND:
            if self.mode is Mode.OBSERVE:
                self._show(x)
            return x
        if self.learner is not None:
            return self.learner(x)
        return self.rounded(x, self.active.index)

    def rounded(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """``x`` rounded to the grid of one of the widths."""
        if self.spec.format in BLOCKS:
            return fake_blocks(x, self.spec.format, self.axis)
        if self.spec.dynamic:
            scale, zero = self._as_it_comes(x, index)
            return _round(x, scale, zero, self.spec, self.grids[index])
        if self.ranges > 1 and torch.compiler.is_compiling():
            place = self.step.place.to(self.scale.device)
            if place.ndim == 0:
                scale, zero = self.scale[place, index], self.zero_point[place, index]
                return _round(x, scale.to(x.dtype), zero, self.spec, self.grids[index])
        if isinstance(self.step.index, torch.Tensor):
            scale, zero = (self.by_row(t, x, index) for t in (self.scale, self.zero_point))
            return _round(x, scale.to(x.dtype), zero, self.spec, self.grids[index])
        if not self._numbers:
            self.refresh()
        if self.scale.is_meta:  # where there are no numbers, any do
            here = [(1.0, 0.0, grid) for grid in self.grids]
        else:
            here = self._numbers[self.step.index if self.ranges > 1 else 0]
        scale_, zero_, grid = here[index]
        return _round(x, scale_, zero_, self.spec, grid)

    def parameters_for(self, x: torch.Tensor) -> tuple[Any, Any]:
        """Scale and zero point of ``x``, where there is one width and one range: numbers, or one of each token."""
        if self.spec.dynamic:
            return self._as_it_comes(x, self.active.index)
        if not self._numbers:
            self.refresh()
        scale, zero, _ = self._numbers[0][self.active.index]
        return scale, zero

    def by_row(self, values: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        """What of ``values`` (S, W) or (W,) holds for each row of ``x``: (N, 1, ..., 1), or one number for all."""
        column = values.view(self.ranges, -1)[:, index]  # S
        if self.ranges == 1:
            return column[0]
        if not isinstance(self.step.index, torch.Tensor):
            return column[self.step.index]
        rows = self.step.index.to(column.device)
        if len(x) % len(rows):
            raise InputError(
                f"{len(x)} rows of an activation cannot be told the steps of {len(rows)} samples; "
                "leave step_ranges at 1 and time_embedding out for this denoiser"
            )
        chosen = column[rows].repeat_interleave(len(x) // len(rows))  # heads follow their sample
        return chosen.view(-1, *[1] * (x.ndim - 1))

    def _as_it_comes(self, x: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each token, or sample, of ``x``."""
        axes = tuple(range(1, x.ndim)) if self.rowwise and x.ndim > 1 else (self.axis,)
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        low, high, grid = low.clamp(max=0), high.clamp(min=0), self.grids[index]
        tiny = torch.finfo(x.dtype).smallest_normal
        if self.spec.format != "int" or grid.symmetric:
            most = LARGEST.get(self.spec.format, grid.qmax)
            scale = torch.maximum(-low, high).float() / most
            return torch.where(scale > tiny, scale, 1.0).to(x.dtype), torch.zeros_like(scale)
        scale = (high - low).float() / (grid.qmax - grid.qmin)
        scale = torch.where(scale > tiny, scale, 1.0)
        zero = (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)
        return scale.to(x.dtype), zero.to(x.dtype)

    def _show(self, x: torch.Tensor) -> None:
        index = self.step.index
        if not self.observers:  # its range is fixed, or of each input
            if not bool(torch.isfinite(x).all()):
                raise InputError(NOT_FINITE)
            return
        if len(self.observers) == 1:
            self.observers[0].update(x)
        elif isinstance(index, torch.Tensor):
            each = index.to(x.device).repeat_interleave(max(1, len(x) // len(index)))
            for s in index.unique().tolist():
                self.observers[s].update(x[each == s])
        else:
            self.observers[index].update(x)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


def _round(x: torch.Tensor, scale: Any, zero: Any, spec: QuantSpec, grid: Grid) -> torch.Tensor:
    if grid.bits > MAX_BITS and x.dtype != torch.float32:  # half precision has not as many numbers
        return _round(x.float(), scale, zero, spec, grid).to(x.dtype)
    if spec.format == "int":
        return fake_quantize(x, scale, zero, grid)
    return round_float(x / scale, spec.format).mul_(scale)
