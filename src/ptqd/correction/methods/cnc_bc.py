"""PTQD's corrections of the mean (He et al., arXiv 2305.10657, section 4.2), from one regression per step.

    delta = k eps + b + r        k shared by the channels, b one a channel

    CNC   divide by 1 + k        the part of the noise that is correlated with the output
    BC    subtract b             the bias

Together ``eps_c = (eps_q - b) / (1 + k) = eps + r / (1 + k)``. Without CNC the slope is not part of the fit: the bias
is then the noise's mean and the residual all the rest. What VSC does with the residual is in
:mod:`ptqd.correction.methods.vsc`.
"""

import torch

from ptqd.errors import InputError
from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate, covariance


def cnc_bc(cnc: bool, bc: bool) -> Estimator:
    """CNC, BC or both.

    Raises:
        InputError: from the estimator, where at some step ``1 + k`` is not positive (the output is anti-correlated with
            the full-precision one: more bits are needed, not a correction).
    """

    def estimate(table: torch.Tensor, layout: Layout) -> OutputEstimate:
        own = torch.arange(layout.channels)
        q, e = layout.blocks[0].start + own, layout.blocks[2].start + own
        mean, cov = covariance(table)
        var = cov[..., e, e].sum((-1, -2))
        k = torch.zeros_like(var)
        if cnc:
            k = torch.where(var > 0, cov[..., q, e].sum((-1, -2)) / torch.where(var > 0, var, 1.0) - 1, 0.0)
        if bool((k <= -1).any()):
            raise InputError(
                f"at step {int((k <= -1).nonzero()[0])} the noise undoes the output (1 + k <= 0); "
                "quantize with more bits"
            )
        k = k[..., None, None]
        nothing = OutputEstimate.nothing(table, layout)
        nothing.output[..., own, own] = k / (1 + k)
        bias = (mean[..., q] - (1 + k) * mean[..., e]) / (1 + k)
        return OutputEstimate(nothing.output, nothing.sample, bias if bc else nothing.bias)

    return estimate
