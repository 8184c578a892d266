"""GPTQ (Frantar et al., arXiv 2210.17323), as a function of a weight's rows and their inputs' Hessian.

Column by column, each rounding's error is made up for by the columns still to come, as the inverse Hessian of the
layer's squared output error says: ``W_rest -= (w_j - q_j) / U_jj U_j,rest`` with ``H^-1 = U^T U`` (algorithm 1). A very
wide layer's columns are taken in blocks of whole channels, as if blocks were uncorrelated: memory goes with the square
of the columns, and time with the cube.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.progress import track
from ptqd.quantization.blocks import find_units, is_inside
from ptqd.quantization.budget import live_bytes
from ptqd.quantization.calibration import BATCH, CalibrationInputs
from ptqd.quantization.checkpoints import DoneLayers
from ptqd.quantization.methods import Gptq
from ptqd.quantization.modules.linear_conv import QuantLayer, full_weight
from ptqd.quantization.numerics.weight_grid import WeightGrid, round_to
from ptqd.quantization.recipe import QuantSpec
from ptqd.quantization.rounding.capture import run_until, times_called, units_in_order
from ptqd.quantization.rounding.lockstep import in_lockstep
from ptqd.quantization.rounding.registry import Task, handles
from ptqd.quantization.sites import quantized_layers

_MOST_NUMBERS = 1 << 25  # of inputs under a convolution's kernel, at once
_WIDEST = 9216  # columns whose Hessian is taken whole: its factors in float64 are 0.7 GB each
_FEWEST = 64  # rows that Hessians are worth taking on
_BLOCK = 128  # columns whose updates of the rest are made at once


def hessian_inputs(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """What multiplies a layer's rows: (n, I) of an input, at every place and token."""
    if layer.kind == "linear":
        return x.reshape(-1, layer.columns)
    conv: Any = layer
    kernel, stride, padding, dilation = (
        getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    if isinstance(padding, str):
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)) if padding == "same" else 0
    if len(kernel) == 2:
        return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).reshape(-1, layer.columns)
    x = F.pad(x, [p for side in reversed(padding) for p in (side, side)])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # places first, the kernel's own axes last
    places = tuple(range(2, 2 + len(kernel)))
    return x.movedim(places, tuple(range(1, 1 + len(kernel)))).reshape(-1, layer.columns)


def gptq(
    rows: torch.Tensor, hessian: torch.Tensor | Sequence[torch.Tensor], grid: WeightGrid, *, order: bool, damping: float
) -> torch.Tensor:
    """Rows on their grid, chosen one column after the other.

    Args:
        rows: (O, I), float32.
        hessian: ``X^T X`` of the layer's inputs (I, I), or the blocks on its diagonal that count.
        grid: the numbers that rows are rounded to; its scales stay.
        order: columns by falling diagonal of the Hessian.
        damping: share of its mean diagonal that is added to it.

    Returns:
        Rounded rows (O, I), on the grid.
    """
    blocks = [hessian] if isinstance(hessian, torch.Tensor) else list(hessian)
    sizes = [len(block) for block in blocks]
    scale, zero = grid.expanded()
    parts = zip(rows.split(sizes, 1), scale.split(sizes, 1), zero.split(sizes, 1), blocks, strict=True)
    done = [_block(w, s, z, h, grid.spec, order=order, damping=damping) for w, s, z, h in parts]
    return torch.cat(done, 1) if len(done) > 1 else done[0]


def _block(
    rows: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hessian: torch.Tensor,
    spec: QuantSpec,
    *,
    order: bool,
    damping: float,
) -> torch.Tensor:
    """Columns that make up for each other."""
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that are always 0: any rounding does
    diagonal[dead] = 1
    permutation = diagonal.argsort(descending=True, stable=True) if order else torch.arange(len(diagonal))
    hessian = hessian[permutation][:, permutation]
    hessian.diagonal().add_(damping * float(hessian.diagonal().mean()))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    scale, zero = scale[:, permutation], zero[:, permutation]
    left, result = rows[:, permutation].clone(), torch.empty_like(rows)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        errors = torch.zeros(len(left), end - start)
        for j in range(start, end):
            rounded = round_to(left[:, j], scale[:, j], zero[:, j], spec)
            error = (left[:, j] - rounded) / upper[j, j]
            left[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - start] = error
            result[:, j] = rounded
        left[:, end:] -= errors @ upper[start:end, end:]
    return result[:, permutation.argsort()]


