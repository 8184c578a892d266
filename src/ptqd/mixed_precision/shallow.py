"""What it does to the final sample to hold the deep part of the network, and at which steps to hold it.

It is measured: the quantized denoiser runs along the full-precision trajectory with the deep part computed at every
``AGE + 1`` th step and held between, a few times, each shifted against the other, so that at every step some ages of
what is held are known. What a step's contribution to the final error is then above that of the step in full, CNC and BC
applied, is that of the age; between the steps where an age was seen it is interpolated, in its logarithm. Features that
are held are off in the same direction at one step as at the next, and :func:`contributions` counts that too.

Which steps to compute in full follows exactly, for every number of them, by dynamic programming over the last one.
"""

import functools
from collections.abc import Sequence

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from ptqd.diffusion.sampling import Sampling
from ptqd.mixed_precision.contributions import contributions
from ptqd.noise.measure import measure
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.plan import PrecisionPlan

AGE = 7  # steps that features are held for, at the most
SHIFTS = 2
LEAST = 1e-3  # of a step's own error, that holding adds at least


class ShallowErrors:
    """The final sample's expected error for patterns of shallow steps.

    Args:
        added: to it by each step whose deep part is so many steps old (T, A); the first column is one step.
    """

    def __init__(self, added: NDArray[np.float64]) -> None:
        self.added = added

    def error(self, shallow: Sequence[bool], held: Sequence[bool] = ()) -> float:
        """What shallow steps (T,) add, and features age over steps that hold their output too (T,).

        Features that are older than any that were measured are taken to be off in proportion to their age.
        """
        total, age, oldest = 0.0, 0, self.added.shape[1]
        for j, is_shallow in enumerate(shallow):
            age = age + 1 if is_shallow or any(held[j : j + 1]) else 0
            if is_shallow:
                total += float(self.added[j, min(age, oldest) - 1]) * max(1.0, age / oldest) ** 2
        return total

    @functools.cached_property
    def patterns(self) -> tuple[tuple[bool, ...], ...]:
        """Which steps are shallow (T,), from none to as many as can be, each with one more: the best of so many."""
        steps, ages = self.added.shape
        along = np.full((steps + 1, steps), np.inf)  # of full steps i and the next one j: what those between add
        for i in range(steps):
            between = [self.added[i + age, age - 1] for age in range(1, min(ages, steps - 1 - i) + 1)]
            sums = np.concatenate([[0.0], np.cumsum(between)])
            along[i + 1 : i + 1 + len(sums), i] = sums
        best = np.full((steps + 1, steps + 1), np.inf)  # by full steps so far and the next full one, or the end
        last = np.zeros((steps + 1, steps + 1), dtype=np.int64)
        best[0, 0] = 0.0
        for n in range(steps):
            through = best[n, :steps] + along  # the next, the last
            last[n + 1], best[n + 1] = through.argmin(1), through.min(1)
        fewest = int(np.isfinite(best[1:, steps]).argmax()) + 1
        return tuple(self._pattern(last, full) for full in range(steps, fewest - 1, -1))

    def _pattern(self, last: NDArray[np.int64], full: int) -> tuple[bool, ...]:
        steps = len(self.added)
        shallow, at = [True] * steps, steps
        for n in range(full, 0, -1):
            at = int(last[n, at])
            shallow[at] = False
        return tuple(shallow)


def measure_shallow(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    stats: NoiseStats,
    width: int,
    *,
    progress: bool = False,
) -> ShallowErrors:
    """What shallow steps add, of two runs of half as many samples.

    Args:
        pipe: full precision.
        qpipe: quantized.
        sampling: how it samples.
        stats: of the quantized pipeline at that width, with all steps in full.
        width: of activations.
        progress: show a bar.

    Raises:
        InputError: the denoiser's deep part is not known.
    """
    timesteps = stats.measured_on.model_timesteps
    steps, whole = len(timesteps), contributions(stats).numpy()
    ages = min(AGE, steps - 1)
    half = sampling.replace(samples=max(sampling.samples // 2, min(sampling.samples, 16)))
    found = np.full((steps, ages), np.nan)
    for shift in sorted({shift * (ages + 1) // SHIFTS for shift in range(SHIFTS)}):
        shallow = [j > 0 and (j - shift) % (ages + 1) > 0 for j in range(steps)]
        plan = PrecisionPlan.uniform(timesteps, width).replace(shallow=tuple(np.flatnonzero(shallow).tolist()))
        title = "measuring shallow steps" if progress else False
        own = contributions(measure(pipe, apply_plan(qpipe, plan), half, progress=title)).numpy()
        age = 0
        for j, is_shallow in enumerate(shallow):
            age = age + 1 if is_shallow else 0
            if age:
                found[j, age - 1] = max(own[j] - whole[j], LEAST * whole[j], 1e-300)
    columns = []
    for column in found.T:
        known = np.flatnonzero(np.isfinite(column))
        columns.append(np.exp(np.interp(np.arange(steps), known, np.log(column[known]))))
    return ShallowErrors(np.maximum.accumulate(np.stack(columns, 1), axis=1))
