"""A denoiser's structure, read off its modules: skip connections' concatenations, and the units that are learned.

No model is named here. A UNet is known by blocks whose ``forward`` takes ``res_hidden_states_tuple``, diffusers' sign
of an up block; units by lists of blocks.
"""

import inspect
from typing import Any

from torch import nn

from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer

SKIPS = "res_hidden_states_tuple"
LISTS = nn.ModuleList | nn.ModuleDict


def concatenations(model: nn.Module) -> dict[str, int]:
    """The convolutions that see a skip connection's concatenation as it is, and how many channels come from below.

    In an up block, residual block i sees what came before it, as wide as that block's output, and beside it a skipped
    tensor; its shortcut sees both unchanged.
    """
    known = getattr(model, "config", {}).get("concatenations") if hasattr(model, "config") else None
    if known is not None:  # of a network that is none of diffusers'
        return dict(known)
    result: dict[str, int] = {}
    before = _width(getattr(model, "mid_block", None)) or _width(_last(getattr(model, "down_blocks", None)))
    for name, module in model.named_modules():
        resnets = getattr(module, "resnets", None)
        if resnets is None or SKIPS not in inspect.signature(module.forward).parameters:
            continue
        for i, block in enumerate(resnets):
            shortcut = find_layer(block, "conv_shortcut")
            if isinstance(shortcut, nn.Conv1d | nn.Conv2d | nn.Conv3d) and 0 < before < shortcut.in_channels:
                result[f"{name}.resnets.{i}.conv_shortcut"] = before
            before = _width(block)
    return result


def _last(blocks: Any) -> Any:
    return blocks[-1] if blocks else None


def _width(block: object) -> int:
    """The channels that a residual block, or the last one of a block, gives; 0 where there is none."""
    block = _last(getattr(block, "resnets", None)) or block
    return int(getattr(block, "out_channels", 0) or 0)


def find_units(model: nn.Module) -> list[str]:
    """The modules whose rounding is learned together: residual blocks, transformer blocks, and layers between them.

    A module is taken apart while it holds a list of modules with two or more quantized layers each; what is left is a
    unit.
    """
    return [name for child, module in model.named_children() for name in _units(child, module)]


def _units(name: str, module: nn.Module) -> list[str]:
    if not any(isinstance(m, QuantLayer) for m in module.modules()):
        return []
    if isinstance(module, QuantLayer | SplitConv) or not (isinstance(module, LISTS) or _holds_blocks(module)):
        return [name]
    return inner_units(name, module)


def inner_units(name: str, module: nn.Module) -> list[str]:
    """The units inside a module, where it is none itself."""
    return [unit for child, inner in module.named_children() for unit in _units(f"{name}.{child}", inner)]


def _holds_blocks(module: nn.Module) -> bool:
    """Whether it is, or has inside, a list of modules that are more than a layer."""
    lists = (m for m in module.modules() if isinstance(m, LISTS))
    return any(
        sum(isinstance(m, QuantLayer) for m in item.modules()) > 1 for items in lists for item in items.children()
    )


def is_inside(name: str, unit: str) -> bool:
    """Whether a module is a unit, or is in it."""
    return not unit or f"{name}.".startswith(f"{unit}.")
