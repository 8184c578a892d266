"""Our correction: estimate eps from everything the step knows, ``eps_q`` and ``x_t``, across channels.

Noise that is uncorrelated with ``eps`` can still be correlated with ``x_t``; then it is no fresh variance, and the
sampler adds it up coherently. What an estimate withholds adds up likewise. :func:`ptqd.joint.estimate_output` weighs
both; CNC, BC and the observable regression of D2-DPM (arXiv 2501.08180) are special cases of its form. At run time it
is a 1 x 1 convolution from 2 C to C channels; beyond 16 channels, two numbers a channel.

Where a step draws noise, it draws as much less (or more) as the estimate's variance exceeds (or lacks) that of eps, on
average over the channels: the next sample then has the variance that it has in full precision, as far as the step's
noise goes.

Every step is gated: it takes the largest of the weights L at which the estimate still lowers the error of samples it
was not fitted on, beyond the 95 % interval, and none where none does.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple

import torch

from ptqd.correction.correction import Correction, rows
from ptqd.errors import InputError
from ptqd.joint import OutputEstimate, estimate_output, held_out_gain
from ptqd.noise import NoiseStats
from ptqd.response import noise_scales

logger = logging.getLogger(__name__)

COHERENCES = (1.0, 2.0, 4.0, 8.0)
MIN_SAMPLES = 4


def fit_joint(stats: NoiseStats, coherences: Sequence[float] = COHERENCES) -> Correction:
    """The estimate from ``stats``.

    Args:
        stats: measured on the pipeline to correct.
        coherences: the weights L to choose from, at least 1: over how many times as many steps withheld signal adds up
            as residual noise does.

    Raises:
        InputError: fewer than four samples.
    """
    if stats.samples < MIN_SAMPLES:
        raise InputError(f"{stats.samples} samples cannot be fitted and judged apart; measure at least {MIN_SAMPLES}")
    table = stats.joint.sum(0) / stats.samples  # T,G,K,K
    parts = [torch.zeros_like(part) for part in astuple(estimate_output(table, 1.0))]
    for coherence in sorted(coherences):
        gain, half_width = held_out_gain(stats.joint, stats.fold_samples, coherence)
        for part, better in zip(parts, astuple(estimate_output(table, coherence)), strict=True):
            part[gain > half_width] = better[gain > half_width]
    estimate = OutputEstimate(*parts)
    if estimate.bias.shape[1] == 1:  # one group of C channels
        output, sample, bias = estimate.output[:, 0], estimate.sample[:, 0], estimate.bias[:, 0]
    else:  # C groups of one
        output, sample, bias = estimate.output[..., 0, 0], estimate.sample[..., 0, 0], estimate.bias[..., 0]
    if not stats.response.exact:
        logger.warning("the drawn noise stays as it is: how %s draws it is not known", stats.source.get("scheduler"))
    return Correction(
        methods=("joint",),
        timesteps=tuple(stats.timesteps.tolist()),
        output=rows(output),
        sample=rows(sample),
        bias=rows(bias),
        noise=tuple(noise_scales(stats.response, estimate.excess.mean(1))) if stats.response.draws else (),
        eta=float(stats.source.get("eta", 0.0)),
        source=dict(stats.source),
    )
