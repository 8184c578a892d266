"""VSC, variance schedule calibration (He et al., arXiv 2305.10657, section 4.2): draw less noise.

    sigma_c^2 = max(0, sigma^2 - B^2 V / (1 + k)^2)

The residual's variance takes the place of drawn variance. For any scheduler, multistep history included, the share to
draw is :func:`ptqd.diffusion.scheduler_response.noise_scales`. After an estimate that withholds signal the variance is
negative: then more is drawn.
"""

import torch

from ptqd.correction.registry import variance_method
from ptqd.correction.variance import ResidualNoise, StepRescaling
from ptqd.diffusion.scheduler_response import noise_scales
from ptqd.errors import InputError


@variance_method("vsc")
def vsc(residuals: ResidualNoise) -> StepRescaling:
    """The noise that is left to draw.

    Raises:
        InputError: the scheduler draws no noise, or it is not known how.
    """
    name = residuals.scheduler
    if not residuals.response.exact:
        raise InputError(f"vsc is left out: how {name} draws its noise is not known; its mean is corrected")
    if not residuals.response.draws:
        raise InputError(f"vsc changes nothing here: {name} draws no noise")
    ones = torch.ones_like(residuals.added)
    return StepRescaling(ones, 0 * ones, tuple(noise_scales(residuals.response, residuals.added)))
