"""Frechet distances between two sets of features (FID, sFID), plain and extrapolated to infinitely many samples."""

from collections.abc import Iterator

import torch

from ptqd.errors import InputError
from ptqd.metrics.bootstrap import Statistic
from ptqd.metrics.moments import ROWS, Moments

_SINGULAR = 1e-10  # an eigenvalue this far below the largest is 0


def frechet_distance(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982).

    The square root is taken of a symmetric matrix, by its eigenvalues: exact where a covariance is singular.

    Args:
        mean_a: (D,), float64.
        cov_a: (D, D), float64, positive semidefinite up to rounding.
        mean_b: like ``mean_a``.
        cov_b: like ``cov_a``.
    """
    root = square_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = mean_a - mean_b
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def square_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_statistic(features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> Statistic:
    """Frechet distance of features (N, D) to a reference's mean (D,) and covariance (D, D).

    A sample's influence is ``2 (m - m_r).(x - m) + (x - m)^T G (x - m) - tr(G C)`` with
    ``G = 1 - C_r^1/2 (C_r^1/2 C C_r^1/2)^-1/2 C_r^1/2``, the derivative by the covariance C.

    Raises:
        InputError: fewer than four samples, or features that are not finite.
    """
    own = _moments(features)
    return _frechet(own, mean.double(), covariance.double(), features)


def paired_frechet_statistic(features: torch.Tensor, reference: torch.Tensor) -> Statistic:
    """Frechet distance of features (N, D) to those of other images of the same seeds (N, D), drawn together."""
    a, b = _moments(features), _moments(reference)
    mine = _frechet(a, b.mean, b.covariance, features)
    theirs = _frechet(b, a.mean, a.covariance, reference)
    return Statistic(mine.value, mine.influence + theirs.influence)


def extrapolated_frechet(
    found: Statistic, features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
) -> Statistic:
    """A Frechet distance without its bias of order 1/N (Chong and Forsyth, arXiv 1911.07023).

    The line through the distances of all N samples and of either half, at infinitely many. Halves are first and last
    samples, so that classes that take turns are in both. To first order samples do to it what they do to the distance.

    Args:
        found: by :func:`frechet_statistic` from the other arguments.
        features: (N, D).
        mean: the reference's (D,).
        covariance: the reference's (D, D).
    """
    middle = len(features) // 2
    parts = [Moments.of(part) for part in (features[:middle], features[middle:])]
    halves = [frechet_distance(mean.double(), covariance.double(), own.mean, own.covariance) for own in parts]
    return Statistic(2 * found.value - sum(halves) / 2, found.influence)


def _moments(features: torch.Tensor) -> Moments:
    if len(features) < 4:
        raise InputError(f"a distance between sets needs at least four samples; got {len(features)}")
    result = Moments.of(features)
    if not bool(torch.isfinite(result.total).all()):
        broken = sum(int((~torch.isfinite(part).all(1)).sum()) for part in features.split(ROWS))
        raise InputError(f"the features of {broken} of {len(features)} images are not finite; look at these images")
    return result


def _frechet(own: Moments, mean: torch.Tensor, covariance: torch.Tensor, features: torch.Tensor) -> Statistic:
    root, mine = square_root(covariance), own.covariance
    values, vectors = torch.linalg.eigh(root @ mine @ root)
    values = values.clamp(min=0)
    shift = own.mean - mean
    value = float(shift @ shift + mine.trace() + covariance.trace() - 2 * values.sqrt().sum())
    remaining = values > _SINGULAR * values.max()
    across = root @ vectors[:, remaining]  # D,K
    inverse = values[remaining].rsqrt()

    def parts() -> Iterator[torch.Tensor]:
        for part in features.split(ROWS):
            x = part.double() - own.mean
            yield 2 * (x @ shift) + x.square().sum(1) - (x @ across).square() @ inverse

    influence = torch.cat(list(parts()))
    return Statistic(value, influence - influence.mean())
