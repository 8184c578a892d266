"""Diffusion of Gaussian data, whose exact denoiser is known, with quantization noise of known k, bias and variance."""

import copy
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

SHAPE = (2, 4, 4)
MEAN = torch.tensor([1.0, -0.5])
SCHEDULE: dict[str, Any] = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, SchedulerMixin] = {
    "ddim": DDIMScheduler(**SCHEDULE, clip_sample=False),
    "ddpm": DDPMScheduler(**SCHEDULE, clip_sample=False),
    "euler ancestral": EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
    "sde-dpmsolver++ 1": DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="sde-dpmsolver++", solver_order=1),
    "sde-dpmsolver++ 2": DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="sde-dpmsolver++", solver_order=2),
}


class GaussianDenoiser(nn.Module):
    """``eps(x_t) = sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a)``, the exact one for data N(m, s^2), plus noise

    delta = k eps + b + sqrt(V) z + c x_t.
    """

    def __init__(self, std: tuple[float, float], k: float, bias: tuple[float, float], v: float, c: float) -> None:
        super().__init__()
        alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.register_buffer("a_bar", alphas)
        self.register_buffer("std", torch.tensor(std))
        self.register_buffer("noise", torch.tensor([k, *bias, v, c]))
        self.k, self.v, self.c = k, v, c
        self.bias = torch.tensor(bias)
        self.generator = torch.Generator().manual_seed(1234)

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        a = self.a_bar[int(t)]  # type: ignore[index]
        std: torch.Tensor = self.std  # type: ignore[assignment]
        mean, s = MEAN.view(-1, 1, 1), std.view(-1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * s**2 + 1 - a)
        z = torch.randn(x.shape, generator=self.generator)
        out: torch.Tensor = (1 + self.k) * eps + self.bias.view(-1, 1, 1) + self.v**0.5 * z + self.c * x
        return out


class GaussianPipeline(DiffusionPipeline):
    shape = SHAPE
    dtype_of_samples = torch.float32

    def __init__(self, unet: GaussianDenoiser, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        num_inference_steps: int,
        eta: float = 0.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> ImagePipelineOutput:
        self.scheduler.set_timesteps(num_inference_steps)
        x = randn_tensor((batch_size, *self.shape), generator=generator).to(self.dtype_of_samples)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        extra = {"eta": eta} if isinstance(self.scheduler, DDIMScheduler) else {}
        scale = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        for t in self.scheduler.timesteps:
            out = self.unet(scale(x, t), t).to(x.dtype)
            x = self.scheduler.step(out, t, x, generator=generator, **extra).prev_sample
        return ImagePipelineOutput(images=x)


def gaussian_pipeline(
    scheduler: str = "ddim",
    std: tuple[float, float] = (0.6, 0.6),
    k: float = 0.0,
    bias: tuple[float, float] = (0.0, 0.0),
    v: float = 0.0,
    c: float = 0.0,
) -> GaussianPipeline:
    return GaussianPipeline(GaussianDenoiser(std, k, bias, v, c), copy.deepcopy(SCHEDULERS[scheduler]))
