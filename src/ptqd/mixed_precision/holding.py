"""What it does to the final sample to hold outputs, and which steps to hold.

A step j that holds takes the quantized output of step s, ``eps_s + delta_s``, for ``eps_j``. The second moments of
(eps, delta) over all pairs of steps, which statistics have by bands of directions, say what that leaves, of any pattern
of held steps; nothing more is measured. As after CNC, a slope is divided out:

    (1 + k) eps_j ~ eps_s + delta_s,        r_j = (eps_s + delta_s) / (1 + k) - eps_j

and the final sample's expected squared error is ``sum over bands E |sum_j c_j r_j|^2``, with ``c`` of
:func:`ptqd.mixed_precision.contributions.final_coefficients`. Held steps are off in the same direction, one like the
next, so their errors are not summed one by one.

Patterns are searched by adding the step that costs least error, again and again.
"""

import functools
from collections.abc import Sequence

import torch

from ptqd.mixed_precision.contributions import final_coefficients
from ptqd.noise.stats import NoiseStats

LEAST = 0.1  # of 1 + k: a slope below is none to divide by


class HeldErrors:
    """The final sample's expected error for patterns of held steps, at one width of activations.

    Args:
        stats: of that width, measured in open loop.
    """

    def __init__(self, stats: NoiseStats) -> None:
        self.cross = stats.noise_by_bands()  # B,2T,2T
        self.steps = len(stats.timesteps)
        self.coefficients = final_coefficients(stats)  # B,T
        whole = self.cross.sum(0)
        noise, signal = whole[self.steps :, : self.steps], whole[: self.steps, : self.steps]
        energy = signal.diagonal().clamp(min=1e-300)
        self.slope = ((signal + noise).T / energy[:, None]).clamp(min=LEAST)  # 1 + k of step j that holds s (T, T)

    def error(self, held: Sequence[bool]) -> float:
        """Expected squared error of the final sample, mean over its elements."""
        weights = self._weights(sources(held))
        return float(((self.cross @ weights[..., None])[..., 0] * weights).sum().clamp(min=0))

    def amplification(self, held: Sequence[bool]) -> torch.Tensor:
        """How many times as much of the final error a computed step's noise makes, as it is held afterwards (T,)."""
        source = torch.tensor(sources(held))
        noise = self.cross.diagonal(dim1=-2, dim2=-1)[:, self.steps :]  # B,T
        together = torch.zeros_like(self.coefficients).index_add_(1, source, self.coefficients)
        own = (self.coefficients**2 * noise).sum(0)
        grown = (together**2 * noise).sum(0) / own.clamp(min=1e-300)
        return torch.where(own > 0, grown, 1.0)

    @functools.cached_property
    def patterns(self) -> tuple[tuple[bool, ...], ...]:
        """Which steps to hold (T,), from none to all but the first, each with one step more than the one before."""
        held = [False] * self.steps
        result = [tuple(held)]
        while not all(held[1:]):
            held[self._next(held)] = True
            result.append(tuple(held))
        return tuple(result)

    def _next(self, held: Sequence[bool]) -> int:
        """The step that adds least to the error where it holds too: it changes four weights, of h and s."""
        source, steps = sources(held), self.steps
        weights = self._weights(source)
        answer = (self.cross @ weights[..., None])[..., 0]  # B,2T
        best, least = 0, float("inf")
        for h in range(1, steps):
            if held[h]:
                continue
            s, after = source[h - 1], h
            taken, given = torch.zeros(2, len(weights), dtype=torch.float64)
            while after < steps and source[after] == h:
                taken += self.coefficients[:, after] / self.slope[after, h]
                given += self.coefficients[:, after] / self.slope[after, s]
                after += 1
            places = torch.tensor([h, h + steps, s, s + steps])
            change = torch.stack([-taken, -taken, given, given], -1)  # B,4
            inner = (self.cross[:, places][:, :, places] @ change[..., None])[..., 0]
            added = float((change * (2 * answer[:, places] + inner)).sum())
            if added < least:
                best, least = h, added
        return best

    def _weights(self, source: Sequence[int]) -> torch.Tensor:
        """What of each step's eps and delta the final sample's error consists of (B, 2 T)."""
        c, steps, own = self.coefficients, self.steps, torch.arange(self.steps)
        s = torch.tensor(source)
        used = c / self.slope[own, s]
        weights = torch.zeros(len(c), 2 * steps, dtype=torch.float64)
        weights[:, :steps] -= c
        weights.index_add_(1, s, used)
        weights.index_add_(1, s + steps, used)
        return weights


def sources(held: Sequence[bool]) -> list[int]:
    """The step whose output each step takes (T,)."""
    result: list[int] = []
    for step, holds in enumerate(held):
        result.append(result[-1] if holds else step)
    return result
