"""Networks as they compute, without what is done to them for speed or memory: offloading, casting, compiling."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.offload import bring_like, is_brought, stay
from ptqd.diffusion.several_devices import align_devices
from ptqd.errors import InputError


@contextlib.contextmanager
def uncompiled(*models: nn.Module) -> Iterator[None]:
    """Inside the block networks that ``Module.compile`` was called on run as they are, hooks and all."""
    before = [getattr(model, "_compiled_call_impl", None) for model in models]
    for model in models:
        model._compiled_call_impl = None
    try:
        yield
    finally:
        for model, compiled in zip(models, before, strict=True):
            model._compiled_call_impl = compiled


def plain_copy(model: nn.Module, *, shares_weights: bool = False) -> Any:
    """A copy of a network, as it is before it is offloaded, cast or compiled.

    Hooks of accelerate and diffusers, which move or cast weights for the time of a call, are left out; what they hold
    elsewhere is fetched, and parts on several devices stay there. Weights that are stored narrower than they are
    computed with come as computed.

    Args:
        model: the network.
        shares_weights: where the copy is only read: it has the network's weights, not ones of its own.

    Raises:
        InputError: weights that are nowhere to be had.
    """
    elsewhere = weights_elsewhere(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _hooks_on(module):
            memo[id(vars(module)[name])] = None
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta and name in elsewhere:
            full = elsewhere[name].detach()
            full = full if shares_weights else full.clone()
            memo[id(value)] = nn.Parameter(full, value.requires_grad) if isinstance(value, nn.Parameter) else full
        elif value.is_meta and name in model.state_dict():
            raise InputError(
                f"{name!r} of {type(model).__name__} is offloaded to where ptqd cannot fetch it; load the pipeline "
                "without device_map or offloading to quantize it"
            )
    for parameter in model.parameters() if shares_weights else ():
        if id(parameter) not in memo and not parameter.is_inference():
            memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    copied: nn.Module = copy.deepcopy(model, memo)
    wide = _computed_in(model)
    for (path, module), twin in zip(model.named_modules(), copied.modules(), strict=True):
        for name in _hooks_on(module):
            vars(twin).pop(name, None)
        if path in wide:
            nn.Module.to(twin, wide[path])
    stay(copied)
    align_devices(copied)
    return copied


def as_plain(model: nn.Module) -> Any:
    """A network as it computes: itself where it is so, else a copy; see :func:`plain_copy`."""
    return model if is_plain(model) else plain_copy(model)


def as_it_computes(model: nn.Module) -> Any:
    """A network as :func:`as_plain` gives it, which comes to its device when it is called if the network does."""
    if is_plain(model) or (is_brought(model) and _is_untouched(model)):
        return model
    own = plain_copy(model)
    bring_like(own, model)
    return own


def is_plain(model: nn.Module) -> bool:
    """Whether a network is neither offloaded, cast, compiled nor made for inference alone; see :func:`plain_copy`."""
    return not is_brought(model) and _is_untouched(model)


def _is_untouched(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return not any(x.is_inference() or x.is_meta for x in tensors) and not any(
        _hooks_on(module) or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


def _hooks_on(module: nn.Module) -> list[str]:
    """The attributes by which accelerate and diffusers take the place of a module's ``forward``."""
    own = vars(module)
    hooks: list[str] = [name for name in ("_hf_hook", "_old_forward", "_diffusers_hook") if name in own]
    return [*hooks, "forward"] if hooks and "forward" in own else hooks


def check_weights_are_here(model: nn.Module) -> None:
    """Refuse weights that diffusers' group offloading keeps in files: what stands in their place is anything.

    Raises:
        InputError: so it is.
    """
    for module in model.modules():
        hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None:
            kind = type(model).__name__
            raise InputError(f"{kind} is offloaded to the disk in groups; load it without that to quantize it")


def weights_elsewhere(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that accelerate keeps outside a network, by name."""
    result: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        hooks: Any = getattr(module, "_hf_hook", None)
        for hook in getattr(hooks, "hooks", (hooks,)):
            held = getattr(hook, "weights_map", None)
            if held is None:
                continue
            for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if value.is_meta and name in held:
                    result[f"{path}.{name}".lstrip(".")] = held[name]
    return result


def _computed_in(model: nn.Module) -> dict[str, torch.dtype]:
    """The type that modules with layerwise casting compute in, by path."""
    result: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("layerwise_casting")
        if hook is not None:
            result[path] = hook.compute_dtype
    return result
