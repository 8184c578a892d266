"""Where on the noise schedule a run's samples stand: ``x_t = alpha x_0 + sigma eps``, for every scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import SchedulerMixin

from ptqd.errors import InputError

Family = Literal["vp", "ve", "flow"]


@dataclass(frozen=True)
class Levels:
    """Signal and noise before each step.

    Attributes:
        family: ``"vp"``: alpha^2 + sigma^2 = 1;  ``"ve"``: alpha = 1;  ``"flow"``: alpha + sigma = 1.
        alpha: (T,), float64.
        sigma: (T,), float64.
    """

    family: Family
    alpha: torch.Tensor
    sigma: torch.Tensor

    @property
    def log_snr(self) -> torch.Tensor:
        """``log(alpha^2 / sigma^2)`` (T,), within +-40."""
        return (2 * (self.alpha.log() - self.sigma.log())).clamp(-40, 40)

    @classmethod
    def at_ratio(cls, family: Family, ratio: torch.Tensor) -> "Levels":
        """The levels of a family at which sigma / alpha has these values (T,)."""
        if family == "ve":
            return cls(family, torch.ones_like(ratio), ratio)
        alpha = (1 + ratio**2).rsqrt() if family == "vp" else 1 / (1 + ratio)
        return cls(family, alpha, alpha * ratio)


def noise_levels(scheduler: SchedulerMixin, timesteps: Sequence[Any]) -> Levels | None:
    """The levels of a run over ``timesteps``, None where the scheduler's schedule is not known.

    Args:
        scheduler: as it was before the first step.
        timesteps: those it took.
    """
    known: Any = scheduler
    sigmas = getattr(known, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(timesteps):
        begin = min(getattr(known, "begin_index", None) or 0, len(sigmas) - len(timesteps))
        sigma = sigmas.detach().cpu().double()[begin : begin + len(timesteps)]
        if "FlowMatch" in type(known).__name__ or known.config.get("use_flow_sigmas"):
            return Levels("flow", 1 - sigma, sigma)
        if hasattr(known, "_sigma_to_alpha_sigma_t"):  # the DPM-Solver family, at the VP scale or with alpha 1
            alpha, sigma = (torch.as_tensor(value).double() for value in known._sigma_to_alpha_sigma_t(sigma))
            return Levels("ve" if bool((alpha == 1).all()) else "vp", alpha.expand_as(sigma), sigma)
        return Levels("ve", torch.ones_like(sigma), sigma)
    alphas, index = getattr(known, "alphas_cumprod", None), torch.tensor([int(t) for t in timesteps])
    if not isinstance(alphas, torch.Tensor) or int(index.min()) < 0 or int(index.max()) >= len(alphas):
        return None
    a = alphas.detach().cpu().double()[index]
    return Levels("vp", a.sqrt(), (1 - a).sqrt())


def timesteps_at(scheduler: SchedulerMixin, levels: Levels) -> torch.Tensor | None:
    """What the network has to be told at some levels (T,), between the trained timesteps too; None if not known."""
    known: Any = scheduler
    if levels.family == "flow":
        return levels.sigma * float(known.config.get("num_train_timesteps", 1000))
    alphas = getattr(known, "alphas_cumprod", None)
    if not isinstance(alphas, torch.Tensor):
        return None
    a = alphas.detach().cpu().double().clamp(1e-12, 1 - 1e-12)
    table = (0.5 * ((1 - a) / a).log()).numpy()  # rises with the timestep
    result = np.interp((levels.sigma / levels.alpha).log().numpy(), table, np.arange(len(table)))
    return torch.from_numpy(result)


def prediction_of(config: Mapping[str, Any], levels: Levels) -> str:
    """The prediction type of a scheduler's configuration."""
    return "flow_prediction" if levels.family == "flow" else str(config.get("prediction_type", "epsilon"))


def clean_sample(config: Mapping[str, Any], levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """``P`` and ``R`` of ``x_0 = P out + R x`` (T,), of a scheduler's configuration.

    EDM's networks are preconditioned (arXiv 2206.00364, table 1): ``c_out`` and ``c_skip`` of ``sigma_data``.

    Raises:
        InputError: an unknown prediction type.
    """
    prediction, data = prediction_of(config, levels), config.get("sigma_data")
    if data is None or levels.family != "ve":
        return x0_coefficients(levels, prediction)
    size = levels.sigma**2 + float(data) ** 2
    out = levels.sigma * float(data) * size.rsqrt()
    return -out if prediction == "v_prediction" else out, float(data) ** 2 / size


def x0_coefficients(levels: Levels, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``P`` and ``R`` of ``x_0 = P out + R x`` at some levels, both (T,).

    Of v_prediction they hold at every size of the sample, at pure noise (alpha = 0) too: with ``n^2 = alpha^2 +
    sigma^2``, ``P = -sigma / n`` and ``R = alpha / n^2``.

    Raises:
        InputError: an unknown prediction type.
    """
    alpha, sigma = levels.alpha, levels.sigma
    if prediction == "flow_prediction" or levels.family == "flow":
        return -sigma, torch.ones_like(sigma)
    if prediction == "epsilon":
        return -sigma / alpha, 1 / alpha
    if prediction == "v_prediction":
        size = alpha**2 + sigma**2
        return -sigma * size.rsqrt(), alpha / size
    if prediction == "sample":
        return torch.ones_like(sigma), torch.zeros_like(sigma)
    raise InputError(f"ptqd knows no prediction type {prediction!r}")
