"""From statistics to a correction: every method by its name.

A correction of the mean, at most one, makes an estimate of eps from what a step knows:

    cnc, bc     PTQD's, alone or together     tac     TAC's gain
    d2          D2-DPM's regression           joint   ours
    cnc-channel CNC with a slope a channel    trajectory   ours, fitted along the trajectory; it needs runs, see
                                              :func:`ptqd.correction.trajectory.fit_trajectory`

and a method for the variance, at most one, deals with what the estimate leaves:

    vsc         PTQD's: draw less noise       dns, qdrift, stepbaq     for steps that draw none
    energy      ours: full precision's energy, fitted along the trajectory, see
                :func:`ptqd.correction.trajectory.fit_energy`

Named methods are taken as published, at every step; ``joint`` is gated step by step. What is best for a pipeline is
found by :func:`ptqd.correction.search.search_correction`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ptqd.correction.correction import Correction, rows, smallest_form
from ptqd.correction.gate import gated
from ptqd.correction.methods.cnc_bc import CHANNEL, cnc_bc
from ptqd.correction.registry import MEAN_METHODS, VARIANCE_METHODS
from ptqd.correction.variance import ResidualNoise, StepRescaling
from ptqd.diffusion.scheduler_response import added_variance
from ptqd.errors import InputError
from ptqd.noise.regression import regression
from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate, excess_variance, mean_table
from ptqd.noise.stats import NoiseStats

logger = logging.getLogger(__name__)

DEFAULT = ("cnc", "bc", "vsc")
COHERENCES = (1.0, 2.0, 4.0, 8.0)
CLIPPING = 0.99  # below this a step clips
TRAJECTORY, ENERGY = "trajectory", "energy"  # which are fitted along runs
METHODS = ("cnc", CHANNEL, "bc", *MEAN_METHODS, "joint", TRAJECTORY, *VARIANCE_METHODS, ENERGY)


def fit_correction(stats: NoiseStats, methods: Sequence[str] = DEFAULT) -> Correction:
    """The correction that follows from statistics.

    Args:
        stats: measured on the pipeline to correct.
        methods: of ``"cnc"`` and ``"bc"``, ``"tac"``, ``"d2"`` or ``"joint"`` for the mean; and of ``"vsc"``,
            ``"dns"``, ``"qdrift"`` or ``"stepbaq"`` for the variance. None gives the empty correction.

    Raises:
        InputError: an unknown method, methods that do not go together, or statistics that give no correction.
    """
    mean, variance = split_methods(methods)
    if along_runs(methods):
        name = TRAJECTORY if TRAJECTORY in mean else ENERGY
        raise InputError(f"{name} is fitted along runs, not from statistics alone; use ptqd.correct with sampling=")
    if stats.samples < 2:
        raise InputError(f"statistics of {stats.samples} sample give no correction; measure at least two samples")
    _check_slopes(stats, mean)
    if mean == ("joint",):
        estimate, _ = gated(stats, COHERENCES)
    else:
        estimate = mean_estimator(mean)(mean_table(stats.joint, stats.fold_samples), stats.layout)
    return compose(stats, methods, estimate, variance)


def _check_slopes(stats: NoiseStats, mean: Sequence[str]) -> None:
    """Refuse noise that surely undoes the output.

    Raises:
        InputError: cnc is asked for, and the upper bound of some step's k is below -1.
    """
    if "cnc" not in mean or bool((regression(stats.moments.mean(0), slope=True)["k"] > -1).all()):
        return
    undone = (stats.fit().k.high < -1).nonzero().flatten()
    if len(undone):
        raise InputError(f"at step {int(undone[0])} the noise undoes the output (1 + k <= 0); quantize with more bits")


def split_methods(methods: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The methods for the mean, and that for the variance.

    Raises:
        InputError: an unknown method, or methods that do not go together.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown correction {method!r}; known are {', '.join(METHODS)}")
    for_variance = (*VARIANCE_METHODS, ENERGY)
    mean = tuple(m for m in METHODS if m in methods and m not in for_variance)
    variance = [m for m in dict.fromkeys(methods) if m in for_variance]
    if len(mean) > 1 and set(mean) not in ({"cnc", "bc"}, {CHANNEL, "bc"}):
        raise InputError(f"{' and '.join(mean)} are each a whole correction of the mean; give one of them")
    if mean == (TRAJECTORY,) and variance:
        raise InputError(f"trajectory answers for the whole of a step, {variance[0]} too; give it alone")
    if len(variance) > 1:
        raise InputError(f"{' and '.join(variance)} both answer for the residual's variance; give one of them")
    return mean, variance[0] if variance else None


def along_runs(methods: Sequence[str]) -> bool:
    """Whether methods are fitted along whole trajectories."""
    return TRAJECTORY in methods or ENERGY in methods


def mean_estimator(mean: Sequence[str]) -> Estimator:
    """The estimator of some of cnc and bc, or none of them; or of another method of the mean."""
    for name in mean:
        if name in MEAN_METHODS:
            return MEAN_METHODS[name]()
    return cnc_bc("cnc" in mean or CHANNEL in mean, "bc" in mean, by_channel=CHANNEL in mean)


def compose(
    stats: NoiseStats,
    methods: Sequence[str],
    estimate: OutputEstimate,
    variance: str | None,
) -> Correction:
    """A correction of the mean with a method for the variance on top.

    Args:
        stats: what both follow from.
        methods: names for the record.
        estimate: of every step's eps.
        variance: the method's name. One that has nothing to do here says so in the log, and is left out.

    Raises:
        InputError: a method for the variance that does not go with the scheduler.
    """
    layout = stats.layout
    reshaped: StepRescaling | None = None
    if variance is not None:
        residuals = _residuals(stats, estimate)
        config = stats.measured_on.config
        if not stats.response.one_step and (config.get("clip_sample") or config.get("thresholding")):
            logger.warning("%s clips and remembers: what that takes of the residual is not known", residuals.scheduler)
        try:
            reshaped = VARIANCE_METHODS[variance](residuals)
        except InputError as error:
            if variance != "vsc":
                raise
            logger.warning("%s", error)
    taken = tuple(m for m in METHODS if m in methods and (m != variance or reshaped is not None))
    output, sample, bias = estimate.output.clone(), estimate.sample.clone(), estimate.bias
    if reshaped is not None:  # out = f (eps_q - D_q eps_q - D_x x - b) + h x
        f, own = reshaped.gain.view(-1, 1, 1, 1), range(layout.channels)
        output, sample, bias = f * output, f * sample, f[..., 0] * bias
        output[..., own, own] += 1 - f[..., 0]
        sample[..., own, own] -= reshaped.sample.view(-1, 1, 1)
    return Correction(
        methods=taken,
        timesteps=tuple(stats.timesteps.tolist()),
        output=_plain(output, layout),
        sample=_plain(sample, layout),
        bias=rows(bias.flatten(1)) if bool(bias.any()) else (),
        noise=() if reshaped is None else reshaped.noise,
        model_timesteps=() if reshaped is None else reshaped.model_timesteps,
        eta=stats.measured_on.eta,
        measured_on=stats.measured_on,
    )


def _residuals(stats: NoiseStats, estimate: OutputEstimate) -> ResidualNoise:
    table = mean_table(stats.joint, stats.fold_samples)
    excess = excess_variance(table, estimate).mean((1, 2)) * stats.attenuation() ** 2
    return ResidualNoise(
        scheduler=stats.measured_on.scheduler,
        config=stats.measured_on.config,
        timesteps=stats.timesteps,
        levels=stats.levels,
        response=stats.response,
        clips=bool((stats.attenuation() < CLIPPING).any()),
        added=added_variance(stats.response, excess),
    )


def _plain(maps: torch.Tensor, layout: Layout) -> Any:
    table = smallest_form(maps, layout)
    return () if table is None else rows(table)
