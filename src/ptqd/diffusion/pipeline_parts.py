"""A pipeline's parts: its denoisers, its scheduler, the call it is in; and copies with other parts."""

import copy
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.offload import is_brought, stay
from ptqd.errors import InputError, UnsupportedError

DENOISERS = ("unet", "transformer", "decoder", "prior")  # the latter of Stable Cascade, Wuerstchen and Kandinsky


def denoiser_names(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """The names of a pipeline's denoisers: one, or two that share the steps, as Wan 2.2's ``transformer_2`` does.

    Raises:
        InputError: it has none.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            second = f"{name}_2"
            return (name, second) if isinstance(getattr(pipe, second, None), nn.Module) else (name,)
    if not isinstance(pipe, DiffusionPipeline) and hasattr(pipe, "blocks"):
        raise UnsupportedError(
            f"{type(pipe).__name__} is a modular pipeline, which has no call that ptqd could follow; give the "
            "DiffusionPipeline of the same model"
        )
    raise UnsupportedError(
        f"{type(pipe).__name__} has neither a unet nor a transformer, decoder or prior; ptqd quantizes one of these"
    )


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The name of a pipeline's denoiser, of two the first.

    Raises:
        InputError: it has none.
    """
    return denoiser_names(pipe)[0]


def denoiser_of(pipe: DiffusionPipeline, name: str | None = None) -> Any:
    """A pipeline's denoiser itself, also where ``torch.compile`` wrapped it; of two the first, or the named one."""
    model: Any = getattr(pipe, name or denoiser_name(pipe))
    return getattr(model, "_orig_mod", model)


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A pipeline's denoisers themselves by name, as :func:`denoiser_of` gives them."""
    return {name: denoiser_of(pipe, name) for name in denoiser_names(pipe)}


def scheduler_of(pipe: DiffusionPipeline) -> Any:
    """The pipeline's scheduler, its ``step`` one that ptqd can record and correct.

    Raises:
        InputError: there is none, it steps in another way, or its ``step`` was replaced on the instance.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise InputError(
            f"{type(pipe).__name__} has no scheduler; ptqd measures and corrects at scheduler.step: "
            "give it one with pipe.register_modules(scheduler=...)"
        )
    kind = type(scheduler).__name__
    step = getattr(type(scheduler), "step", None)
    taken = [] if step is None else list(inspect.signature(step).parameters)[1:4]
    if taken != ["model_output", "timestep", "sample"]:
        steps = "has no step" if step is None else f"steps by step({', '.join(taken)}, ...)"
        raise UnsupportedError(
            f"{kind} {steps}; ptqd needs step(model_output, timestep, sample, ...): use another scheduler"
        )
    if "step" in vars(scheduler):
        raise InputError(
            f"the step of this {kind} was replaced on the instance, which ptqd can neither record nor save; "
            "undo it with 'del pipe.scheduler.step', or make it a method of a subclass"
        )
    return scheduler


GUIDANCE = re.compile(r"guidance|cfg|pag_.*scale")  # arguments that change the output at every step


def calling_pipeline() -> tuple[DiffusionPipeline | None, dict[str, float]]:
    """The pipeline in whose call this is called, and the guidance of that call by the names of its arguments.

    It is read off the call itself: what a pipeline says of itself may be of an earlier call, and copies share it.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            code, values = frame.f_code, frame.f_locals
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            return values["self"], _guidance({name: values.get(name) for name in names})
        frame = frame.f_back
    return None, {}


def _guidance(arguments: Mapping[str, Any]) -> dict[str, float]:
    single = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in arguments.items()}
    numbers = {k: float(v) for k, v in single.items() if isinstance(v, Real)}
    return {name: value for name, value in numbers.items() if GUIDANCE.search(name)}


def channel_axis(sample: torch.Tensor) -> int:
    """Where channels usually are: second in images and video, last in tokens (N, L, C)."""
    return 2 if sample.ndim == 3 else 1


def find_channel_axis(model: nn.Module, output: torch.Tensor, sample: torch.Tensor) -> int:
    """Where a step's channels are, whatever the pipeline: audio is (N, C, L), some video (N, F, C, H, W).

    A learned variance follows the channels: there output and sample differ. Else the axis has the size that the
    denoiser's configuration names; where several have, or none, it is the usual one.
    """
    axes = range(1, sample.ndim)
    differ = [axis for axis in axes if output.shape[axis] != sample.shape[axis]]
    if differ:
        return differ[0]
    usual = channel_axis(sample)
    config: Mapping[str, Any] = getattr(model, "config", {})
    inputs, outputs = config.get("in_channels"), config.get("out_channels")
    if inputs is not None and outputs == 2 * inputs:  # the pipeline dropped a learned variance
        outputs = inputs
    for channels in (outputs, inputs):  # conditions may follow the sample in the inputs
        fitting = [axis for axis in axes if sample.shape[axis] == channels]
        if fitting:
            return usual if usual in fitting else fitting[0]
    return usual


def with_components(pipe: DiffusionPipeline, **components: object) -> DiffusionPipeline:
    """A pipeline like ``pipe`` that shares all its components but the named ones."""
    clone: Any = copy.copy(pipe)
    clone.register_modules(**components)
    if any(isinstance(part, nn.Module) and _stays(part) for part in components.values()):
        clone._all_hooks = []  # by which diffusers offloads all of a pipeline's parts at the end of a call
    return clone


def _stays(part: nn.Module) -> bool:
    """Whether a part of a pipeline is not to be offloaded by diffusers."""
    return is_brought(part) or any(tensor.is_meta for tensor in part.parameters())


def with_denoisers(pipe: DiffusionPipeline, **components: object) -> DiffusionPipeline:
    """As :func:`with_components`, of denoisers that are ready to be used: offloaded as the pipeline is.

    What ``enable_model_cpu_offload`` was called on is so again; otherwise they come to their device layer by layer.
    """
    made: Any = with_components(pipe, **components)
    device = getattr(pipe, "_offload_device", None)
    if getattr(pipe, "_all_hooks", None) and device is not None:
        for part in components.values():
            if isinstance(part, nn.Module):
                stay(part)
        made.enable_model_cpu_offload(device=device)
    return made


def with_twins(pipe: DiffusionPipeline, **denoisers: object) -> DiffusionPipeline:
    """A pipeline whose denoisers are others that compute the same, in other layers; a scheduler that corrects goes on.

    It gets a scheduler of its own, where the scheduler looks whether the denoiser is the one that was measured.
    """
    if not hasattr(pipe.scheduler, "watch_denoiser"):
        return with_denoisers(pipe, **denoisers)
    made = with_denoisers(pipe, **denoisers, scheduler=copy.deepcopy(scheduler_of(pipe)))
    made.scheduler.watch_denoiser(made)
    return made


def copy_module(model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a module whose parameters and buffers are ``tensor`` of the original's: themselves, to share them."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        changed = tensor(value)
        if isinstance(value, nn.Parameter) and not isinstance(changed, nn.Parameter):
            changed = nn.Parameter(changed, value.requires_grad)
        memo[id(value)] = changed
    return copy.deepcopy(model, memo)


def plain_scheduler(scheduler: Any) -> Any:
    """A new scheduler like this one, without the correction it may have."""
    kind = getattr(type(scheduler), "plain_class", type(scheduler))
    return kind.from_config({name: value for name, value in scheduler.config.items() if name != "correction"})
