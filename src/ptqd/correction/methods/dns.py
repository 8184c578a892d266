"""DNS, the deformable noise scheduler (ICML 2026): overshoot the target, let the residual bring the sample back to it.

The network's time stays as it is. A deterministic step from level ``t`` to ``s``, in coordinates where signal and noise
add up to one (flow matching's own; ``sigma = sigma / (alpha + sigma)`` of any other schedule), is ``x + (sigma_s -
sigma_t) v``. It goes ``f`` times as far, to ``sigma' = sigma_t - f (sigma_t - sigma_s)``, so that with the residual's
variance, which grows by ``f^2``, the ratio of noise to signal is that of the schedule:

    (sigma'^2 + f^2 u) / (1 - sigma')^2 = sigma_s^2 / (1 - sigma_s)^2

and the sample is scaled by ``(1 - sigma_s) / (1 - sigma')``. ``u`` is the variance that the residual adds to the next
sample. The formula serves variance-preserving and -exploding schedules and flow alike; where the residual is more than
any overshoot can take up, it goes as far as lowers the ratio. The last step, onto clean data, stays as it is.
"""

import torch

from ptqd.correction.registry import variance_method
from ptqd.correction.variance import ResidualNoise, StepRescaling, from_coefficients


@variance_method("dns")
def dns(residuals: ResidualNoise) -> StepRescaling:
    """The overshoot, as outputs for the scheduler's own step.

    Raises:
        InputError: the run draws noise, keeps history, or its schedule is not known.
    """
    levels = residuals.deterministic("dns")
    kappa = 1 / (levels.alpha + levels.sigma)
    sigma = levels.sigma * kappa
    start, end, here, there = sigma[:-1], sigma[1:], kappa[:-1], kappa[1:]
    added = residuals.added[:-1] * there**2
    f = overshoot(start, end, added)
    scale = (1 - end) / (1 - (start - f * (start - end)))
    state, own = residuals.response.own_state, residuals.response.outputs.diagonal()
    sample, output = state.clone(), own.clone()
    sample[:-1] = scale * (here / there * (1 - f) + f * state[:-1])
    output[:-1] = scale * f * own[:-1]
    return from_coefficients(residuals, sample, output)


def overshoot(start: torch.Tensor, end: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """``f``, by how much further than from ``start`` to ``end`` a step has to go (flow levels, all (T,)).

    Args:
        start: noise level of the step.
        end: of its target, below ``start``.
        added: variance that the residual adds to the step as it is.
    """
    width = start - end
    ratio = (end / (1 - end)) ** 2
    a = (1 - ratio) * width**2 + added
    b = width * (start + ratio * (1 - start))
    c = start**2 - ratio * (1 - start) ** 2
    root = (b**2 - a * c).clamp(min=0).sqrt()
    f = c / (b + root)  # the smaller root, without cancellation; 1 where nothing is added
    return torch.where(width > 0, f, 1.0)
