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
_AT_ONCE = 1 << 17  # numbers that a search rounds at once: small tensors all candidates, large ones one by one


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
    """Clip both ends together; on an affine grid then the upper and the lower one alone; keep what lowers the error.

    Candidates are tried as many at a time as fit into :data:`_AT_ONCE`; of equal errors the first counts.
    """

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Errors (K, R) of K candidates for each row's ends (K, R)."""
        scale, zero = affine_parameters(low, high, grid)
        difference = (fake_quantize(values, scale[..., None], zero[..., None], grid) - values).abs_()  # K,R,n
        return difference.pow_(p) @ weights

    shrinks = torch.linspace(1.0, 0.1, _SHRINKS, device=values.device)[1:, None]  # K,1
    best = error(low[None], high[None])[0]  # R
    ends = [(True, True)] if grid.symmetric else [(True, True), (False, True), (True, False)]
    for clip_low, clip_high in ends:
        start_low, start_high = low, high
        for some in shrinks.split(max(1, _AT_ONCE // values.numel())):
            try_low = start_low * some if clip_low else start_low.expand(len(some), -1)
            try_high = start_high * some if clip_high else start_high.expand(len(some), -1)
            errors = error(try_low, try_high)
            first = errors.argmin(0, keepdim=True)  # 1,R
            least, at_low, at_high = (t.gather(0, first)[0] for t in (errors, try_low, try_high))
            better = least < best
            best = torch.where(better, least, best)
            low, high = torch.where(better, at_low, low), torch.where(better, at_high, high)
    return low, high
