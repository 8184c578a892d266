"""SmoothQuant (Xiao et al., arXiv 2211.10438) with a searched exponent."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.quantization.budget import release_memory
from ptqd.quantization.calibration import CalibrationInputs
from ptqd.quantization.checkpoints import DoneLayers
from ptqd.quantization.methods import SMOOTHED, ConvRot, Smooth
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer, full_weight
from ptqd.quantization.numerics.weight_grid import WeightGrid
from ptqd.quantization.rounding.registry import Task, handles
from ptqd.quantization.sites import quantized_layers

ALPHAS = tuple(i / 10 for i in range(11))
_TINY = 1e-5


def smoothing(seen: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`` (eq. 4), of geometric mean 1; 1 where a channel is always 0.

    Args:
        seen: largest magnitude of each input channel (I,).
        weight: the layer's, input channels second.
        alpha: between 0 and 1.

    >>> smoothing(torch.tensor([4.0, 1.0]), torch.ones(1, 2), 0.5).tolist()
    [1.4142135381698608, 0.7071067690849304]
    """
    strength = weight.detach().abs().transpose(0, 1).flatten(1).amax(1).float()  # I
    seen = seen.float()
    alive = (seen > 0) & (strength > 0)
    scale = seen.clamp(min=_TINY).pow(alpha) / strength.clamp(min=_TINY).pow(1 - alpha)
    scale = torch.where(alive, scale, 1.0)
    if alive.any():
        scale = torch.where(alive, scale / scale[alive].log().mean().exp(), 1.0)
    return scale.clamp(_TINY, 1 / _TINY)


def search_smoothing(layer: QuantLayer, weight: torch.Tensor, x: torch.Tensor, alpha: float | None) -> None:
    """Give a layer the smoothing and rotation under which its output errs least, on inputs ``x`` as it gets them.

    Each is tried with weights and activations rounded to nearest; none, if nothing is better than that.
    """
    assert layer.smooth_scale is not None
    axes = [axis for axis in range(x.ndim) if axis != layer.axis % x.ndim]
    seen = x.abs().amax(axes).cpu()
    weight = weight.detach()
    want = layer.matmul(x, weight)
    scales = [smoothing(seen, weight.cpu(), tried) for tried in (ALPHAS if alpha is None else (alpha,))]
    if alpha is None:
        scales.insert(0, torch.ones_like(scales[0]))
    best, choice = float("inf"), (scales[0], 1)
    for group in (1,) if layer.rotation is None else (1, layer.largest_rotation):
        for scale in scales:
            layer.smooth_scale.copy_(scale)
            if layer.rotation is not None:
                layer.set_rotation(group)
            error = _error(layer, weight, x, want)
            if error < best:
                best, choice = error, (scale, group)
    layer.smooth_scale.copy_(choice[0])
    if layer.rotation is not None:
        layer.set_rotation(choice[1])


def _error(layer: QuantLayer, weight: torch.Tensor, x: torch.Tensor, want: torch.Tensor) -> float:
    """Squared error of the output with rounding to nearest and the smoothing that the layer has now."""
    quantizer = ActivationQuantizer(layer.input.spec, axis=layer.axis, rowwise=layer.input.rowwise)
    smoothed = layer.smoothed(x)
    quantizer.observe()
    quantizer(smoothed)
    quantizer.freeze()
    rows = layer.target_weight(weight)
    spec = (
        layer.weights if layer.weights.range == "minmax" else replace(layer.weights, range="minmax")
    )  # one try is quick
    rounded = WeightGrid.find(rows, spec).rounded(rows).view(layer.shape).to(weight)
    return float((layer.matmul(quantizer(smoothed), rounded) - want).float().square().sum())


def fit_smoothing(
    model: nn.Module, full: nn.Module, inputs: CalibrationInputs, method: Smooth, scratch: Path | None = None
) -> None:
    """Smooth every layer that has room for it, in one call of the denoiser in full precision.

    A layer is smoothed when its input comes, and goes on with the smoothed weight, which changes nothing of its output.
    Of rows that cannot be called together it is the commonest kind that is looked at. ``scratch`` keeps what is done
    over a kill.
    """
    layers = {name: layer for name, layer in quantized_layers(model) if layer.smooth_scale is not None}
    done = DoneLayers(scratch)
    if done.is_whole:
        for name, layer in layers.items():
            if done.has(name):
                _restore(done, name, layer)
                layer.use_float(full_weight(full, name, layer))
        return
    smoothed: set[str] = set()  # a layer may be called again

    def smooth(layer: Any, args: Any, name: str) -> None:
        if name in smoothed or not args[0].numel():
            return
        smoothed.add(name)
        weight = full_weight(full, name, layer).to(layer.codes.device)  # which may be on its device just now
        if done.has(name):
            _restore(done, name, layer)
        else:
            search_smoothing(layer, weight, args[0].detach(), method.alpha)
            done.keep({name: layer}, ["smooth_scale", *(["rotation"] if layer.rotation is not None else [])])
        layer.use_float(weight)
        if layer.holds_codes:
            release_memory()

    hooks = [layer.register_forward_pre_hook(partial(smooth, name=name)) for name, layer in layers.items()]
    with hooked(*hooks), torch.no_grad():
        args, kwargs = inputs.call(inputs.kinds()[0])
        model(*args, **kwargs)
    done.finish()


def fit_rotation(model: nn.Module, full: nn.Module) -> None:
    """Rotate every layer that has room for it, by a regular Hadamard matrix of the largest group."""
    for name, layer in quantized_layers(model):
        if layer.rotation is not None:
            layer.set_rotation(-layer.largest_rotation)
            layer.use_float(full_weight(full, name, layer))


def _restore(done: DoneLayers, name: str, layer: QuantLayer) -> None:
    done.restore(name, layer)
    if layer.rotation is not None:
        layer.set_rotation(int(layer.rotation))


@handles(ConvRot)
def handle_convrot(task: Task, method: ConvRot) -> None:
    """Rotate by ConvRot."""
    fit_rotation(task.model, task.full)


@handles(Smooth)
def handle_smooth(task: Task, method: Smooth) -> None:
    """Smooth by SmoothQuant."""
    fit_smoothing(task.model, task.full, task.rows(task.rows_at_once(SMOOTHED)), method, task.kept)
