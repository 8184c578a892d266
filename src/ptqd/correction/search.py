"""``auto``: the correction that helps this pipeline most, each candidate judged itself on whole trajectories.

1. ``trajectory`` (:mod:`ptqd.correction.trajectory`) is fitted along up to 64 samples, each walked with what others
   give: that walk is its trial. It chooses among PTQD's estimate, ours and its own, step by step.
2. The others are: none, the paper's plain CNC and BC, the same with a slope for each channel where slopes differ, the
   same gated step by step where the gate leaves some out, and ``joint``. They run whole trajectories of the first 8
   samples, and unless ``trajectory`` is ahead beyond doubt of 8 more, those of even folds corrected by what the odd
   folds' statistics give and the other way round, so that nothing is judged on what it was fitted on (but which steps
   ``joint`` keeps follows from all). Where one of them is ahead of ``trajectory``, it runs with each method for the
   variance that the scheduler allows, and with its energy mended along the trajectory (``energy``); the best two run
   16 samples more.
3. Two measures, both against no correction: the mean squared distance to the same seed's full-precision sample (its
   geometric mean: no sample that went astray leads), and how far energy, by channel and band of frequency, is shifted.
   A smaller error alone is not enough: an estimate shrinks, and samples that are all too smooth are near to everything.
   The score is the sum of both measures' logarithms, the second's by a quarter, over the samples that two candidates
   share. In 53 corrections of 20 pipelines (docs/corrections) the Frechet distance to full precision went with the
   first by 0.7 of its logarithm, with the second by 0.1.
4. The one with the best score is taken; but ``trajectory`` unless another is better by more than two standard errors
   (the best of several leads by one by chance alone), and no correction where nothing is better by a tenth. What is
   taken is fitted on all samples.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.correction.correction import Correction
from ptqd.correction.fit import COHERENCES, ENERGY, TRAJECTORY, compose, mean_estimator, split_methods
from ptqd.correction.gate import StepGate, every_step, gated, gated_cnc_bc
from ptqd.correction.methods.cnc_bc import CHANNEL, differs_by_channel
from ptqd.correction.sample_features import by_chance, distribution_distance, features, jackknife_error
from ptqd.correction.scheduler import apply_correction
from ptqd.correction.step_batch import StepBatch
from ptqd.correction.trajectory import HalfEstimate, TrajectoryFit, check_run, fit_energy, fit_trajectory, of_halves
from ptqd.diffusion.in_step import Arrival, run_in_step
from ptqd.diffusion.pipeline_parts import channel_axis, plain_scheduler, with_components
from ptqd.diffusion.sampling import Sampling
from ptqd.diffusion.trajectory import final_samples, whole_samples
from ptqd.errors import ArtifactError, InputError, PtqdError
from ptqd.files import read_json
from ptqd.noise.regression import POWERS
from ptqd.noise.second_moments import fold_of
from ptqd.noise.stats import NoiseStats
from ptqd.progress import busy
from ptqd.schema import nan_for_null, typed

logger = logging.getLogger(__name__)

MIN_CHECKED = 8
QUICK = 8  # samples by which a candidate that is far behind the trajectory's is dropped
FAR = 3.0  # standard errors
FIRST = 16  # samples that every other candidate runs
MORE = 32  # that the best run where they are alike
ENOUGH_CHECKED = 64  # samples by which a correction that helps is told from one that does not
RESOLUTION = 1e-6
ENERGY_WEIGHT = 0.25
SURE = 2.0  # standard errors by which another has to lead
LEVEL = 0.1  # of the score: by less than that candidates are alike
NONE = "none"


@dataclass(frozen=True)
class Candidate:
    """A way to correct.

    Attributes:
        name: for the record.
        methods: as :func:`ptqd.fit_correction` takes them.
        gate: whether cnc and bc are kept step by step only where they are told from chance.
    """

    name: str
    methods: tuple[str, ...]
    gate: bool = False


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
        score: log of ``ratio`` plus a quarter of the log of ``distribution``, and what it would be by chance, against
            no correction's; 0 for no correction, less is better.
        kept: whether it is the one that was taken.
        why: what it was taken or dropped for.
        samples: that it ran.
    """

    name: str
    error: float
    ratio: float
    distribution: float
    score: float
    kept: bool = False
    why: str = ""
    samples: int = 0


