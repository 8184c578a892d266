"""Networks that wait in memory for their device, and come to it a module at a time, as they are called.

ptqd works on plain copies of networks (:func:`ptqd.diffusion.plain_copy.plain_copy`): what accelerate and diffusers do
to bring weights to a GPU is not on them. Here the same is done for such copies, so that a network that is larger than
the GPU is calibrated and rounded there. Weights that are mapped from files stay so: what leaves the device is dropped,
and what was in memory is there again, unless it was changed meanwhile.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

_DEVICE, _PRESENT, _BEFORE, _CALLER = "_ptqd_device", "_ptqd_present", "_ptqd_before", "_ptqd_caller"
_KINDS = ("_parameters", "_buffers")
_READING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # which do not call all their parts


def execution_device(model: nn.Module) -> torch.device | None:
    """The device that a network's weights are brought to when it is called; None of one that computes where it is.

    It knows accelerate's hooks (of ``enable_model_cpu_offload`` and ``enable_sequential_cpu_offload``), diffusers'
    group offloading, and its own. A network of which a part is on such a device already counts as being where it is.
    """
    if _DEVICE in vars(model):
        return vars(model)[_DEVICE]  # type: ignore[no-any-return]
    if any(tensor.device.type not in ("cpu", "meta") for tensor in (*model.parameters(), *model.buffers())):
        return None
    found = {str(device) for device in _asked_for(model) if torch.device(device).type != "cpu"}
    return torch.device(found.pop()) if len(found) == 1 else None


def _asked_for(model: nn.Module) -> Iterator[torch.device]:
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None and getattr(each, "offload", True):
                yield torch.device(device)
        groups = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        config = getattr(groups.get("group_offloading"), "config", None)
        if config is not None:
            yield torch.device(config.onload_device)


def bring_like(model: nn.Module, original: nn.Module) -> None:
    """Let a plain copy of a network be brought to the device that the network is brought to, where it is offloaded.

    Every module's own tensors come when it is called, and go when it is left; what the network is given comes first.
    What of the pipeline the original would have sent away (of ``enable_model_cpu_offload``) is sent away.

    Args:
        model: the copy, whose tensors are in memory.
        original: the network, or another copy.
    """
    device = execution_device(original)
    if device is None:
        return
    vars(model)[_DEVICE] = torch.empty(0, device=device).device  # with its number
    _hook(model)
    if _arrive not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_arrive, with_kwargs=True, prepend=True)
        model.register_forward_hook(_back)
    earlier = getattr(getattr(original, "_hf_hook", None), "prev_module_hook", None)
    vars(model)[_BEFORE] = vars(original).get(_BEFORE) or (None if earlier is None else _Shared(earlier))


def _hook(model: nn.Module) -> None:
    """Put the hooks on modules that have none: all, or those that came later, such as a LoRA's."""
    for module in model.modules():
        if _come_in not in module._forward_pre_hooks.values():
            vars(module)[_DEVICE] = vars(model)[_DEVICE]
            module.register_forward_pre_hook(_come_in, prepend=True)
            module.register_forward_hook(_leave, always_call=True)


def is_brought(model: nn.Module) -> bool:
    """Whether a network has the hooks of :func:`bring_like`."""
    return _DEVICE in vars(model)


def stay(model: nn.Module) -> None:
    """Take the hooks of :func:`bring_like` off a network."""
    for module in model.modules():
        for name in (_DEVICE, _PRESENT, _BEFORE, _CALLER):
            vars(module).pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_come_in, _leave, _arrive, _back)]:
                del hooks[key]
                for options in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    options.pop(key, None)


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Inside the block a part of a network, whole, is where it is brought to; of one that is not nothing changes."""
    parts = [part for part in module.modules() if _DEVICE in vars(part)]
    with torch.no_grad():
        for part in parts:
            _come(part)
    try:
        yield
    finally:
        for part in parts:
            _go(part)


def send_home(model: nn.Module) -> None:
    """Take from the device what calls left there that were broken off by what is no ``Exception``, as Ctrl-C."""
    for module in model.modules():
        present = vars(module).get(_PRESENT)
        if present is not None:
            present.callers = 1
            _go(module)


@contextmanager
def weights_left_behind(model: nn.Module) -> Iterator[None]:
    """Inside the block a backward pass brings a network's weights to the device anew, one at a time.

    Autograd would keep there all that the forward pass has brought.

    Args:
        model: the network; of one that is not brought nothing changes.
    """
    if not is_brought(model):
        yield
        return
    device = vars(model)[_DEVICE]

    def pack(tensor: torch.Tensor) -> Any:
        there, home = _homes.get(_place(tensor), (None, None))
        if there is None or there() is None:  # another's place by now
            return tensor
        return (home, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        home, *view = packed
        return home.detach().to(device).as_strided(*view)  # type: ignore[no-any-return]

    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:  # its gradient would be there, and keep it there
        parameter.requires_grad_(False)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


_homes: dict[int, tuple["weakref.ref[torch.Tensor]", torch.Tensor]] = {}
"""Of the tensors that are on a device now, by where they are there: themselves, and what was in memory of them."""


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Shared:
    """What copies of a network share."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __deepcopy__(self, memo: object) -> "_Shared":
        return self


