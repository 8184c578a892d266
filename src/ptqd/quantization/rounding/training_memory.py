"""What a training step keeps for its gradients, and how to keep less: fewer rows at once, and units computed again.

A batch may be learned from in parts whose gradients add up. Where one row is too much, only what stands between units
is kept, and each unit is computed again when its gradient comes (Chen et al., arXiv 1604.06174). Neither changes the
gradient, but for the order of a sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptqd.diffusion.intercept import hooked

SLACK = 1.6  # of what is kept: what a gradient takes beside it while it is computed


@dataclass(frozen=True)
class RowsAtOnce:
    """How a batch is learned from.

    Attributes:
        rows: at once.
        again: units are computed again for their gradients.
        fits: whether that fits into the memory that there is.
    """

    rows: int
    again: bool
    fits: bool


@dataclass(frozen=True)
class Kept:
    """Bytes that are kept for gradients.

    Attributes:
        all: in all.
        by_unit: in each unit; "" is what is kept between them.
    """

    all: int
    by_unit: dict[str, int]


def kept_bytes(forward: Callable[[], object], model: nn.Module, units: Sequence[str]) -> Kept:
    """What a forward pass keeps for its gradients.

    Args:
        forward: the pass, with gradients on.
        model: that it calls.
        units: names of its modules, none inside another.
    """
    sizes = dict.fromkeys(["", *units], 0)
    seen: set[int] = set()
    where = [""]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            sizes[where[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(module: object, args: object, unit: str) -> None:
        where.append(unit)

    def leave(module: object, args: object, output: object) -> None:
        where.pop()

    modules = [(unit, model.get_submodule(unit)) for unit in units]
    hooks = [module.register_forward_pre_hook(partial(enter, unit=unit)) for unit, module in modules]
    hooks += [module.register_forward_hook(leave) for _, module in modules]
    with hooked(*hooks), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # kept alive: storage that is freed could be taken again
    del kept
    return Kept(sum(sizes.values()), sizes)


def rows_at_once(one: Kept, two: Kept, batch: int, spare: int) -> RowsAtOnce:
    """How many rows of a batch can be learned from at once.

    Args:
        one: what a pass with one row keeps.
        two: the same with two rows.
        batch: rows.
        spare: bytes that may be taken.
    """

    def fitting(each: float, fixed: float) -> int:
        return int((spare - SLACK * fixed) / (SLACK * max(each, 1)))

    each, fixed = two.all - one.all, max(0, 2 * one.all - two.all)
    rows = fitting(each, fixed)
    if rows >= 1:
        return RowsAtOnce(min(rows, batch), again=False, fits=True)
    units = [unit for unit in one.by_unit if unit]
    inside = max((two.by_unit[unit] - one.by_unit[unit] for unit in units), default=0)
    between = each - sum(two.by_unit[unit] - one.by_unit[unit] for unit in units)
    rows = fitting(between + 2 * inside, fixed)
    return RowsAtOnce(max(1, min(rows, batch)), again=True, fits=rows >= 1)


@contextmanager
def computed_again(model: nn.Module, units: Sequence[str]) -> Iterator[None]:
    """Inside the block units keep nothing for their gradients, and are computed again instead."""
    modules: list[Any] = [model.get_submodule(unit) for unit in units]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
