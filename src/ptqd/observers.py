"""The range a quantizer covers, from the values it was shown.

Three estimators: the extremes (``minmax``), a percentile of the values (``percentile``), and the clipping that
minimises the p-norm of the quantization error (``pnorm``; LAPQ, arXiv 1911.07190, p = 2.4).
"""

from typing import Literal

import torch

from ptqd.affine import Grid, affine_parameters, fake_quantize
from ptqd.errors import InputError

RangeMethod = Literal["minmax", "percentile", "pnorm"]

_PER_CALL = 2048  # values kept of one batch
_KEPT = 16384  # values a search looks at
_SHRINKS = 48  # candidate clippings a search tries for each end


def find_range(
    values: torch.Tensor,
    grid: Grid,
    method: RangeMethod,
    *,
    percentile: float = 99.9,
    p: float = 2.4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each row.

    Args:
        values: (R, n), finite.
        grid: the integers the range will be mapped to.
        method: ``"minmax"``, ``"percentile"`` or ``"pnorm"``.
        percentile: share of values, in percent, inside the range (two-sided).
        p: the error norm of the search.

    Returns:
        Low and high, each (R,).

    Raises:
        InputError: no values, or values that are NaN or infinite.
    """
    if values.numel() == 0:
        raise InputError("a range needs at least one value; the layer was never run during calibration")
    if not bool(torch.isfinite(values).all()):
        raise InputError("values to quantize are NaN or infinite; look for NaN or infinite weights or activations")
    low, high = values.amin(1), values.amax(1)  # R
    if method == "minmax":
        return low, high
    if method == "percentile":
        tail = (1 - percentile / 100) / 2
        ordered = values.sort(dim=1).values  # R,n
        cut = int(tail * (values.shape[1] - 1))
        return ordered[:, cut], ordered[:, values.shape[1] - 1 - cut]
    return _search(values, low, high, grid, p)


def _error(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, p: float) -> torch.Tensor:
    scale, zero = affine_parameters(low, high, grid)
    return (fake_quantize(values, scale[:, None], zero[:, None], grid) - values).abs_().pow_(p).mean(1)  # R


def _search(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip both ends together; on an affine grid then the upper and the lower one alone; keep what lowers the error."""
    best = _error(values, low, high, grid, p)
    ends = [(True, True)] if grid.symmetric else [(True, True), (False, True), (True, False)]
    for clip_low, clip_high in ends:
        start_low, start_high = low, high
        for shrink in torch.linspace(1.0, 0.1, _SHRINKS)[1:].tolist():
            try_low = start_low * shrink if clip_low else start_low
            try_high = start_high * shrink if clip_high else start_high
            error = _error(values, try_low, try_high, grid, p)
            better = error < best
            best = torch.where(better, error, best)
            low, high = torch.where(better, try_low, low), torch.where(better, try_high, high)
    return low, high


class Observer:
    """Collects what a per-tensor quantizer sees over many batches; bounded memory, deterministic.

    The extremes are exact. For percentile and p-norm an evenly strided subset of every batch is kept.
    """

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")
        self.kept: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        """Show it one batch, of any shape."""
        flat = x.detach().reshape(-1)
        if flat.numel() == 0:
            return
        low, high = torch.aminmax(flat)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InputError("an activation is NaN or infinite during calibration; check the model's weights and dtype")
        self.kept.append(flat[:: max(1, flat.numel() // _PER_CALL)].float().cpu())

    def range(self, grid: Grid, method: RangeMethod, percentile: float, p: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high, scalars; see :func:`find_range`."""
        if not self.kept:
            raise InputError("a range needs at least one value; the layer was never run during calibration")
        if method == "minmax":
            return torch.tensor(self.low), torch.tensor(self.high)
        values = torch.cat(self.kept)
        values = values[:: max(1, values.numel() // _KEPT)]
        low, high = find_range(values[None], grid, method, percentile=percentile, p=p)
        return low[0], high[0]
