"""PTQD's three corrections (He et al., arXiv 2305.10657, section 4.2), from one regression per step.

    CNC   divide by 1 + k              the part of the noise that is correlated with the output
    BC    subtract b                   the bias, per channel
    VSC   draw less noise              the residual's variance takes the place of drawn variance

Together ``eps_c = (eps_q - b) / (1 + k) = eps + r / (1 + k)``. Without CNC the slope is not part of the fit: the bias
is then the noise's mean and the residual all the rest.
"""

import logging
from collections.abc import Sequence

from ptqd.correction.correction import Correction, rows
from ptqd.errors import InputError
from ptqd.noise import NoiseStats
from ptqd.response import noise_scales

logger = logging.getLogger(__name__)

METHODS = ("cnc", "bc", "vsc")


def fit_ptqd(stats: NoiseStats, methods: Sequence[str]) -> Correction:
    """Any of CNC, BC and VSC; none of them gives the empty correction.

    Raises:
        InputError: at some step ``1 + k`` is not positive (the output is anti-correlated with the full-precision one:
            more bits are needed, not a correction).
    """
    fit = stats.fit(slope="cnc" in methods)
    k = fit.k.value
    if bool((1 + k <= 0).any()):
        t = stats.timesteps[int((1 + k).argmin())].item()
        raise InputError(f"at timestep {t:g} the noise undoes the output (1 + k <= 0); quantize with more bits")
    noise: tuple[float, ...] = ()
    if "vsc" in methods:
        name = stats.source.get("scheduler", "the scheduler")
        if not stats.response.exact:
            logger.warning("vsc is left out: how %s draws its noise is not known; its mean is corrected", name)
        elif not stats.response.draws:
            logger.warning("vsc changes nothing here: %s draws no noise", name)
        else:
            noise = tuple(noise_scales(stats.response, fit.variance.value / (1 + k) ** 2))
    divided = (k / (1 + k))[:, None].expand_as(fit.bias.value)
    return Correction(
        methods=tuple(m for m in METHODS if m in methods and (m != "vsc" or noise)),
        timesteps=tuple(stats.timesteps.tolist()),
        output=rows(divided) if "cnc" in methods else (),
        sample=(),
        bias=rows(fit.bias.value / (1 + k)[:, None]) if "bc" in methods else (),
        noise=noise,
        eta=float(stats.source.get("eta", 0.0)),
        source=dict(stats.source),
    )
