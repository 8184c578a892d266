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
from ptqd.quantization.calibration import BATCH, CalibrationInputs


class _Stop(Exception):  # noqa: N818  # no error: the unit was reached
    pass


class UnsplittableError(Exception):
    """What a unit is given, or makes, is not one entry for each row: experts are given tokens of all of them."""


@dataclass(frozen=True)
class _How:
    """How a leaf has something for each row.

    Attributes:
        each: entries for a row; 0 where the leaf is the same for every row.
        axis: of these entries; None of a number that counts them, or of one value in a list of as many.
        listed: the leaf is a list with an element for each row: of tensors, which are kept stacked, or of one value.
    """

    each: int = 0
    axis: int | None = 0
    listed: bool = False

    @property
    def kept(self) -> bool:
        """Whether there is a tensor of each row to keep."""
        return self.each > 0 and self.axis is not None


@dataclass
class _OfKind:
    """A tree of tensors for the rows of one kind; leaves that are the same for every row are kept once."""

    leaves: list[Any]
    how: list[_How]
    dtypes: list[Any]
    structure: Any
    lists: frozenset[int]  # the lists with an element for each row, by their places among the leaves


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
        """The leaves for some rows, of one kind; lists of tensors are stacked."""
        of = self._of(index[0])
        own = np.array([self.place[row][1] for row in index])
        picked: list[Any] = []
        for leaf, how, dtype in zip(of.leaves, of.how, of.dtypes, strict=True):
            if how.each == 0:
                picked.append(leaf)
            elif how.axis is None:
                picked.append([leaf] * len(own) if how.listed else how.each * len(own))
            else:
                picked.append(torch.from_numpy(leaf[own]).flatten(0, 1).movedim(0, how.axis).to(dtype))
        return picked

    def by_row(self, row: int) -> list[bool]:
        """Which of the leaves of a row's kind are tensors with entries for each row."""
        return [how.kept for how in self._of(row).how]

    def tree(self, leaves: list[Any], row: int) -> Any:
        """Leaves, as :meth:`rows` gives them, as they were given or made, for rows of a row's kind."""
        of = self._of(row)
        pairs = zip(leaves, of.how, strict=True)
        return tree_unflatten([list(leaf) if how.listed else leaf for leaf, how in pairs], of.structure)

    def flat(self, tree: object, row: int) -> list[Any]:
        """The leaves of a tree, as :meth:`rows` gives them for rows of a row's kind."""
        return _flat(tree, self._of(row).lists)[0]

    def _of(self, row: int) -> _OfKind:
        return self.kinds[self.place[row][0]]


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
        UnsplittableError: what it is given or makes cannot be told apart by rows.
    """
    place = {row: (k, i) for k, rows in enumerate(inputs.kinds()) for i, row in enumerate(rows)}
    sides = [Captured([], place) for _ in range(1 + outputs)]
    for k, rows in enumerate(inputs.kinds()):
        probed = [_run(model, unit, inputs, rows[:1] * n, outputs) for n in (2, 3)]
        lists = [_row_lists(*pair) for pair in zip(*probed, strict=True)]
        shared, more = ([_flat(tree, of)[0] for tree, of in zip(trees, lists, strict=True)] for trees in probed)
        listed = [_is_list(tree, of) for tree, of in zip(probed[0], lists, strict=True)]
        hows = [_how(two, three, which) for two, three, which in zip(shared, more, listed, strict=True)]
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            trees = _run(model, unit, inputs, some, outputs)
            for side, (captured, tree) in enumerate(zip(sides, trees, strict=False)):
                leaves, structure = _flat(tree, lists[side])
                pairs = zip(hows[side], leaves, shared[side], strict=True)
                same = [how.each > 0 or _alike(own, probed_leaf) for how, own, probed_leaf in pairs]
                if not all(same):
                    raise UnsplittableError(unit)
                if len(captured.kinds) == k:
                    mapped = [
                        _mapped(folder / f"{side}-{k}-{i}.bin", leaf, how, len(rows)) if how.kept else leaf
                        for i, (leaf, how) in enumerate(zip(leaves, hows[side], strict=True))
                    ]
                    dtypes = [getattr(leaf, "dtype", None) for leaf in leaves]
                    captured.kinds.append(_OfKind(mapped, hows[side], dtypes, structure, lists[side]))
                for into, leaf, how in zip(captured.kinds[k].leaves, leaves, hows[side], strict=True):
                    if how.each and how.axis is not None:
                        first = _plain(leaf).movedim(how.axis, 0)
                        if len(first) != how.each * len(some):
                            raise UnsplittableError(unit)
                        into[start : start + len(some)] = first.unflatten(0, (-1, how.each)).numpy()
    return sides[0], sides[1] if outputs else None


def _alike(a: object, b: object) -> bool:
    """Whether what is shared by the rows of two calls is of one shape; a mask may be there for some rows alone."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor)


