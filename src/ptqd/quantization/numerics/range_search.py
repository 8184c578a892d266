"""The range a quantizer covers, from the values it was shown.

Three estimators: the extremes (``minmax``), a percentile of the values (``percentile``), and the clipping that
minimises the p-norm of the quantization error (``pnorm``; LAPQ, arXiv 1911.07190, p = 2.4).
"""

import math
from typing import Literal

import torch

from ptqd.errors import InputError
from ptqd.quantization.numerics.affine import Grid, affine_parameters, fake_quantize

RangeMethod = Literal["minmax", "percentile", "pnorm"]

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
