"""Class-conditional latent diffusion: a first stage, a cross-attention UNet, and a class embedding as its context.

The shape of LDM-4 on ImageNet (Rombach et al., arXiv 2112.10752): the class is one context token, a null class
learned by label dropout serves classifier-free guidance (Ho and Salimans, arXiv 2207.12598),

    eps = eps(x_t, null) + w (eps(x_t, class) - eps(x_t, null)).
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from ptqd.errors import InputError
from ptqd.pipelines.latent import decoded, denoised


class ClassEmbedder(ModelMixin, ConfigMixin):
    """An embedding of ``classes`` classes and, last, the null class; gives one context token a sample."""

    @register_to_config
    def __init__(self, classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, embed_dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Context (N, 1, embed_dim) of labels (N,)."""
        context: torch.Tensor = self.embedding(labels)[:, None]
        return context


class LatentClassPipeline(DiffusionPipeline):
    """Samples images of asked-for classes from a latent diffusion model."""

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | VQModel,
        unet: UNet2DConditionModel,
        class_embedder: ClassEmbedder,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        """Of the last call, as other diffusers pipelines show it."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each label.

        Args:
            class_labels: (N,) class numbers.
            guidance_scale: ``w`` above; at 1 the null class is not evaluated.
            num_inference_steps: denoising steps.
            eta: noise of DDIM's step, where the scheduler takes it (arXiv 2010.02502).
            generator: one for the batch, or one for each sample.
            latents: (N, C, H, W) start noise instead of drawn one.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: a tuple when False.

        Returns:
            The images, N of them.

        Raises:
            InputError: a label outside the classes the model knows, or a number of steps the scheduler cannot take.
        """
        device = self._execution_device
        null = self.class_embedder.config.classes
        try:
            labels = torch.as_tensor(class_labels, device=device, dtype=torch.long).reshape(-1)  # N
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            text = str(class_labels)[:100]
            raise InputError(f"class_labels must be at least one number in 0..{null - 1}; got {text}") from error
        if labels.numel() == 0 or int(labels.min()) < 0 or int(labels.max()) >= null:
            raise InputError(f"class_labels must be at least one number in 0..{null - 1}; got {labels.tolist()}")
        self._guidance_scale = guidance_scale
        guided = guidance_scale != 1.0
        context = self.class_embedder(labels)  # N,1,D
        if guided:
            context = torch.cat([self.class_embedder(torch.full_like(labels, null)), context])  # 2N,1,D

        scale = getattr(self.scheduler, "scale_model_input", lambda sample, t: sample)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            inputs = scale(torch.cat([x, x]) if guided else x, t)
            eps: torch.Tensor = self.unet(inputs, t, encoder_hidden_states=context).sample
            if not guided:
                return eps
            eps_null, eps_class = eps.chunk(2)
            return eps_null + guidance_scale * (eps_class - eps_null)

        x = denoised(self, labels.numel(), predict, num_inference_steps, eta, generator, latents)
        images = decoded(self, x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
