"""The kernel distance between two sets of features (KID)."""

from collections.abc import Iterator

import torch

from ptqd.errors import InputError
from ptqd.metrics.bootstrap import Statistic
from ptqd.metrics.moments import ROWS


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401, eq. 4).

    Args:
        features: (n, D), n at least 2.
        reference: (m, D), m at least 2.
    """
    return kernel_statistic(features, reference).value


def kernel_statistic(features: torch.Tensor, reference: torch.Tensor) -> Statistic:
    """Kernel distance of features (N, D) to a reference set's (M, D), in parts: memory grows with N + M.

    Its influence is twice the first-order part of the U-statistic (Hoeffding 1948).
    """
    n, m = len(features), len(reference)
    if min(n, m) < 2:
        raise InputError(f"a kernel distance needs at least two samples on either side; got {n} and {m}")
    within, across = _kernel_sums(features, features), _kernel_sums(features, reference)
    own = within - _diagonal(features)  # N, sums over the others
    theirs = (_kernel_sums(reference, reference) - _diagonal(reference)).sum().item() / (m * (m - 1))
    value = own.sum().item() / (n * (n - 1)) + theirs - 2 * across.sum().item() / (n * m)
    influence = 2 * (own / (n - 1) - across / m)
    return Statistic(value, influence - influence.mean())


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sums of the kernel over ``y``, for each of ``x`` (N,)."""

    def sums() -> Iterator[torch.Tensor]:
        for part in x.split(ROWS):
            total = torch.zeros(len(part), dtype=torch.float64, device=x.device)
            for other in y.split(ROWS):
                total += _kernel(part.double() @ other.double().T, x.shape[1]).sum(1)
            yield total

    return torch.cat(list(sums()))


def _diagonal(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([_kernel(part.double().square().sum(1), x.shape[1]) for part in x.split(ROWS)])


def _kernel(product: torch.Tensor, width: int) -> torch.Tensor:
    return (product / width + 1) ** 3
