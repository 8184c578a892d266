"""The range a quantizer covers, from the values it was shown.

Three estimators: the extremes (``minmax``), a percentile of the values (``percentile``), and the clipping that
minimises the p-norm of the quantization error (``pnorm``; LAPQ, arXiv 1911.07190, p = 2.4).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from ptqd.affine import Grid, affine_parameters, fake_quantize
from ptqd.errors import InputError

RangeMethod = Literal["minmax", "percentile", "pnorm"]

_PER_CALL = 1 << 16  # values counted of one batch
_BINS = 8192
_SHRINKS = 40  # candidate clippings a search tries for each end


def find_range(
    values: torch.Tensor,
    grid: Grid,
    method: RangeMethod,
    *,
    percentile: float = 99.9,
    p: float = 2.4,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row.

    Args:
        values: (R, n), finite.
        grid: the integers the range will be mapped to.
        method: ``"minmax"``, ``"percentile"`` or ``"pnorm"``.
        percentile: share of values, in percent, inside the range (two-sided).
        p: the error norm of the search.
        counts: how often each value occurs (n,); once by default.

    Returns:
        Low and high, each (R,).

    Raises:
        InputError: no values, or values that are NaN or infinite.
    """
    if values.numel() == 0:
        raise InputError("a range needs at least one value; the layer was never run during calibration")
    if not bool(torch.isfinite(values).all()):
        raise InputError("values to quantize are NaN or infinite; look for NaN or infinite weights or activations")
    weights = torch.ones_like(values[0]) if counts is None else counts.to(values.dtype)
    weights = weights / weights.sum()  # n
    low, high = values.amin(1), values.amax(1)  # R
    if method == "minmax":
        return low, high
    if method == "percentile":
        tail = (1 - percentile / 100) / 2
        ordered, order = values.sort(dim=1)  # R,n
        below = weights[order].cumsum(1)  # R,n
        inside = (below > tail) & (below - weights[order] < 1 - tail)
        return ordered.where(inside, math.inf).amin(1), ordered.where(inside, -math.inf).amax(1)
    return _search(values, weights, low, high, grid, p)


def _search(
    values: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip both ends together; on an affine grid then the upper and the lower one alone; keep what lowers the error."""

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero = affine_parameters(low, high, grid)
        difference = (fake_quantize(values, scale[:, None], zero[:, None], grid) - values).abs_()  # R,n
        return difference.pow_(p) @ weights  # R

    best = error(low, high)
    ends = [(True, True)] if grid.symmetric else [(True, True), (False, True), (True, False)]
    for clip_low, clip_high in ends:
        start_low, start_high = low, high
        for shrink in torch.linspace(1.0, 0.1, _SHRINKS)[1:].tolist():
            try_low = start_low * shrink if clip_low else start_low
            try_high = start_high * shrink if clip_high else start_high
            tried = error(try_low, try_high)
            better = tried < best
            best = torch.where(better, tried, best)
            low, high = torch.where(better, try_low, low), torch.where(better, try_high, high)
    return low, high


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
            raise InputError("an activation is NaN or infinite during calibration; check the model's weights and dtype")
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