@dataclass(frozen=True)
class CorrectionSearch:
    """What :func:`search_correction` chose, and why.

    Attributes:
        correction: to be given to :func:`ptqd.correct`.
        trials: every candidate that ran, in order.
        steps: what each step keeps of the one that was taken; empty for no correction.
        checked: samples that the one that was taken ran.
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
    def load(cls, path: str | Path) -> "CorrectionSearch":
        """From a JSON file of :meth:`to_dict`.

        Raises:
            ArtifactError: it does not fit.
        """
        return cls.from_dict(read_json(Path(path)))


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
        batch: samples at once; at most 16 of the run's where it is not given.
        progress: show a bar.

    Raises:
        MismatchError: the statistics are of another model, scheduler, guidance scale or number of steps, or of other
            seeds or arguments of the call.
        InputError: too few samples, or statistics that whole trajectories cannot be checked against.
    """
    check_run(qpipe, stats, sampling)
    indices = stats.final_indices.tolist()
    if not bool(torch.isfinite(stats.finals).all()):
        raise InputError("the full-precision samples hold NaN or infinite values; try a wider dtype")
    if len(indices) < MIN_CHECKED:
        raise InputError(
            f"{len(indices)} full-precision samples to check against are too few; measure at least {MIN_CHECKED}, in "
            "open loop"
        )
    return _Search(qpipe, stats, sampling, batch, progress).best()


def fit_along_runs(
    qpipe: DiffusionPipeline, stats: NoiseStats, sampling: Sampling, methods: Sequence[str]
) -> CorrectionSearch:
    """Named methods that are fitted along runs, without a search but in the form of one.

    Raises:
        MismatchError: as :func:`ptqd.correction.trajectory.fit_trajectory`.
        InputError: likewise; or methods that do not go together.
    """
    candidate = Candidate("+".join(methods), tuple(methods))
    mean, _ = split_methods(methods)
    if mean == (TRAJECTORY,):
        walk = fit_trajectory(qpipe, stats, sampling)
        steps = walk.steps
    else:
        walk = fit_energy(qpipe, stats, sampling, mean, _estimate(stats, candidate))
        steps = tuple(_steps(stats, candidate))
    error = float((walk.finals.double() - stats.finals[: len(walk.finals)].double()).square().mean())
    unknown = float("nan")
    trial = Trial(candidate.name, error, unknown, unknown, unknown, True, "named", len(walk.finals))
    return CorrectionSearch(walk.correction, (trial,), steps, len(walk.finals))


def _estimate(stats: NoiseStats, candidate: Candidate) -> HalfEstimate:
    mean, _ = split_methods(candidate.methods)
    if candidate.gate:
        return lambda half: gated_cnc_bc(stats, half)[0]
    if mean == ("joint",):
        return lambda half: gated(stats, COHERENCES, half)[0]
    return of_halves(stats, mean_estimator(mean))


def _steps(stats: NoiseStats, candidate: Candidate) -> list[StepGate]:
    """What each step keeps of it."""
    mean, _ = split_methods(candidate.methods)
    if candidate.gate:
        return gated_cnc_bc(stats)[1]
    if mean == ("joint",):
        return gated(stats, COHERENCES)[1]
    return every_step(stats, "+".join(mean), mean_estimator(mean)) if mean else []


def _with(candidate: Candidate, method: str) -> Candidate:
    return replace(candidate, name=f"{candidate.name}+{method}", methods=(*candidate.methods, method))


