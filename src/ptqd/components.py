"""A pipeline's parts: its denoiser, its scheduler, and fingerprints that tell whether two things belong together."""

import copy
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.errors import InputError


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """``"unet"`` or ``"transformer"``, whichever the pipeline has.

    Raises:
        InputError: it has neither.
    """
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise InputError(f"{type(pipe).__name__} has neither a unet nor a transformer; ptqd quantizes one of these")


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
        raise InputError(f"{kind} {steps}; ptqd needs step(model_output, timestep, sample, ...): use another scheduler")
    if "step" in vars(scheduler):
        raise InputError(
            f"the step of this {kind} was replaced on the instance, which ptqd can neither record nor save; "
            "undo it with 'del pipe.scheduler.step', or make it a method of a subclass"
        )
    return scheduler


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


def with_components(pipe: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
    """A pipeline like ``pipe`` that shares all its components but the named ones."""
    clone = copy.copy(pipe)
    clone.register_modules(**components)
    return clone


def copy_module(model: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a module whose parameters and buffers are ``tensor`` of the original's: themselves, to share them."""
    memo: dict[int, Any] = {}
    for value in (*model.parameters(), *model.buffers()):
        changed = tensor(value)
        if isinstance(value, nn.Parameter) and not isinstance(changed, nn.Parameter):
            changed = nn.Parameter(changed, value.requires_grad)
        memo[id(value)] = changed
    return copy.deepcopy(model, memo)


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers, equal after saving and loading, and on every device.

    Tensors of other libraries' own classes are hashed by what they are made of: ``__tensor_flatten__`` gives a
    wrapper's plain tensors (torchao's codes and scales) and what else it knows (how it quantizes activations).
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        _hash(digest, name, value)
    return digest.hexdigest()[:16]


def _hash(digest: Any, name: str, value: Any) -> None:
    """Add a value to a hash: tensors bit by bit, everything else by what stays the same from one run to the next."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        parts, context = value.__tensor_flatten__()
        digest.update(f"{name} {type(value).__name__} {tuple(value.shape)}".encode())
        _hash(digest, name, context)
        for part in parts:
            _hash(digest, f"{name}.{part}", getattr(value, part))
    elif isinstance(value, torch.Tensor):
        if hasattr(value, "quant_type"):  # GGUF: the same bytes of another type are other weights
            digest.update(f"{name} {value.quant_type!r}".encode())
        with torch._C.DisableTorchFunctionSubclass():  # whatever a subclass makes of its bytes
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _hash(digest, f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):  # one may be saved as the other
        for i, item in enumerate(value):
            _hash(digest, f"{name}.{i}", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        digest.update(f"{name} {type(value).__name__}".encode())
        _hash(digest, name, vars(value))
    elif not isinstance(value, torch.device):
        digest.update(f"{name} {re.sub(' at 0x[0-9a-f]+', '', repr(value))}".encode())


def activation_bits(model: nn.Module) -> str | None:
    """A hash of the recipe and the plan of a denoiser that ptqd quantized; None for any other."""
    config = getattr(model, "config", {}).get("quantization_config")
    facts: Mapping[str, Any] = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if facts.get("quant_method") != "ptqd":
        return None
    decides = [facts["recipe"], facts.get("plan")]
    if decides[1] is not None:
        decides[1] = {name: value for name, value in decides[1].items() if name != "made"}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def schedule_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A pipeline's scheduler, as plain facts; see :func:`scheduler_facts`."""
    return scheduler_facts(scheduler_of(pipe))


def plain_scheduler(scheduler: Any) -> Any:
    """A new scheduler like this one, without the correction it may have."""
    kind = getattr(type(scheduler), "plain_class", type(scheduler))
    return kind.from_config({name: value for name, value in scheduler.config.items() if name != "correction"})


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """A scheduler as plain facts; a corrected one counts as the class it was made from."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_") and k != "correction"}
    facts = {"scheduler": type(scheduler).__name__.removeprefix("Corrected"), "config": config}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def pipeline_fingerprint(pipe: DiffusionPipeline) -> str:
    """A hash of all that decides what a pipeline samples: its modules' weights and its scheduler's configuration."""
    facts: dict[str, Any] = {
        "class": type(pipe).__name__,
        "schedule": schedule_of(pipe),
        "correction": pipe.scheduler.config.get("correction"),
        "activation_bits": activation_bits(getattr(pipe, denoiser_name(pipe))),
    }
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            facts[name] = fingerprint(component)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
