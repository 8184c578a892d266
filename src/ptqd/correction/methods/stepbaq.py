"""StepbaQ (NeurIPS 2024): a residual in the sample is a step back; take the step from where the sample really is.

A sample at level (alpha, sigma) with a residual of variance u in it stands at the noise-to-signal ratio
``sqrt(sigma^2 + u) / alpha``; with alpha^2 + sigma^2 = 1 that is ``a_bar_tau = a_bar / (1 + u)``. So it is scaled to
the schedule's size there, the network is told tau, and the step to the next level is taken from tau:

    x_0 = P out + R x,    x_s = alpha_s x_0 + sigma_s (x - alpha_tau x_0) / sigma_tau

with ``P`` and ``R`` of the prediction type at tau. Works without drawn noise.
"""

import diffusers
import torch

from ptqd.correction.registry import variance_method
from ptqd.correction.variance import ResidualNoise, StepRescaling, from_coefficients
from ptqd.diffusion.noise_schedule import Levels, prediction_of, timesteps_at, x0_coefficients
from ptqd.errors import InputError


@variance_method("stepbaq")
def stepbaq(residuals: ResidualNoise) -> StepRescaling:
    """Scaled samples, the timesteps that the network is told, and the steps from there.

    Raises:
        InputError: the run draws noise, keeps history, or its schedule or prediction type is not known.
    """
    levels = residuals.deterministic("stepbaq")
    prediction = prediction_of(residuals.config, levels)
    state, by_output = residuals.response.own_state, residuals.response.outputs.diagonal()
    p, r = x0_coefficients(levels, prediction)
    # the target levels, from the step itself: state = alpha_s R + sigma_s (1 - alpha R) / sigma, and so on
    step = torch.stack([r, (1 - levels.alpha * r) / levels.sigma, p, -p * levels.alpha / levels.sigma], -1).view(
        -1, 2, 2
    )
    target: torch.Tensor = torch.linalg.solve(step, torch.stack([state, by_output], -1))
    reached = torch.stack([levels.alpha, levels.sigma], -1)[1:]
    if not torch.allclose(target[:-1], reached, rtol=1e-3, atol=1e-4):
        raise InputError(f"stepbaq needs to know how {residuals.scheduler} steps, which is not known")

    there = torch.cat([torch.zeros(1, dtype=torch.float64), residuals.added[:-1]])  # in the sample, before each step
    ratio = (levels.sigma**2 + there).clamp(min=0.25 * levels.sigma**2).sqrt() / levels.alpha
    shifted = Levels.at_ratio(levels.family, ratio)
    shifted.alpha[0], shifted.sigma[0] = levels.alpha[0], levels.sigma[0]  # pure noise has no ratio
    kind = getattr(diffusers, residuals.scheduler, None)
    scheduler = None if kind is None else kind.from_config(dict(residuals.config))
    own = None if scheduler is None else timesteps_at(scheduler, levels)
    timestep = None if scheduler is None else timesteps_at(scheduler, shifted)
    if own is None or timestep is None or not torch.allclose(own[1:], residuals.timesteps[1:], rtol=0, atol=2):
        raise InputError(f"stepbaq needs the timestep of any noise level, which is not known of {residuals.scheduler}")
    timestep[0] = residuals.timesteps[0]

    scale = shifted.alpha / levels.alpha  # to what the sample before each step is scaled
    scale[0] = 1
    after = torch.cat([scale[1:], torch.ones(1, dtype=torch.float64)])
    p, r = x0_coefficients(shifted, prediction)
    alpha_s, away = target[:, 0], target[:, 1] / shifted.sigma
    sample = after * (alpha_s * r + away * (1 - shifted.alpha * r))
    output = after * p * (alpha_s - away * shifted.alpha)
    steps = from_coefficients(residuals, sample, output)
    return StepRescaling(steps.gain, steps.sample, (), tuple(timestep.tolist()))
