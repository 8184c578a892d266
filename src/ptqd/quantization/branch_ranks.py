"""The rank of each layer's branch (SVDQuant): more where the denoiser's output shows it.

All branches together cost the bit operations of one rank everywhere. Beside a branch ``L`` of rank ``r`` a layer
computes ``Q(W - L) Q(x) + L x`` in place of ``W x``. What that changes of its output, for several ranks, moves the
denoiser's output by as much as :mod:`ptqd.quantization.output_effect` says; the rank that takes away most of it for
each bit operation comes first, as for a knapsack.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import brought, weights_left_behind
from ptqd.quantization.calibration import CalibrationInputs
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.numerics.weight_grid import WeightGrid
from ptqd.quantization.output_effect import OutputEffects
from ptqd.quantization.sites import quantized_layers

SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the rank that all would have
_Effect = tuple[str, int]  # of a layer's roundings beside a branch of a rank


@dataclass(frozen=True)
class BranchOptions:
    """What a layer's branch can be.

    Attributes:
        cost: bit operations of a branch of rank 1.
        effects: what the layer's roundings do to the denoiser's output, by the branch's rank; 0 is none.
    """

    cost: float
    effects: Mapping[int, float]


def choose_ranks(options: Mapping[str, BranchOptions], budget: float) -> dict[str, int]:
    """The rank of each layer's branch, by the layer's name; those that take away most for each bit operation first.

    Args:
        options: of each layer.
        budget: bit operations of all branches together, at most.
    """
    ranks = dict.fromkeys(options, 0)
    room = budget
    while True:
        best: tuple[float, str, int] | None = None
        for name, layer in options.items():
            has = ranks[name]
            for rank, effect in layer.effects.items():
                costs, gain = layer.cost * (rank - has), layer.effects[has] - effect
                if rank <= has or gain <= 0 or costs > room:
                    continue
                worth = gain / max(costs, 1e-300)
                if best is None or (worth, name, -rank) > (best[0], best[1], -best[2]):
                    best = worth, name, rank
        if best is None:
            return ranks
        _, name, rank = best
        room -= options[name].cost * (rank - ranks[name])
        ranks[name] = rank


def branch_ranks(
    model: nn.Module,
    inputs: CalibrationInputs,
    macs: Mapping[str, float],
    exempt: frozenset[str],
    *,
    seed: int = 0,
    title: str | None = None,
) -> dict[str, int]:
    """The rank of each layer's branch, for the bit operations of the branches that the layers have room for now.

    Args:
        model: the denoiser, smoothed, its quantizers bypassed.
        inputs: rows of its calls.
        macs: multiply-accumulates by layer.
        exempt: layers whose branch stays as it is.
        seed: of the directions in which the output's change is taken, and of the branches.
        title: of a progress bar.
    """
    layers = {name: layer for name, layer in quantized_layers(model) if layer.rank and name not in exempt}
    found = OutputEffects[_Effect](seed)
    hooks = []
    for name, layer in layers.items():
        branches = _branches(layer, seed)
        hooks.append(layer.register_forward_hook(partial(_watch, found, name, branches)))
    with hooked(*hooks), weights_left_behind(model):
        found.run(partial(inputs.run, model), len(inputs), title)
    options = {}
    for name, layer in layers.items():
        cost = macs.get(name, 0.0) * (1 / layer.shape[0] + 1 / layer.columns) * layer.rank_bits**2
        effects = {rank: value for (own, rank), value in found.effects.items() if own == name}
        if cost and effects:
            options[name] = BranchOptions(cost, effects)
    budget = sum(each.cost * layers[name].rank for name, each in options.items())
    return choose_ranks(options, budget)


@dataclass(frozen=True)
class _Branches:
    """A layer's branches of several ranks: ``u s v^T`` is the largest; and the ranks, none included."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    ranks: tuple[int, ...]


def _branches(layer: QuantLayer, seed: int) -> _Branches:
    rows = layer.float_weight().detach().cpu().float().flatten(1)
    most = min(rows.shape) // 4
    ranks = sorted({0, *(max(1, min(most, round(share * layer.rank))) for share in SHARES)})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(rows, min(ranks[-1] + 8, *rows.shape), niter=4)
    return _Branches(u, s, v, tuple(ranks))


def _watch(
    found: "OutputEffects[_Effect]", name: str, branches: _Branches, layer: Any, args: Any, y: torch.Tensor
) -> torch.Tensor:
    def moves() -> dict[_Effect, torch.Tensor]:
        with brought(layer):
            x, rows = layer.smoothed(args[0].detach()), layer.float_weight().detach().cpu().float().flatten(1)
        as_it_comes = ActivationQuantizer(
            replace(layer.input.spec, dynamic=True), axis=layer.input.axis, rowwise=layer.input.rowwise
        ).to(x.device)
        moved, rounded = {}, as_it_comes(x)
        for rank in branches.ranks:
            rest = rows - (branches.u[:, :rank] * branches.s[:rank]) @ branches.v[:, :rank].T
            codes = WeightGrid.find(rest, replace(layer.weights, range="minmax")).rounded(rest)
            wanted, found_weight = (weight.view(layer.shape).to(x) for weight in (rest, codes))
            moved[name, rank] = layer.matmul(rounded, found_weight) - layer.matmul(x, wanted)
        return moved

    return found.watch(name, y, moves)
