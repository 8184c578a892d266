"""Time embeddings rounded exactly: layers that see a finite set of inputs, one for each sampling step."""

from typing import Any

import torch
from torch import nn

from ptqd.diffusion.offload import brought
from ptqd.quantization.activation_profile import ActivationProfile, temporal_inputs
from ptqd.quantization.modules.linear_conv import QuantLayer, find_layer, full_weight
from ptqd.quantization.rounding.gptq import gptq, grid_on_cpu

DAMPING = 0.01


def fit_temporal(model: nn.Module, full: nn.Module, profile: ActivationProfile, names: frozenset[str]) -> None:
    """Round the layers that see nothing but the step for exactly the inputs they will get, in place.

    Layers with the same inputs go together, those closest to the timestep first; the inputs of the next are then looked
    up behind them.

    Args:
        model: the denoiser; its ranges are fixed.
        full: the same in full precision.
        profile: of the layers in full precision.
        names: of the layers.
    """
    inputs = profile.temporal
    left = [name for name in inputs if name in names]
    while left:
        alike = [name for name in left if torch.equal(inputs[name], inputs[left[0]])]
        now = temporal_inputs(model, profile, alike)  # smoothed already
        for name in alike:
            layer: Any = find_layer(model, name)
            exact = layer.smoothed(inputs[name].to(layer.weight)).float().cpu()
            x = now[name]
            if layer.input.ranges > 1:
                layer.input.set_static_range(x)
            rounded = _rounded_by_step(layer, x)
            fit_exactly(layer, layer.target_weight(full_weight(full, name, layer)), exact, rounded, DAMPING)
        left = [name for name in left if name not in alike]


def _rounded_by_step(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """A layer's smoothed inputs (T, I) as it rounds them, each at its step."""
    before, layer.input.step.index = layer.input.step.index, torch.arange(len(x))
    try:
        with brought(layer):
            rounded: torch.Tensor = layer.input(x.to(layer.weight))
        return rounded.float().cpu()
    finally:
        layer.input.step.index = before


def fit_exactly(layer: QuantLayer, rows: torch.Tensor, x: torch.Tensor, seen: torch.Tensor, damping: float) -> None:
    """Round a layer for the only inputs it will ever see (TFMQ-DM, arXiv 2311.16503, section 4.2, in closed form).

    The rows first become those that make the most of the rounded inputs, then they are rounded by GPTQ, and the mean
    error that is left goes into the bias.

    Args:
        layer: with its input's ranges fixed.
        rows: what its codes stand for (O, I).
        x: its inputs in full precision (T, I).
        seen: the same as it will see them, rounded (T, I).
        damping: as for :func:`gptq`.
    """
    gram = (seen.T @ seen).double()
    ridge = gram + damping * float(gram.diagonal().mean().clamp(min=1e-12)) * torch.eye(len(gram), dtype=torch.float64)
    required = x @ rows.T  # T,O
    missing = seen.T.double() @ (required - seen @ rows.T).double()  # I,O
    better = rows + torch.linalg.solve(ridge, missing).T.float()
    grid = grid_on_cpu(layer)
    rounded = gptq(better, gram.float(), grid, order=True, damping=damping)
    layer.write(grid, grid.codes(rounded))
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias += (required - seen @ rounded.T).mean(0).to(layer.bias)
