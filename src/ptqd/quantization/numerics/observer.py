"""An observer: the range and the distribution of what a quantizer sees, over many batches, in bounded memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ptqd.errors import InputError
from ptqd.quantization.numerics.affine import Grid
from ptqd.quantization.numerics.range_search import RangeMethod, find_range

_PER_CALL = 1 << 16  # values counted of one batch


_BINS = 8192


NOT_FINITE = "an activation is NaN or infinite during calibration; check the model's weights and dtype"


class Observer:
    """Collects what a per-tensor quantizer sees over many batches, in any order: bounded memory.

    The extremes are exact. For percentile and p-norm, values (of a large batch an evenly strided subset) are counted
    in a histogram over [-2^e, 2^e], whose e grows with the extremes by merging neighbouring bins.
    """

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.exponent = -126
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    @classmethod
    def merged(cls, parts: "Sequence[Observer]") -> "Observer":
        """An observer that has seen what several have."""
        whole = cls()
        whole.low = min((part.low for part in parts), default=math.inf)
        whole.high = max((part.high for part in parts), default=-math.inf)
        whole.exponent = max((part.exponent for part in parts), default=whole.exponent)
        for part in parts:
            copied = cls()
            copied.exponent, copied.counts = part.exponent, part.counts
            while copied.exponent < whole.exponent and copied.counts.any():
                copied._widen(2.0**whole.exponent)
            whole.counts = whole.counts + copied.counts
        return whole

    def state(self) -> dict[str, Any]:
        """What it has seen, in plain values and tensors: the bins with something in them, and how much that is."""
        bins = self.counts.nonzero()[:, 0].to(torch.int16)
        counts = self.counts[bins.long()]
        return {"low": self.low, "high": self.high, "exponent": self.exponent, "bins": bins, "counts": counts}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Observer":
        """From a :meth:`state`."""
        observer = cls()
        observer.load(state)
        return observer

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what another has seen."""
        self.low, self.high, self.exponent = state["low"], state["high"], state["exponent"]
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.counts[state["bins"].long()] = state["counts"]

    def update(self, x: torch.Tensor) -> None:
        """Show it one batch, of any shape.

        Raises:
            InputError: the batch holds NaN or infinity.
        """
        flat = x.detach().reshape(-1)
        if flat.numel() == 0:
            return
        low, high = (end.item() for end in torch.aminmax(flat))
        if not math.isfinite(low + high):
            raise InputError(NOT_FINITE)
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(abs(low), abs(high)) > 2.0**self.exponent:
            self._widen(max(abs(low), abs(high)))
        stride = -(-flat.numel() // _PER_CALL)
        while math.gcd(stride, flat.numel()) > 1:  # coprime: no channel or column is passed over
            stride += 1
        edge = 2.0**self.exponent
        self.counts += torch.histc(flat[::stride].float(), _BINS, -edge, edge).cpu().double()

    def _widen(self, largest: float) -> None:
        if not self.counts.any():
            self.exponent = max(self.exponent, math.frexp(largest)[1])
            return
        middle = self.counts.view(-1, 2).sum(1)
        self.counts = torch.nn.functional.pad(middle, (_BINS // 4, _BINS // 4))
        self.exponent += 1

    def range(self, grid: Grid, method: RangeMethod, percentile: float, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, scalars; see :func:`find_range`."""
        if self.low > self.high:
            raise InputError("a range needs at least one value; the layer was never run during calibration")
        edge = 2.0**self.exponent
        centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * edge / _BINS) - edge
        seen = self.counts > 0
        values = centres[seen].float().clamp(self.low, self.high)
        ends = torch.tensor([self.low, self.high])
        counts = torch.cat([self.counts[seen], torch.full((2,), 1e-9)])
        low, high = find_range(torch.cat([values, ends])[None], grid, method, percentile=percentile, p=p, counts=counts)
        return low[0], high[0]
