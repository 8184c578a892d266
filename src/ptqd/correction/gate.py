"""The gate: a step keeps a correction only where samples that it was not fitted on bear it out.

What counts is the *systematic* error: what a step withholds of the signal, or adds to it in the same way for every
sample, is added again at the next step, while a residual that is drawn anew is not. One step's mean squared error says
the wrong thing where k is negative: to divide by ``1 + k < 1`` amplifies the residual, and yet takes away what adds up.

    cnc, bc   are kept apart, each where its square is above twice its sampling variance (jackknife over folds): since
              ``E|estimate|^2 = |true|^2 + variance``, leaving it out then costs more than its own error does. What is
              kept is applied unshrunk.
    joint     fitted on one half of the samples and judged on the other, beyond the 95 % interval of the mean over
              folds, in the error that it minimises: the residual by 1 / L
              (:func:`ptqd.noise.second_moments.held_out_gain`); an output channel that it makes worse is left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptqd.correction.methods.cnc_bc import from_slope, slope
from ptqd.correction.methods.joint import joint
from ptqd.errors import InputError
from ptqd.noise.second_moments import (
    Estimator,
    Gain,
    Layout,
    OutputEstimate,
    held_out_gain,
    left_out_tables,
    mean_table,
    smoothed,
)
from ptqd.noise.stats import NoiseStats

MIN_SAMPLES = 4
NOTHING = "nothing"
SMOOTHED = (
    8  # samples up to which a step's neighbours in time count as much as the step; their weight falls with the square
)


@dataclass(frozen=True)
class StepGate:
    """What a step keeps.

    Attributes:
        kept: name of the estimator, or ``"nothing"``.
        gain: share of the next sample's mean squared error that it takes away on samples it was not fitted on; of
            ``joint`` the residual counts by 1 / L.
        half_width: of the 95 % interval of that share. Where nothing is kept, both are the first estimator's.
        channels: how many output channels are corrected.
    """

    kept: str
    gain: float
    half_width: float
    channels: int


def gated(
    stats: NoiseStats, coherences: Sequence[float], half: int | None = None
) -> tuple[OutputEstimate, list[StepGate]]:
    """For each step ``joint`` at the largest L that helps there, or nothing.

    Args:
        stats: at least four samples.
        coherences: the Ls to try.
        half: fit what is kept on the even (0) or odd (1) folds alone; judged are both.

    Raises:
        InputError: too few samples to be fitted and judged apart.
    """
    layout, folds = stats.layout, _folds(stats, half)
    samples = stats.fold_samples[folds]
    weight = min(1.0, (SMOOTHED / int(samples.sum())) ** 2)
    table = smoothed(mean_table(stats.joint[folds], samples), layout, weight)
    estimate = OutputEstimate.nothing(table, layout)
    steps: list[StepGate] = []
    for coherence in sorted(coherences):
        estimator = joint(coherence)
        gain = held_out_gain(stats.joint, stats.fold_samples, layout, estimator, coherence)
        chosen = gain.helps[:, None, None] & (gain.outputs > 0)
        estimate = estimator(table, layout).where(chosen, estimate.where(~gain.helps[:, None, None], _none(estimate)))
        counts = chosen.sum((1, 2)).tolist()
        found = _steps(gain, [f"joint L={coherence:g}" if helps else NOTHING for helps in gain.helps.tolist()], counts)
        steps = [new if new.kept != NOTHING or not steps else steps[i] for i, new in enumerate(found)]
    return estimate, steps


def gated_cnc_bc(stats: NoiseStats, half: int | None = None) -> tuple[OutputEstimate, list[StepGate]]:
    """For each step cnc, bc, both or neither.

    Args:
        stats: at least four samples.
        half: fit on the even (0) or odd (1) folds alone.

    Raises:
        InputError: too few samples.
    """
    layout, folds = stats.layout, _folds(stats, half)
    tables, samples = stats.joint[folds], stats.fold_samples[folds]
    whole, without = mean_table(tables, samples), left_out_tables(tables, samples)

    def told(values: torch.Tensor, left_out: torch.Tensor) -> torch.Tensor:
        variance = (len(left_out) - 1) * left_out.var(0, unbiased=False)
        return (values**2 - 2 * variance).sum((-1, -2), keepdim=True) > 0  # T,1,1

    k = slope(whole, layout)
    k = torch.where(told(k, slope(without, layout)), k, 0.0)
    estimate = from_slope(whole, layout, k, True)
    bc = told(estimate.bias, from_slope(without, layout, k.expand(len(without), *k.shape), True).bias)
    estimate = from_slope(whole, layout, k, bc)
    words = [
        "+".join(word for word, kept in (("cnc", bool(slopes.any())), ("bc", bool(biases))) if kept) or NOTHING
        for slopes, biases in zip(k, bc, strict=True)
    ]

    def again(table: torch.Tensor, layout: Layout) -> OutputEstimate:
        return from_slope(table, layout, torch.where(k == 0, 0.0, slope(table, layout)), bc)

    gain = held_out_gain(stats.joint, stats.fold_samples, layout, again)
    channels = layout.groups * layout.channels
    return estimate, _steps(gain, words, [0 if word == NOTHING else channels for word in words])


def every_step(stats: NoiseStats, name: str, estimator: Estimator) -> list[StepGate]:
    """What an estimator that is kept at every step gains there."""
    gain = held_out_gain(stats.joint, stats.fold_samples, stats.layout, estimator)
    return _steps(gain, [name] * len(gain.steps), [stats.layout.groups * stats.layout.channels] * len(gain.steps))


def _steps(gain: Gain, names: Sequence[str], channels: Sequence[int]) -> list[StepGate]:
    before = torch.where(gain.before > 0, gain.before, 1.0)
    shares, widths = (gain.steps / before).tolist(), (gain.half_width / before).tolist()
    return [StepGate(*values) for values in zip(names, shares, widths, channels, strict=True)]


def _folds(stats: NoiseStats, half: int | None) -> slice:
    if stats.samples < MIN_SAMPLES:
        raise InputError(f"{stats.samples} samples cannot be fitted and judged apart; measure at least {MIN_SAMPLES}")
    return slice(half, None, 1 if half is None else 2)


def _none(estimate: OutputEstimate) -> OutputEstimate:
    return OutputEstimate(*(torch.zeros_like(part) for part in (estimate.output, estimate.sample, estimate.bias)))
