"""Image against image of the same seed: PSNR and SSIM; and statistics that are means over samples."""

import math

import torch
from scipy import stats as scipy_stats

from ptqd.errors import InputError
from ptqd.metrics.bootstrap import Metric, Statistic

WINDOW = 11  # of structural similarity
_DISTANCES = 4_000_000  # in memory at once


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB, capped at 100 for identical ones.

    Args:
        images: (N, ...) in [0, 1].
        reference: like ``images``.

    Returns:
        (N,), float64.
    """
    mse = (images.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al., IEEE TIP 13, 2004, eq. 13), with its Gaussian window.

    Args:
        images: (N, C, H, W) in [0, 1], at least 11 x 11.
        reference: like ``images``.

    Returns:
        (N,), float64: the mean over channels and the places where the window of 11 fits.
    """
    size, sigma, c1, c2 = WINDOW, 1.5, 0.01**2, 0.03**2
    if min(images.shape[-2:]) < size:
        raise InputError(f"structural similarity needs images of {size} x {size} or more; got {tuple(images.shape)}")
    window = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / sigma) ** 2)
    window = (window / window.sum()).to(images.device)

    def blurred(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)[:, None]  # N*C,1,H,W
        rows = torch.nn.functional.conv2d(rows, window.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, window.view(1, 1, 1, -1)).view(*x.shape[:2], -1)

    x, y = images.double(), reference.double()
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (light * structure).flatten(1).mean(1)


def mean_statistic(values: torch.Tensor) -> Statistic:
    """Mean of one value a sample (N,)."""
    values = values.double()
    return Statistic(values.mean().item(), values - values.mean())


def mean_metric(values: torch.Tensor) -> Metric:
    """Mean of one value a sample (N,), with Student's interval."""
    n = len(values)
    mean = values.double().mean().item()
    if n < 2:
        return Metric(mean, -math.inf, math.inf)
    half = float(scipy_stats.t.ppf(0.975, n - 1)) * values.double().std().item() / math.sqrt(n)
    return Metric(mean, mean - half, mean + half)


def share_metric(hits: int, count: int) -> Metric:
    """Share of hits, with Wilson's interval."""
    test = scipy_stats.binomtest(hits, count)
    interval = test.proportion_ci(method="wilson")
    return Metric(float(test.statistic), float(interval.low), float(interval.high))