def _mapped(path: Path, leaf: torch.Tensor, how: _How, rows: int) -> Any:
    assert how.axis is not None
    make_folder(path.parent)
    others = leaf.movedim(how.axis, 0).shape[1:]
    shape, dtype = (rows, how.each, *others), _plain(leaf.flatten()[:1]).numpy().dtype
    with explained(path):
        reserve(path, math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def _plain(leaf: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, in a type that numpy has."""
    leaf = leaf.detach().cpu()
    return leaf.float() if leaf.is_floating_point() else leaf


def _lists_in(tree: object) -> dict[int, list[Any]]:
    """The outermost lists in a tree, by their places among its leaves, where such a list is one leaf."""
    leaves = tree_flatten(tree, is_leaf=lambda node: isinstance(node, list))[0]
    return {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, list)}


def _row_lists(two: object, three: object) -> frozenset[int]:
    """The lists with an element for each row, from calls with one row twice and three times."""
    a, b = _lists_in(two), _lists_in(three)
    return frozenset(place for place in a.keys() & b.keys() if (len(a[place]), len(b[place])) == (2, 3))


def _flat(tree: object, lists: frozenset[int]) -> tuple[list[Any], Any]:
    """Leaves and structure of a tree, in which some lists are one leaf: stacked, or the value of all elements."""
    rows = {id(value) for place, value in _lists_in(tree).items() if place in lists}
    leaves, structure = tree_flatten(tree, is_leaf=lambda node: id(node) in rows)
    return [_together(leaf) if id(leaf) in rows else leaf for leaf in leaves], structure


def _is_list(tree: object, lists: frozenset[int]) -> list[bool]:
    """Which of the leaves that :func:`_flat` gives are lists."""
    rows = {id(value) for place, value in _lists_in(tree).items() if place in lists}
    return [id(leaf) in rows for leaf in tree_flatten(tree, is_leaf=lambda node: id(node) in rows)[0]]


def _together(values: list[Any]) -> Any:
    """A list of tensors stacked, or the one value of another.

    Raises:
        UnsplittableError: tensors of several shapes, or several values.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) == len(values) and len({value.shape for value in tensors}) == 1:
        return torch.stack(tensors)
    if tensors or any(value != values[0] for value in values):
        raise UnsplittableError("a list of several kinds of things")
    return values[0]


def _how(two: list[Any], three: list[Any], listed: list[bool]) -> list[_How]:
    """How each leaf has something for each row, from the leaves of calls with one row twice and three times.

    Raises:
        UnsplittableError: a leaf neither grows with the rows nor stays the same.
    """
    if len(two) != len(three):
        raise UnsplittableError("another structure")
    return [_how_of_list(a) if one else _how_of(a, b) for a, b, one in zip(two, three, listed, strict=True)]


def _how_of_list(together: object) -> _How:
    return _How(1, 0 if isinstance(together, torch.Tensor) else None, listed=True)


def _how_of(a: Any, b: Any) -> _How:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.ndim == b.ndim:
        grows = [axis for axis in range(a.ndim) if a.shape[axis] and 3 * a.shape[axis] == 2 * b.shape[axis]]
        if grows:
            return _How(a.shape[grows[0]] // 2, grows[0])
        if a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5, equal_nan=True):
            return _How()
    elif type(a) is type(b) is int and a and 3 * a == 2 * b:
        return _How(a // 2, None)
    elif not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return _How()
    raise UnsplittableError("an argument that is no row's own, and not the same for all")


def _run(model: nn.Module, unit: str, inputs: CalibrationInputs, rows: Sequence[int], outputs: bool) -> tuple[Any, Any]:
    """A unit's arguments and its output in a call with some rows."""
    remaining = _reached(model, unit, inputs.call(rows), outputs)
    return remaining[0], remaining[1] if outputs else ()


def _reached(model: nn.Module, unit: str, call: tuple[Any, Any], outputs: bool) -> list[Any]:
    args, kwargs = call
    remaining: list[Any] = []
    with _reaching(model.get_submodule(unit), remaining, outputs), torch.no_grad(), suppress(_Stop):
        model(*args, **kwargs)
    if not remaining:
        raise InputError(f"the denoiser never calls its module {unit!r}, so it cannot be learned as a whole")
    return remaining


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


def reaching(model: nn.Module, unit: str, call: tuple[Any, Any]) -> tuple[Any, Any]:
    """The arguments that a denoiser calls one of its modules with, in a call with some arguments.

    Raises:
        InputError: it does not call it.
    """
    return _reached(model, unit, call, outputs=False)[0]  # type: ignore[no-any-return]


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
