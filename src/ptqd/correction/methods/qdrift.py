"""Q-Drift (arXiv 2603.18095): scale the deterministic increment by ``1 + c`` once the conditional mean is removed.

    c = V |d_sigma| / (2 sigma)

in the coordinates in which the sampler is Euler's: ``x / alpha`` and ``sigma / alpha`` for diffusion, flow matching's
own for flow; ``V`` is the residual's variance in the derivative. To first order it is what DNS's overshoot does, but
for flow: there the increment is the velocity's, the signal goes further with the noise, and nothing scales it back.
"""

import torch

from ptqd.correction.registry import variance_method
from ptqd.correction.variance import ResidualNoise, StepRescaling, from_coefficients


@variance_method("qdrift")
def qdrift(residuals: ResidualNoise) -> StepRescaling:
    """The longer increments, as outputs for the scheduler's own step.

    Raises:
        InputError: the run draws noise, keeps history, or its schedule is not known.
    """
    levels = residuals.deterministic("qdrift")
    flow = levels.family == "flow"
    placed = (levels.alpha > 0) | flow  # pure noise has no place in the coordinates: a step from there stays as it is
    scale = torch.ones_like(levels.alpha) if flow else 1 / torch.where(placed, levels.alpha, 1.0)
    sigma = levels.sigma * scale
    width = sigma[:-1] - sigma[1:]
    c = torch.zeros_like(sigma)
    c[:-1] = residuals.added[:-1] * scale[1:] ** 2 / (2 * sigma[:-1] * width)  # V d_sigma^2 = what it adds
    state, own = residuals.response.own_state, residuals.response.outputs.diagonal()
    here = torch.cat([scale[:-1] / scale[1:], state[-1:]])
    sample, output = here + (1 + c) * (state - here), (1 + c) * own
    return from_coefficients(residuals, torch.where(placed, sample, state), torch.where(placed, output, own))
