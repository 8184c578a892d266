"""The networks and the scheduler that a YAML describes, without weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

from ptqd.diffusion.compvis.config import Model, Unet
from ptqd.pipelines.latent import MultiHeadUNet2DModel
from ptqd.pipelines.latent_class import ClassEmbedder


def build_scheduler(model: Model) -> DDIMScheduler:
    """The original's DDIM: its betas, and its grid of steps, which begins at 1."""
    return DDIMScheduler(
        num_train_timesteps=model.timesteps,
        beta_start=model.linear_start,
        beta_end=model.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_embedder(model: Model) -> ClassEmbedder:
    """Its last class is the null class."""
    with _on_meta():
        output: ClassEmbedder = ClassEmbedder(model.classes - 1, model.class_width)
    return output


def build_denoiser(unet: Unet) -> Any:
    """The UNet: conditional on a context, or not; with heads of one width, or of one number."""
    levels = range(len(unet.multipliers))
    last = levels[-1]
    common: dict[str, Any] = {
        "sample_size": unet.image_size,
        "in_channels": unet.inputs,
        "out_channels": unet.outputs,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }
    with _on_meta():
        if unet.context:
            heads = [unet.heads_of(width) for width in unet.widths]
            down = ["CrossAttnDownBlock2D" if unet.attention[i] else "DownBlock2D" for i in levels]
            up = ["CrossAttnUpBlock2D" if unet.attention[i] else "UpBlock2D" for i in reversed(levels)]
            return UNet2DConditionModel(
                **common,
                down_block_types=tuple(down),
                up_block_types=tuple(up),
                attention_head_dim=heads[0] if len(set(heads)) == 1 else tuple(heads),  # heads, despite its name
                cross_attention_dim=unet.context,
                transformer_layers_per_block=unet.depth,
            )
        plain_down = ["ResnetDownsampleBlock2D" if unet.resnet_updown and i < last else "DownBlock2D" for i in levels]
        plain_up = ["ResnetUpsampleBlock2D" if unet.resnet_updown and i > 0 else "UpBlock2D" for i in levels]
        common |= {
            "down_block_types": tuple("AttnDownBlock2D" if unet.attention[i] else plain_down[i] for i in levels),
            "up_block_types": tuple("AttnUpBlock2D" if unet.attention[i] else plain_up[i] for i in reversed(levels)),
            "downsample_type": "resnet" if unet.resnet_updown else "conv",
            "upsample_type": "resnet" if unet.resnet_updown else "conv",
            "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
            "attn_norm_num_groups": 32 if unet.scale_shift else None,
        }
        if unet.heads > 0:
            return MultiHeadUNet2DModel(num_heads=unet.heads, **common)
        return UNet2DModel(attention_head_dim=unet.head_width, **common)


def build_first_stage(model: Model, scale: float) -> Any:
    """The first stage; ``scale`` is what latents are multiplied with."""
    stage, levels = model.stage, len(model.stage.multipliers)
    common: dict[str, Any] = {
        "in_channels": stage.image_channels,
        "out_channels": stage.image_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(stage.channels * m for m in stage.multipliers),
        "layers_per_block": stage.blocks,
        "latent_channels": stage.latents,
        "sample_size": stage.resolution,
        "norm_num_groups": 32,
        "scaling_factor": scale,
    }
    with _on_meta():
        if stage.codes:
            return VQModel(**common, num_vq_embeddings=stage.codes, vq_embed_dim=stage.code_width)
        return AutoencoderKL(**common)


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield
