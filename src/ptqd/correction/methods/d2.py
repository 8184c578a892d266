"""D2-DPM's regression on what is observable (arXiv 2501.08180), one number a channel and step.

    E[delta | eps_q] = mu + (C / S) (eps_q - E[eps_q]),    C = Cov(eps_q, delta),  S = Var(eps_q)

The best linear estimate of the noise from eps_q alone; it is taken away. The residual's variance is
``Var(delta) - C^2 / S``. The estimate shrinks: as least squares does, it withholds some of eps with the noise.
"""

import torch

from ptqd.correction.registry import mean_method
from ptqd.noise.second_moments import Layout, OutputEstimate, covariance


@mean_method("d2")
def d2(table: torch.Tensor, layout: Layout) -> OutputEstimate:
    """The regression from mean tables (..., G, K, K)."""
    own = torch.arange(layout.channels)
    q, e = layout.blocks[0].start + own, layout.blocks[2].start + own
    mean, cov = covariance(table)
    s = cov[..., q, q]
    c = s - cov[..., q, e]
    slope = torch.where(s > 0, c / torch.where(s > 0, s, 1.0), 0.0)
    estimate = OutputEstimate.nothing(table, layout)
    estimate.output[..., own, own] = slope
    bias = mean[..., q] - mean[..., e] - slope * mean[..., q]
    return OutputEstimate(estimate.output, estimate.sample, bias)
