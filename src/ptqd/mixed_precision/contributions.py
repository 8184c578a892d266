"""What noise in each step's output does to the final sample; the derivation is in :mod:`ptqd.mixed_precision`."""

import logging

import torch

from ptqd.noise.stats import NoiseStats

logger = logging.getLogger(__name__)


def final_coefficients(stats: NoiseStats) -> torch.Tensor:
    """``c_j``: how noise in the output of step j moves the final sample, the network's answer included (B, T).

    By bands of directions, from those in which data varies most (:mod:`ptqd.noise.bands`). Of a scheduler whose
    response is not known, 1 at every step.
    """
    answers = stats.by_bands()[1]
    if not stats.response.exact:
        logger.warning("how %s steps is not known; every step counts alike", stats.measured_on.scheduler)
        return torch.ones_like(answers)
    outputs = stats.response.outputs * stats.attenuation()
    steps = len(outputs)
    rows = []
    for answer in answers:
        fed_back = torch.zeros_like(outputs)
        fed_back[:, 1:] = outputs[:, 1:] * answer[1:]  # by the sample that the step before made
        system = torch.eye(steps, dtype=torch.float64)
        system[:, :-1] -= fed_back[:, 1:]
        rows.append(torch.linalg.solve(system, outputs)[-1])
    return torch.stack(rows)


def contributions(stats: NoiseStats) -> torch.Tensor:
    """``E_j``: each step's part of the final sample's expected squared error, what cnc and bc leave of it (T,)."""
    coefficients, covariance = final_coefficients(stats), stats.by_bands()[0]
    return (coefficients * (covariance @ coefficients[..., None])[..., 0]).sum(0).clamp(min=0)
