"""Multiply-accumulates of a denoiser, layer by layer and step by step.

Convolutions, linear layers and the products of attention are counted, on the meta device: the pipeline really runs, for
one sample, but its networks have shapes and no numbers (:func:`meta_proxy`). So guidance is counted as the two calls it
is, a model of any size costs no memory, and nothing of a model's kind need be known. What each operation takes is
torch's own count (``torch.utils.flop_counter``).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ptqd.diffusion.intercept import hooked, stepping
from ptqd.diffusion.pipeline_parts import copy_module, denoiser_names, denoisers_of, with_components
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.errors import InputError, PtqdError

FULL_BITS = 32
PRODUCTS = (".qk", ".pv")


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a run for one sample.

    Attributes:
        layers: dotted names (L,); the products of an attention end in ``.qk`` and ``.pv``, other products of two
            activations in ``.matmul``.
        counts: of each step, all of its denoiser calls together (T, L), float64, whole numbers.
    """

    layers: tuple[str, ...]
    counts: torch.Tensor

    @property
    def total(self) -> int:
        """Of the whole run."""
        return int(self.counts.sum())

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, int]]) -> "Macs":
        """Of each step's counts by layer."""
        layers = tuple(dict.fromkeys(name for step in steps for name in step))
        rows = [[float(step.get(name, 0)) for name in layers] for step in steps]
        return cls(layers, torch.tensor(rows, dtype=torch.float64))


def on_meta(model: nn.Module) -> Any:
    """A denoiser's architecture in full precision on the meta device, whatever it is quantized by."""
    own: Any = getattr(model, "on_meta", None)
    if own is not None:
        return own()
    config: Any = getattr(model, "config", None)
    kind: Any = getattr(type(model), "proxy_for", type(model))
    if isinstance(config, Mapping) and hasattr(kind, "from_config"):
        return from_configuration(kind, config)
    return copy_module(model, lambda tensor: tensor.to("meta"))


def from_configuration(kind: Any, config: Mapping[str, Any]) -> Any:
    """A network of diffusers in full precision on the meta device."""
    with torch.device("meta"):
        model = kind.from_config({name: value for name, value in config.items() if name != "quantization_config"})
    return nn.Module.to(model, "meta").eval()  # some parameters are made on the CPU all the same


def call_macs(model: nn.Module, *args: object, **kwargs: object) -> dict[str, int]:
    """Multiply-accumulates of one call by layer, on whatever device model and arguments are, such as meta."""
    return _counted(model, args, kwargs)[1]


