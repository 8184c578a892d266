"""The gate: a step keeps a correction only where it lowers the error of samples it was not fitted on.

Fitted on one half of the samples and judged on the other (:func:`ptqd.noise.second_moments.held_out_gain`), beyond the
95 % interval of the mean over folds; an output channel that it makes worse is left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ptqd.errors import InputError
from ptqd.noise.second_moments import Estimator, OutputEstimate, held_out_gain, mean_table, smoothed
from ptqd.noise.stats import NoiseStats

MIN_SAMPLES = 4
SMOOTHED = (
    8  # samples up to which a step's neighbours in time count as much as the step; their weight falls with the square
)


@dataclass(frozen=True)
class StepGate:
    """What a step keeps.

    Attributes:
        kept: name of the estimator, or ``"nothing"``.
        gain: share of the next sample's mean squared error that it takes away on samples it was not fitted on.
        half_width: of the 95 % interval of that share. Where nothing is kept, both are the first estimator's.
        channels: how many output channels are corrected.
    """

    kept: str
    gain: float
    half_width: float
    channels: int


def gated(
    stats: NoiseStats, estimators: Mapping[str, Estimator], half: int | None = None
) -> tuple[OutputEstimate, list[StepGate]]:
    """For each step the last of the estimators that helps there, or nothing.

    Args:
        stats: at least four samples.
        estimators: by name, in the order in which the later are preferred.
        half: fit what is kept on the even (0) or odd (1) folds alone; judged are both.

    Raises:
        InputError: too few samples to be fitted and judged apart.
    """
    if stats.samples < MIN_SAMPLES:
        raise InputError(f"{stats.samples} samples cannot be fitted and judged apart; measure at least {MIN_SAMPLES}")
    layout, folds = stats.layout, slice(half, None, 1 if half is None else 2)
    samples = stats.fold_samples[folds]
    weight = min(1.0, (SMOOTHED / int(samples.sum())) ** 2)
    table = smoothed(mean_table(stats.joint[folds], samples), layout, weight)
    estimate = OutputEstimate.nothing(table, layout)
    steps: list[StepGate] = []
    for name, estimator in estimators.items():
        gain = held_out_gain(stats.joint, stats.fold_samples, layout, estimator)
        chosen = gain.helps[:, None, None] & (gain.outputs > 0)
        estimate = estimator(table, layout).where(chosen, estimate.where(~gain.helps[:, None, None], _none(estimate)))
        before = torch.where(gain.before > 0, gain.before, 1.0)
        shares, widths = (gain.steps / before).tolist(), (gain.half_width / before).tolist()
        for i, helps in enumerate(gain.helps.tolist()):
            step = StepGate(name if helps else "nothing", shares[i], widths[i], int(chosen[i].sum()))
            if i == len(steps):
                steps.append(step)
            elif helps:
                steps[i] = step
    return estimate, steps


def _none(estimate: OutputEstimate) -> OutputEstimate:
    return OutputEstimate(*(torch.zeros_like(part) for part in (estimate.output, estimate.sample, estimate.bias)))
