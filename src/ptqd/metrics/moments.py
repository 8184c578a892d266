"""Mean and covariance of features, block by block, so that intervals need no second pass over the samples."""

from dataclasses import dataclass

import torch

ROWS = 4096  # at once


@dataclass(frozen=True)
class Moments:
    """Sums over n feature vectors, float64; add and subtract them to join and leave out samples.

    Attributes:
        n: how many.
        total: sum of x (D,).
        outer: sum of x x^T (D, D).
    """

    n: int
    total: torch.Tensor
    outer: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """Moments of features (n, D), which may be mapped from disk: they are read in parts."""
        width = features.shape[1]
        total = torch.zeros(width, dtype=torch.float64, device=features.device)
        outer = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for part in features.split(ROWS):
            x = part.double()
            total += x.sum(0)
            outer.addmm_(x.T, x)
        return cls(len(features), total, outer)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.n - other.n, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> torch.Tensor:
        """(D,)."""
        return self.total / self.n

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased (D, D), of at least two samples."""
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)
