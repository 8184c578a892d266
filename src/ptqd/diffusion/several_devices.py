"""Networks whose parts are on several devices, where ``device_map`` put them."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only


def align_devices(model: nn.Module) -> None:
    """Let a network be called whose parts are on several devices: what a part is given is moved to where it is.

    What the network gives comes back to where its first argument was. Of one that is on one device nothing is changed.
    As with accelerate's maps, a module whose parts are on several devices has to add up nothing of its own.
    """
    if len(_devices(model)) < 2:
        return
    for module in model.modules():
        if len(_devices(module)) == 1 and _to_its_device not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_to_its_device, with_kwargs=True)
    if _back not in model._forward_hooks.values():
        model.register_forward_hook(_back, with_kwargs=True)


def _devices(module: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type != "meta"}


def _to_its_device(module: nn.Module, args: Any, kwargs: Any) -> Any:
    here = _devices(module)
    if len(here) != 1:  # offloaded since, or taken apart
        return args, kwargs
    (device,) = here
    return tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))


def _back(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), None)
    return output if device is None else tree_map_only(torch.Tensor, lambda x: x.to(device), output)
