"""Models of guided-diffusion and consistency_models as diffusers pipelines.

Dhariwal and Nichol, arXiv 2105.05233; Song et al., arXiv 2303.01469. Both projects build their UNet from the flags of a
command line and save its state dict alone. Here every parameter is placed by name; one that is left over, missing or
of another shape is an error, and so is a flag that is not known.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    UNet2DModel,
)

from ptqd.diffusion.compvis.config import Unet
from ptqd.diffusion.compvis.key_mapping import RESNET, unet_places
from ptqd.diffusion.compvis.pipeline import filled
from ptqd.diffusion.converters.tensors import Tensors
from ptqd.diffusion.guided_diffusion.options import Gaussian, Karras, Options, read_options
from ptqd.errors import InputError
from ptqd.pipelines.guided_unet import GuidedUNet2DModel
from ptqd.pipelines.pixel import PixelPipeline
from ptqd.pipelines.respaced import RespacedDDIMScheduler, RespacedDDPMScheduler

_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}


def pipeline_from(
    state: Mapping[str, torch.Tensor],
    flags: Mapping[str, object],
    *,
    where: str = "the state dict",
    described: str = "the flags",
) -> DiffusionPipeline:
    """A state dict with the names of guided-diffusion, and the flags of its project, as a pipeline of diffusers.

    The channels of images and the number of classes are the weights'. How rows of queries, keys and values lie follows
    from the attention's weights, which have three axes in guided-diffusion and four in consistency_models.

    Args:
        state: the model's, by the original's names (``input_blocks.0.0.weight``, ...).
        flags: by the names of the project's command lines, with its defaults where they are absent; ``channel_mult``
            may be a text or a list, ``sigma_data`` may be said too.
        where: the tensors come from, for messages.
        described: where the flags come from, for messages.

    Returns:
        A :class:`ptqd.PixelPipeline`, with a DDPM or DDIM scheduler of guided-diffusion's models and EDM's Euler
        scheduler of the teachers of consistency models; a ``ConsistencyModelPipeline`` of these themselves.

    Raises:
        InputError: a flag that is not known, or a parameter that is left over, missing or of another shape.
    """
    options = read_options(flags, described)
    tensors = Tensors(state, where, described)
    queries_first = _queries_first(tensors, options)
    taken, made = tensors.shape("input_blocks.0.0.weight")[1], tensors.shape("out.2.weight")[0]
    classes = tensors.shape("label_emb.weight")[0] if options.classes else None
    channels = _image_channels(options, taken, made, tensors)
    network = build_network(options, taken, made, classes)
    placed = _placed(tensors, options, queries_first)
    tensors.check_empty()
    unet = filled(network, placed, where, described)
    if isinstance(options.process, Karras) and options.process.consistent:
        return ConsistencyModelPipeline(unet, build_scheduler(options.process))
    return PixelPipeline(unet, build_scheduler(options.process), channels)


def _image_channels(options: Options, taken: int, made: int, tensors: Tensors) -> int:
    """Channels of an image, as the weights have it.

    Raises:
        InputError: inputs and outputs do not fit each other.
    """
    channels, odd = divmod(taken, 2 if options.small_size else 1)
    learned = isinstance(options.process, Gaussian) and options.process.learned_variance
    wanted = channels * (2 if learned else 1)
    if odd or made != wanted:
        raise InputError(
            f"{tensors.where} has {taken} input and {made} output channels, where {tensors.described} gives {wanted} "
            f"outputs; look at learn_sigma ({str(learned).lower()}) and at large_size, which an upsampler needs"
        )
    return channels


def build_network(options: Options, taken: int, made: int, classes: int | None) -> Any:
    """The UNet without weights: diffusers' own where it can say it.

    Args:
        options: of it.
        taken: input channels.
        made: output channels.
        classes: how many there are; None: no labels.
    """
    levels = range(len(options.widths))
    last = levels[-1]
    heads, widths = 0, {width for i, width in enumerate(options.widths) if options.attention[i] or i == last}
    head_width = options.head_width or options.widths[last] // options.heads
    if not options.head_width and len(widths) > 1:
        heads = options.heads
    down = ["ResnetDownsampleBlock2D" if options.resnet_updown and i < last else "DownBlock2D" for i in levels]
    up = ["ResnetUpsampleBlock2D" if options.resnet_updown and i > 0 else "UpBlock2D" for i in levels]
    resampling = "resnet" if options.resnet_updown else "conv"
    common: dict[str, Any] = {
        "sample_size": options.image_size,
        "in_channels": taken,
        "out_channels": made,
        "num_class_embeds": classes,
        "block_out_channels": options.widths,
        "layers_per_block": options.blocks,
        "down_block_types": tuple("AttnDownBlock2D" if options.attention[i] else down[i] for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if options.attention[i] else up[i] for i in reversed(levels)),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if options.scale_shift else "default",
        "attn_norm_num_groups": 32,
        "attention_head_dim": head_width,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }
    teacher = isinstance(options.process, Karras) and not options.process.consistent
    with torch.device("meta"):
        if heads or teacher or options.widths[0] != options.channels:
            return GuidedUNet2DModel(
                time_proj_dim=options.channels,
                num_heads=heads or None,
                time_scale=1000.0 if teacher else 1.0,  # 250 ln(sigma), of the scheduler's ln(sigma) / 4
                **common,
            )
        return UNet2DModel(**common)


def build_scheduler(process: Gaussian | Karras) -> Any:
    """The scheduler that samples as the original does."""
    if isinstance(process, Karras):
        noise = {"sigma_min": process.sigma_min, "sigma_max": process.sigma_max, "sigma_data": process.sigma_data}
        if process.consistent:
            return CMStochasticIterativeScheduler(
                num_train_timesteps=process.steps, clip_denoised=process.clip, **noise
            )
        return EDMEulerScheduler(**noise)
    scale = 1000 / process.steps
    betas: dict[str, Any] = {"beta_schedule": "linear", "beta_start": scale * 1e-4, "beta_end": scale * 0.02}
    if process.schedule == "cosine":
        betas = {"beta_schedule": "squaredcos_cap_v2"}
    common: dict[str, Any] = {
        "num_train_timesteps": process.steps,
        "prediction_type": "sample" if process.predict_start else "epsilon",
        "clip_sample": process.clip,
        "timestep_spacing": "leading" if process.every else "linspace",
        **betas,
    }
    if not process.ddim:
        return RespacedDDPMScheduler(
            variance_type="learned_range" if process.learned_variance else "fixed_large", **common
        )
    return DDIMScheduler(**common) if process.every else RespacedDDIMScheduler(**common)


def _queries_first(tensors: Tensors, options: Options) -> bool:
    """Whether a layer for queries, keys and values has all queries first, and not one head after the other.

    consistency_models always has them first, and its layers are convolutions of images; those of guided-diffusion are
    convolutions of sequences, whose order is an option.

    Raises:
        InputError: the layers are of the other project than the flags.
    """
    axes = len(tensors.shape("middle_block.1.qkv.weight"))
    if axes == 4 and isinstance(options.process, Gaussian):
        raise InputError(
            f"the attention of {tensors.where} is of consistency_models (its weights have four axes), and "
            f"{tensors.described} of guided-diffusion; give the flags of the checkpoint's own project"
        )
    return axes == 4 or options.new_order


def _placed(tensors: Tensors, options: Options, queries_first: bool) -> dict[str, torch.Tensor]:
    """The tensors by diffusers' names."""
    described = Unet(
        image_size=options.image_size,
        inputs=0,
        outputs=0,
        channels=options.channels,
        multipliers=tuple(range(1, len(options.widths) + 1)),  # names follow from their number alone
        blocks=options.blocks,
        attention=options.attention,
        heads=0,
        head_width=0,
        context=0,
        depth=1,
        scale_shift=options.scale_shift,
        resnet_updown=options.resnet_updown,
        new_order=False,
    )
    result: dict[str, torch.Tensor] = {}
    for theirs, ours, kind in unet_places(described):
        for suffix, value in tensors.take_all(f"{theirs}.").items():
            part, _, leaf = suffix.rpartition(".")
            flat = value.flatten(1) if kind == "attention" and value.ndim > 2 else value
            if kind == "resnet":
                result[f"{ours}.{RESNET.get(part, part)}.{leaf}"] = value
            elif kind != "attention":
                result[f"{ours}.{suffix}"] = value
            elif part != "qkv":
                result[f"{ours}.{_ATTENTION.get(part, part)}.{leaf}"] = flat
            else:
                heads = 1 if queries_first else _heads(tensors, options, f"{theirs}.{suffix}", len(value))
                rows = flat.view(heads, 3, -1, *flat.shape[1:]).unbind(1)  # each (heads, width of one, ...)
                names = zip(("to_q", "to_k", "to_v"), rows, strict=True)
                result |= {f"{ours}.{name}.{leaf}": of_one.flatten(0, 1) for name, of_one in names}
    if options.classes:
        result["class_embedding.weight"] = tensors.take("label_emb.weight")
    return result


def _heads(tensors: Tensors, options: Options, name: str, rows: int) -> int:
    """Heads of an attention layer with this many rows of queries, keys and values.

    Raises:
        InputError: there is no such number.
    """
    width = rows // 3
    heads = width // options.head_width if options.head_width else options.heads
    if rows % 3 or not heads or width % heads or (options.head_width and width % options.head_width):
        raise InputError(f"{tensors.where}: the {rows} rows of {name} are no queries, keys and values of whole heads")
    return heads
