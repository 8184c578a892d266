"""A plain ``torch.nn.Module`` as a pipeline: how it is called, and what of it can be quantized.

One call of the network, with what torch's functions are given in view, tells what a list of its modules does not:
products of two activations (attention by einsum, matmul or scaled_dot_product_attention), convolutions that are given a
concatenation, and layers that are not torch's own classes, but call torch's convolution or linear function.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import nn
from torch.overrides import TorchFunctionMode

from ptqd.diffusion.intercept import hooked
from ptqd.errors import InputError, raised_by
from ptqd.pipelines.module import (
    CONVENTIONS,
    ModuleDenoiser,
    ModulePipeline,
    network_for_loading,
    put_module,
    torch_layer,
)

logger = logging.getLogger(__name__)

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_KINDS = {F.conv1d: "Conv1d", F.conv2d: "Conv2d", F.conv3d: "Conv3d", F.linear: "Linear"}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
WRITTEN_OUT = {torch.einsum, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm}
"""Torch's functions that attention is written with."""
_SAME = 1e-5  # of a layer's largest output: how far a folded layer may be off


def from_module(
    network: nn.Module,
    scheduler: SchedulerMixin,
    shape: Sequence[int],
    *,
    convention: str = "timestep",
    conditions: Mapping[str, torch.Tensor] | None = None,
) -> ModulePipeline:
    """Make a pipeline of a network that is no model of diffusers, to quantize, measure, correct, save and sample it.

    Args:
        network: called as ``network(x, t, **conditions)`` with samples (N, *shape) and t (N,). It is copied; layers of
            classes of its own that only convolve or multiply by constant weights become torch's.
        scheduler: of diffusers.
        shape: of a sample, channels first.
        convention: ``"timestep"``: x is scaled and t told by the scheduler, and the output is what its
            ``prediction_type`` says (guided-diffusion; a variance in further channels is for DDPM alone).
            ``"sigma"``: x is the noisy sample itself, t its standard deviation, and the output the clean sample, as of
            k-diffusion's denoisers, EDM and EDM2 (Karras et al., arXiv 2206.00364, eq. 7); the scheduler is one of
            EDM's, or has ``prediction_type="sample"``.
        conditions: the network's further arguments by name, each a tensor with one entry, as of one sample.

    Returns:
        The pipeline; its call takes the conditions by name, tensors (N, ...). What of the network cannot be quantized
        is told by the coverage of a quantized pipeline, and logged.

    Raises:
        InputError: a convention that is not known or that the scheduler does not fit, or a network that cannot be
            called as it says.
    """
    given = dict(conditions or {})
    if convention not in CONVENTIONS:
        raise InputError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    if isinstance(network, ModuleDenoiser):
        raise InputError("the network is a pipeline's denoiser already; give the network itself")
    _check_scheduler(scheduler, convention)
    with network_for_loading(network):
        kind = type(network)
        denoiser = ModuleDenoiser(
            network_class=f"{kind.__module__}.{kind.__qualname__}",
            sample_shape=tuple(int(size) for size in shape),
            convention=convention,
            conditions=tuple(given),
        )
    example = next((p for p in network.parameters()), torch.zeros(()))
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(example)
    t = torch.ones(1, device=example.device, dtype=example.dtype)
    first = _watched(denoiser, x, t, given)
    if first.own_layers:
        denoiser.register_to_config(folded=_fold(denoiser, first))
        denoiser.architecture = (copy.deepcopy(denoiser.network).to("meta"),)
        first = _watched(denoiser, x, t, given)
    denoiser.register_to_config(
        attentions=tuple(first.attentions), concatenations=first.concatenations, left=tuple(first.left.items())
    )
    for name, why in first.left.items():
        logger.info("%s stays in full precision: %s", name, why)
    return ModulePipeline(denoiser, scheduler)


def _check_scheduler(scheduler: Any, convention: str) -> None:
    kind = type(scheduler).__name__
    if convention == "sigma":
        if not hasattr(scheduler, "sigmas"):
            raise InputError(f"{kind} has no sigmas; a network of the convention 'sigma' needs EDM's or Euler's")
        predicts = scheduler.config.get("prediction_type")
        if not hasattr(scheduler, "precondition_outputs") and predicts != "sample":
            raise InputError(
                f"{kind} expects {predicts!r} from the network, one of the convention 'sigma' gives the clean sample; "
                "set prediction_type='sample', or take one of EDM's schedulers"
            )
    elif hasattr(scheduler, "precondition_outputs") and scheduler.config.get("prediction_type") == "sample":
        raise InputError(f"{kind} with prediction_type='sample' is for networks of the convention 'sigma'")