@dataclass
class _Present:
    """A module's tensors that are on the device.

    Attributes:
        callers: that are in the module; the last one that leaves takes the tensors away.
        moved: by kind and name: what was in memory, what was brought, and the version that it had then.
        there: names of tensors that were on the device before.
    """

    callers: int = 0
    moved: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, int]] = field(default_factory=dict)
    there: set[tuple[str, str]] = field(default_factory=set)


def _come_in(module: nn.Module, args: object) -> None:
    for part in _together(module):
        _come(part)


def _leave(module: nn.Module, args: object, output: object) -> None:
    for part in _together(module):
        _go(part)


def _together(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and those that it does not call but reads the tensors of."""
    return iter(module.modules()) if isinstance(module, _READING) else iter((module,))


def _come(module: nn.Module) -> None:
    present = vars(module).setdefault(_PRESENT, _Present())
    present.callers += 1
    if present.callers > 1:
        return
    device = vars(module)[_DEVICE]
    for kind in _KINDS:
        own = getattr(module, kind)
        for name, value in own.items():
            if value is None or value.is_meta:
                continue
            if value.device == device:
                present.there.add((kind, name))
                continue
            if value.requires_grad and torch.is_grad_enabled():  # its gradient is to come home
                own[name] = value.to(device)
            else:
                new = value.detach().to(device)
                own[name] = nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new
            present.moved[kind, name] = (value, own[name], _version(own[name]))
            if value.numel():
                _homes[_place(own[name])] = (weakref.ref(own[name]), value)


def _go(module: nn.Module) -> None:
    present = vars(module).get(_PRESENT)
    if present is None:
        return
    present.callers -= 1
    if present.callers:
        return
    del vars(module)[_PRESENT]
    home = next((value.device for value, _, _ in present.moved.values()), None)
    for _, new, _ in present.moved.values():
        if new.numel():
            _homes.pop(_place(new), None)
    for kind in _KINDS:
        own = getattr(module, kind)
        for name, value in own.items():
            before, new, version = present.moved.get((kind, name), (None, None, 0))
            if value is None or value.is_meta or (kind, name) in present.there:
                continue
            if value is new and _version(value) == version:
                own[name] = before
            elif home is not None and value.device != home:  # changed, or made, meanwhile
                moved = value.detach().to(home)
                takes = value.requires_grad or (before is not None and before.requires_grad)
                own[name] = nn.Parameter(moved, takes) if kind == _KINDS[0] else moved


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; not known of one of inference mode, where nothing is learned."""
    return 0 if tensor.is_inference() else tensor._version


def _arrive(module: nn.Module, args: Any, kwargs: Any) -> Any:
    _hook(module)
    device, before = vars(module)[_DEVICE], vars(module).get(_BEFORE)
    if before is not None:
        before.of.offload()
    given = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), device)
    vars(module)[_CALLER] = given
    return tree_map_only(torch.Tensor, lambda x: x if x.is_meta else x.to(device), (args, kwargs))


def _back(module: nn.Module, args: object, output: Any) -> Any:
    """What a network gives, where its first argument was; the rest of a pipeline need not be on the device."""
    device = vars(module)[_CALLER]
    return tree_map_only(torch.Tensor, lambda x: x if x.is_meta else x.to(device), output)
