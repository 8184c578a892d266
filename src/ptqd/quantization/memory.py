"""What a quantized denoiser takes: bytes on the disk, in memory, and at most while it is quantized.

All of it is counted on the meta device, before anything large is loaded. A process has its libraries besides, half a
gigabyte or so.
"""

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptqd.quantization.blocks import find_units, is_inside
from ptqd.quantization.methods import Gptq, Learned, LowRank, Method, Smooth
from ptqd.quantization.modules.linear_conv import QuantLayer
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.rounding.gptq import hessian_widths
from ptqd.quantization.sites import quantized_layers
from ptqd.quantization.weights_in_memory import LARGE, float_bytes

ENCODING = 26  # bytes for each weight of a layer while it is rounded: in float32 some times, as whole numbers and bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a denoiser takes.

    Attributes:
        disk: of its saved tensors: packed codes, scales and what stays in full precision.
        resident: of what is held between two calls: these and float weights, or, of one that holds codes alone
            (:func:`ptqd.keep_weights`), room for the largest layer's weight, which is made as the layer is called.
        calling: that a call of one sample takes beside that, at most; 0 where it was not counted.
        quantizing: that quantizing takes at most, the full-precision weights included; 0 in full precision. Weights of
            256 MiB and more are taken to be mapped from files, in the type that these have (Linux): others stay until
            the end, and what methods take comes on top of them.
    """

    disk: int
    resident: int
    calling: int = 0
    quantizing: int = 0


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations inside the block give and that are not gone yet.

    Attributes:
        most: of them at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage: Any = tensor.untyped_storage()
                if storage._cdata not in self._seen and storage._cdata not in given:
                    self._seen.add(storage._cdata)
                    self._live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def calling_bytes(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    """Bytes that a call takes beside a denoiser's own tensors, at most; denoiser and arguments are on meta."""
    counted = _LiveBytes()
    with counted, torch.no_grad():
        model(**arguments)
    return counted.most


def memory_of(full: nn.Module, quantized: nn.Module, recipe: Recipe | None, calling: int = 0) -> Memory:
    """What a denoiser takes, as a recipe quantizes it.

    Args:
        full: in full precision, in the type it is loaded in; may be on the meta device.
        quantized: as the recipe says, of the same type; the same where there is no recipe.
        recipe: None for full precision.
        calling: see :class:`Memory`.
    """
    disk = _bytes(quantized.state_dict().values())
    if recipe is None:
        return Memory(disk, disk, calling)
    resident = disk + _weights_bytes(quantized)
    full_bytes = _bytes(full.state_dict().values())
    most = max([0, *(_method_bytes(method, quantized, full) for method in recipe.methods)])
    largest = max((math.prod(layer.shape) for _, layer in quantized_layers(quantized)), default=0)
    later = resident + max(calling + most, largest * ENCODING)
    first = full_bytes + resident + calling
    if float_bytes(quantized) < LARGE:  # else the pages of rounded layers' weights are given back
        later += full_bytes
    elif any(isinstance(method, Smooth | LowRank) for method in recipe.methods):  # which round before that, to compare
        first += largest * ENCODING
    return Memory(disk, resident, calling, max(first, later))


def memory_bytes(model: nn.Module) -> int:
    """Bytes that a denoiser, quantized or not, holds between two calls; see :class:`Memory`."""
    return _bytes(model.state_dict().values()) + _weights_bytes(model)


def _weights_bytes(model: nn.Module) -> int:
    """Of a quantized denoiser's float weights, or of the memory that they are made in one after the other."""
    floats = float_bytes(model)
    if floats < LARGE:
        return floats
    return 4 * max(int(math.prod(layer.shape)) for _, layer in quantized_layers(model))


def _method_bytes(method: Method, model: nn.Module, full: nn.Module) -> int:
    """Beside what is held and what a call takes."""
    layers = dict(quantized_layers(model))
    weights = float_bytes(model)
    if isinstance(method, Gptq):
        units = list(layers) if method.asymmetric else find_units(model)
        inside = [[x for name, x in layers.items() if is_inside(name, unit)] for unit in units]
        return max(_rounding_bytes(each, 2 if method.asymmetric else 1) for each in inside if each)
    if isinstance(method, Learned):
        parameters = _bytes(full.parameters())
        return 5 * parameters  # what moves, gradients, Adam's two moments, and what is computed with
    if isinstance(method, Smooth | LowRank):
        return weights if weights < LARGE else 0  # in full precision, as they are smoothed and split
    return 0


def _rounding_bytes(layers: list[QuantLayer], moments: int) -> int:
    """Of the Hessians of layers that are rounded together, and of the factors of the largest."""
    widths = [hessian_widths(layer) for layer in layers]
    hessians = sum(4 * moments * width**2 for each in widths for width in each)
    return hessians + max(2 * 8 * width**2 for each in widths for width in each)


def _bytes(tensors: Iterable[Any]) -> int:
    own = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in own.values())
