"""GPTQ (Frantar et al., arXiv 2210.17323), as a function of a weight's rows and their inputs' Hessian.

Column by column, each rounding's error is made up for by the columns still to come, as the inverse Hessian of the
layer's squared output error says: ``W_rest -= (w_j - q_j) / U_jj U_j,rest`` with ``H^-1 = U^T U`` (algorithm 1). A very
wide layer's columns are taken in blocks of whole channels, as if blocks were uncorrelated: memory goes with the square
of the columns, and time with the cube.

Asymmetric (GPTAQ, Li et al., arXiv 2504.02692) the target is not ``W X``, on inputs ``X`` from behind rounded layers,
but ``W X~`` on full precision's. That is the same problem for another weight, ``W + W (X~ - X) X^T H^-1``; the target
goes part of the way there. Layers are then rounded one after the other: two of them that saw the same error would both
make up for it. The layer's own rounding of its input is left out of ``X~ - X``, for which least squares would shrink.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.files import release_pages
from ptqd.progress import track
from ptqd.quantization.blocks import find_units, is_inside
from ptqd.quantization.budget import live_bytes, release_memory
from ptqd.quantization.calibration import BATCH, CalibrationInputs
from ptqd.quantization.checkpoints import DoneLayers
from ptqd.quantization.methods import Gptq
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer, full_weight
from ptqd.quantization.numerics.weight_grid import WeightGrid, round_to
from ptqd.quantization.recipe import QuantSpec
from ptqd.quantization.rounding.capture import reached_in_order, run_until, times_called, units_in_order
from ptqd.quantization.rounding.lockstep import in_lockstep
from ptqd.quantization.rounding.registry import Task, handles
from ptqd.quantization.sites import quantized_layers
from ptqd.quantization.swap import HALVES

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
    diagonal = hessian.diagonal().double()
    diagonal[diagonal == 0] = 1  # inputs that are always 0: any rounding does
    permutation = diagonal.argsort(descending=True, stable=True) if order else torch.arange(len(diagonal))
    factor = hessian[permutation[:, None], permutation].double()  # two of its size in float64 at once, at most
    factor.diagonal().copy_(diagonal[permutation] + damping * float(diagonal[permutation].mean()))
    factor = torch.linalg.cholesky(factor)
    factor = torch.cholesky_inverse(factor)
    factor = torch.linalg.cholesky(factor, upper=True)
    upper = factor.float()
    del factor
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

    Hessians are of the inputs that layers get behind units that are already rounded; units are single layers where it
    is asymmetric. All calls go from unit to unit together where memory allows it; else, or where a unit is called more
    than once, they are run anew up to each unit. (Asymmetric, it is the layers that are called more than once for which
    they are, before the others.)

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
    units = _layers_in_order(model, inputs) if method.asymmetric else units_in_order(model, find_units(model), inputs)
    times = times_called(model, units, inputs)
    again = [unit for unit in units if times[unit] > 1] if method.asymmetric else []
    bar = iter(track(units, title))
    between = live_bytes(model, units, inputs.call([0])) * (2 if method.asymmetric else 1)
    waiting = rows_that_wait(between, spare, len(inputs))

    def anew(unit: str) -> None:
        """Round a unit by calls that are run up to it."""

        def call_unit() -> None:
            with torch.no_grad():
                for rows in inputs.batches(at_once):
                    if method.asymmetric:
                        run_until(full, unit, inputs.call(rows), times[unit])
                    run_until(model, unit, inputs.call(rows), times[unit])

        _round_unit(model, full, unit, method, exempt, call_unit, done, times[unit])

    if (method.asymmetric or max(times.values()) == 1) and waiting:
        inputs = inputs.first(waiting)

        def visit(unit: str, call_unit: Callable[[], None]) -> None:
            next(bar, None)
            _round_unit(model, full, unit, method, exempt, call_unit, done)

        for unit in again:  # whose moments are of all its calls
            next(bar, None)
            anew(unit)
        beside = (full, partial(find_layer, full)) if method.asymmetric else None
        once = [unit for unit in units if unit not in again]
        in_lockstep(model, [inputs.call(rows) for rows in inputs.batches(at_once)], once, visit, beside)
        done.finish()
        return
    for unit in bar:
        anew(unit)
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
    times: int = 1,
) -> None:
    """Round the layers of one unit by the inputs that they get when the unit is called."""
    layers = {name: x for name, x in quantized_layers(model) if is_inside(name, unit) and name not in exempt}
    if done.has(*layers):
        _restore(layers, done)
    else:
        moments = moments_of(layers, call_unit, full if method.asymmetric else None, times)
        weights = {name: full_weight(full, name, layers[name]) for name in moments}
        round_layers(layers, weights, moments, method)
        done.keep(layers, ["codes"])
        if any(layer.holds_codes for layer in layers.values()):
            for weight in weights.values():
                release_pages(weight)
            release_memory()


def _restore(layers: Mapping[str, QuantLayer], done: DoneLayers) -> None:
    """Give layers the codes that were chosen before a kill."""
    for name, layer in layers.items():
        done.restore(name, layer)
        layer.refresh()


@dataclass
class Moments:
    """Sums over the inputs of a layer, whole (I, I) or as blocks on the diagonal.

    Attributes:
        hessians: ``X^T X``.
        changes: ``(X~ - X)^T X``, of full precision's inputs less those before the layer rounds them; none where full
            precision is not called beside.
    """

    hessians: list[torch.Tensor]
    changes: list[torch.Tensor]

    def add(self, other: "Moments") -> None:
        """Further inputs."""
        self.hessians = [a + b for a, b in zip(self.hessians, other.hessians, strict=True)]
        self.changes = [a + b for a, b in zip(self.changes, other.changes, strict=True)]


def moments_of(
    layers: Mapping[str, QuantLayer], call: Callable[[], None], full: nn.Module | None = None, times: int = 1
) -> dict[str, Moments]:
    """The moments of the inputs that each layer gets in calls, where it is called.

    Args:
        layers: by name.
        call: makes the calls; each of a full-precision denoiser, where there is one, before the same of the layers.
        full: that denoiser.
        times: that it calls each layer in one call, before the other calls it as often.
    """
    result: dict[str, Moments] = {}
    given: dict[str, list[torch.Tensor]] = {}

    def keep(module: Any, args: Any, name: str) -> None:
        given[name] = [*given.get(name, ()), args[0].detach()][-times:]

    def add(layer: Any, args: Any, name: str) -> None:
        before = layer.smoothed(args[0].detach())
        x = layer.input(before)
        change = None
        if full is not None:  # experts are given other tokens than in full precision, or none
            waiting = given.get(name)
            theirs = layer.smoothed(_half(waiting.pop(0), layer, full, name)) if waiting else before
            change = theirs - before if theirs.shape == before.shape else torch.zeros_like(before)
        at_once = _rows_at_once(layer, x)
        for n, part in enumerate(x.split(at_once)):
            columns = hessian_inputs(layer, part).float().split(hessian_widths(layer), dim=1)
            own = Moments([(x.T @ x).cpu() for x in columns], [])
            if change is not None:
                changed = hessian_inputs(layer, change.split(at_once)[n]).float().split(hessian_widths(layer), dim=1)
                own.changes = [(d.T @ x).cpu() for d, x in zip(changed, columns, strict=True)]
            if name in result:
                result[name].add(own)
            else:
                result[name] = own

    hooks = [layer.register_forward_pre_hook(partial(add, name=name)) for name, layer in layers.items()]
    if full is not None:
        hooks += [_full_layer(full, name).register_forward_pre_hook(partial(keep, name=name)) for name in layers]
    with hooked(*hooks):
        call()
    return result


def _layers_in_order(model: nn.Module, inputs: CalibrationInputs) -> list[str]:
    """A denoiser's quantized layers in the order a call first reaches them, both halves of a split one together."""
    names = dict.fromkeys(_whole_name(model, name) for name, _ in quantized_layers(model))
    return reached_in_order(model, list(names), inputs)


