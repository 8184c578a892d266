"""``auto``: the method and strength that help this pipeline most, checked on whole trajectories.

1. Every candidate is gated step by step (:mod:`ptqd.correction.gate`): fitted on one half of the samples, judged on
   the other.
2. Candidates, fitted on one half, run whole trajectories of samples of the other half, whose full-precision ends the
   statistics hold. Two measures, both against no correction: the mean squared distance to the same seed's
   full-precision sample, and the distance of the samples' distribution. A smaller error alone is not enough: an
   estimate shrinks, and samples that are all too smooth are near to everything.
3. The weight L of withheld signal rises while the score (the sum of both measures' logarithms) improves; then other
   ways with the residual's variance are tried on the best.
4. The best must hold on samples that did not choose it: its distance must be lower beyond the 95 % interval of the
   paired difference, its distribution not significantly worse. Else it backs off to the next best, in the end to no
   correction.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from scipy import stats as scipy_stats

from ptqd.components import channel_axis
from ptqd.correction.correction import Correction
from ptqd.correction.fit import compose, joint_estimators, mean_estimator
from ptqd.correction.gate import StepGate, gated
from ptqd.correction.scheduler import check_source, correct
from ptqd.errors import InputError, MismatchError
from ptqd.joint import Estimator
from ptqd.noise import NoiseStats
from ptqd.progress import track
from ptqd.replay import final_samples
from ptqd.sampling import Sampling, guidance_of

logger = logging.getLogger(__name__)

COHERENCES = (1.0, 2.0, 4.0, 8.0, 16.0)
MIN_CHECKED = 4
BANDS = 4
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A way to correct: estimators of the mean, the later preferred where they help, and a method for the variance."""

    name: str
    methods: tuple[str, ...]
    coherences: tuple[float, ...] = ()
    variance: str | None = None

    @property
    def estimators(self) -> dict[str, Estimator]:
        """By name; none for no correction."""
        mean = tuple(m for m in self.methods if m != self.variance)
        if self.coherences:
            return joint_estimators(self.coherences)
        return {"+".join(mean): mean_estimator(mean)} if mean else {}


@dataclass(frozen=True)
class Trial:
    """What a candidate's whole trajectories came to, on samples it was not fitted on.

    Attributes:
        name: of the candidate.
        error: mean squared distance of the final samples to the full-precision ones.
        ratio: geometric mean over samples of that distance against no correction's.
        distribution: how far the samples' energy and means are shifted against the full-precision ones'; see
            :func:`distribution_distance`.
        score: log of ``ratio`` plus log of ``distribution`` against no correction's, on the samples that choose; 0 for
            no correction, less is better.
        kept: whether it is the one that was taken.
        why: what it was taken or dropped for.
    """

    name: str
    error: float
    ratio: float
    distribution: float
    score: float
    kept: bool = False
    why: str = ""


