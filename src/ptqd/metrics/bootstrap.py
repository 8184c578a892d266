"""Intervals for any statistic of a set of samples, from what each sample does to it.

To first order a statistic changes by the mean of its influence function over the samples that are drawn again (Hampel,
JASA 69, 1974; Efron, "The jackknife, the bootstrap and other resampling plans", 1982, chapter 6). So the bootstrap
draws counts of samples and averages influences: it never computes the statistic again, and two statistics of the same
seeds are drawn together, which is the paired bootstrap. First order leaves out the bias that drawing again adds to a
Frechet distance, which an ordinary bootstrap counts twice.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ptqd.errors import InputError

DRAWS = 1000
LEVEL = 0.95
COUNTS = 4_000_000  # in memory at once


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Statistic:
    """A statistic of N samples.

    Attributes:
        value: of all samples.
        influence: of each sample (N,), float64: N times what its being there once more changes, to first order.
    """

    value: float
    influence: torch.Tensor

    def minus(self, other: "Statistic") -> "Statistic":
        """The difference to a statistic of the same seeds."""
        self._check(other)
        return Statistic(self.value - other.value, self.influence - other.influence)

    def above(self, other: "Statistic") -> "Statistic":
        """How far it is above one of the same seeds, as a share of that."""
        self._check(other)
        ratio = self.value / other.value
        return Statistic(ratio - 1, (self.influence - ratio * other.influence) / other.value)

    def interval(self, strata: torch.Tensor | None = None, draws: int = DRAWS, seed: int = 0) -> Metric:
        """The bootstrap's percentile interval.

        Args:
            strata: a group for each sample (N,), such as its class, where every group's size was chosen beforehand:
                groups are then drawn from one by one.
            draws: how often samples are drawn again.
            seed: the same for statistics that are compared.
        """
        return intervals({"": self}, strata, draws, seed)[""]

    def _check(self, other: "Statistic") -> None:
        if len(self.influence) != len(other.influence):
            raise InputError(
                f"a paired difference needs the same seeds; one has {len(self.influence)} samples, the other "
                f"{len(other.influence)}"
            )


def intervals(
    found: Mapping[str, Statistic], strata: torch.Tensor | None = None, draws: int = DRAWS, seed: int = 0
) -> dict[str, Metric]:
    """:meth:`Statistic.interval` of several statistics, from the same draws."""
    if not found:
        return {}
    influences = torch.stack([statistic.influence.cpu() for statistic in found.values()], 1)  # N,K
    means = resampled(influences, strata, draws, seed)
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    if len(influences) < 2:
        ends[:] = [[-math.inf], [math.inf]]
    values = [statistic.value for statistic in found.values()]
    output = [Metric(v, v + float(low), v + float(high)) for v, low, high in zip(values, *ends, strict=True)]
    return dict(zip(found, output, strict=True))


def resampled(influences: torch.Tensor, strata: torch.Tensor | None, draws: int, seed: int) -> np.ndarray:
    """Means of centred influences (N, K) over samples drawn with replacement (draws, K).

    Groups of one sample tell no spread; they are drawn from as one group.
    """
    values = influences.double().cpu().numpy()
    groups = [np.arange(len(values))] if strata is None else _groups(strata.cpu().numpy())
    total = np.zeros((draws, values.shape[1]))
    random = np.random.default_rng(seed)
    for group in groups:
        centred = values[group] - values[group].mean(0)
        unbiased = math.sqrt(len(group) / max(len(group) - 1, 1))
        alike, at_once = np.full(len(group), 1 / len(group)), max(1, COUNTS // len(group))
        for start in range(0, draws, at_once):
            stop = min(start + at_once, draws)
            counts = random.multinomial(len(group), alike, size=stop - start)
            total[start:stop] += unbiased * (counts @ centred)
    return total / len(values)


def _groups(strata: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(strata, kind="stable")
    cuts = np.flatnonzero(np.diff(strata[order])) + 1
    groups = np.split(order, cuts)
    alone = [group for group in groups if len(group) == 1]
    return [group for group in groups if len(group) > 1] + ([np.concatenate(alone)] if alone else [])
