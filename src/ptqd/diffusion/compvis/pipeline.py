"""Checkpoints of CompVis' latent diffusion (Rombach et al., arXiv 2112.10752) as diffusers pipelines.

The original keeps one state dict for the UNet, its moving average (EMA), the first stage and the class embedder, and
builds them as its YAML says. Here every parameter is placed by name; one that is left over, missing or of another shape
is an error, and so is anything in the YAML that is not understood.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion.compvis.checkpoint import State, read_checkpoint
from ptqd.diffusion.compvis.config import read_config
from ptqd.diffusion.compvis.key_mapping import choose_weights, first_stage_tensors, unet_tensors
from ptqd.diffusion.compvis.networks import build_denoiser, build_embedder, build_first_stage, build_scheduler
from ptqd.errors import InputError
from ptqd.files import write_large_tensors
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline


def convert(checkpoint: Path, config: Path) -> DiffusionPipeline:
    """A checkpoint and its YAML as a pipeline of diffusers.

    Weights are mapped from the checkpoint's file, in the precision that they have there. Where the configuration keeps
    an EMA copy, as the original does by default, its weights are taken; where the checkpoint has one kind of weights
    alone, those are, and the log says so if the configuration says otherwise.

    Args:
        checkpoint: ``model.ckpt``, or its state dict as ``.safetensors``.
        config: the YAML.

    Returns:
        A :class:`ptqd.LatentClassPipeline` for class-conditional models, else a :class:`ptqd.LatentPipeline`.

    Raises:
        InputError: a file that is missing, truncated or holds code; classes or options that are not known; or a
            parameter that is left over, missing or of another shape.
    """
    model = read_config(config)
    state = State(read_checkpoint(checkpoint), str(checkpoint))
    state.check_schedule(model)
    scale = state.scale(model)
    choose_weights(state, model)
    empty, stage = _built(config, lambda: (build_denoiser(model.unet), build_first_stage(model, scale)))
    unet = filled(empty, unet_tensors(state, model), checkpoint, config)
    vae = filled(stage, first_stage_tensors(state, model), checkpoint, config)
    embedder = None
    if model.classes:
        rows = {"embedding.weight": state.take("cond_stage_model.embedding.weight")}
        embedder = filled(build_embedder(model), rows, checkpoint, config)
    state.check_empty()
    parts = [part for part in (unet, vae, embedder) if part is not None]
    widest = functools.reduce(torch.promote_types, {p.dtype for part in parts for p in part.parameters()})
    for part in parts:  # some checkpoints have the UNet's in half precision alone
        torch.nn.Module.to(part, widest)
    if embedder is None:
        return LatentPipeline(vae, unet, build_scheduler(model))
    return LatentClassPipeline(vae, unet, embedder, build_scheduler(model))


def blank(config: Path) -> DiffusionPipeline:
    """The pipeline that a YAML describes, on the meta device.

    Raises:
        InputError: a YAML that is not understood.
    """
    model = read_config(config)
    unet, vae = _built(config, lambda: (build_denoiser(model.unet), build_first_stage(model, model.scale)))
    if not model.classes:
        return LatentPipeline(vae, unet, build_scheduler(model))
    return LatentClassPipeline(vae, unet, build_embedder(model), build_scheduler(model))


def _built(config: Path, build: Callable[[], tuple[object, object]]) -> tuple[Any, Any]:
    """Networks that diffusers builds, if it takes what the YAML says."""
    try:
        return build()
    except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{config} describes networks that cannot be built: {' '.join(str(error).split())}") from error


def save_converted(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a converted pipeline as ``save_pretrained`` does, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.save_config(folder / name)  # type: ignore[operator]
            weights = folder / name / "diffusion_pytorch_model.safetensors"
            write_large_tensors(weights, part.state_dict(), {"format": "pt"})
        else:
            part.save_pretrained(folder / name)


def filled(network: Any, tensors: Mapping[str, torch.Tensor], checkpoint: Path | str, config: Path | str) -> Any:
    """A network that was built without weights, with these."""
    required = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in required.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            has = f"it has {tuple(tensors[name].shape)} there" if name in tensors else "it has none"
            raise InputError(
                f"{checkpoint} is of another architecture than {config} says: {name} should be {shape}, and {has}"
            )
        if not tensors[name].is_floating_point():
            raise InputError(f"{checkpoint} has {name} as {tensors[name].dtype}; give weights of floating point")
    left = sorted(set(tensors) - set(required))
    if left:
        raise InputError(f"{checkpoint} is of another architecture than {config} says: there is no place for {left[0]}")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)
