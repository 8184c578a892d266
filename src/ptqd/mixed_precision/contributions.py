"""What noise in each step's output does to the final sample; the derivation is in :mod:`ptqd.mixed_precision`."""

import logging

import torch

from ptqd.noise.regression import regression
from ptqd.noise.second_moments import covariance, mean_table
from ptqd.noise.stats import NoiseStats

logger = logging.getLogger(__name__)


def final_coefficients(stats: NoiseStats) -> torch.Tensor:
    """``c_j``: how noise in the output of step j moves the final sample, the network's answer included (T,).

    Of a scheduler whose response is not known, 1 at every step.
    """
    steps = len(stats.timesteps)
    if not stats.response.exact:
        logger.warning("how %s steps is not known; every step counts alike", stats.measured_on.scheduler)
        return torch.ones(steps, dtype=torch.float64)
    outputs = stats.response.outputs * stats.attenuation()
    layout = stats.layout
    _, cov = covariance(mean_table(stats.joint, stats.fold_samples))  # T,G,K,K
    own = torch.arange(layout.channels)
    x, e = layout.blocks[1].start + own, layout.blocks[2].start + own
    variance = cov[..., x, x].sum((1, 2))
    answer = torch.where(variance > 0, cov[..., x, e].sum((1, 2)) / variance.clamp(min=1e-300), 0.0)
    fed_back = torch.zeros_like(outputs)
    fed_back[:, 1:] = outputs[:, 1:] * answer[1:]  # by the sample that the step before made
    system = torch.eye(steps, dtype=torch.float64)
    system[:, :-1] -= fed_back[:, 1:]
    response: torch.Tensor = torch.linalg.solve(system, outputs)
    return response[-1]


def contributions(stats: NoiseStats) -> torch.Tensor:
    """``E_j``: each step's part of the final sample's expected squared error, what cnc and bc leave of it (T,)."""
    size = final_coefficients(stats) * regression(stats.moments.mean(0), slope=True)["variance"].sqrt()
    return (size * (stats.residual_correlation() @ size)).clamp(min=0)
