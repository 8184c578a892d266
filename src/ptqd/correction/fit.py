"""From statistics to a correction: every method by its name.

A correction of the mean, at most one, makes an estimate of eps from what a step knows:

    cnc, bc     PTQD's, alone or together     tac     TAC's gain
    d2          D2-DPM's regression           joint   ours

and a method for the variance, at most one, deals with what the estimate leaves:

    vsc         PTQD's: draw less noise       dns, qdrift, stepbaq     for steps that draw none

Named methods are taken as published, at every step; ``joint`` is gated step by step. What is best for a pipeline is
found by :func:`ptqd.correction.search.search_correction`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ptqd.correction.correction import Correction, rows
from ptqd.correction.gate import gated
from ptqd.correction.methods.cnc_bc import cnc_bc
from ptqd.correction.methods.joint import joint
from ptqd.correction.registry import MEAN_METHODS, VARIANCE_METHODS
from ptqd.correction.variance import ResidualNoise, StepRescaling
from ptqd.diffusion.scheduler_response import added_variance
from ptqd.errors import InputError
from ptqd.noise.second_moments import Estimator, Layout, OutputEstimate, excess_variance, mean_table
from ptqd.noise.stats import NoiseStats

logger = logging.getLogger(__name__)

DEFAULT = ("cnc", "bc", "vsc")
COHERENCES = (1.0, 2.0, 4.0, 8.0)
CLIPPING = 0.99  # below this a step clips
METHODS = ("cnc", "bc", *MEAN_METHODS, "joint", *VARIANCE_METHODS)


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
    if stats.samples < 2:
        raise InputError(f"statistics of {stats.samples} sample give no correction; measure at least two samples")
    if mean == ("joint",):
        estimate, _ = gated(stats, joint_estimators(COHERENCES))
    else:
        estimate = mean_estimator(mean)(mean_table(stats.joint, stats.fold_samples), stats.layout)
    return compose(stats, methods, estimate, variance)


def split_methods(methods: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """The methods for the mean, and that for the variance.

    Raises:
        InputError: an unknown method, or methods that do not go together.
    """
    for method in methods:
        if method not in METHODS:
            raise InputError(f"unknown correction {method!r}; known are {', '.join(METHODS)}")
    mean = tuple(m for m in METHODS if m in methods and m not in VARIANCE_METHODS)
    variance = [m for m in dict.fromkeys(methods) if m in VARIANCE_METHODS]
    if len(mean) > 1 and set(mean) != {"cnc", "bc"}:
        raise InputError(f"{' and '.join(mean)} are each a whole correction of the mean; give one of them")
    if len(variance) > 1:
        raise InputError(f"{' and '.join(variance)} both answer for the residual's variance; give one of them")
    return mean, variance[0] if variance else None


def mean_estimator(mean: Sequence[str]) -> Estimator:
    """The estimator of some of cnc and bc, or none of them; or of another method of the mean."""
    for name in mean:
        if name in MEAN_METHODS:
            return MEAN_METHODS[name]()
    return cnc_bc("cnc" in mean, "bc" in mean)


def joint_estimators(coherences: Sequence[float]) -> dict[str, Estimator]:
    """Ours with some weights L, by name, in rising order."""
    return {f"joint L={c:g}": joint(c) for c in sorted(coherences)}


def compose(
    stats: NoiseStats,
    methods: Sequence[str],
    estimate: OutputEstimate,
    variance: str | None,
    *,
    correlated: bool = False,
) -> Correction:
    """A correction of the mean with a method for the variance on top.

    Args:
        stats: what both follow from.
        methods: names for the record.
        estimate: of every step's eps.
        variance: the method's name. One that has nothing to do here says so in the log, and is left out.
        correlated: count residuals that repeat from step to step as they add up; as published, they count as
            independent.

    Raises:
        InputError: a method for the variance that does not go with the scheduler.
    """
    layout = stats.layout
    reshaped: StepRescaling | None = None
    if variance is not None:
        residuals = _residuals(stats, estimate, correlated)
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


def _residuals(stats: NoiseStats, estimate: OutputEstimate, correlated: bool) -> ResidualNoise:
    table = mean_table(stats.joint, stats.fold_samples)
    excess = excess_variance(table, estimate).mean((1, 2)) * stats.attenuation() ** 2
    covariance = torch.diag(excess)
    if correlated:
        size = excess.clamp(min=0).sqrt()
        covariance = (stats.residual_correlation() * size[:, None] * size[None, :]).fill_diagonal_(0) + covariance
    return ResidualNoise(
        scheduler=stats.measured_on.scheduler,
        config=stats.measured_on.config,
        timesteps=stats.timesteps,
        levels=stats.levels,
        response=stats.response,
        clips=bool((stats.attenuation() < CLIPPING).any()),
        added=added_variance(stats.response, covariance),
    )


def _plain(maps: torch.Tensor, layout: Layout) -> Any:
    """Maps (T, G, C, taps C) as a correction holds them: in the smallest form that says the same."""
    if not bool(maps.any()):
        return ()
    if layout.groups > 1:  # G groups of one channel
        return rows(maps[:, :, 0] if layout.taps > 1 else maps[:, :, 0, 0])
    whole = maps[:, 0]
    across = whole[..., : layout.channels]
    if layout.taps > 1 and bool(whole[..., layout.channels :].any()):
        return rows(whole)
    diagonal = across.diagonal(dim1=1, dim2=2)
    return rows(diagonal) if torch.equal(torch.diag_embed(diagonal), across) else rows(across)
