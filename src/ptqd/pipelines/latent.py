"""Unconditional latent diffusion: a first stage and a UNet, the shape of LDM-4 on LSUN-Bedrooms.

Rombach et al., arXiv 2112.10752. Diffusers' ``LDMPipeline`` draws a batch's noise from one stream and always decodes;
here every sample has a generator of its own, and latents can be had.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,  # noqa: F401  looked for here when a folder with a MultiHeadUNet2DModel is loaded
    SchedulerMixin,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ptqd.errors import InputError

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None


class MultiHeadUNet2DModel(UNet2DModel):
    """A UNet2DModel whose attention layers all have the same number of heads, as LDM-8 on LSUN-Churches.

    ``UNet2DModel`` can only fix the width of a head.

    Args:
        num_heads: of every attention layer.
    """

    ignore_for_config = [  # noqa: RUF012  as diffusers has it
        "add_attention",
        "attention_head_dim",
        "downsample_padding",
        "dropout",
        "mid_block_scale_factor",
        "mid_block_type",
        "num_class_embeds",
        "num_train_timesteps",
        "time_embedding_dim",
    ]

    @register_to_config
    def __init__(
        self,
        num_heads: int = 8,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",),
        block_out_channels: tuple[int, ...] = (192,),
        layers_per_block: int = 2,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "default",
        attn_norm_num_groups: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        norm_eps: float = 1e-5,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        class_embed_type: str | None = None,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attn_norm_num_groups=attn_norm_num_groups,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            norm_eps=norm_eps,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            class_embed_type=class_embed_type,
            attention_head_dim=None,  # one head, until the next lines
        )
        for module in self.modules():
            if hasattr(module, "heads") and hasattr(module, "to_q"):
                module.heads = module.sliceable_head_dim = num_heads
                module.scale = (module.inner_dim // num_heads) ** -0.5


def denoised(
    pipe: Any,
    count: int,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    eta: float,
    generator: Generators,
    latents: torch.Tensor | None,
) -> torch.Tensor:
    """Latents (N, C, H, W) after the last step.

    Args:
        pipe: with a ``unet`` and a ``scheduler``.
        count: N.
        predict: the denoiser's output, guided, for a sample (N, C, H, W) at a timestep.
        steps: denoising steps.
        eta: noise of DDIM's step, where the scheduler takes it (arXiv 2010.02502).
        generator: one for the batch, or one for each sample.
        latents: start noise instead of drawn one.

    Raises:
        InputError: start noise of another shape, or a number of steps that the scheduler cannot take.
    """
    _check_steps(pipe.scheduler, steps)
    device, size = pipe._execution_device, pipe.unet.config.sample_size
    shape = (count, pipe.unet.config.in_channels, size, size)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=pipe.unet.dtype)
    elif tuple(latents.shape) != shape:
        raise InputError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps, device=device)
    x: torch.Tensor = latents.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none
    accepted = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
    for t in pipe.progress_bar(scheduler.timesteps):
        x = scheduler.step(predict(x, t), t, x, **extra).prev_sample
    return x


def _check_steps(scheduler: Any, steps: int) -> None:
    """Refuse numbers of steps that reach beyond the trained timesteps; say where a grid begins late.

    diffusers' leading grid of S steps is 0, r, ..., (S - 1) r with r = T // S, plus an offset; CompVis' DDIM goes on to
    the end, range(0, T, r), plus 1, and takes more steps than S then. They agree where S divides T.
    """
    if steps < 1:
        raise InputError(f"num_inference_steps must be at least 1; got {steps}")
    known = isinstance(scheduler, DDIMScheduler | DDPMScheduler)
    if not known or scheduler.config.timestep_spacing != "leading":
        return
    trained, offset = scheduler.config.num_train_timesteps, scheduler.config.steps_offset
    if steps > trained:
        return  # diffusers refuses it by itself
    first = (steps - 1) * (trained // steps) + offset
    if first >= trained:
        raise InputError(
            f"{steps} steps would begin at timestep {first}, beyond {trained - 1}, the last; take "
            f"{_agreeing(trained)[-1]} or fewer"
        )
    if offset == 1 and trained % steps and isinstance(scheduler, DDIMScheduler):
        _warn_of_late_start(steps, trained, first)


@functools.cache
def _warn_of_late_start(steps: int, trained: int, first: int) -> None:
    """Once a process."""
    theirs = range(1, trained + 1, trained // steps)
    original = f"takes {len(theirs)} steps from {theirs[-1]}" if theirs[-1] < trained else "fails at that number"
    near = [s for s in _agreeing(trained) if s < steps][-1:] + [s for s in _agreeing(trained) if s > steps][:1]
    logger.warning(
        "%d steps do not divide %d: sampling begins at timestep %d, where CompVis' DDIM %s; both are alike at %s steps",
        steps,
        trained,
        first,
        original,
        " or ".join(map(str, near)),
    )


def _agreeing(trained: int) -> list[int]:
    """Numbers of steps at which the grid of diffusers is CompVis'."""
    return [s for s in range(1, trained) if trained % s == 0]


def decoded(pipe: Any, latents: torch.Tensor, output_type: str) -> Any:
    """Images of latents (N, C, H, W), by the pipeline's first stage; the latents themselves for ``"latent"``."""
    if output_type == "latent":
        return latents
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(images, output_type=output_type)


class LatentPipeline(DiffusionPipeline):
    """Samples images from an unconditional latent diffusion model."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(self, vae: AutoencoderKL | VQModel, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: N, how many.
            num_inference_steps: denoising steps.
            eta: noise of DDIM's step, where the scheduler takes it (arXiv 2010.02502).
            generator: one for the batch, or one for each sample.
            latents: (N, C, H, W) start noise instead of drawn one.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: a tuple when False.

        Returns:
            The images, N of them.

        Raises:
            InputError: start noise of another shape, or a number of steps that the scheduler cannot take.
        """
        scale = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.unet(scale(x, t), t).sample
            return output

        x = denoised(self, batch_size, predict, num_inference_steps, eta, generator, latents)
        images = decoded(self, x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
