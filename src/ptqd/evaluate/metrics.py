"""Distances between sets of images, from features; nothing here knows of quantization.

Frechet distance (Heusel et al., arXiv 1706.08500), of pooled features; the same of spatial features, as sFID is
constructed (Nash et al., arXiv 2103.03841); kernel distance (Binkowski et al., arXiv 1801.01401). In features other
than Inception's these are not FID, sFID or KID, and are never called so.

Intervals are the delete-a-block jackknife's over samples: 20 contiguous blocks, Student's t.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats as scipy_stats

from ptqd.errors import InputError
from ptqd.evaluate.moments import Moments

BLOCKS = 20


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def frechet_distance(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982).

    The square root is taken of a symmetric matrix, by its eigenvalues: exact where a covariance is singular.

    Args:
        mean_a: (D,), float64.
        cov_a: (D, D), float64, positive semidefinite up to rounding.
        mean_b: like ``mean_a``.
        cov_b: like ``cov_a``.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = mean_a - mean_b
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401, eq. 4).

    Args:
        features: (n, D), n at least 2.
        reference: (m, D), m at least 2.
    """
    a, b = _sums(features.double(), features.double()), _sums(reference.double(), reference.double())
    n, m = len(features), len(reference)
    cross = _kernel(features.double(), reference.double()).mean().item()
    return (a[0] - a[1]) / (n * (n - 1)) + (b[0] - b[1]) / (m * (m - 1)) - 2 * cross


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sums(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    gram = _kernel(x, y)
    return gram.sum().item(), gram.trace().item()


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


def mean_metric(values: torch.Tensor) -> Metric:
    """Mean of one value a sample (N,), with Student's interval."""
    n = len(values)
    mean = values.double().mean().item()
    if n < 2:
        return Metric(mean, -math.inf, math.inf)
    half = float(scipy_stats.t.ppf(0.975, n - 1)) * values.double().std().item() / math.sqrt(n)
    return Metric(mean, mean - half, mean + half)


def share_metric(hits: torch.Tensor) -> Metric:
    """Share of hits (N,), bool, with Wilson's interval."""
    test = scipy_stats.binomtest(int(hits.sum()), len(hits))
    interval = test.proportion_ci(method="wilson")
    return Metric(float(test.statistic), float(interval.low), float(interval.high))


def jackknife_metric(count: int, statistic: Callable[[torch.Tensor | None], float]) -> Metric:
    """A statistic of a set of samples, with the delete-a-block jackknife's interval.

    Args:
        count: how many samples.
        statistic: its value without the samples of an index tensor; without none, for None.

    Raises:
        InputError: fewer than three samples.
    """
    if count < 3:
        raise InputError(f"a distance between sets needs at least three samples; got {count}")
    value = statistic(None)
    blocks = min(BLOCKS, count)
    # neighbours stay together: samples whose classes take turns are then left out in equal shares
    left_out = [statistic(block) for block in torch.arange(count).tensor_split(blocks)]
    mean = sum(left_out) / blocks
    error = math.sqrt((blocks - 1) / blocks * sum((v - mean) ** 2 for v in left_out))
    half = float(scipy_stats.t.ppf(0.975, blocks - 1)) * error
    return Metric(value, value - half, value + half)


def frechet_metric(features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> Metric:
    """Frechet distance of features (N, D) to a reference's mean (D,) and covariance (D, D)."""
    whole = Moments.of(features)

    def statistic(left_out: torch.Tensor | None) -> float:
        kept = whole if left_out is None else whole - Moments.of(features[left_out])
        return frechet_distance(kept.mean, kept.covariance, mean.double(), covariance.double())

    return jackknife_metric(len(features), statistic)


def paired_frechet_metric(features: torch.Tensor, reference: torch.Tensor) -> Metric:
    """Frechet distance of features (N, D) to those of other images of the same seeds (N, D), left out together."""
    a, b = Moments.of(features), Moments.of(reference)

    def statistic(left_out: torch.Tensor | None) -> float:
        if left_out is None:
            return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        x, y = a - Moments.of(features[left_out]), b - Moments.of(reference[left_out])
        return frechet_distance(x.mean, x.covariance, y.mean, y.covariance)

    return jackknife_metric(len(features), statistic)


def kernel_metric(features: torch.Tensor, reference: torch.Tensor) -> Metric:
    """Kernel distance of features (N, D) to a reference set's (M, D)."""
    x, y = features.double(), reference.double()
    within, across = _kernel(x, x), _kernel(x, y)  # N,N and N,M
    b = _sums(y, y)
    of_reference = (b[0] - b[1]) / (len(y) * (len(y) - 1))
    rows, diagonal, across_rows = within.sum(1), within.diagonal(), across.sum(1)  # N

    def statistic(left_out: torch.Tensor | None) -> float:
        n, total, trace, cross = len(x), rows.sum(), diagonal.sum(), across_rows.sum()
        if left_out is not None:
            n -= len(left_out)
            total = total - 2 * rows[left_out].sum() + within[left_out][:, left_out].sum()
            trace, cross = trace - diagonal[left_out].sum(), cross - across_rows[left_out].sum()
        return ((total - trace) / (n * (n - 1)) + of_reference - 2 * cross / (n * len(y))).item()

    return jackknife_metric(len(x), statistic)