def fit_gptq(
    model: nn.Module,
    full: nn.Module,
    inputs: CalibrationInputs,
    method: Gptq,
    exempt: frozenset[str],
    title: str | None,
    spare: int,
    at_once: int = BATCH,
    scratch: Path | None = None,
) -> None:
    """Round a denoiser's layers unit by unit, in place.

    Hessians are of the inputs that layers get behind units that are already rounded. All calls go from unit to unit
    together where memory allows it; else, or where a unit is called more than once, they are run anew up to each unit.

    Args:
        model: the quantized denoiser, rounded to nearest.
        full: the same in full precision.
        inputs: rows of its calls.
        method: says how.
        exempt: layers that stay as they are.
        title: of a progress bar.
        spare: bytes that may be taken.
        at_once: rows of a call.
        scratch: a folder that keeps what is done over a kill.
    """
    done = DoneLayers(scratch)
    if done.is_whole:
        _restore({name: layer for name, layer in quantized_layers(model) if done.has(name)}, done)
        return
    units = units_in_order(model, find_units(model), inputs)
    times = times_called(model, units, inputs)
    bar = iter(track(units, title))
    waiting = rows_that_wait(live_bytes(model, units, inputs.call([0])), spare, len(inputs))
    if max(times.values()) == 1 and waiting:
        inputs = inputs.first(waiting)

        def visit(unit: str, call_unit: Callable[[], None]) -> None:
            next(bar, None)
            _round_unit(model, full, unit, method, exempt, call_unit, done)

        in_lockstep(model, [inputs.call(rows) for rows in inputs.batches(at_once)], units, visit)
        done.finish()
        return
    for unit in bar:

        def call_unit(unit: str = unit) -> None:
            with torch.no_grad():
                for rows in inputs.batches(at_once):
                    run_until(model, unit, inputs.call(rows), times[unit])

        _round_unit(model, full, unit, method, exempt, call_unit, done)
    done.finish()


def rows_that_wait(each: int, spare: int, rows: int) -> int:
    """How many of some rows can go from unit to unit together in half of the memory that there is; none if too few.

    Args:
        each: bytes that a row needs between units.
        spare: bytes that may be taken.
        rows: that there are.
    """
    fitting = min(rows, int(spare / 2 / max(each, 1)))
    return fitting if fitting >= min(rows, _FEWEST) else 0


def _round_unit(
    model: nn.Module,
    full: nn.Module,
    unit: str,
    method: Gptq,
    exempt: frozenset[str],
    call_unit: Callable[[], None],
    done: DoneLayers,
) -> None:
    """Round the layers of one unit by the inputs that they get when the unit is called."""
    layers = {name: x for name, x in quantized_layers(model) if is_inside(name, unit) and name not in exempt}
    if done.has(*layers):
        _restore(layers, done)
    else:
        hessians = hessians_of(layers, call_unit)
        weights = {name: full_weight(full, name, layers[name]) for name in hessians}
        round_layers(layers, weights, hessians, method)
        done.keep(layers, ["codes"])


def _restore(layers: Mapping[str, QuantLayer], done: DoneLayers) -> None:
    """Give layers the codes that were chosen before a kill."""
    for name, layer in layers.items():
        done.restore(name, layer)
        layer.refresh()


def hessians_of(layers: Mapping[str, QuantLayer], call: Callable[[], None]) -> dict[str, list[torch.Tensor]]:
    """``X^T X`` of the inputs that each layer gets in calls, where it is called: (I, I), or blocks on its diagonal."""
    hessians: dict[str, list[torch.Tensor]] = {}

    def add(layer: Any, args: Any, name: str) -> None:
        x = layer.input(layer.smoothed(args[0].detach()))
        for part in x.split(_rows_at_once(layer, x)):
            columns = hessian_inputs(layer, part).float()
            products = [(x.T @ x).cpu() for x in columns.split(_widths(layer), dim=1)]
            before = hessians.get(name)
            hessians[name] = products if before is None else [a + b for a, b in zip(before, products, strict=True)]

    with hooked(*(layer.register_forward_pre_hook(partial(add, name=name)) for name, layer in layers.items())):
        call()
    return hessians


def _rows_at_once(layer: QuantLayer, x: torch.Tensor) -> int:
    """Rows of an input whose columns under a kernel are not too many to be side by side."""
    taps = layer.columns // layer.shape[1]  # of a kernel, each of which has the input once more
    return int(max(1, _MOST_NUMBERS * len(x) // max(1, x.numel() * taps)))


def round_layers(
    layers: Mapping[str, QuantLayer],
    weights: Mapping[str, torch.Tensor],
    hessians: Mapping[str, list[torch.Tensor]],
    method: Gptq,
) -> None:
    """Round layers' full-precision weights by their Hessians, in place."""
    for name, blocks in hessians.items():
        layer = layers[name]
        grid, target = grid_on_cpu(layer), layer.target_weight(weights[name])
        layer.write(grid, grid.codes(gptq(target, blocks, grid, order=method.order, damping=method.damping)))


def _widths(layer: QuantLayer) -> list[int]:
    """How many of a layer's columns each block of its Hessian has: all, or whole channels of as many as fit."""
    if layer.columns <= _WIDEST:
        return [layer.columns]
    taps = layer.columns // layer.shape[1]
    count = -(-layer.columns // _WIDEST)
    channels = [len(part) for part in torch.arange(layer.shape[1]).chunk(count)]
    return [taps * n for n in channels]


def grid_on_cpu(layer: QuantLayer) -> WeightGrid:
    """A layer's grid, on the CPU: not every device has float64 and Cholesky factors."""
    grid = layer.grid()
    return replace(grid, scale=grid.scale.cpu(), zero=grid.zero.cpu())


@handles(Gptq)
def handle_gptq(task: Task, method: Gptq) -> None:
    """Round by GPTQ."""
    inputs = task.rows(method.inputs)
    fit_gptq(
        task.model,
        task.full,
        inputs,
        method,
        task.exempt,
        task.title,
        spare=task.spare(),
        at_once=task.rows_at_once(),
        scratch=task.kept,
    )
