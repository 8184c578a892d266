"""Second moments by bands of directions: what a run does to noise depends on how much data varies that way.

A denoiser takes a change of its sample back where data hardly varies, and lets it through where it varies much. One
answer for all directions is the mean of both, and wrong for either. So noise is measured in nine bands of directions:
the principal components of a batch's final full-precision samples, from the largest, in bands of 1, 1, 2, 4, ... 64,
and all the rest, of which no component is told from the others. Every batch has its own, so that it does not matter
which process measured it; of small batches few components are known, and the rest is wider.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptqd.diffusion.trajectory import whole_samples

SIZES = (1, 1, 2, 4, 8, 16, 32, 64)  # of the bands; the last one has what is left


@dataclass(frozen=True)
class Bands:
    """Sums over samples, of means over elements, so that bands add up to the whole; float64.

    Attributes:
        cross: second moments of (eps, delta) over all pairs of steps (B, 2 T, 2 T), without each channel's mean.
        known: of x_t with itself and with eps (B, T, 2), likewise.
    """

    cross: torch.Tensor
    known: torch.Tensor

    def __add__(self, other: "Bands") -> "Bands":
        return Bands(self.cross + other.cross, self.known + other.known)

    def at(self, steps: torch.Tensor) -> "Bands":
        """The same at some of the steps (T',), which may repeat."""
        pair = torch.cat([steps, steps + self.known.shape[1]])
        return Bands(self.cross[:, pair][:, :, pair], self.known[:, steps])


def principal_directions(finals: torch.Tensor) -> torch.Tensor:
    """The largest principal components of samples (N, ...), as rows (R, D) of unit length; R below N."""
    flat = finals.flatten(1).cpu().double()
    if not bool(torch.isfinite(flat).all()):
        return flat[:0]
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    kept = (values > 1e-9 * values.max().clamp(min=1e-300)).nonzero().flatten().flip(0)[: sum(SIZES)]
    rows: torch.Tensor = vectors[:, kept].T @ flat
    length: torch.Tensor = rows.norm(dim=1, keepdim=True)
    return rows / length.clamp(min=1e-300)


def measured_bands(
    outputs: Sequence[torch.Tensor],
    outputs_q: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    directions: torch.Tensor,
    cross: torch.Tensor,
    axis: int,
    samples: int,
    each: int,
) -> Bands:
    """Of one batch; its own means are taken out.

    Args:
        outputs: full-precision outputs (rows, C, ...) of each step.
        outputs_q: quantized ones.
        steps: the samples before each step.
        directions: (R, D).
        cross: second moments of (eps, delta) in all directions, means left in, summed over the samples (2 T, 2 T).
        axis: of the channels of a row.
        samples: how many the batch holds.
        each: rows of a sample.
    """
    places, total, means = [], [], []
    for rows in zip(outputs, outputs_q, steps, strict=True):
        e, q, x = (part.cpu().double() for part in rows)
        others = [i for i in range(e.ndim) if i != axis]
        own = [part.mean(others, keepdim=True) for part in (e, q - e, x)]
        parts = [
            whole_samples(part - mean, samples, each).flatten(1) for part, mean in zip((e, q - e, x), own, strict=True)
        ]
        places.append(torch.stack([part @ directions.T for part in parts]))  # 3,n,R
        total.append(torch.stack([(parts[2] * parts[i]).sum() for i in (2, 0)]))
        means.append(torch.stack([mean.flatten() for mean in own[:2]]))
    elements = directions.shape[1]
    by_step = torch.stack(places, dim=1)  # 3,T,n,R
    crosses, knowns = [], []
    for low, high in itertools.pairwise(torch.tensor([0, *SIZES]).cumsum(0).tolist()):
        part = by_step[..., low:high]
        both = part[:2].flatten(0, 1).flatten(1)
        crosses.append(both @ both.T / elements)
        knowns.append(torch.stack([(part[2] * part[i]).sum((1, 2)) for i in (2, 0)], -1) / elements)
    mean = torch.stack(means, dim=1).flatten(0, 1)  # 2T,C
    whole = (cross - samples * mean @ mean.T / mean.shape[1], torch.stack(total) / elements)
    named = [torch.stack(crosses), torch.stack(knowns)]
    rest = [(every - parts.sum(0))[None] for parts, every in zip(named, whole, strict=True)]
    return Bands(torch.cat([named[0], rest[0]]), torch.cat([named[1], rest[1]]))
