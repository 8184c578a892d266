"""Pipelines and denoisers without weights: what they cost can be counted before anything large is loaded.

A skeleton is a real pipeline of the real class. Its networks are on the meta device, made from their configurations,
and answer with zeros (:func:`ptqd.cost.stand_in`); tokenizers and scheduler are the real ones.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn

from ptqd import zoo
from ptqd.cost import Macs, call_macs, stand_in
from ptqd.errors import InputError
from ptqd.pipelines.latent_class import LatentClassPipeline


def skeleton(model: str | Path) -> DiffusionPipeline:
    """A pipeline of an embedded model, a folder or a hub id, with no weights.

    Raises:
        InputError: it is no pipeline, or one of its parts has a configuration that nothing can be made of.
    """
    source = str(zoo.MODELS.get(str(model), model))
    try:
        index = DiffusionPipeline.load_config(source)
        kind: Any = getattr(diffusers, index["_class_name"], None) or LatentClassPipeline
        parts = {
            name: _component(source, name, *entry)
            for name, entry in index.items()
            if isinstance(entry, list | tuple) and len(entry) == 2
        }
        settings = {name: value for name, value in index.items() if name[0] != "_" and name not in parts}
        pipe: DiffusionPipeline = kind(**parts, **settings)
        return pipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{model} is no pipeline whose cost can be counted: {' '.join(str(error).split())}") from error


def _component(source: str, name: str, library: str | None, class_name: str | None) -> Any:
    if library is None or class_name is None:
        return None
    home = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    kind: Any = getattr(home, class_name)
    ours = kind
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        if issubclass(kind, ConfigMixin):
            config: Any = {k: v for k, v in ours.load_config(source, subfolder=name).items() if k != QUANTIZED}
            with torch.device("meta"):
                part = ours.from_config(config)
        else:  # of transformers
            config = ours.config_class.from_pretrained(source, subfolder=name)
            with torch.device("meta"):
                part = ours(config)
        return stand_in(nn.Module.to(part, "meta"), torch.device("cpu"), torch.float32)
    return kind.from_pretrained(source, subfolder=name)


QUANTIZED = "quantization_config"


def bare_denoiser(config: Mapping[str, Any]) -> Any:
    """A denoiser on the meta device, from its configuration.

    Raises:
        InputError: diffusers has no such class.
    """
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if kind is None:
        raise InputError(
            f"diffusers has no denoiser {config.get('_class_name')!r}; see '_class_name' in its config.json"
        )
    with torch.device("meta"):
        model = kind.from_config({name: value for name, value in config.items() if name != QUANTIZED})
    return nn.Module.to(model, "meta").eval()


def one_call(model: Any) -> dict[str, int]:
    """Multiply-accumulates by layer of one call of a bare denoiser, for one sample of the size it was trained for.

    Raises:
        InputError: what it is called with does not follow from its configuration.
    """
    config = model.config
    size, channels = config.get("sample_size"), config.get("in_channels")
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if not sides or channels is None:
        raise InputError(
            f"the size of a sample does not follow from the configuration of {type(model).__name__}; {WHOLE}"
        )
    with torch.device("meta"):
        arguments: dict[str, Any] = {"timestep": torch.zeros(1)}
        first = torch.zeros(1, channels, *sides)
        if config.get("cross_attention_dim") is not None and hasattr(model, "set_attn_processor"):
            arguments["encoder_hidden_states"] = torch.zeros(1, 1, config["cross_attention_dim"])
        if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
            arguments["class_labels"] = torch.zeros(1, dtype=torch.long)
        try:
            return call_macs(model, first, **arguments)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{type(model).__name__} is called with more than its configuration says ({reason}); {WHOLE}"
            ) from error


WHOLE = "give the whole pipeline's folder or hub id"


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
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    return config if isinstance(config, dict) else None


def run_of_calls(call: Mapping[str, int], steps: int, calls: int) -> Macs:
    """A run of a bare denoiser that is called so many times at each step."""
    return Macs.of([{name: count * calls for name, count in call.items()}] * steps)
