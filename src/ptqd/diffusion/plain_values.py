"""Arguments of calls as tensors and plain containers alone, which a file may hold that is read without running code."""

from collections.abc import Mapping
from typing import Any

import torch

from ptqd.diffusion.call_rows import Leaf, Row

PLAIN = {str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size}


class NotPlainError(Exception):
    """A value is no tensor, plain container, string or number; its message is the type."""


def as_plain(node: Any, moved: dict[int, Any] | None = None) -> Any:
    """A row, or a tree of arguments, in tuples that :func:`from_plain` reads; tensors are on the CPU.

    Args:
        node: it.
        moved: what became of tensors before, by their ids: those that rows share are kept once.

    Raises:
        NotPlainError: it holds something else.
    """
    moved = {} if moved is None else moved
    if isinstance(node, torch.Tensor):
        if id(node) not in moved:
            moved[id(node)] = (node, ("tensor", node.device.type == "cpu", _own(node)))  # which keeps the id taken
        return moved[id(node)][1]
    if isinstance(node, Row):
        return ("row", as_plain(node.tree, moved), node.kind)
    if isinstance(node, Leaf):
        return ("leaf", node.how, as_plain(node.value, moved), node.axis)
    if type(node) in PLAIN:
        return ("value", node)
    if isinstance(node, Mapping) and all(type(key) in (str, int) for key in node):
        return ("dict", {key: as_plain(value, moved) for key, value in node.items()})
    if type(node) in (list, tuple):
        return (type(node).__name__, [as_plain(value, moved) for value in node])
    raise NotPlainError(type(node).__name__)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, without the rest of a larger one that it is a part of."""
    tensor = tensor.detach().cpu()
    whole = tensor.untyped_storage().nbytes()
    return tensor.clone() if whole > tensor.numel() * tensor.element_size() else tensor


def from_plain(node: Any, device: torch.device | str = "cpu", moved: dict[int, Any] | None = None) -> Any:
    """What :func:`as_plain` was given.

    Args:
        node: what it made.
        device: for tensors that were not on the CPU.
        moved: what became of tensors before, by their ids: those that rows share are there once.
    """
    moved = {} if moved is None else moved
    kind, *values = node
    if kind == "tensor":
        on_cpu, tensor = values
        if id(tensor) not in moved:
            moved[id(tensor)] = (tensor, tensor if on_cpu else tensor.to(device))
        return moved[id(tensor)][1]
    if kind == "row":
        return Row(from_plain(values[0], device, moved), values[1])
    if kind == "leaf":
        return Leaf(values[0], from_plain(values[1], device, moved), values[2])
    if kind == "dict":
        return {key: from_plain(value, device, moved) for key, value in values[0].items()}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(from_plain(value, device, moved) for value in values[0])
    return values[0]
