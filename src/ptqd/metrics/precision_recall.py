"""Precision and recall, density and coverage, by nearest neighbours in feature space."""

from collections.abc import Iterator

import torch

from ptqd.errors import InputError
from ptqd.metrics.bootstrap import Statistic
from ptqd.metrics.image_quality import _DISTANCES, mean_statistic
from ptqd.metrics.moments import ROWS


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3
) -> tuple[Statistic, Statistic]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of generated samples within the ball around some reference sample that reaches its k-th
    neighbour; recall, the other way round. A generated sample's influence on recall is that of leaving it out: the
    reference samples that are within its ball alone (Efron and Stein, Ann. Statist. 9, 1981).

    Args:
        features: generated (N, D).
        reference: real (M, D).
        neighbours: k.
    """
    radii = _radii(reference, neighbours)
    precision = torch.cat([(distances <= radii).any(1) for _, distances in _distances(features, reference)])
    radii = _radii(features, neighbours)
    recall = _held((distances <= radii for _, distances in _distances(reference, features)), len(reference))
    return mean_statistic(precision), recall


def density_coverage(
    features: torch.Tensor, reference: torch.Tensor, neighbours: int = 5
) -> tuple[Statistic, Statistic]:
    """Density and coverage (Naeem et al., arXiv 2002.09797, eq. 3 and 4).

    Density: how many balls around reference samples hold a generated one, over k; coverage: the share of these balls
    that hold any. A generated sample's influence on coverage is that of leaving it out.

    Args:
        features: generated (N, D).
        reference: real (M, D).
        neighbours: k.
    """
    radii = _radii(reference, neighbours)
    counts = [(distances < radii).double().sum(1) for _, distances in _distances(features, reference)]
    inside = (distances < radii[rows, None] for rows, distances in _distances(reference, features))
    return mean_statistic(torch.cat(counts) / neighbours), _held(inside, len(reference))


def _held(parts: Iterator[torch.Tensor], count: int) -> Statistic:
    """Share of a reference's samples that generated ones hold, from whether each (m, N) does, part by part."""
    held, alone = 0, torch.zeros(0, dtype=torch.float64)
    for inside in parts:
        holders = inside.sum(1)
        held += int((holders > 0).sum())
        mine = inside[holders == 1].double().sum(0)
        alone = mine if not len(alone) else alone + mine
    influence = len(alone) * alone / count
    return Statistic(held / count, influence - influence.mean())


def _radii(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance of each of ``x`` to its k-th neighbour (N,)."""
    if len(x) <= neighbours:
        raise InputError(f"the {neighbours}-th neighbour needs more samples than {len(x)}")
    return torch.cat([distances.kthvalue(neighbours + 1, 1).values for _, distances in _distances(x, x)])


def _distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Distances (n, M) of parts of ``x`` to ``y``, with which rows they are."""
    at_once = max(1, _DISTANCES // len(y))
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        yield rows, torch.cat([torch.cdist(x[rows].double(), part.double()) for part in y.split(ROWS)], 1)
