"""Diffusion of pixels with class labels, or from a smaller image: guided-diffusion, the networks of EDM.

Dhariwal and Nichol, arXiv 2105.05233; Karras et al., arXiv 2206.00364. Diffusers' ``DDPMPipeline`` and
``DDIMPipeline`` know neither labels nor a learned variance.
"""

import functools
import inspect
import logging
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ptqd.errors import InputError
from ptqd.pipelines.respaced import RespacedDDIMScheduler

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None


class PixelPipeline(DiffusionPipeline):
    """Samples images from a diffusion model of pixels.

    A network with twice as many output channels as an image has tells its variance in the second half, which a DDPM
    scheduler uses and others are not given. One with more input channels enlarges an image, which follows the sample.

    Args:
        unet: takes a sample, a timestep and ``class_labels``.
        scheduler: any of diffusers.
        image_channels: of the images that it makes.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, image_channels: int = 3) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(image_channels=image_channels)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor | int | None = None,
        image: Any = None,
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
            class_labels: (N,) class numbers, of a model that has classes; those of EDM sample without, too.
            image: N smaller images for a model that enlarges them: pictures, or a tensor (N, C, h, w) in [-1, 1].
            batch_size: N, where neither labels nor images say it.
            num_inference_steps: denoising steps.
            eta: noise of DDIM's step, where the scheduler takes it (arXiv 2010.02502).
            generator: one for the batch, or one for each sample.
            latents: (N, C, H, W) start noise of unit variance instead of drawn one.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``, which is the sample itself, in [-1, 1].
            return_dict: a tuple when False.

        Returns:
            The images, N of them.

        Raises:
            InputError: labels or an image that the model does not take, or lacks; start noise of another shape; or a
                number of steps that the scheduler cannot take.
        """
        labels = self._labels(class_labels)
        small = self._small_images(image)
        count = len(labels) if labels is not None else batch_size if small is None else len(small)
        if small is not None and len(small) != count:
            raise InputError(f"there are {count} class_labels and {len(small)} images; give as many of both")
        self._check_grid(num_inference_steps)
        device, dtype, size = self._execution_device, self.unet.dtype, self.unet.config.sample_size
        channels = self.config.image_channels
        shape = (count, channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise InputError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
        condition = []
        if small is not None:
            enlarged = torch.nn.functional.interpolate(small.to(device, dtype), (size, size), mode="bilinear")
            condition.append(enlarged)

        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=device)
        scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        accepted = inspect.signature(scheduler.step).parameters
        given = {"eta": eta, "generator": generator, "use_clipped_model_output": True}
        extra = {name: value for name, value in given.items() if name in accepted}
        learned = isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in ("learned", "learned_range")
        x: torch.Tensor = latents.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in self.progress_bar(scheduler.timesteps):
            inputs = torch.cat([scale(x, t), *condition], dim=1)
            output = self.unet(inputs, t, class_labels=labels).sample
            x = scheduler.step(output if learned else output[:, :channels], t, x, **extra).prev_sample
        images: Any = x
        if output_type != "latent":
            images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: list[int] | torch.Tensor | int | None) -> torch.Tensor | None:
        """Class numbers (N,)."""
        classes = self.unet.config.get("num_class_embeds")
        if given is None:
            if classes is not None and not getattr(self.unet, "takes_no_labels", False):
                raise InputError(f"the model has {classes} classes; give class_labels, numbers in 0..{classes - 1}")
            return None
        if classes is None:
            raise InputError("the model has no classes; leave class_labels out")
        labels = torch.as_tensor(given, device=self._execution_device, dtype=torch.long).reshape(-1)
        if labels.numel() == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(f"class_labels must be at least one number in 0..{classes - 1}; got {labels.tolist()}")
        return labels

    def _small_images(self, given: Any) -> torch.Tensor | None:
        """Images to enlarge (N, C, h, w)."""
        channels = self.config.image_channels
        enlarges = self.unet.config.in_channels > channels
        if given is None:
            if enlarges:
                raise InputError("the model enlarges images; give image, one for each sample")
            return None
        if not enlarges:
            raise InputError("the model enlarges no images; leave image out")
        small = given if isinstance(given, torch.Tensor) else self.image_processor.preprocess(given)
        if small.ndim != 4 or small.shape[1] != channels or 0 in small.shape:
            raise InputError(f"image must be (N, {channels}, height, width) or pictures; got {tuple(small.shape)}")
        return small

    def _check_grid(self, steps: int) -> None:
        """Refuse a grid that the scheduler would leave without a word, and say where the original has another."""
        if steps < 1:
            raise InputError(f"num_inference_steps must be at least 1; got {steps}")
        scheduler = self.scheduler
        if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
            return
        trained, spacing = scheduler.config.num_train_timesteps, scheduler.config.timestep_spacing
        respaced = isinstance(scheduler, RespacedDDIMScheduler | DDPMScheduler)
        if spacing == "linspace" and steps != trained and not respaced:
            raise InputError(
                f"{type(scheduler).__name__} leaves its own grid, timestep_spacing 'linspace', at {steps} steps; take "
                "RespacedDDIMScheduler, which follows it"
            )
        if spacing == "leading" and trained % steps and steps <= trained:
            _warn_of_another_stride(steps, trained)


@functools.cache
def _warn_of_another_stride(steps: int, trained: int) -> None:
    """Once a process; ``space_timesteps`` of ``guided_diffusion/respace.py`` takes the first stride that fits."""
    stride = next((i for i in range(1, trained) if len(range(0, trained, i)) == steps), None)
    original = "has no such grid" if stride is None else f"has them {stride} apart, from {(steps - 1) * stride} on"
    logger.warning(
        "%d steps do not divide %d: timesteps are %d apart, from %d on, where guided-diffusion's ddim%d %s",
        steps,
        trained,
        trained // steps,
        (steps - 1) * (trained // steps),
        steps,
        original,
    )
