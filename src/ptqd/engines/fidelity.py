"""How near an engine is to the simulation: codes that differ, and what that does to the output."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.engines.module import EngineModule
from ptqd.errors import InputError
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.numerics.affine import MAX_BITS
from ptqd.quantization.sites import activation_quantizers


@dataclass(frozen=True)
class Fidelity:
    """An engine beside the simulation, on the same inputs.

    Codes differ where a sum in another order falls on the other side of a rounding's tie; what follows sees that.

    Attributes:
        codes: of activations that were compared.
        differing: share of them that differ.
        first: of the codes that see the inputs alone, the share that differs.
        most: the largest difference of two codes.
        output: root mean square of the outputs' difference, over that of the simulation's.
        layers: the share that differs by quantizer, in the order that they are computed.
    """

    codes: int
    differing: float
    first: float
    most: int
    output: float
    layers: Mapping[str, float]


def fidelity(simulated: nn.Module, engine: EngineModule, *args: object, **kwargs: object) -> Fidelity:
    """Compare an exported denoiser with the one it was exported from, on one call.

    Args:
        simulated: the quantized denoiser.
        engine: exported from it.
        args: of the call, as a pipeline makes it.
        kwargs: of the call.

    Returns:
        Shares over all codes of ranges that were found beforehand; ranges that come with the tokens are left out, and
        activations of more than 8 bits, which are two bytes each.

    Raises:
        InputError: there are no others.
    """
    kwargs["return_dict"] = False
    mine: dict[str, tuple[torch.Tensor, int]] = {}
    hooks = [q.register_forward_hook(_keeping(mine, name)) for name, q in activation_quantizers(simulated)]
    with hooked(*hooks), torch.no_grad():
        expected = simulated(*args, **kwargs)[0]
    result = engine(*args, **kwargs)[0]
    differences = {}
    for name, theirs in engine.codes(*args, **kwargs).items():
        if name in mine and mine[name][0].numel() == theirs.numel():
            ours, first = mine[name]
            ours = ours.transpose(1, 2) if name.endswith(".key") else ours  # which the graph turns before it rounds
            differences[name] = (ours - theirs.int() - (0 if theirs.dtype == torch.int8 else first)).abs()
    if not differences:
        raise InputError("all ranges come with the tokens, so there are no codes to compare; compare images")
    count = sum(d.numel() for d in differences.values())
    shares = {name: (d > 0).float().mean().item() for name, d in differences.items()}
    return Fidelity(
        codes=count,
        differing=sum(int((d > 0).sum()) for d in differences.values()) / count,
        first=next(iter(shares.values())),
        most=max(int(d.max()) for d in differences.values()),
        output=((result - expected).square().mean() / expected.square().mean()).sqrt().item(),
        layers=shares,
    )


def _keeping(kept: dict[str, tuple[torch.Tensor, int]], name: str) -> Any:
    """A hook that keeps what a quantizer made, as codes, and its smallest code."""

    def keep(quantizer: ActivationQuantizer, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if quantizer.spec.dynamic or quantizer.bits > MAX_BITS or name in kept:
            return
        index = quantizer.active.index
        scale, zero = (quantizer.by_row(t, output, index) for t in (quantizer.scale, quantizer.zero_point))
        kept[name] = (output.double() / scale.double()).round().int() + zero, quantizer.grids[index].qmin

    return keep
