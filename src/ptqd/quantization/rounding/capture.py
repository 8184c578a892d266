"""What a unit of a denoiser is given and what it makes of it, for every row of calibration inputs.

The model runs batch by batch up to the unit and stops there. What is kept goes to files that are mapped into memory, so
that what lies in memory is a batch.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptqd.diffusion.intercept import hooked
from ptqd.errors import InputError
from ptqd.files import explained, make_folder, reserve
from ptqd.quantization.blocks import inner_units
from ptqd.quantization.calibration import CalibrationInputs

BATCH = 64  # rows that a model runs at once


class _Stop(Exception):  # noqa: N818  # no error: the unit was reached
    pass


@dataclass
class _OfKind:
    """A tree of tensors for the rows of one kind; leaves that are the same for every row are kept once."""

    leaves: list[Any]
    factors: list[int]  # entries of a leaf for each row; 0 where it is shared
    dtypes: list[Any]
    structure: Any


@dataclass
class Captured:
    """Trees of tensors for all rows, by their kind.

    Attributes:
        kinds: of each kind of rows.
        place: of each row: its kind's number, and its own among them.
    """

    kinds: list[_OfKind]
    place: dict[int, tuple[int, int]]

    def rows(self, index: Sequence[int]) -> list[Any]:
        """The leaves for some rows, of one kind."""
        of = self.kinds[self.place[index[0]][0]]
        own = np.array([self.place[row][1] for row in index])
        picked: list[Any] = []
        for leaf, factor, dtype in zip(of.leaves, of.factors, of.dtypes, strict=True):
            picked.append(leaf if factor == 0 else torch.from_numpy(leaf[own]).flatten(0, 1).to(dtype))
        return picked

    def factors(self, row: int) -> list[int]:
        """Of the leaves of a row's kind."""
        return self.kinds[self.place[row][0]].factors

    def tree(self, leaves: list[object], row: int) -> Any:
        """Leaves as they were given or made, for rows of a row's kind."""
        return tree_unflatten(leaves, self.kinds[self.place[row][0]].structure)


def capture(
    model: nn.Module, unit: str, inputs: CalibrationInputs, folder: Path, *, outputs: bool = False, batch: int = BATCH
) -> tuple[Captured, Captured | None]:
    """The inputs, and if asked for the outputs, of a unit for every row of calibration inputs.

    Args:
        model: the denoiser.
        unit: the name of one of its modules; ``""`` is itself.
        inputs: rows of its calls.
        folder: where the mapped files go.
        outputs: keep what it makes of them too.
        batch: rows at once.

    Raises:
        InputError: the unit is not reached when the denoiser is called.
    """
    place = {row: (k, i) for k, rows in enumerate(inputs.kinds()) for i, row in enumerate(rows)}
    sides = [Captured([], place) for _ in range(1 + outputs)]
    for k, rows in enumerate(inputs.kinds()):
        both = zip(*(_run(model, unit, inputs, rows[:1] * n, outputs) for n in (2, 3)), strict=True)
        factors = [_factors(*pair) for pair in both]
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            trees = _run(model, unit, inputs, some, outputs)
            for side, (captured, tree) in enumerate(zip(sides, trees, strict=False)):
                leaves, structure = tree_flatten(tree)
                if len(captured.kinds) == k:
                    mapped = [
                        _mapped(folder / f"{side}-{k}-{i}.bin", leaf, factor, len(rows)) if factor else leaf
                        for i, (leaf, factor) in enumerate(zip(leaves, factors[side], strict=True))
                    ]
                    dtypes = [getattr(leaf, "dtype", None) for leaf in leaves]
                    captured.kinds.append(_OfKind(mapped, factors[side], dtypes, structure))
                for into, leaf, factor in zip(captured.kinds[k].leaves, leaves, factors[side], strict=True):
                    if factor:
                        into[start : start + len(some)] = _plain(leaf).unflatten(0, (-1, factor)).numpy()
    return sides[0], sides[1] if outputs else None


def _mapped(path: Path, leaf: torch.Tensor, factor: int, rows: int) -> Any:
    make_folder(path.parent)
    shape, dtype = (rows, factor, *leaf.shape[1:]), _plain(leaf[:1]).numpy().dtype
    with explained(path):
        reserve(path, math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def _plain(leaf: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, in a type that numpy has."""
    leaf = leaf.detach().cpu()
    return leaf.float() if leaf.is_floating_point() else leaf


def _factors(two: object, three: object) -> list[int]:
    """How many entries of each leaf a row has, from calls with two and with three rows."""
    result = []
    for a, b in zip(tree_flatten(two)[0], tree_flatten(three)[0], strict=True):
        grows = isinstance(a, torch.Tensor) and a.ndim > 0 and 3 * len(a) == 2 * len(b)
        result.append(len(a) // 2 if grows else 0)
    return result


def _run(model: nn.Module, unit: str, inputs: CalibrationInputs, rows: Sequence[int], outputs: bool) -> tuple[Any, Any]:
    """A unit's arguments and its output in a call with some rows."""
    args, kwargs = inputs.call(rows)
    remaining: list[Any] = []
    with _reaching(model.get_submodule(unit), remaining, outputs), torch.no_grad(), suppress(_Stop):
        model(*args, **kwargs)
    if not remaining:
        raise InputError(f"the denoiser never calls its module {unit!r}, so it cannot be learned as a whole")
    return remaining[0], remaining[1] if outputs else ()


def _reaching(module: nn.Module, kept: list[object], outputs: bool) -> AbstractContextManager[None]:
    def before(module: object, args: object, kwargs: object) -> None:
        if not kept:
            kept.append((args, kwargs))
            if not outputs:
                raise _Stop

    def after(module: object, args: object, output: object) -> None:
        if len(kept) == 1:
            kept.append(output)
            raise _Stop

    return hooked(module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after))


def run_until(model: nn.Module, unit: str, call: tuple[tuple[object, ...], dict[str, object]], times: int = 1) -> None:
    """Run a denoiser with a call's arguments until one of its modules was called so many times, and no further."""
    left = [times]

    def stop(module: object, args: object, output: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise _Stop

    args, kwargs = call
    with hooked(model.get_submodule(unit).register_forward_hook(stop)), suppress(_Stop):
        model(*args, **kwargs)


def times_called(model: nn.Module, names: list[str], inputs: CalibrationInputs) -> dict[str, int]:
    """How often one call of a denoiser calls each of some of its modules."""
    times = dict.fromkeys(names, 0)

    def count(module: object, args: object, name: str) -> None:
        times[name] += 1

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(count, name=name)) for name in names]
    args, kwargs = inputs.call(inputs.kinds()[0][:2])
    with hooked(*hooks), torch.no_grad():
        model(*args, **kwargs)
    return times


def units_in_order(model: nn.Module, names: list[str], inputs: CalibrationInputs) -> list[str]:
    """Units in the order a call reaches them; one whose parts are called without it is taken apart."""
    order = reached_in_order(model, names, inputs)
    apart = [unit for name in names if name not in order for unit in inner_units(name, model.get_submodule(name))]
    return units_in_order(model, [*order, *apart], inputs) if apart else order


def reached_in_order(model: nn.Module, names: list[str], inputs: CalibrationInputs) -> list[str]:
    """The named modules that a call reaches, in the order it first does."""
    order: list[str] = []

    def note(module: object, args: object, name: str) -> None:
        if name not in order:
            order.append(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name=name)) for name in names]
    args, kwargs = inputs.call(inputs.kinds()[0][:2])
    with hooked(*hooks), torch.no_grad():
        model(*args, **kwargs)
    return order