class _Search:
    def __init__(
        self, qpipe: DiffusionPipeline, stats: NoiseStats, sampling: Sampling, batch: int | None, progress: bool
    ) -> None:
        self.qpipe, self.stats, self.sampling, self.progress = qpipe, stats, sampling, progress
        self.run = sampling.with_seed_for("measuring")
        self.batch = batch or min(sampling.batch, processes.SHARED_BATCH)
        self.indices = stats.final_indices
        self.reference = stats.finals.double()
        axis = stats.measured_on.channel_axis
        self.axis = channel_axis(self.reference) if axis is None else axis
        self.wanted = features(self.reference, self.axis, self.reference)
        self.errors: dict[Candidate, torch.Tensor] = {}  # of its first samples, to their full-precision ends (n,)
        self.shifts: dict[Candidate, torch.Tensor] = {}  # of their features (n, F)
        self.plain = Candidate(NONE, ())
        self.fitted = Candidate(TRAJECTORY, (TRAJECTORY,))
        self.behind: set[Candidate] = set()
        self.walks: dict[Candidate, TrajectoryFit] = {}

    def best(self) -> CorrectionSearch:
        if not bool(self.stats.moments[..., [n for n, (_, j) in enumerate(POWERS) if j]].any()):  # nothing was lost
            self._race([self.plain], min(FIRST, len(self.indices)))
            return self._choice(self.plain)
        self._walk(self.fitted, len(self.indices))
        known = len(self.errors.get(self.fitted, self.indices))  # of large samples few trajectories are kept
        first, more = min(FIRST, known), min(MORE, known)
        means = self._means()
        if self.fitted in self.errors and first > QUICK:
            self._race([self.plain, *means], QUICK)
            means = [c for c in means if c in self.errors]
            self.behind = {c for c in means if self._is_far_behind(c)}
        self._race([self.plain, *(c for c in means if c not in self.behind)], first)
        leader = self._leader(first)
        if self._leads(leader, first):
            self._race([_with(leader, method) for method in self._variances()], first)
            self._walk(_with(leader, ENERGY), more)
            leader = self._leader(first)
            if more > first:
                rivals = [c for c in (leader, self._runner_up(first)) if c is not self.fitted]
                self._race(rivals, more)
                leader = self._leader(first)  # what ran away on the further samples is gone
        finalists = [c for c in self.errors if len(self.errors[c]) >= more] if self._leads(leader, first) else []
        count = more if len(finalists) > 1 else first
        taken = min(finalists or self._rivals(), key=lambda c: self._score(c, count))
        if self.fitted in self.errors and not self._worse(self.fitted, taken, count, SURE):
            taken = self.fitted
        if not self._worse(self.plain, taken, first) and more > first:
            self._race([c for c in dict.fromkeys((self.plain, taken)) if len(self.errors[c]) < more], more)
        if taken not in self.errors or self._score(taken, min(more, len(self.errors[taken]))) > -LEVEL:
            taken = self.plain
        return self._choice(taken)

    def _leader(self, count: int) -> Candidate:
        return min(self._rivals(), key=lambda c: self._score(c, count))

    def _rivals(self) -> list[Candidate]:
        return [c for c in self.errors if c not in self.behind]

    def _is_far_behind(self, candidate: Candidate) -> bool:
        """Whether it is behind the trajectory's beyond doubt, in distance and in the whole score."""
        farther = (self.errors[candidate][:QUICK] / self.errors[self.fitted][:QUICK]).log()
        surely = float(farther.mean()) > FAR * float(farther.std()) / QUICK**0.5
        return surely and self._score(candidate, QUICK) > self._score(self.fitted, QUICK) + LEVEL

    def _leads(self, candidate: Candidate, count: int) -> bool:
        """Whether a candidate is ahead of the trajectory's by more than next to nothing."""
        if candidate in (self.plain, self.fitted):
            return False
        return self.fitted not in self.errors or self._score(candidate, count) < self._score(self.fitted, count) - LEVEL

    def _runner_up(self, count: int) -> Candidate:
        return sorted(self._rivals(), key=lambda c: self._score(c, count))[1]

    def _means(self) -> list[Candidate]:
        """Candidates for the mean, that differ for these statistics."""
        plain = Candidate("cnc+bc", ("cnc", "bc"))
        channels = Candidate(f"{CHANNEL}+bc", (CHANNEL, "bc"))
        steps = _steps(self.stats, replace(plain, gate=True))
        apart = differs_by_channel(self.stats)
        result = [plain, *([channels] if apart else [])]
        kept = [step.kept for step in steps]
        if any(name != "cnc+bc" for name in kept) and any(name != "nothing" for name in kept):
            result.append(Candidate("cnc+bc, gated", ("cnc", "bc"), gate=True))
        return [*result, Candidate("joint", ("joint",))]

    def _variances(self) -> tuple[str, ...]:
        return ("vsc",) if self.stats.response.draws else ("dns", "stepbaq")

    def _walk(self, candidate: Candidate, count: int) -> None:
        """Fit a candidate along trajectories, if that can be done; the walk is its trial."""
        run = (self.qpipe, self.stats, self.sampling)
        try:
            with busy(f"fitting {candidate.name} along the trajectory" if self.progress else None):
                if candidate is self.fitted:
                    walk = fit_trajectory(*run, batch=self.batch)
                else:
                    mean, _ = split_methods(candidate.methods)
                    estimate = _estimate(self.stats, candidate)
                    walk = fit_energy(*run, mean, estimate, samples=count, batch=self.batch)
        except PtqdError as error:
            logger.info("%s is left out: %s", candidate.name, error)
            return
        if not bool(torch.isfinite(walk.finals).all()):
            logger.warning("%s is left out: its samples hold NaN or infinite values", candidate.name)
            return
        self.walks[candidate] = walk
        self._judge(candidate, walk.finals.double())

    def _race(self, candidates: Sequence[Candidate], count: int) -> None:
        """Run candidates' trajectories up to so many samples; what cannot be made or run is left out.

        Those of the mean alone run together, in the same batches.
        """
        candidates = [c for c in candidates if c not in self.walks]
        together = [c for c in candidates if split_methods(c.methods)[1] is None]
        ends = self._together(together, count) if together else {}
        for candidate in candidates:
            if candidate not in together:
                try:
                    ends[candidate] = self._apart(candidate, count)
                except PtqdError as error:
                    logger.info("%s is left out: %s", candidate.name, error)
        for candidate, samples in ends.items():
            if bool(torch.isfinite(samples).all()):
                self._judge(candidate, samples)
            elif candidate is self.plain:
                raise InputError("the quantized pipeline's samples hold NaN or infinite values; try a wider dtype")
            else:
                logger.warning("%s is left out: its samples hold NaN or infinite values", candidate.name)
                self.errors.pop(candidate, None)

    def _judge(self, candidate: Candidate, ends: torch.Tensor) -> None:
        """Note what a candidate's next samples came to."""
        done = len(self.errors.get(candidate, ()))
        part = slice(done, done + len(ends))
        errors = (ends - self.reference[part]).square().flatten(1).mean(1) + 1e-9 * self.reference.var()
        shifts = features(ends, self.axis, self.reference) - self.wanted[part]
        errors, shifts = processes.as_main((errors, shifts))
        if done:
            errors, shifts = torch.cat([self.errors[candidate], errors]), torch.cat([self.shifts[candidate], shifts])
        self.errors[candidate], self.shifts[candidate] = errors, shifts

    def _together(self, candidates: Sequence[Candidate], count: int) -> dict[Candidate, torch.Tensor]:
        """Final samples of candidates for the mean; every batch holds samples of several."""
        entries = [(c, i) for c in candidates for i in range(len(self.errors.get(c, ())), count)]
        batches = [entries[i : i + self.batch] for i in range(0, len(entries), self.batch)]
        half = [1 - n % 2 for n in fold_of(self.indices).tolist()]  # of the statistics that a sample is corrected by
        estimates = {(c, h): _estimate(self.stats, c)(h) for c in candidates for h in (0, 1) if c.methods}

        def decide(step: int, arrivals: Sequence[Arrival]) -> list[torch.Tensor]:
            outputs = []
            with processes.failing_alike():
                for arrival, batch in zip(arrivals, processes.mine(batches), strict=True):
                    rows = StepBatch(arrival, self.stats, len(batch))
                    places: dict[tuple[Candidate, int], list[int]] = {}
                    for place, (candidate, i) in enumerate(batch):
                        places.setdefault((candidate, half[i]), []).append(place)
                    own = ((torch.tensor(at), estimates[key].at(step)) for key, at in places.items() if key[0].methods)
                    rows.correct(own, self.stats.layout)
                    outputs.append(rows.full_output())
            return outputs

        plain = with_components(self.qpipe, scheduler=plain_scheduler(self.qpipe.scheduler))
        indices = [[int(self.indices[i]) for _, i in batch] for batch in batches]
        title = f"trying {', '.join(c.name for c in candidates)}" if self.progress else None
        with busy(title):
            ends = run_in_step(plain, self.run, indices, decide)
        each = self.reference[0].numel() // ends[0][0].numel()
        samples = [whole_samples(rows, len(batch), each).cpu() for rows, batch in zip(ends, batches, strict=True)]
        found: dict[Candidate, list[torch.Tensor]] = {c: [] for c in candidates}
        for (candidate, _), sample in zip(entries, torch.cat(samples), strict=True):
            found[candidate].append(sample)
        return {c: torch.stack(each).double() for c, each in found.items()}

    def _apart(self, candidate: Candidate, count: int) -> torch.Tensor:
        """Final samples of one candidate."""
        part = torch.arange(len(self.errors.get(candidate, ())), count)
        ends: dict[int, torch.Tensor] = {}
        parity = fold_of(self.indices[part]) % 2
        for half in (0, 1):
            pipe = apply_correction(self.qpipe, self._correction(candidate, 1 - half))
            with busy(f"trying {candidate.name}" if self.progress else None):
                batches = [batch for batch in part[parity == half].split(self.batch) if len(batch)]

                def run(batch: torch.Tensor, pipe: DiffusionPipeline = pipe) -> torch.Tensor:
                    return final_samples(pipe, self.run, self.indices[batch].tolist())

                found = processes.spread(run, processes.mine(batches))
                for batch, samples in zip(batches, found, strict=True):
                    ends |= dict(zip(batch.tolist(), samples, strict=True))
        return torch.stack([ends[i] for i in part.tolist()]).double()

    def _correction(self, candidate: Candidate, half: int | None = None) -> Correction:
        estimate = _estimate(self.stats, candidate)(half)
        return compose(self.stats, candidate.methods, estimate, split_methods(candidate.methods)[1])

    def _ratios(self, candidate: Candidate, count: int) -> torch.Tensor:
        """Log of each sample's squared distance against no correction's (count,)."""
        return (self.errors[candidate][:count] / self.errors[self.plain][:count]).log()

    def _score(self, candidate: Candidate, count: int) -> float:
        """Against no correction, on as many samples as both ran."""
        on = torch.arange(min(count, len(self.errors[self.plain])))
        return self._absolute(candidate, on) - self._absolute(self.plain, on)

    def _absolute(self, candidate: Candidate, on: torch.Tensor) -> float:
        """Log of the distance plus a quarter of that of the shift of energy, which is at least what chance gives."""
        shifts = self.shifts[candidate][on]
        shift = distribution_distance(shifts) + by_chance(shifts) + RESOLUTION
        return float(self.errors[candidate][on].log().mean()) + ENERGY_WEIGHT * math.log(shift)

    def _difference(self, candidate: Candidate, than: Candidate, count: int) -> tuple[float, float]:
        """By how much a candidate's score is worse, and the standard error of that."""
        on = torch.arange(count)
        differences = [
            self._absolute(candidate, remaining) - self._absolute(than, remaining)
            for remaining in (on, *(on[on != i] for i in range(count)))
        ]
        return differences[0], jackknife_error(torch.tensor(differences[1:]))

    def _worse(self, candidate: Candidate, than: Candidate, count: int, errors: float = 1.0) -> bool:
        difference, error = self._difference(candidate, than, count)
        return difference > errors * error

    def _why(self, candidate: Candidate, taken: Candidate) -> str:
        count = min(len(self.errors[candidate]), len(self.errors[taken]))
        if candidate is taken:
            if taken is not self.plain:
                return f"the best of {count} samples"
            better = any(self._score(c, min(count, len(self.errors[c]))) < 0 for c in self.errors)
            few = f" on {len(self.indices)} samples, which are few to tell by: measure {ENOUGH_CHECKED}"
            return "nothing is better by a tenth" + (few if better and len(self.indices) < ENOUGH_CHECKED else "")
        difference, error = self._difference(candidate, taken, count)
        if difference > 0:
            return f"worse on {count} samples" + ("" if difference > error else ", by less than the standard error")
        less = "a tenth" if taken is self.plain else "two standard errors"
        return f"better on {count} samples, by less than {less}"

    def _choice(self, taken: Candidate) -> CorrectionSearch:
        trials = [
            Trial(
                c.name,
                float(self.errors[c].mean()),
                float(self._ratios(c, count).mean().exp()),
                distribution_distance(self.shifts[c][:count]),
                self._score(c, count),
                c is taken,
                self._why(c, taken),
                len(self.errors[c]),
            )
            for c in self.errors
            for count in [min(len(self.errors[c]), len(self.errors[self.plain]))]
        ]
        walk = self.walks.get(taken)
        correction = self._correction(taken) if walk is None else walk.correction
        steps = _steps(self.stats, taken) if walk is None or taken is not self.fitted else walk.steps
        return CorrectionSearch(correction, tuple(trials), tuple(steps), len(self.errors[taken]))


def describe(trials: Sequence[Trial]) -> list[str]:
    """One line a trial, for the terminal."""
    return [
        f"{'*' if t.kept else ' '} {t.name:34s} mse {t.error:.4g}  ratio {t.ratio:.3f}  "
        f"distribution {t.distribution:.3g}  score {t.score:+.2f}  {t.why}"
        for t in trials
    ]
