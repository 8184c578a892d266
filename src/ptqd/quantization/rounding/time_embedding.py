"""Rounding in closed form: GPTQ over a denoiser's layers, and exactly for layers that see a finite set of inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.diffusion.sampling import Sampling
from ptqd.progress import track
from ptqd.quantization.activation_profile import survey
from ptqd.quantization.blocks import find_units
from ptqd.quantization.calibration import Pool
from ptqd.quantization.methods import Gptq
from ptqd.quantization.modules.linear_conv import QuantLayer, full_weight
from ptqd.quantization.numerics.weight_grid import WeightGrid
from ptqd.quantization.rounding.capture import BATCH, units_in_order
from ptqd.quantization.rounding.gptq import gptq, hessian_inputs

DAMPING = 0.01


def fit_columns(
    quantized: nn.Module, full: nn.Module, pool: Pool, method: Gptq, fixed: frozenset[str], progress: str | None
) -> None:
    """GPTQ, unit by unit: Hessians are of the inputs that layers get behind units that are already rounded."""
    for unit in track(units_in_order(quantized, find_units(quantized), pool), progress):
        layers = {
            name: layer
            for name, layer in quantized.named_modules()
            if isinstance(layer, QuantLayer) and f"{name}.".startswith(f"{unit}.") and name not in fixed
        }
        hessians: dict[str, torch.Tensor] = {}
        with _summing(layers, hessians), torch.no_grad():
            for rows in pool.batches(BATCH):
                args, kwargs = pool.call(rows)
                quantized(*args, **kwargs)
        for name, hessian in hessians.items():
            layer = layers[name]
            grid, target = _on_cpu(layer), layer.target(full_weight(full, name, layer))
            layer.write(grid, grid.codes(gptq(target, hessian, grid, order=method.order, damping=method.damping)))


def _on_cpu(layer: QuantLayer) -> WeightGrid:
    """A layer's grid, on the CPU: not every device has float64 and Cholesky factors."""
    grid = layer.grid()
    return replace(grid, scale=grid.scale.cpu(), zero=grid.zero.cpu())


@contextmanager
def _summing(layers: Mapping[str, QuantLayer], hessians: dict[str, torch.Tensor]) -> Iterator[None]:
    """Sum ``X^T X`` of what the layers' weights are multiplied with."""

    def add(name: str, layer: QuantLayer, x: torch.Tensor) -> None:
        inputs = hessian_inputs(layer, layer.input(layer.smoothed(x.detach()))).float()
        product = (inputs.T @ inputs).cpu()
        hessians[name] = product if name not in hessians else hessians[name] + product

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: add(name, m, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fit_temporal(
    qpipe: DiffusionPipeline, full: nn.Module, run: Sampling, names: frozenset[str], inputs: Mapping[str, torch.Tensor]
) -> None:
    """Round the layers that see nothing but the step for exactly the inputs they will get, in place.

    Layers with the same inputs go together, those closest to the timestep first; the inputs of the next are then looked
    up behind them.

    Args:
        qpipe: frozen.
        full: its denoiser in full precision.
        run: its steps.
        names: of the layers.
        inputs: of each of them in full precision, not smoothed (T, I).
    """
    model = getattr(qpipe, denoiser_name(qpipe))
    left = [name for name in inputs if name in names]
    while left:
        alike = [name for name in left if torch.equal(inputs[name], inputs[left[0]])]
        now = survey(qpipe, run.replace(samples=2)).temporal
        for name in alike:
            layer: Any = model.get_submodule(name)
            exact = layer.smoothed(inputs[name].to(layer.weight)).float().cpu()
            x = now.get(name, exact)  # smoothed already
            if layer.input.ranges > 1:
                layer.input.fix(x)
            seen = _rounded_by_step(layer, x)
            fit_exactly(layer, layer.target(full_weight(full, name, layer)), exact, seen, DAMPING)
        left = [name for name in left if name not in alike]


def _rounded_by_step(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """A layer's smoothed inputs (T, I) as it rounds them, each at its step."""
    before, layer.input.step.index = layer.input.step.index, torch.arange(len(x))
    try:
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
    wanted = x @ rows.T  # T,O
    missing = seen.T.double() @ (wanted - seen @ rows.T).double()  # I,O
    better = rows + torch.linalg.solve(ridge, missing).T.float()
    grid = _on_cpu(layer)
    rounded = gptq(better, gram.float(), grid, order=True, damping=damping)
    layer.write(grid, grid.codes(rounded))
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias += (wanted - seen @ rounded.T).mean(0).to(layer.bias)
