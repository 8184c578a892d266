"""What methods that act on the residual's variance have in common: what they know, and what they ask for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ptqd.diffusion.noise_schedule import Levels
from ptqd.diffusion.scheduler_response import Response
from ptqd.errors import InputError


@dataclass(frozen=True)
class ResidualNoise:
    """What a run does with the noise that a mean correction leaves.

    Attributes:
        scheduler: its class's name.
        config: its configuration.
        timesteps: of the run (T,).
        levels: before each step; None where the schedule is not known.
        response: of the run.
        clips: whether some step lets less through than its linear response.
        added: variance that each step's residual adds to its next sample (T,); negative where signal is withheld.
    """

    scheduler: str
    config: Mapping[str, Any]
    timesteps: torch.Tensor
    levels: Levels | None
    response: Response
    clips: bool
    added: torch.Tensor

    def deterministic(self, method: str) -> Levels:
        """The levels of a run that draws nothing and keeps no history.

        Raises:
            InputError: the run is not of that kind; ``method`` is named.
        """
        name = self.scheduler
        if self.response.draws:
            raise InputError(f"{method} is for steps that draw no noise; {name} draws some: use vsc")
        if not self.response.exact or self.levels is None:
            raise InputError(f"{method} needs to know how {name} steps, which is not known")
        if self.clips:
            raise InputError(f"{method} would lengthen steps that {name} clips")
        if not self.response.one_step:
            raise InputError(f"{method} rewrites one step; {name} remembers others")
        return self.levels


@dataclass(frozen=True)
class StepRescaling:
    """What the scheduler is handed instead of ``eps_c``: ``gain eps_c + sample x_t``.

    Attributes:
        gain: (T,).
        sample: (T,).
        noise: share of the drawn noise's standard deviation that is left to draw (T,); empty for all of it.
        model_timesteps: timesteps that the denoiser gets (T,); empty for its own.
    """

    gain: torch.Tensor
    sample: torch.Tensor
    noise: tuple[float, ...] = ()
    model_timesteps: tuple[float, ...] = ()


def from_coefficients(residuals: ResidualNoise, sample: torch.Tensor, output: torch.Tensor) -> StepRescaling:
    """The outputs that make a step ``sample_i x_t + output_i eps_c`` (T,) out of the scheduler's own.

    The scheduler's is ``A_i x_t + O_ii out``; a step that its outputs do not move stays as it is.
    """
    own = residuals.response.outputs.diagonal()
    moved = own.abs() > 1e-12
    safe = torch.where(moved, own, 1.0)
    gain = torch.where(moved, output / safe, 1.0)
    drift = torch.where(moved, (sample - residuals.response.own_state) / safe, 0.0)
    return StepRescaling(gain, drift)