@dataclass(frozen=True)
class Choice:
    """What :func:`fit_auto` chose, and why.

    Attributes:
        correction: to be given to :func:`ptqd.correct`.
        trials: every candidate that ran, in order.
        steps: what each step keeps of the one that was taken; empty for no correction.
        checked: samples that each candidate ran.
    """

    correction: Correction
    trials: tuple[Trial, ...]
    steps: tuple[StepGate, ...]
    checked: int

    @property
    def name(self) -> str:
        """Of the candidate that was taken."""
        return next(trial.name for trial in self.trials if trial.kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Choice":
        """The inverse of :meth:`to_dict`, also after JSON."""
        return cls(
            Correction.from_dict(values["correction"]),
            tuple(Trial(**trial) for trial in values["trials"]),
            tuple(StepGate(**step) for step in values["steps"]),
            values["checked"],
        )


def fit_auto(
    qpipe: DiffusionPipeline, stats: NoiseStats, run: Sampling, *, batch: int | None = None, progress: bool = False
) -> Choice:
    """Find the correction that helps most, or none.

    Args:
        qpipe: the pipeline the statistics were measured on.
        stats: of at least 16 samples or so; fewer give the trajectories nothing to be checked against.
        run: how it samples, as it was measured.
        batch: samples at once, if not the run's.
        progress: show a bar.

    Raises:
        MismatchError: the statistics are of another model, scheduler, guidance scale or number of steps, or of other
            seeds.
        InputError: too few samples, or statistics that whole trajectories cannot be checked against.
    """
    apart = run.apart("measuring")
    check_source(qpipe, stats.source)
    for fact, value in (("seed", apart.seed), ("steps", run.steps), ("guidance", guidance_of(qpipe, run))):
        if stats.source.get(fact) != value:
            raise MismatchError(
                f"the statistics were measured with another {fact}; give the run they were measured with"
            )
    indices = stats.final_indices.tolist()
    if len(indices) < MIN_CHECKED:
        raise InputError(
            f"{len(indices)} full-precision samples to check against are too few; measure at least 16, in open loop"
        )
    return _Search(qpipe, stats, apart, indices, batch or run.batch, progress).best()


class _Search:
    def __init__(
        self,
        qpipe: DiffusionPipeline,
        stats: NoiseStats,
        run: Sampling,
        indices: list[int],
        batch: int,
        progress: bool,
    ) -> None:
        self.qpipe, self.stats, self.run, self.progress = qpipe, stats, run, progress
        self.batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        self.reference = stats.finals.double()
        self.axis = stats.source.get("channel_axis", channel_axis(self.reference))
        self.wanted = features(self.reference, self.axis)
        self.found: dict[Candidate, torch.Tensor] = {}
        self.plain = Candidate("none", ())
        self.chosen_on = torch.arange(len(indices)) % 2 == 0

    def best(self) -> Choice:
        draws = self.stats.response.draws
        variance = "vsc" if draws else None
        self._try(self.plain)
        self._try(Candidate("cnc+bc", ("cnc", "bc")))
        last: Candidate | None = None
        for n in range(len(COHERENCES)):
            ours = Candidate(
                f"joint L<={COHERENCES[n]:g}",
                ("joint", *([variance] if variance else [])),
                COHERENCES[: n + 1],
                variance,
            )
            if not self._try(ours) or (last is not None and self._score(ours) > self._score(last)):
                break
            last = ours
        top = min(self.found, key=self._score)
        if top is not self.plain:
            for other in (None,) if draws else ("dns", "stepbaq"):
                mean = tuple(m for m in top.methods if m != top.variance)
                name = f"{top.name}, all noise drawn" if other is None else f"{top.name}, {other}"
                if top.variance != other:
                    self._try(replace(top, name=name, methods=(*mean, *([other] if other else [])), variance=other))
        return self._choice()

    def _try(self, candidate: Candidate) -> bool:
        """Run a candidate's trajectories; False where it cannot be made, or keeps nothing."""
        pipe = self.qpipe
        if candidate.methods:
            try:
                correction, steps = self._correction(candidate, half=0)
            except InputError as error:
                logger.info("%s is left out: %s", candidate.name, error)
                return False
            if all(step.kept == "nothing" for step in steps):
                return False
            pipe = correct(pipe, correction)
        elif hasattr(pipe.scheduler, "correction"):
            pipe = correct(pipe, self._correction(candidate, half=0)[0])
        title = f"trying {candidate.name}" if self.progress else None
        ends = [final_samples(pipe, self.run, batch) for batch in track(self.batches, title)]
        self.found[candidate] = torch.cat(ends).double()
        return True

    def _correction(self, candidate: Candidate, half: int | None) -> tuple[Correction, list[StepGate]]:
        estimate, steps = gated(self.stats, candidate.estimators, half)
        methods = candidate.methods
        return compose(self.stats, methods, estimate, candidate.variance, correlated=True), steps

    def _errors(self, candidate: Candidate) -> torch.Tensor:
        return (self.found[candidate] - self.reference).square().flatten(1).mean(1)

    def _log_ratios(self, candidate: Candidate) -> torch.Tensor:
        """Log of each sample's squared distance against no correction's (n,)."""
        floor = 1e-9 * self.reference.var()
        return ((self._errors(candidate) + floor) / (self._errors(self.plain) + floor)).log()

    def _log_distribution(self, candidate: Candidate, kept: torch.Tensor) -> float:
        mine, plain = (
            distribution_distance(features(self.found[c], self.axis)[kept], self.wanted[kept])
            for c in (candidate, self.plain)
        )
        return math.log((mine + RESOLUTION) / (plain + RESOLUTION))

    def _score(self, candidate: Candidate) -> float:
        on = self.chosen_on
        return float(self._log_ratios(candidate)[on].mean()) + self._log_distribution(candidate, on)

    def _refuted(self, candidate: Candidate) -> str:
        """Why the samples that did not choose it speak against a candidate; empty if they do not."""
        held = ~self.chosen_on
        ratios = self._log_ratios(candidate)[held]
        quantile = float(scipy_stats.t.ppf(0.95, len(ratios) - 1))
        high = ratios.mean() + quantile * ratios.std() / len(ratios) ** 0.5
        if high >= 0:
            return f"its distance may be up to {float(high.exp()):.2f} of that without"
        n = int(held.sum())
        whole = self._log_distribution(candidate, held)
        without = torch.tensor(
            [
                self._log_distribution(candidate, held & (torch.arange(len(held)) != i))
                for i in held.nonzero().flatten().tolist()
            ]
        )
        error = ((n - 1) * without.var(unbiased=False)).sqrt()
        if whole - quantile * error > 0:
            return f"the samples' distribution is {math.exp(whole):.2f} times as far off as without"
        return ""

    def _choice(self) -> Choice:
        order = sorted(self.found, key=self._score)
        why: dict[Candidate, str] = {}
        taken = self.plain
        for candidate in order:
            if candidate is self.plain:
                break
            against = self._refuted(candidate)
            if not against:
                taken = candidate
                break
            why[candidate] = against
        why[taken] = "nothing better held" if taken is self.plain else "the best that held on other samples"
        trials = [
            Trial(
                c.name,
                float(self._errors(c).mean()),
                float(self._log_ratios(c).mean().exp()),
                distribution_distance(features(self.found[c], self.axis), self.wanted),
                self._score(c),
                c == taken,
                why.get(c, "" if c is self.plain else "another scored better"),
            )
            for c in self.found
        ]
        correction, steps = self._correction(taken, half=None)
        if taken is self.plain:
            steps = []
        return Choice(correction, tuple(trials), tuple(steps), len(self.reference))


def features(samples: torch.Tensor, axis: int) -> torch.Tensor:
    """What a distribution of samples is judged by: each channel's mean, and its log energy in bands of frequency.

    Args:
        samples: (N, C, ...) or (N, L, C); bands where the last two axes are a picture's, else one.
        axis: of the channels.

    Returns:
        (N, F), float64; the means in units of the channel's deviation.
    """
    x = samples.double().movedim(axis, 1)
    flat = x.flatten(2)
    mean = flat.mean(2) / flat.std((0, 2)).clamp(min=1e-9)
    if x.ndim < 4:
        return torch.cat([mean, (flat.var(2) + 1e-12).log()], dim=1)
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x, norm="forward").abs().square()
    ky, kx = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    radius = (ky[:, None] ** 2 + kx[None, :] ** 2).sqrt()
    parts = [mean]
    for low, high in itertools.pairwise(torch.linspace(0, float(radius.max()) + 1e-6, BANDS + 1)):
        inside = (radius >= low) & (radius < high) & (radius > 0)
        if bool(inside.any()):
            parts.append((power[..., inside].flatten(2).mean(2) + 1e-12).log())
    return torch.cat(parts, dim=1)


def distribution_distance(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    """By how much features (N, F) are shifted against those of the same seeds: mean square of the shifts.

    Each shift is the mean over samples without the tenth at either end: what happens to most samples, not what a
    single one that went astray does. A correction that smooths shows as lost energy, whatever it does to the error.
    """
    shifts = scipy_stats.trim_mean((mine - wanted).numpy(), 0.1, axis=0)
    return float((shifts**2).mean())


def describe(trials: Sequence[Trial]) -> list[str]:
    """One line a trial, for the terminal."""
    return [
        f"{'*' if t.kept else ' '} {t.name:34s} mse {t.error:.4g}  ratio {t.ratio:.3f}  "
        f"distribution {t.distribution:.3g}  score {t.score:+.2f}  {t.why}"
        for t in trials
    ]
