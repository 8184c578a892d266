"""``auto``: the method and strength that help this pipeline most, checked on whole trajectories.

1. Every candidate is gated step by step (:mod:`ptqd.correction.gate`): fitted on one half of the samples, judged on
   the other.
2. Candidates run whole trajectories of samples whose full-precision ends the statistics hold. Their estimates are
   fitted on the other half of the samples; which steps keep them, and what remains for the variance, follows from all.
   Two measures, both against no correction: the mean squared distance to the same seed's
   full-precision sample (its geometric mean: no sample that went astray leads), and how far energy, by channel and band
   of frequency, is shifted. A smaller error alone is not enough: an estimate shrinks, and samples that are all too
   smooth are near to everything. The score is the sum of both measures' logarithms.
3. The weight L of withheld signal rises until the score worsens by more than its standard error. Of weights that score
   alike within one standard error the largest is taken, which withholds least; another way with the residual's
   variance than the usual must be better by as much.
4. What is chosen this way on either half of the checked samples must hold on the other: the upper 95 % bound of the
   paired difference of distances must be below 0, and the shift of energy not significantly larger. Else the candidate
   is dropped and the next best stands trial, in the end no correction. What is taken is fitted anew on all samples.
"""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from scipy import stats as scipy_stats

from ptqd.correction.correction import Correction
from ptqd.correction.fit import compose, joint_estimators, mean_estimator
from ptqd.correction.gate import StepGate, gated
from ptqd.correction.scheduler import apply_correction, check_measured_on
from ptqd.diffusion.pipeline_parts import channel_axis
from ptqd.diffusion.sampling import Sampling, guidance_of
from ptqd.diffusion.trajectory import final_samples
from ptqd.errors import ArtifactError, InputError, MismatchError, PtqdError
from ptqd.files import read_json
from ptqd.noise.second_moments import Estimator
from ptqd.noise.stats import NoiseStats
from ptqd.progress import track
from ptqd.schema import nan_for_null, typed

logger = logging.getLogger(__name__)

