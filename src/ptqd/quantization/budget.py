"""How much memory and time quantizing may take."""

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ptqd import processes
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import execution_device
from ptqd.errors import InputError

SHARE = 0.7  # of what is free, where no limit is given
WORKING = 4  # times the outputs that are kept: what a row takes while a layer works on it, and what allocators keep


@dataclass(frozen=True)
class Budget:
    """What quantizing may take.

    Attributes:
        memory: bytes, of the process on a CPU, of the device's own memory elsewhere; what is free where it is none.
        minutes: of wall-clock time from the start; as long as the recipe takes where it is none.
    """

    memory: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory <= 0:
            raise InputError(f"memory must be positive, in bytes; got {self.memory}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes must be positive; got {self.minutes}")

    def spare(self, device: torch.device) -> int:
        """Bytes that may be taken beside what is held now."""
        if self.memory is None:
            return int(SHARE * _free(device))
        return max(0, min(self.memory - held(device), _free(device)))


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where it is brought to for its calls, else where its first tensor is."""
    return execution_device(model) or next(
        (x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu")
    )


def held(device: torch.device) -> int:
    """Bytes that this process holds: on a CPU all of it, elsewhere what torch has allocated there."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    import psutil

    return int(psutil.virtual_memory().available) // processes.beside()


def release_memory() -> None:
    """Give back what the C library keeps of memory that is free again: of large models' layers that is gigabytes."""
    with suppress(OSError, AttributeError):  # other C libraries than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def live_bytes(model: nn.Module, modules: Sequence[str], arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> int:
    """Bytes of some modules' outputs that are kept at once, at most, while a denoiser is called."""
    live = most = 0

    def gone(size: int) -> None:
        nonlocal live
        live -= size

    def note(module: object, args: object, output: object) -> None:
        nonlocal live, most
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                size = tensor.numel() * tensor.element_size()
                live += size
                weakref.finalize(tensor, gone, size)
        most = max(most, live)

    args, kwargs = arguments
    with hooked(*(model.get_submodule(name).register_forward_hook(note) for name in modules)), torch.no_grad():
        model(*args, **kwargs)
    return most


def rows_that_fit(model: nn.Module, arguments: tuple[tuple[Any, ...], Mapping[str, Any]], spare: int, most: int) -> int:
    """How many rows a denoiser can be called with at once, without gradients, at least one.

    Args:
        model: the denoiser.
        arguments: of a call with one row.
        spare: bytes that may be taken.
        most: as many rows are wanted.
    """
    each = live_bytes(model, [name for name, _ in model.named_modules()], arguments)
    return max(1, min(most, int(spare / (WORKING * max(each, 1)))))
