"""Our estimate: eps from everything the step knows, ``eps_q`` and ``x_t`` with their neighbourhoods, across channels.

Noise that is uncorrelated with ``eps`` can still be correlated with ``x_t``; then it is no fresh variance, and the
sampler adds it up coherently. What an estimate withholds adds up likewise; :func:`joint` weighs both. At run time it is
one small convolution from 2 C to C channels. CNC, BC, TAC's gain and the observable regression of D2-DPM are special
cases of its form.
"""

import torch

from ptqd.errors import InputError
from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate, covariance, inverse


def joint(coherence: float) -> Estimator:
    """The best linear estimate of eps for a whole run, not for one step of it.

    What x_t says of both outputs is known exactly; the rest of eps_q is signal and noise:

        eps = G x + e,    eps_q = G_q x + K e + r,    e and r uncorrelated with x, r with e;    means left out.

    An estimate ``G x + T (eps_q - G_q x)`` of eps is wrong by ``(1 - T K) e - T r``. Least squares weighs both alike,
    and shrinks. But over the steps of a run e hardly changes, so that what is withheld of it is withheld again and
    again and adds up, while r is drawn anew, at least in part. If the first adds up over L times as many steps as the
    second,

        T = Cov(e) K^T (K Cov(e) K^T + Cov(r) / L)^-1,

    least squares for L = 1, unbiased (``T K = 1``) for L without bound. ``x`` and ``eps_q`` stand for the pixel and,
    where the table has them, its four neighbours.

    Args:
        coherence: L, at least 1.

    Raises:
        InputError: L below 1.
    """
    if coherence < 1:
        raise InputError(f"the weight of withheld signal must be at least 1; got {coherence:g}")

    def estimate(table: torch.Tensor, layout: Layout) -> OutputEstimate:
        q, x, e = layout.blocks
        mean, cov = covariance(table)
        by_x = inverse(cov[..., x, x])
        g, g_q = cov[..., e, x] @ by_x, cov[..., q, x] @ by_x
        cov_e = cov[..., e, e] - g @ cov[..., x, e]
        cov_q = cov[..., q, q] - g_q @ cov[..., x, q]
        cross = cov[..., e, q] - g @ cov[..., x, q]  # Cov(e, K e + r) = Cov(e) K^T
        cov_r = cov_q - cross.transpose(-1, -2) @ inverse(cov_e) @ cross
        t = cross @ inverse(cov_q - (1 - 1 / coherence) * cov_r)
        output = -t
        output[..., range(layout.channels), range(layout.channels)] += 1
        sample = t @ g_q - g
        known = output @ mean[..., q, None] + sample @ mean[..., x, None]
        own = slice(q.start, q.start + layout.channels)
        return OutputEstimate(output, sample, mean[..., own] - mean[..., e] - known[..., 0])

    return estimate