COHERENCES = (1.0, 2.0, 4.0, 8.0, 16.0)
MIN_CHECKED = 4
ENOUGH_CHECKED = 64  # samples by which a correction that helps is told from one that does not
BANDS = 4
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A way to correct: estimators of the mean, the later preferred where they help, and a method for the variance."""

    name: str
    methods: tuple[str, ...]
    coherences: tuple[float, ...] = ()
    variance: str | None = None
    variant_of: str | None = None  # the candidate it differs from in what it does with the variance

    @property
    def estimators(self) -> dict[str, Estimator]:
        """By name; none for no correction."""
        mean = tuple(m for m in self.methods if m != self.variance)
        if self.coherences:
            return joint_estimators(self.coherences)
        return {"+".join(mean): mean_estimator(mean)} if mean else {}


NUMBERS = ("error", "ratio", "distribution", "score", "gain", "half_width")  # which may be infinite or NaN


@dataclass(frozen=True)
class Trial:
    """What a candidate's whole trajectories came to, on samples that its estimate was not fitted on.

    Attributes:
        name: of the candidate.
        error: mean squared distance of the final samples to the full-precision ones.
        ratio: geometric mean over samples of that distance against no correction's.
        distribution: how far the samples' energy and means are shifted against the full-precision ones'; see
            :func:`distribution_distance`.
        score: log of ``ratio`` plus log of ``distribution`` against no correction's; 0 for no correction, less is
            better.
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
class CorrectionSearch:
    """What :func:`search_correction` chose, and why.

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
        return asdict(self) | {"correction": self.correction.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CorrectionSearch":
        """The inverse of :meth:`to_dict`, also after JSON."""
        plain = typed(nan_for_null(values, NUMBERS), _Stored, "the searched correction")
        if not any(trial.kept for trial in plain.trials):
            raise ArtifactError("the searched correction names no candidate that was taken; search it again")
        return cls(Correction.from_dict(plain.correction), plain.trials, plain.steps, plain.checked)

    @classmethod
    def load(cls, path: Path) -> "CorrectionSearch":
        """From a JSON file of :meth:`to_dict`.

        Raises:
            ArtifactError: it does not fit.
        """
        return cls.from_dict(read_json(path))


@dataclass(frozen=True)
class _Stored:
    """A search, as JSON has it."""

    correction: dict[str, Any]
    trials: tuple[Trial, ...]
    steps: tuple[StepGate, ...]
    checked: int


def search_correction(
    qpipe: DiffusionPipeline, stats: NoiseStats, sampling: Sampling, *, batch: int | None = None, progress: bool = False
) -> CorrectionSearch:
    """Find the correction that helps most, or none.

    Args:
        qpipe: the pipeline the statistics were measured on.
        stats: of at least 16 samples or so; fewer give the trajectories nothing to be checked against.
        sampling: how it samples, as it was measured.
        batch: samples at once, if not the run's.
        progress: show a bar.

    Raises:
        MismatchError: the statistics are of another model, scheduler, guidance scale or number of steps, or of other
            seeds or arguments of the call.
        InputError: too few samples, or statistics that whole trajectories cannot be checked against.
    """
    apart = sampling.with_seed_for("measuring")
    check_measured_on(qpipe, stats.measured_on)
    required = {
        "seed": apart.seed,
        "steps": sampling.steps,
        "guidance": guidance_of(qpipe, sampling),
        "inputs": sampling.inputs_digest,
    }
    if stats.measured_on.interpolated_from is not None:
        raise InputError("statistics carried over to other steps have no full-precision samples to check against")
    for fact, value in required.items():
        if getattr(stats.measured_on, fact) != value:
            what = "arguments of the call (--call, --shared)" if fact == "inputs" else f"another {fact}"
            raise MismatchError(
                f"the statistics were measured with {'other ' * (fact == 'inputs')}{what}; give the run they were "
                "measured with"
            )
    indices = stats.final_indices.tolist()
    if not stats.measured_on.repeatable and (stats.response.draws or not stats.response.exact):
        raise InputError(
            f"{type(qpipe).__name__} hands its scheduler no generator, so a sample's noise depends on its batch and no "
            "trajectory can be checked; name methods instead, such as cnc,bc"
        )
    if not bool(torch.isfinite(stats.finals).all()):
        raise InputError("the full-precision samples hold NaN or infinite values; try a wider dtype")
    if len(indices) < MIN_CHECKED:
        raise InputError(
            f"{len(indices)} full-precision samples to check against are too few; measure at least 16, in open loop"
        )
    return _Search(qpipe, stats, apart, indices, batch or sampling.batch, progress).best()


class _Search:
    def __init__(
        self,
        qpipe: DiffusionPipeline,
        stats: NoiseStats,
        sampling: Sampling,
        indices: list[int],
        batch: int,
        progress: bool,
    ) -> None:
        self.qpipe, self.stats, self.run, self.progress = qpipe, stats, sampling, progress
        self.batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
        self.reference = stats.finals.double()
        axis = stats.measured_on.channel_axis
        self.axis = channel_axis(self.reference) if axis is None else axis
        self.wanted = features(self.reference, self.axis)
        self.errors: dict[Candidate, torch.Tensor] = {}  # of each sample, to its full-precision end (n,)
        self.shifts: dict[Candidate, torch.Tensor] = {}  # of each sample's features (n, F)
        self.plain = Candidate("none", ())
        self.all = torch.arange(len(indices))

    def best(self) -> CorrectionSearch:
        draws = self.stats.response.draws
        usual = "vsc" if draws else None
        self._try(self.plain)
        self._try(Candidate("cnc+bc", ("cnc", "bc")))
        for n, most in enumerate(COHERENCES):
            methods = ("joint", *([usual] if usual else []))
            ours = Candidate(f"joint L<={most:g}", methods, COHERENCES[: n + 1], usual)
            if not self._try(ours):
                break
            top = min(self.errors, key=lambda c: self._score(c, self.all))
            if top.coherences and self._worse(ours, top, self.all):
                break
        top = self._pick(set(self.errors), self.all)
        if top is not self.plain:
            mean = tuple(m for m in top.methods if m != top.variance)
            for other in (None, "vsc") if draws else ("dns", "stepbaq"):
                if other != top.variance:
                    name = f"{top.name}, {other or 'all noise drawn'}"
                    methods = (*mean, *([other] if other else []))
                    self._try(replace(top, name=name, methods=methods, variance=other, variant_of=top.name))
        return self._choice()

    def _try(self, candidate: Candidate) -> bool:
        """Run a candidate's trajectories; False where it cannot be made or run, or keeps nothing."""
        if candidate is self.plain:
            ends = self._ends(candidate, self._correction(candidate, half=0)[0])
            if not bool(torch.isfinite(ends).all()):
                raise InputError("the quantized pipeline's samples hold NaN or infinite values; try a wider dtype")
        else:
            try:
                correction, steps = self._correction(candidate, half=0)
                if all(step.kept == "nothing" for step in steps):
                    return False
                ends = self._ends(candidate, correction)
            except PtqdError as error:
                logger.info("%s is left out: %s", candidate.name, error)
                return False
            if not bool(torch.isfinite(ends).all()):
                logger.warning("%s is left out: its samples hold NaN or infinite values", candidate.name)
                return False
        self.errors[candidate] = (ends - self.reference).square().flatten(1).mean(1) + 1e-9 * self.reference.var()
        self.shifts[candidate] = features(ends, self.axis) - self.wanted
        return True

    def _ends(self, candidate: Candidate, correction: Correction) -> torch.Tensor:
        pipe = apply_correction(self.qpipe, correction)
        title = f"trying {candidate.name}" if self.progress else None
        return torch.cat([final_samples(pipe, self.run, batch) for batch in track(self.batches, title)]).double()

    def _correction(self, candidate: Candidate, half: int | None) -> tuple[Correction, list[StepGate]]:
        estimate, steps = gated(self.stats, candidate.estimators, half)
        return compose(self.stats, candidate.methods, estimate, candidate.variance, correlated=True), steps

    def _ratios(self, candidate: Candidate) -> torch.Tensor:
        """Log of each sample's squared distance against no correction's (n,)."""
        return (self.errors[candidate] / self.errors[self.plain]).log()

    def _score(self, candidate: Candidate, on: torch.Tensor) -> float:
        shift = log_shift(self.shifts[candidate][on], self.shifts[self.plain][on])
        return float(self._ratios(candidate)[on].mean()) + shift

    def _worse(self, candidate: Candidate, than: Candidate, on: torch.Tensor) -> bool:
        """Whether a candidate's score is worse by more than the standard error of the difference."""
        differences = [
            self._score(candidate, remaining) - self._score(than, remaining)
            for remaining in (on, *(on[torch.arange(len(on)) != i] for i in range(len(on))))
        ]
        return differences[0] > jackknife_error(torch.tensor(differences[1:]))

    def _pick(self, candidates: set[Candidate], on: torch.Tensor) -> Candidate:
        """The best on some samples, by the rules of one standard error."""
        usual = [c for c in self.errors if c in candidates and c.variant_of is None]
        best = min(usual, key=lambda c: self._score(c, on))
        if best.coherences:
            best = max((c for c in usual if c.coherences), key=lambda c: (not self._worse(c, best, on), c.coherences))
        variants = [c for c in self.errors if c in candidates and c.variant_of == best.name]
        better = [c for c in variants if self._worse(best, c, on)]
        return min([best, *better], key=lambda c: self._score(c, on))

    def _refuted(self, candidates: set[Candidate]) -> str:
        """Why what either half of the samples chooses does not hold on the other; empty if it does."""
        halves = (self.all[::2], self.all[1::2])
        held = [(self._pick(candidates, on), other) for on, other in (halves, halves[::-1])]
        ratios = torch.cat([self._ratios(chosen)[other] for chosen, other in held])
        quantile = float(scipy_stats.t.ppf(0.95, len(ratios) - 1))
        high = ratios.mean() + quantile * ratios.std() / len(ratios) ** 0.5
        if not high < 0:
            return f"on other samples, the distance may be up to {float(high.exp()):.2f} of that without"
        mine = torch.cat([self.shifts[chosen][other] for chosen, other in held])
        plain = torch.cat([self.shifts[self.plain][other] for _, other in held])
        without = [torch.arange(len(mine)) != i for i in range(len(mine))]
        error = jackknife_error(torch.tensor([log_shift(mine[remaining], plain[remaining]) for remaining in without]))
        whole = log_shift(mine, plain)
        return (
            "" if whole <= quantile * error else f"on other samples, energy is {math.exp(whole):.2f} times as far off"
        )

    def _nothing_held(self) -> str:
        """Why no correction is taken; where samples are few, that these may be why."""
        promising = [each for each in self.errors if each is not self.plain and self._score(each, self.all) < 0]
        if promising and len(self.all) < ENOUGH_CHECKED:
            return f"nothing better held on {len(self.all)} samples, which are few to tell by: measure {ENOUGH_CHECKED}"
        return "nothing better held"

    def _choice(self) -> CorrectionSearch:
        candidates, why = set(self.errors), {}
        while True:
            taken = self._pick(candidates, self.all)
            against = "" if taken is self.plain else self._refuted(candidates)
            if not against:
                break
            why[taken] = against
            candidates.remove(taken)
        why[taken] = self._nothing_held() if taken is self.plain else "the best, and it held on other samples"
        trials = [
            Trial(
                c.name,
                float(self.errors[c].mean()),
                float(self._ratios(c).mean().exp()),
                distribution_distance(self.shifts[c]),
                self._score(c, self.all),
                c == taken,
                why.get(c, "" if c is self.plain else "not better by more than a standard error"),
            )
            for c in self.errors
        ]
        correction, steps = self._correction(taken, half=None)
        return CorrectionSearch(
            correction, tuple(trials), () if taken is self.plain else tuple(steps), len(self.reference)
        )


