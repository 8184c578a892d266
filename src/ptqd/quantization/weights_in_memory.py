"""What a quantized denoiser holds of its weights while it runs: the codes alone, or float weights beside them.

A layer that holds codes makes its float weight of them whenever it is called, and forgets it: the numbers are the same
ones. It takes the memory of the codes and of one layer's weight; a call takes longer by the unpacking.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.pipeline_parts import denoisers_of
from ptqd.errors import InputError
from ptqd.quantization.sites import quantized_layers

Weights = Literal["auto", "codes", "floats"]
LARGE = 256 << 20  # bytes of a denoiser's float weights from which on "auto" holds codes

_loaded_as: ContextVar[Weights] = ContextVar("_loaded_as", default="auto")


def check_weights_kind(kind: str) -> None:
    """Refuse what is no way to hold weights.

    Raises:
        InputError: so it is.
    """
    if kind not in ("auto", "codes", "floats"):
        raise InputError(f"weights are held as 'codes', 'floats' or 'auto', which is by their size; got {kind!r}")


def keep_weights(pipe: DiffusionPipeline, kind: Weights) -> None:
    """Let a quantized pipeline hold codes alone, or float weights beside them, from now on; it is changed itself.

    Outputs are the same to the bit. Nothing happens to a pipeline in full precision, or one that an engine runs.

    Args:
        pipe: quantized by ptqd.
        kind: ``"codes"``, which takes the least memory; ``"floats"``, which is the fastest; or ``"auto"``: codes where
            the floats of a denoiser would take 256 MiB or more.

    Raises:
        InputError: another kind.
    """
    check_weights_kind(kind)
    for model in denoisers_of(pipe).values():
        choose_weights(model, kind)
        for _, layer in quantized_layers(model):
            layer.refresh()


def choose_weights(model: nn.Module, kind: Weights | None = None) -> None:
    """Say what a denoiser's layers hold when they are refreshed next.

    Args:
        model: the denoiser.
        kind: see :func:`keep_weights`; without it what :func:`loading_weights_as` says.
    """
    kind = kind or _loaded_as.get()
    holds_codes = kind == "codes" or (kind == "auto" and float_bytes(model) >= LARGE)
    for _, layer in quantized_layers(model):
        layer.holds_codes = holds_codes


def float_bytes(model: nn.Module) -> int:
    """Bytes that the float weights of a denoiser's quantized layers take, or would."""
    return sum(math.prod(layer.shape) * layer.weight.element_size() for _, layer in quantized_layers(model))


@contextmanager
def loading_weights_as(kind: Weights) -> Iterator[None]:
    """Inside the block denoisers are loaded so; see :func:`keep_weights`.

    Raises:
        InputError: another kind.
    """
    check_weights_kind(kind)
    token = _loaded_as.set(kind)
    try:
        yield
    finally:
        _loaded_as.reset(token)