def _counted(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, int]]:
    """A call's answer, and its multiply-accumulates by layer. Fused attention would hide its products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        answer = model(*args, **kwargs)
    return answer, _by_layer(model, type(model).__name__, counter)


def _by_layer(model: nn.Module, root: str, counter: FlopCounterMode) -> dict[str, int]:
    modules = dict(model.named_modules())
    counts = {
        name.removeprefix(root).removeprefix("."): sum(ops.values()) // 2
        for name, ops in counter.get_flop_counts().items()
        if f"{name}.".startswith(f"{root}.") and ".products" not in name  # of a quantized attention, which counts it
    }
    own = dict(counts)
    for name, count in counts.items():
        above = name
        while above:  # what a module's children count is theirs
            above = above.rpartition(".")[0]
            if above in own:
                own[above] -= count
                break
    config: Any = getattr(model, "config", {})
    plain = (config.get("attentions") if isinstance(config, Mapping) else None) or ()
    layers: dict[str, int] = {}
    for name, count in own.items():
        if count <= 0:  # less where a child was also called by another
            continue
        module = modules.get(name)
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            layers[name] = count
        elif hasattr(module, "processor") or name in plain:
            layers |= {f"{name}{product}".lstrip("."): count // 2 for product in PRODUCTS}
        else:
            layers[f"{name}.matmul".lstrip(".")] = count
    return layers


def run_macs(pipe: DiffusionPipeline, sampling: Sampling) -> Macs:
    """Multiply-accumulates of one sample, step by step.

    A denoiser that looks at numbers, as some do at a mask's, is counted while it really samples one.

    Raises:
        InputError: such a denoiser without its weights.
    """
    try:
        return _run_macs(pipe, sampling, meta=True)
    except RuntimeError as error:  # torch's, for a look at numbers that are not there
        models = denoisers_of(pipe).values()
        if any(tensor.is_meta for model in models for tensor in (*model.parameters(), *model.buffers())):
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{type(pipe).__name__} cannot be counted without its weights: {reason}") from error
        return _run_macs(pipe, sampling, meta=False)


def _run_macs(pipe: DiffusionPipeline, sampling: Sampling, *, meta: bool) -> Macs:
    steps: list[dict[str, int]] = [{}]

    def count(call: Mapping[str, int]) -> None:
        for layer, macs in call.items():
            steps[-1][layer] = steps[-1].get(layer, 0) + macs

    def step(plain: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        steps.append({})
        return result

    counting = {
        name: meta_proxy(on_meta(denoiser), pipe._execution_device, denoiser.dtype, count)
        if meta
        else _counting(copy_module(denoiser, lambda tensor: tensor), count)
        for name, denoiser in denoisers_of(pipe).items()
    }
    counted = with_components(pipe, **counting)
    with stepping(counted, step):
        run_batch(counted, sampling, range(1), "latent")
    return Macs.of([step for step in steps if step])


def steps_called(pipe: DiffusionPipeline, sampling: Sampling) -> dict[str, list[int]]:
    """The steps of a run at which each denoiser is called, by number: of networks without numbers, or of real ones."""
    denoisers = denoisers_of(pipe)
    try:
        empty = {name: _empty(pipe, model) for name, model in denoisers.items()}
        return _steps_called(with_components(pipe, **empty), sampling)
    except (PtqdError, RuntimeError):  # a RuntimeError is torch's for a look at numbers that are not there
        return _steps_called(pipe, sampling)


def _empty(pipe: DiffusionPipeline, denoiser: Any) -> Any:
    """A stand-in for a denoiser that has no numbers."""
    return meta_proxy(on_meta(denoiser), pipe._execution_device, denoiser.dtype)


def _steps_called(pipe: DiffusionPipeline, sampling: Sampling) -> dict[str, list[int]]:
    steps, called = [0], {name: dict[int, None]() for name in denoiser_names(pipe)}

    def step(plain: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return plain(*args, **kwargs)

    hooks = [
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, seen=seen: seen.setdefault(steps[0]))
        for name, seen in called.items()
    ]
    with hooked(*hooks), stepping(pipe, step):
        run_batch(pipe, sampling, range(1), "latent")
    return {name: list(seen) for name, seen in called.items()}


def _counting(model: object, count: Callable[[Mapping[str, int]], None]) -> Any:
    """Let a denoiser count its calls; changed in place."""
    kind: Any = type(model)
    kind = getattr(kind, "proxy_for", kind)  # of one that holds outputs: every call is counted

    def forward(self: object, *args: object, **kwargs: object) -> Any:
        answer, macs = _as_itself(self, kind, args, kwargs)
        count(macs)
        return answer

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]  # pipelines look at it
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def _as_itself(model: Any, kind: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, int]]:
    """Call a model of a changed class as what it was, its modules' names included."""
    own, model.__class__ = type(model), kind
    try:
        return _counted(model, args, kwargs)
    finally:
        model.__class__ = own


def meta_proxy(
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    count: Callable[[Mapping[str, int]], None] | None = None,
) -> Any:
    """Let a network on the meta device stand in for itself: it takes real arguments and answers with zeros.

    Args:
        model: on the meta device; changed in place.
        device: where it says it is; its answers are where its first argument is.
        dtype: of its answers, and the one it says it has.
        count: called after each call, with its multiply-accumulates by layer.
    """
    kind: Any = type(model)
    known: dict[str, tuple[Any, dict[str, int]]] = {}  # calls with the same shapes take the same

    def forward(self: object, *args: object, **kwargs: object) -> Any:
        moved = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        shapes = repr(tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.dtype), moved))
        if shapes not in known:
            with torch.device("meta"):
                known[shapes] = _as_itself(self, kind, *moved)
        answer, macs = known[shapes]
        if count is not None:
            count(macs)
        here = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), device)
        return tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=here), answer)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]  # pipelines look at it
    body: dict[str, Any] = {"forward": forward, "proxy_for": kind, "__module__": kind.__module__}
    body |= {"device": property(lambda self: device), "dtype": property(lambda self: dtype)}
    nn.Module.to(model, dtype)
    model.__class__ = type(kind.__name__, (kind,), body)
    return model.eval()