def log_shift(mine: torch.Tensor, plain: torch.Tensor) -> float:
    """Log of :func:`distribution_distance` against no correction's, from shifts (N, F)."""
    return math.log((distribution_distance(mine) + RESOLUTION) / (distribution_distance(plain) + RESOLUTION))


def jackknife_error(without: torch.Tensor) -> float:
    """Standard error of an estimate, from its values with each of n samples left out (n,)."""
    return float(((len(without) - 1) * without.double().var(unbiased=False)).sqrt())


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


def distribution_distance(shifts: torch.Tensor) -> float:
    """By how much a distribution is off, from the shifts of features (N, F) against those of the same seeds.

    The mean square over features of each one's shift, its mean over samples without the tenth at either end: what
    happens to most samples, not what a single one that went astray does. A correction that smooths shows as lost
    energy, whatever it does to the error.
    """
    return float((scipy_stats.trim_mean(shifts.numpy(), 0.1, axis=0) ** 2).mean())


def describe(trials: Sequence[Trial]) -> list[str]:
    """One line a trial, for the terminal."""
    return [
        f"{'*' if t.kept else ' '} {t.name:34s} mse {t.error:.4g}  ratio {t.ratio:.3f}  "
        f"distribution {t.distribution:.3g}  score {t.score:+.2f}  {t.why}"
        for t in trials
    ]
