"""Pipelines and denoisers without weights: what they cost can be counted before anything large is loaded.

They are real pipelines of the real class. Their networks are on the meta device, made from their configurations,
and answer with zeros (:func:`ptqd.diffusion.macs.meta_proxy`); tokenizers and scheduler are the real ones.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from ptqd import zoo
from ptqd.diffusion.macs import Macs, call_macs, from_configuration, meta_proxy
from ptqd.errors import InputError, raised_by
from ptqd.files import read_json
from ptqd.loading import conversion
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline

TOKENS = "context_tokens"
CALL = "call"
WHOLE = "give the whole pipeline's folder or hub id"


def meta_pipeline(model: str | Path) -> DiffusionPipeline:
    """A pipeline of an embedded model, a folder or a hub id, with no weights.

    Raises:
        InputError: it is no pipeline, or one of its parts has a configuration that nothing can be made of.
    """
    source = str(zoo.MODELS.get(str(model), model))
    if (remedy := conversion(Path(source))) is not None:
        raise InputError(f"{model} is no diffusers pipeline; {remedy}")
    try:
        index = DiffusionPipeline.load_config(source)
        name = index["_class_name"]
        kind: Any = (
            LatentPipeline if name == "LatentPipeline" else getattr(diffusers, name, None) or LatentClassPipeline
        )
        parts = {
            name: _component(source, name, *entry)
            for name, entry in index.items()
            if isinstance(entry, list | tuple) and len(entry) == 2
        }
        settings = {name: value for name, value in index.items() if name[0] != "_" and name not in parts}
        pipe: DiffusionPipeline = kind(**parts, **settings)
        return pipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise InputError(f"{model} is no pipeline whose cost can be counted: {' '.join(str(error).split())}") from error


def with_meta_proxies(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline whose networks are on the meta device, with answers of zeros; changed in place."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            meta_proxy(part, torch.device("cpu"), torch.float32)
    return pipe


def _component(source: str, name: str, library: str | None, class_name: str | None) -> Any:
    if library is None or class_name is None:
        return None
    ours: Any = getattr(getattr(diffusers.pipelines, library, None) or importlib.import_module(library), class_name)
    if nn.Module not in getattr(ours, "__mro__", ()):
        return ours.from_pretrained(source, subfolder=name)
    if ConfigMixin in ours.__mro__:
        part = from_configuration(ours, ours.load_config(source, subfolder=name))
    else:  # of transformers
        config = ours.config_class.from_pretrained(source, subfolder=name)
        with torch.device("meta"):
            part = nn.Module.to(ours(config), "meta")
    return meta_proxy(part, torch.device("cpu"), torch.float32)


def bare_denoiser(config: Mapping[str, object]) -> Any:
    """A denoiser on the meta device, from its configuration.

    Raises:
        InputError: diffusers has no such class, or the class refuses the configuration.
    """
    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise InputError(f"diffusers has no denoiser {name!r}; see '_class_name' in its config.json")
    try:
        return from_configuration(kind, {key: value for key, value in config.items() if key not in (TOKENS, CALL)})
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        if raised_by(error, "ptqd.diffusion", "ptqd.experiments"):
            raise
        raise InputError(f"{name} refuses the configuration: {' '.join(str(error).split())}") from error


def one_call(config: Mapping[str, Any], model: Any) -> dict[str, int]:
    """Multiply-accumulates by layer of one call of a bare denoiser, for one sample of the size it was trained for.

    Args:
        config: its configuration; see :func:`call_of`.
        model: the denoiser, on the meta device.

    Raises:
        InputError: what it is called with does not follow from its configuration.
    """
    arguments = call_of(config, model)
    try:
        return call_macs(model, **arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if raised_by(error, "ptqd"):
            raise
        reason, kind = " ".join(str(error).split())[:160], type(model).__name__
        raise InputError(f"{kind} is called with more than its configuration says ({reason}); {WHOLE}") from error


def call_of(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The arguments of a bare denoiser's call, on the meta device.

    Args:
        config: its configuration. Two things in it are ptqd's own: ``"context_tokens"`` says how long a
            cross-attention's context is; ``"call"`` the shapes of all arguments, by name.
        model: the denoiser, on the meta device.

    Raises:
        InputError: they do not follow from its configuration.
    """
    if CALL in config:
        return {name: _of_shape(value) for name, value in config[CALL].items()}
    config = {**getattr(model, "config", {}), **config}
    size, channels, kind = config.get("sample_size"), config.get("in_channels"), type(model).__name__
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    context, tokens = config.get("cross_attention_dim"), config.get(TOKENS)
    conditional = context is not None and "encoder_hidden_states" in inspect.signature(model.forward).parameters
    if not sides or channels is None or (conditional and tokens is None):
        raise InputError(f"the configuration of {kind} does not say all that a call takes; {WHOLE}")
    with torch.device("meta"):
        arguments: dict[str, Any] = {"timestep": torch.zeros(1)}
        if conditional:
            arguments["encoder_hidden_states"] = torch.zeros(1, int(tokens or 0), int(context or 0))
        if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
            arguments["class_labels"] = torch.zeros(1, dtype=torch.long)
        first = next(iter(inspect.signature(model.forward).parameters))
        return {first: torch.zeros(1, channels, *sides), **arguments}


def _of_shape(value: Any) -> Any:
    """A tensor on the meta device of a shape, which may be headed by a type; of a mapping one for each."""
    if isinstance(value, Mapping):
        return {name: _of_shape(each) for name, each in value.items()}
    if value is None:
        return None
    dtype, shape = (getattr(torch, value[0]), value[1:]) if isinstance(value[0], str) else (torch.float32, value)
    return torch.zeros(shape, dtype=dtype, device="meta")


def denoiser_config(model: str | Path) -> dict[str, Any] | None:
    """The configuration of a bare denoiser: of a published architecture by name, a JSON file, or a denoiser's folder.

    None for anything else.

    Raises:
        InputError: a JSON file that is none.
    """
    path = zoo.ARCHITECTURES.get(str(model), Path(model))
    if path.is_dir() and not (path / "model_index.json").exists():
        path = path / "config.json"
    if path.suffix != ".json" or not path.is_file():
        return None
    config = read_json(path)
    return config if isinstance(config, dict) else None


def saved_configuration(model: str | Path, name: str, denoiser: Any) -> Mapping[str, Any]:
    """The configuration of a saved pipeline's denoiser, how it is quantized included."""
    config: Mapping[str, Any] = denoiser.load_config(str(zoo.MODELS.get(str(model), model)), subfolder=name)
    return config


def run_of_calls(call: Mapping[str, int], steps: int, calls: int) -> Macs:
    """A run of a bare denoiser that is called so many times at each step."""
    return Macs.of([{name: count * calls for name, count in call.items()}] * steps)
