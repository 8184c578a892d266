"""What learned rounding learns: each weight's rounding, and scales.

``Soft``, AdaRound's (arXiv 2004.10568, eq. 22 to 24): ``w = s (floor(w / s) + h(v))`` with the rectified sigmoid
``h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)``, pushed to 0 or 1 by ``sum 1 - |2 h - 1|^beta``. ``Straight``: the weight
itself and its scale, through rounding with a straight-through gradient (LSQ, arXiv 1902.08153).
"""

import math
from typing import Any, Protocol

import torch
from torch import nn

from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.numerics.weight_grid import WeightGrid

_STRETCH = (-0.1, 1.1)
MOVED = 0.2  # of a step, from the code's centre


class LearnedWeight(Protocol):
    """A layer's weight while it is learned."""

    layer: QuantLayer

    def weight(self) -> torch.Tensor:
        """The weight to compute with now, in the layer's shape."""

    def penalty(self, beta: float) -> torch.Tensor:
        """How far it is from a rounding, mean over its elements."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by name; a name with ``scale`` in it is a log scale."""

    def harden(self) -> None:
        """Give the layer the codes that were learned."""


class Soft:
    """AdaRound's; see the module's docstring.

    Args:
        layer: already rounded; its grid stays, and it starts where it was rounded to.
        rows: what its codes should stand for (O, I).
    """

    def __init__(self, layer: QuantLayer, rows: torch.Tensor) -> None:
        self.layer, self.grid = layer, layer.grid()
        scale, zero = self.grid.expanded()
        self.scale, self.zero = scale, zero.float()
        parts = rows.to(scale) / scale  # in float32, whatever the model's precision
        self.floor = parts.floor()
        low, high = _STRETCH
        part = parts - self.floor
        chosen = layer.integer_weight().flatten(1).float() - self.zero - self.floor  # 0 or 1, where nothing is clipped
        part = torch.where(
            (part >= 0.5) == (chosen >= 0.5), part, 0.49 + 0.02 * chosen.clamp(0, 1)
        )  # what is chosen stays
        share = ((part - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
        self.v = nn.Parameter(torch.log(share / (1 - share)))

    def up(self) -> torch.Tensor:
        """``h(v)``: how far each element is rounded up."""
        low, high = _STRETCH
        return (torch.sigmoid(self.v) * (high - low) + low).clamp(0, 1)

    def weight(self) -> torch.Tensor:
        """The weight to compute with now."""
        return self._weight(self.up())

    def _weight(self, up: torch.Tensor) -> torch.Tensor:
        spec = self.layer.weights.grid
        codes = torch.clamp(self.floor + up + self.zero, spec.qmin, spec.qmax)
        return ((codes - self.zero) * self.scale).view(self.layer.shape).to(self.layer.weight.dtype)

    def penalty(self, beta: float) -> torch.Tensor:
        """``mean(1 - |2 h - 1|^beta)``."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).mean()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The roundings."""
        return {"v": self.v}

    def harden(self) -> None:
        """Round each element to where it is nearer."""
        with torch.no_grad():
            rows = self._weight((self.up() >= 0.5).to(self.v)).flatten(1)
            self.layer.write(self.grid, self.grid.codes(rows.float().to(self.grid.scale.device)))


class Straight:
    """The weight and its scale; see the module's docstring.

    Args:
        layer: already rounded; it starts from its codes.
        rows: what its codes should stand for (O, I): where these round otherwise, the start is moved into the code's
            cell, far enough that one step does not round it back.
    """

    def __init__(self, layer: QuantLayer, rows: torch.Tensor) -> None:
        self.layer, self.found = layer, layer.grid()
        scale, zero = (t.float() for t in self.found.expanded())
        codes = layer.integer_weight().flatten(1).float() - zero
        spec, parts = layer.weights.grid, rows.to(scale) / scale
        inside = (parts - codes).sign() * MOVED
        outside = parts.clamp(spec.qmin - zero, spec.qmax - zero)
        start = torch.where((outside - codes).abs() <= 0.5, outside, codes + inside)
        self.size = scale.mean().item()
        self.w = nn.Parameter(
            start * scale / self.size
        )  # in units of the layer's mean scale: one rate suits all layers
        self.log_scale = nn.Parameter(self.found.scale.log())

    def _expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = self.log_scale.exp(), self.found.zero.to(self.w.device)
        if scale.shape[1] == 1:  # which broadcasts
            return scale, zero
        return WeightGrid(self.layer.weights, scale, zero, self.layer.columns).expanded()

    def weight(self) -> torch.Tensor:
        """The weight to compute with now."""
        scale, zero = self._expanded()
        spec = self.layer.weights.grid
        rounded = straight_round(self.w, scale / self.size, spec.qmin - zero, spec.qmax - zero) * self.size
        return rounded.view(self.layer.shape).to(self.layer.weight.dtype)

    def penalty(self, beta: float) -> torch.Tensor:
        """None: it is always rounded."""
        return self.w.new_zeros(())

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weight and its log scale."""
        return {"w": self.w, "log_scale": self.log_scale}

    def harden(self) -> None:
        """Take the codes and scales as they are now."""
        with torch.no_grad():
            device = self.found.scale.device
            scale = self.log_scale.exp().float().to(device)
            grid = WeightGrid(self.layer.weights, scale, self.found.zero, self.layer.columns)
            self.layer.write(grid, grid.codes((self.w * self.size).float().to(device)))


class LearnedScale:
    """The log scales of an activation quantizer at the width it rounds to, with QDrop.

    Args:
        quantizer: whose scales are learned; its zero points stay.
        drop: share of elements that pass in full precision.
    """

    def __init__(self, quantizer: ActivationQuantizer, drop: float) -> None:
        self.quantizer, self.drop = quantizer, drop
        self.index = quantizer.active.index
        column = quantizer.scale.view(quantizer.ranges, -1)[:, self.index]
        self.log_scale = nn.Parameter(column.detach().clone().log())
        self.generator: torch.Generator | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` rounded, with gradients to it and to the scale."""
        q = self.quantizer
        if not q.is_static or q.spec.format != "int":
            rounded = x + (q.rounded(x.detach(), self.index) - x).detach()
        else:
            scale = q.by_row(self.log_scale.exp()[:, None], x, 0).to(x.dtype)
            zero = q.by_row(q.zero_point, x, self.index)
            grid = q.grids[self.index]
            rounded = straight_round(x, scale, grid.qmin - zero, grid.qmax - zero)
        if self.drop == 0 or self.generator is None:
            return rounded
        remaining = torch.rand(x.shape, generator=self.generator) < self.drop
        return torch.where(remaining.to(x.device), x, rounded)

    def harden(self) -> None:
        """Give the quantizer the scales that were learned."""
        with torch.no_grad():
            self.quantizer.scale.view(self.quantizer.ranges, -1)[:, self.index] = self.log_scale.exp()
        self.quantizer.refresh()


def straight_round(x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """``s round(clamp(x / s, low, high))``; the gradient passes rounding as if it were not there.

    What the gradient needs is computed again from ``x``, so that nothing of its size is kept beside it.
    """
    result: torch.Tensor = _StraightRound.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    return result


class _StraightRound(torch.autograd.Function):
    """See :func:`straight_round`: ``d/dx = 1`` inside, and ``d/ds = round(x / s) - x / s`` inside, else the end."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.ends = (low, high)
        return torch.clamp(x / scale, low, high).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, scale) = gradients, ctx.saved_tensors
        parts = x / scale
        clamped = torch.clamp(parts, *ctx.ends)
        inside = parts == clamped
        to_scale = None
        if ctx.needs_input_grad[1]:
            parts *= inside
            to_scale = (gradient * (clamped.round_() - parts)).sum_to_size(scale.shape)
        return gradient * inside, to_scale, None, None


def annealed(progress: float, warm_up: float = 0.2, start: float = 20.0, end: float = 2.0) -> float:
    """AdaRound's beta: ``start`` until the warm-up is over, then to ``end`` along half a cosine."""
    if progress < warm_up:
        return start
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
