"""Our correction: estimate eps from everything the step knows, ``eps_q`` and ``x_t``, across channels.

Noise that is uncorrelated with ``eps`` can still be correlated with ``x_t``; then it is no fresh variance, and the
sampler adds it up coherently. What an estimate withholds adds up likewise. :func:`ptqd.joint.estimate_output` weighs
both; CNC, BC and the observable regression of D2-DPM (arXiv 2501.08180) are special cases of its form. At run time it
is a 1 x 1 convolution from 2 C to C channels.

Where a step draws noise, it draws as much less (or more) as the estimate's variance exceeds (or lacks) that of eps: the
next sample then has the second moments that it has in full precision.
"""

from ptqd.correction.correction import Correction, rows
from ptqd.joint import estimate_output
from ptqd.noise import NoiseStats
from ptqd.response import noise_scales

COHERENCE = 8.0


def fit_joint(stats: NoiseStats, coherence: float = COHERENCE) -> Correction:
    """The estimate from ``stats``.

    Args:
        stats: measured on the pipeline to correct.
        coherence: over how many times as many steps withheld signal adds up as residual noise does; at least 1.
    """
    estimate = estimate_output(stats.joint.sum(0) / stats.samples, coherence)
    if estimate.bias.shape[1] == 1:  # one group of C channels
        output, sample, bias = estimate.output[:, 0], estimate.sample[:, 0], estimate.bias[:, 0]
    else:  # C groups of one
        output, sample, bias = estimate.output[..., 0, 0], estimate.sample[..., 0, 0], estimate.bias[..., 0]
    known = stats.response.exact and stats.response.draws
    return Correction(
        methods=("joint",),
        timesteps=tuple(stats.timesteps.tolist()),
        output=rows(output),
        sample=rows(sample),
        bias=rows(bias),
        noise=tuple(noise_scales(stats.response, estimate.excess.mean(1))) if known else (),
        eta=float(stats.source.get("eta", 0.0)),
        source=dict(stats.source),
    )
