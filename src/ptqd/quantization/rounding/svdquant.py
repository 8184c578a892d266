"""SVDQuant (Li et al., arXiv 2411.05007, eq. 4): a branch of low rank takes what is hardest to quantize."""

from pathlib import Path

import torch
from torch import nn

from ptqd.quantization.checkpoints import DoneLayers
from ptqd.quantization.methods import LowRank
from ptqd.quantization.modules.linear_conv import QuantLayer, full_weight
from ptqd.quantization.rounding.registry import Task, handles
from ptqd.quantization.sites import quantized_layers

BRANCH = ("low_rank_down", "low_rank_up", "low_rank_scale")


def split_low_rank(layer: QuantLayer, weight: torch.Tensor, seed: int) -> None:
    """Give a layer the branch that takes most of its smoothed weight, by randomised SVD (arXiv 0909.4061)."""
    if layer.rank == 0:
        return
    down, up = (torch.zeros(size) for size in ((layer.rank, layer.columns), (layer.shape[0], layer.rank)))
    layer.set_low_rank(down, up)
    rows = layer.target_weight(weight)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(rows, min(layer.rank + 8, *rows.shape), niter=4)
    root = s[: layer.rank].sqrt()
    layer.set_low_rank(root[:, None] * v[:, : layer.rank].T, u[:, : layer.rank] * root)


def fit_low_rank(model: nn.Module, full: nn.Module, seed: int, scratch: Path | None = None) -> None:
    """Give every layer that has room for it its branch; ``scratch`` keeps them over a kill."""
    done = DoneLayers(scratch)
    for name, layer in quantized_layers(model):
        if layer.rank:
            if done.has(name):
                done.restore(name, layer)
            else:
                split_low_rank(layer, full_weight(full, name, layer), seed)
                done.keep({name: layer}, BRANCH if layer.low_rank_scale is not None else BRANCH[:2])
            layer.use_float(full_weight(full, name, layer))
    done.finish()


@handles(LowRank)
def handle_low_rank(task: Task, method: LowRank) -> None:
    """Split off SVDQuant's branch."""
    fit_low_rank(task.model, task.full, task.seed, task.kept)