def _whole_name(model: nn.Module, name: str) -> str:
    """The name of a quantized layer, or of the one that it is half of."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(find_layer(model, parent), SplitConv) else name


def _full_layer(full: nn.Module, name: str) -> nn.Module:
    """The layer of the full-precision denoiser that a quantized one, or half of one, was made from."""
    own: nn.Module | None = find_layer(full, name)
    layer: nn.Module = find_layer(full, name.rpartition(".")[0]) if own is None else own
    return layer


def _half(x: torch.Tensor, layer: QuantLayer, full: nn.Module, name: str) -> torch.Tensor:
    """The channels that a layer gets, of an input of the one that it is half of."""
    if find_layer(full, name) is not None:
        return x
    return x[:, : layer.shape[1]] if name.endswith(HALVES[0]) else x[:, -layer.shape[1] :]


def _rows_at_once(layer: QuantLayer, x: torch.Tensor) -> int:
    """Rows of an input whose columns under a kernel are not too many to be side by side."""
    taps = layer.columns // layer.shape[1]  # of a kernel, each of which has the input once more
    return int(max(1, _MOST_NUMBERS * len(x) // max(1, x.numel() * taps)))


def round_layers(
    layers: Mapping[str, QuantLayer],
    weights: Mapping[str, torch.Tensor],
    moments: Mapping[str, Moments],
    method: Gptq,
) -> None:
    """Round layers' full-precision weights by the moments of their inputs, in place."""
    for name, own in moments.items():
        layer = layers[name]
        grid, target = grid_on_cpu(layer), layer.target_weight(weights[name])
        if own.changes:
            target = target + method.asymmetric * correction_for_inputs(target, own, method.damping)
        rows = gptq(target, own.hessians, grid, order=method.order, damping=method.damping)
        layer.write(grid, grid.codes(rows))


def correction_for_inputs(rows: torch.Tensor, moments: Moments, damping: float) -> torch.Tensor:
    """``W (X~ - X) X^T H^-1``: what a weight (O, I) lacks to give full precision's output on the inputs that come."""
    sizes = [len(block) for block in moments.hessians]
    parts = []
    for w, change, hessian in zip(rows.split(sizes, 1), moments.changes, moments.hessians, strict=True):
        damped = hessian.double().clone()
        damped.diagonal().add_(damping * float(damped.diagonal().mean()) + torch.finfo(torch.float64).tiny)
        parts.append(torch.cholesky_solve((w.double() @ change.double()).T, torch.linalg.cholesky(damped)).T.float())
    return torch.cat(parts, 1)


def hessian_widths(layer: QuantLayer) -> list[int]:
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
