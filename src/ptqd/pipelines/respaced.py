"""The samplers of guided-diffusion where diffusers' differ from them; a saved pipeline names this module.

``SpacedDiffusion`` of ``guided_diffusion/respace.py`` makes a process of its own of any grid of timesteps, in double
precision; ``p_sample`` and ``ddim_sample`` of ``guided_diffusion/gaussian_diffusion.py`` step through it.
"""

import functools
import itertools
import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,  # noqa: F401  looked for here when a folder with one of these schedulers is loaded
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


def exact_alphas(scheduler: Any) -> torch.Tensor:
    """A scheduler's cumulative alphas (T,) in double precision.

    Single precision has 1 - alpha of the first timesteps to three digits alone, which the learned variance of the last
    step but one shows in the fourth digit of an image.
    """
    config, steps = scheduler.config, scheduler.config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    elif config.beta_schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17
        levels = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        ratios = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(levels)]
        betas = torch.tensor(ratios, dtype=torch.float64)
    else:
        betas = scheduler.betas.double()
    return (1 - betas).cumprod(0)


class RespacedDDPMScheduler(DDPMScheduler):
    """DDPM (Ho et al., arXiv 2006.11239) whose noise levels are of double precision, as the original's."""

    @functools.wraps(DDPMScheduler.__init__)  # type: ignore[misc]  # diffusers reads its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alphas_cumprod = exact_alphas(self)


class RespacedDDIMScheduler(DDIMScheduler):
    """DDIM (Song et al., arXiv 2010.02502) that goes from each timestep of its grid to the next one.

    ``DDIMScheduler`` goes back by the same stride from everywhere, so that on a grid from the first to the last trained
    timestep (``timestep_spacing="linspace"``) it denoises to other noise levels than it is told next. The original
    goes from each timestep to the next one. Its noise levels are of double precision.
    """

    @functools.wraps(DDIMScheduler.__init__)  # type: ignore[misc]  # diffusers reads its signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alphas_cumprod = exact_alphas(self)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def previous(self, timestep: int) -> int:
        """The timestep that follows, -1 after the last."""
        after = self.timesteps[self.timesteps < timestep]
        return int(after.max()) if len(after) else -1

    def direction(self, level: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """How much of the noise that is in a sample stays there, at the next cumulative alpha."""
        return (1 - level - deviation**2).clamp(min=0).sqrt()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step (arXiv 2010.02502, eq. 12).

        Args:
            model_output: (N, C, H, W).
            timestep: of the grid.
            sample: (N, C, H, W).
            eta: share of the noise of DDPM.
            use_clipped_model_output: derive the noise anew from the clean image after it was clipped.
            generator: of the noise.
            variance_noise: the noise (N, C, H, W), instead of drawn one.
            return_dict: a tuple when False.

        Raises:
            ValueError: no timesteps are set.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before the first step")
        t = int(timestep)
        after = self.previous(t)
        level = self.alphas_cumprod[t]
        root, other = (1 / level).sqrt(), (1 / level - 1).sqrt()  # x_0 = root x_t - other eps, rounded as there
        if self.config.prediction_type == "sample":
            clean, noise = model_output, (root * sample - model_output) / other
        elif self.config.prediction_type == "v_prediction":
            clean, noise = (sample - other * model_output) / root, (model_output + other * sample) / root
        else:
            clean, noise = root * sample - other * model_output, model_output
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            noise = (root * sample - clean) / other
        deviation = eta * self._get_variance(t, after).sqrt()
        following = (self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod).double()
        stepped = following.sqrt() * clean + self.direction(following, deviation) * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            stepped = stepped + deviation * variance_noise
        return DDIMSchedulerOutput(prev_sample=stepped, pred_original_sample=clean) if return_dict else (stepped, clean)