class _Watch(TorchFunctionMode):
    """What torch's functions are given in a network's call, by the innermost module that calls them.

    Attributes:
        own_layers: of modules that are no layers of torch's, the functions that they call with a weight.
        attentions: modules with products of two activations that come in pairs, as attention's do.
        concatenations: convolutions that are given two tensors side by side, and the channels of the first.
        left: what cannot be quantized, and why.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.stack: list[str] = []
        self.own_layers: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}
        self.products: dict[str, int] = {}
        self.concatenations: dict[str, int] = {}
        self._joined: dict[int, tuple[torch.Tensor, int]] = {}  # each kept, so that no other gets its id

    @property
    def attentions(self) -> list[str]:
        return [name for name, count in self.products.items() if count and count % 2 == 0]

    @property
    def left(self) -> dict[str, str]:
        left = {
            name: "a product of two activations that is no attention"
            for name, count in self.products.items()
            if count % 2
        }
        for name in self.own_layers:
            kind = type(self.network.get_submodule(name)).__name__
            left[name] = f"{kind} does more than one convolution or product by a constant weight"
        return left

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        here = self.stack[-1] if self.stack else ""
        module = self.network.get_submodule(here)
        if func is torch.cat and isinstance(result, torch.Tensor):
            parts = args[0] if args else kwargs["tensors"]
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if len(parts) == 2 and axis in (1, 1 - result.ndim):
                self._joined[id(result)] = (result, parts[0].shape[1])
        elif func is F.scaled_dot_product_attention:
            self.products[here] = self.products.get(here, 0) + 2
        elif func in WRITTEN_OUT and self._multiplies(args):
            self.products[here] = self.products.get(here, 0) + 1
        elif func in _KINDS and not isinstance(module, LAYERS):
            self.own_layers.setdefault(here, []).append((func, args, kwargs))
        return result

    def _multiplies(self, args: tuple[Any, ...]) -> bool:
        """Whether two activations are multiplied; a weight with any is a layer of the network's own."""
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        return len(tensors) >= 2 and all(x.ndim >= 3 for x in tensors[-2:])

    def given(self, name: str, module: object, args: Any) -> None:
        """Before a module is called."""
        x = args[0] if args else None
        if isinstance(module, LAYERS[:3]) and isinstance(x, torch.Tensor) and id(x) in self._joined:
            self.concatenations[name] = self._joined[id(x)][1]
        self.stack.append(name)

    def done(self, name: str, module: object, args: Any, output: object) -> None:
        """After it."""
        self.stack.pop()


def _watched(denoiser: ModuleDenoiser, x: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, Any]) -> _Watch:
    """One call of a denoiser, watched.

    Raises:
        InputError: the network refuses the call.
    """
    try:
        with torch.no_grad():
            output = denoiser(x, t, **conditions).sample
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
        if raised_by(error, "ptqd.diffusion"):
            raise  # a bug
        called = ", ".join(("x", "t", *(f"{name}=..." for name in conditions)))
        raise InputError(
            f"{denoiser.config.network_class} cannot be called as network({called}) with x {tuple(x.shape)}, "
            f"t {tuple(t.shape)}: {' '.join(str(error).split())}"
        ) from error
    watch = _Watch(denoiser)
    hooks = []
    for name, module in denoiser.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(watch.given, name)))
        hooks.append(module.register_forward_hook(partial(watch.done, name)))
    with hooked(*hooks), torch.no_grad(), watch:
        denoiser(x, t, **conditions)
    if tuple(output.shape[2:]) != tuple(x.shape[2:]) or output.shape[1] not in (x.shape[1], 2 * x.shape[1]):
        raise InputError(
            f"{denoiser.config.network_class} gives {tuple(output.shape)} for samples {tuple(x.shape)}; a denoiser "
            "gives as many channels, or twice as many with a learned variance"
        )
    return watch


def _fold(denoiser: ModuleDenoiser, watch: _Watch) -> dict[str, dict[str, Any]]:
    """Put torch's own layers in the place of those that only convolve, or multiply, by a constant weight.

    Returns:
        What they are, by name, as :func:`ptqd.pipelines.module.torch_layer` makes them.
    """
    folded: dict[str, dict[str, Any]] = {}
    for name, calls in watch.own_layers.items():
        module = denoiser.get_submodule(name)
        if len(calls) != 1 or list(module.children()):
            continue
        given = dict(zip(_ARGUMENTS, calls[0][1], strict=False)) | calls[0][2]
        weight = given["weight"].detach()
        facts = {"kind": _KINDS[calls[0][0]], "shape": list(weight.shape)}
        facts |= {key: _plain(given[key]) for key in _ARGUMENTS[3:] if key in given}
        layer = torch_layer(facts)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros_like(weight[:, 0].flatten(1)[:, 0]), requires_grad=False)
        if _alike(module, layer, given["input"]):
            put_module(denoiser, name, layer)
            folded[name] = facts
    return folded


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _alike(module: nn.Module, layer: Any, x: torch.Tensor) -> bool:
    """Whether a layer gives what the module does, on two inputs; its bias is set to what the module adds."""
    with torch.no_grad():
        try:
            zero = module(torch.zeros_like(x))
            if zero.shape != layer(x).shape:
                return False
            axes = [axis for axis in range(zero.ndim) if axis != (1 if zero.ndim > 2 else zero.ndim - 1)]
            layer.bias.copy_(zero.mean(axes))
            inputs = (x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x))
            pairs = [(module(each), layer(each)) for each in inputs]
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return False
    return all(float((a - b).abs().max()) <= _SAME * float(a.abs().max() + 1e-12) for a, b in pairs)
