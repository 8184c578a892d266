"""PTQD's corrections of the mean (He et al., arXiv 2305.10657, section 4.2), from one regression per step.

    delta = k eps + b + r        k shared by the channels, b one a channel

    CNC   divide by 1 + k        the part of the noise that is correlated with the output
    BC    subtract b             the bias

Together ``eps_c = (eps_q - b) / (1 + k) = eps + r / (1 + k)``. Without CNC the slope is not part of the fit: the bias
is then the noise's mean and the residual all the rest. What VSC does with the residual is in
:mod:`ptqd.correction.methods.vsc`. ``cnc-channel`` is CNC with a slope for each channel, which the paper has not:
slopes that differ by channel leave nothing to a shared one.

A step where chance has ``1 + k <= 0`` keeps its output.
"""

import torch

from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate, covariance, left_out_tables
from ptqd.noise.stats import NoiseStats

CHANNEL = "cnc-channel"
DIFFERING = 0.15  # of all slopes beyond two standard errors; chance has a third of that


def cnc_bc(cnc: bool, bc: bool, *, by_channel: bool = False) -> Estimator:
    """CNC, BC or both; ``by_channel`` with a slope for each channel."""

    def estimate(table: torch.Tensor, layout: Layout) -> OutputEstimate:
        k = slope(table, layout, by_channel=by_channel)
        return from_slope(table, layout, k if cnc else torch.zeros_like(k), bc)

    return estimate


def slope(table: torch.Tensor, layout: Layout, *, by_channel: bool = False) -> torch.Tensor:
    """``k`` of mean tables (..., G, K, K), for every channel (..., G, C); 0 where ``1 + k`` is not positive."""
    q, e = _own(layout)
    _, cov = covariance(table)
    var, both = cov[..., e, e], cov[..., q, e]
    if not by_channel:
        var, both = (value.sum((-1, -2), keepdim=True).expand_as(value) for value in (var, both))
    k = torch.where(var > 0, both / torch.where(var > 0, var, 1.0) - 1, 0.0)
    return torch.where(k > -1, k, 0.0)


def from_slope(table: torch.Tensor, layout: Layout, k: torch.Tensor, bc: bool | torch.Tensor) -> OutputEstimate:
    """The estimate from slopes (..., G, C), with the bias that they leave where ``bc`` (..., 1, 1) says so."""
    q, e = _own(layout)
    mean, _ = covariance(table)
    estimate = OutputEstimate.nothing(table, layout)
    own = torch.arange(layout.channels)
    estimate.output[..., own, own] = k / (1 + k)
    bias = (mean[..., q] - (1 + k) * mean[..., e]) / (1 + k)
    return OutputEstimate(estimate.output, estimate.sample, bias * torch.as_tensor(bc))


def differs_by_channel(stats: NoiseStats) -> bool:
    """Whether more slopes differ from the shared one, beyond two standard errors, than chance explains."""
    layout = stats.layout
    if layout.groups * layout.channels == 1:
        return False
    tables = left_out_tables(stats.joint, stats.fold_samples)
    apart = slope(tables, layout, by_channel=True) - slope(tables, layout)
    error = ((len(apart) - 1) * apart.var(0, unbiased=False)).sqrt()
    return float((apart.mean(0).abs() > 2 * error).double().mean()) > DIFFERING


def _own(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where eps_q and eps of the pixel itself stand."""
    own = torch.arange(layout.channels)
    return layout.blocks[0].start + own, layout.blocks[2].start + own
