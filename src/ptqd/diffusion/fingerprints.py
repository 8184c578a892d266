"""Fingerprints: hashes that tell whether two pipelines, models or schedules are the same."""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.pipeline_parts import denoisers_of, scheduler_of
from ptqd.diffusion.plain_copy import weights_elsewhere


def fingerprint(model: Any) -> str:
    """A hash of a model's parameters and buffers, equal after saving and loading, and on every device.

    Tensors of other libraries' own classes are hashed by what they are made of: ``__tensor_flatten__`` gives a
    wrapper's plain tensors (torchao's codes and scales) and what else it knows (how it quantizes activations).
    """
    digest = hashlib.sha256()
    elsewhere = weights_elsewhere(model)
    for name, value in sorted({**model.state_dict(), **elsewhere}.items()):
        _hash(digest, name.replace(".products.", ".processor."), value)  # as earlier versions called them
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):  # an adapter's share is a plain number
            shares = {key: module.scaling[key] for key in module.active_adapters if key in module.scaling}
            _hash(digest, name, [shares, module.disable_adapters, module.merged_adapters])
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


def denoisers_fingerprint(pipe: DiffusionPipeline) -> str:
    """The fingerprint of a pipeline's denoiser, or of both where it has two."""
    return _together([fingerprint(model) for model in denoisers_of(pipe).values()])


def activation_bits_of(pipe: DiffusionPipeline) -> str | None:
    """:func:`activation_bits` of a pipeline's denoiser, or of both; None where ptqd quantized none."""
    each = [activation_bits(model) for model in denoisers_of(pipe).values()]
    return None if each[0] is None else _together([str(bits) for bits in each])


def simulated_by(pipe: DiffusionPipeline) -> str | None:
    """The fingerprint of the denoisers that an engine computes in this pipeline; None where none does."""
    each = [getattr(model, "simulated_by", None) for model in denoisers_of(pipe).values()]
    return None if None in each else _together([str(digest) for digest in each])


def _together(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def structure_of(pipe: DiffusionPipeline) -> str:
    """A hash of what a pipeline's denoisers consist of, without their numbers and without LoRAs: made in no time."""
    digest = hashlib.sha256(str(activation_bits_of(pipe)).encode())
    for name, model in denoisers_of(pipe).items():
        for key, value in sorted(model.state_dict().items()):
            if ".lora_" not in key:
                digest.update(f"{name}.{key.replace('.base_layer', '')} {tuple(value.shape)}".encode())
    return digest.hexdigest()[:16]


def schedule_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """A pipeline's scheduler, as plain facts; see :func:`scheduler_facts`."""
    return scheduler_facts(scheduler_of(pipe))


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """A scheduler as plain facts; a corrected one counts as the class it was made from."""
    config = own_config(type(scheduler), scheduler.config)
    facts = {"scheduler": type(scheduler).__name__.removeprefix("Corrected"), "config": config}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def own_config(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration a scheduler's class knows; diffusers keeps what other classes left there."""
    kind = getattr(kind, "plain_class", kind)
    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in config.items() if name in known and name != "correction"}


def pipeline_fingerprint(pipe: DiffusionPipeline) -> str:
    """A hash of all that decides what a pipeline samples: its modules' weights and its scheduler's configuration."""
    facts: dict[str, Any] = {
        "class": type(pipe).__name__,
        "schedule": schedule_of(pipe),
        "correction": pipe.scheduler.config.get("correction"),
        "activation_bits": activation_bits_of(pipe),
    }
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            facts[name] = fingerprint(getattr(component, "_orig_mod", component))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
