"""TAC's gain (timestep-aware correction, arXiv 2407.03917): one number a channel and step.

    eps_c = K eps_q,    K minimises  E|K eps_q - eps|^2 + pull E|eps_q|^2 (K - 1)^2
                        K = (E[eps_q eps] + pull E[eps_q^2]) / ((1 + pull) E[eps_q^2])

The pull towards 1 keeps the gain of a step whose noise says little about the output from wandering.
"""

import torch

from ptqd.correction.registry import mean_method
from ptqd.errors import InputError
from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate

PULL = 0.1


def tac(pull: float = PULL) -> Estimator:
    """The gain.

    Args:
        pull: its weight, against 1 for the error.

    Raises:
        InputError: a negative pull.
    """
    if pull < 0:
        raise InputError(f"the pull towards 1 must be at least 0; got {pull:g}")

    def estimate(table: torch.Tensor, layout: Layout) -> OutputEstimate:
        own = torch.arange(layout.channels)
        q, e = layout.blocks[0].start + own, layout.blocks[2].start + own
        energy = table[..., q, q]
        total = (1 + pull) * energy
        gain = torch.where(total > 0, (table[..., q, e] + pull * energy) / torch.where(total > 0, total, 1.0), 1.0)
        result = OutputEstimate.nothing(table, layout)
        result.output[..., own, own] = 1 - gain
        return result

    return estimate


mean_method("tac")(tac())
