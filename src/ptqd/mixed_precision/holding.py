"""What it does to the final sample to hold outputs, and which steps to hold.

A step j that holds takes, for its own output ``eps_j``, the quantized output ``q_s = eps_s + delta_s`` of the last step
s that was computed, or goes on in a line through that and ``q_p`` of the computed step before it. The second moments of
(eps, delta) over all pairs of steps, which statistics have by bands of directions, say what that leaves, of any pattern
of held steps; nothing more is measured. Of one output a slope is divided out, as CNC does; two have the weights that
leave least, among all with a slope of 1:

    (1 + k) eps_j ~ q_s,        r_j = q_s / (1 + k) - eps_j
    r_j = a q_s + b q_p - eps_j,        a, b = argmin sum over bands c_j^2 E |r_j|^2  with  E r_j eps_j = 0

The noise in the outputs is in these moments, so two outputs are never weighted so far apart that their noise costs more
than the line gains. The final sample's expected squared error is ``sum over bands E |sum_j c_j r_j|^2``, with ``c`` of
:func:`ptqd.mixed_precision.contributions.final_coefficients`. Held steps are off in the same direction, one like the
next, so their errors are not summed one by one.

Patterns are searched by adding the step that costs least error, again and again.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ptqd.mixed_precision.contributions import final_coefficients
from ptqd.noise.stats import NoiseStats

LEAST = 0.1  # of 1 + k: a slope below is none to divide by
MOST = 8.0  # of an output's weight: two that are further apart are one output and its noise
RIDGE = 1e-9  # of the outputs' energy
DIGITS = 4  # of a weight in a plan

Taken = tuple[tuple[int, float], ...]  # outputs by step, each with its weight


class HeldErrors:
    """The final sample's expected error for patterns of held steps, at one width of activations.

    Args:
        stats: of that width, measured in open loop.
        extrapolate: whether steps go on from two outputs where there are two; else they hold the last one.
    """

    def __init__(self, stats: NoiseStats, *, extrapolate: bool = True) -> None:
        self.extrapolate = extrapolate
        self.steps = steps = len(stats.timesteps)
        self.coefficients: NDArray[np.float64] = final_coefficients(stats).numpy()  # B,T
        self.cross: NDArray[np.float64] = stats.noise_by_bands().numpy()  # B,2T,2T
        whole = self.cross.sum(0)
        signal = whole[:steps, :steps]
        self.energy = signal.diagonal().clip(min=1e-300)
        self.outputs = (signal + whole[steps:, :steps]).T  # E eps_j q_s (T, T)
        self._takes: dict[tuple[int, int, int | None], Taken] = {}
        self.slope = (self.outputs / self.energy[:, None]).clip(min=LEAST)  # 1 + k of step j that holds s (T, T)

    def error(self, held: Sequence[bool]) -> float:
        """Expected squared error of the final sample, mean over its elements."""
        weights = self._weights(held)
        return max(0.0, float(((self.cross @ weights[..., None])[..., 0] * weights).sum()))

    def amplification(self, held: Sequence[bool]) -> torch.Tensor:
        """How many times as much of the final error a computed step's noise makes, as it is held afterwards (T,)."""
        noise = self.cross.diagonal(axis1=1, axis2=2)[:, self.steps :]  # B,T
        together = np.zeros_like(self.coefficients)
        for j, taken in enumerate(self._taken(held)):
            for s, weight in taken:
                together[:, s] += self.coefficients[:, j] * weight * self.slope[s, s]
        own = (self.coefficients**2 * noise).sum(0)
        grown = (together**2 * noise).sum(0) / own.clip(min=1e-300)
        return torch.from_numpy(np.where(own > 0, grown, 1.0))

    def extrapolation(self, held: Sequence[bool]) -> dict[int, tuple[float, float]]:
        """The weights of the last two computed outputs, of each held step that has two and goes on from them."""
        rows = enumerate(self._taken(held))
        return {j: (round(row[0][1], DIGITS), round(row[1][1], DIGITS)) for j, row in rows if len(row) == 2}

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
        """The step that adds least to the error where it holds too.

        It changes what it takes itself, and what those take that held it, or went on from it and another.
        """
        computed = [j for j, holds in enumerate(held) if not holds]
        answer = (self.cross @ self._weights(held)[..., None])[..., 0]  # B,2T
        best, least = 0, float("inf")
        for i, h in enumerate(computed[1:], 1):
            s, p = computed[i - 1], computed[i - 2] if i > 1 else None
            n, m = (*computed[i + 1 :], self.steps, self.steps)[:2]
            change: dict[int, NDArray[np.float64]] = {}
            swaps = [(j, self._take(j, h, s) if j > h else ((h, 1 / self.slope[h, h]),), (s, p)) for j in range(h, n)]
            swaps += [(j, self._take(j, n, h), (n, s)) for j in range(n + 1, m)]
            for j, before, after in swaps:
                for sign, row in ((-1, before), (1, self._take(j, *after))):
                    for source, weight in row:
                        change[source] = change.get(source, 0.0) + sign * weight * self.coefficients[:, j]
            places = np.array([*change, *(s + self.steps for s in change)])
            moved = np.tile(np.stack([*change.values()], -1), 2)  # B,P: of eps and of delta alike
            inner = (self.cross[:, places[:, None], places] @ moved[..., None])[..., 0]
            added = float((moved * (2 * answer[:, places] + inner)).sum())
            if added < least:
                best, least = h, added
        return best

    def _taken(self, held: Sequence[bool]) -> list[Taken]:
        """Whose outputs each step takes, with their weights."""
        result: list[Taken] = []
        last: int | None = None
        before: int | None = None
        for j, holds in enumerate(held):
            if last is None or not holds:
                last, before = j, last
                result.append(((j, 1 / self.slope[j, j]),))
            else:
                result.append(self._take(j, last, before))
        return result

    def _take(self, j: int, s: int, p: int | None) -> Taken:
        """What step j takes that holds s, or goes on from p through s."""
        if (j, s, p) not in self._takes:
            self._takes[j, s, p] = self._fitted(j, s, p)
        return self._takes[j, s, p]

    def _fitted(self, j: int, s: int, p: int | None) -> Taken:
        hold = ((s, float(1 / self.slope[j, s])),)
        if p is None or not self.extrapolate:
            return hold
        steps, share = self.steps, self.coefficients[:, j] ** 2
        own = np.array([s, p])
        blocks = [self.cross[:, r[:, None], c] for r in (own, own + steps) for c in (own, own + steps)]
        inner = np.tensordot(share, sum(blocks), 1)  # of q_s and q_p (2, 2)
        with_signal = np.tensordot(share, self.cross[:, own, j] + self.cross[:, own + steps, j], 1)
        inner += np.eye(2) * (RIDGE * np.trace(inner) + 1e-300)
        slopes = self.outputs[j, own]
        free, along = np.linalg.solve(inner, np.stack([with_signal, slopes], 1)).T
        norm = slopes @ along
        if norm <= 0:
            return hold
        a, b = free + along * (self.energy[j] - slopes @ free) / norm
        return ((s, float(a)), (p, float(b))) if max(abs(a), abs(b)) <= MOST else hold

    def _weights(self, held: Sequence[bool]) -> NDArray[np.float64]:
        """What of each step's eps and delta the final sample's error consists of (B, 2 T)."""
        c, steps = self.coefficients, self.steps
        weights = np.zeros((len(c), 2 * steps))
        weights[:, :steps] -= c
        for j, taken in enumerate(self._taken(held)):
            for s, weight in taken:
                weights[:, [s, s + steps]] += (c[:, j] * weight)[:, None]
        return weights


def sources(held: Sequence[bool]) -> list[int]:
    """The step whose output each step takes (T,)."""
    result: list[int] = []
    for step, holds in enumerate(held):
        result.append(result[-1] if holds else step)
    return result
