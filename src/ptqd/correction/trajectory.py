"""``trajectory``: a correction fitted along the trajectory that it makes.

The other estimates are fitted on outputs at full-precision samples, and take nothing back of what earlier steps left in
the sample. Here the quantized pipeline is run, corrected as far as it is fitted, beside the full-precision trajectories
of the same seeds; at step i, with ``x`` the corrected sample, ``eps_q`` its output and ``x'`` the full-precision sample
after the step, drawn noise shared,

    eps* = eps_q + (x' - step_i(eps_q, x)) / O_ii,        O_ii = d x_{i+1} / d out_i

is the output that would lead to ``x'``. The estimate is the ridge regression of eps* on what the step knows
(:func:`ptqd.noise.second_moments.ridge`), shrunk towards one that the statistics gave, and the samples go on with it:
one quantized run, in closed form. History and drawn noise are those of the scheduler's own ``step``.

A step that clips is no linear one: there an estimate that the statistics gave is taken, by what the step itself makes
of it.

What a step takes is decided on samples that it was not fitted on: the samples walk in groups, each with what the other
groups' samples (for the statistics: the other half's) give. The regression is taken only where it lowers the logarithm
of the error by two standard errors; else the step has the statistics' estimate with the least error, or none. The
groups' ends are thus a fair trial of the whole correction. What is returned is fitted on all samples.

A regression shrinks, step by step, to samples that are too smooth. So each step's signal is lengthened by the factor,
one a channel, that gives the next sample the energy it has in full precision, where the two differ significantly. It
costs next to no distance: at a correlation of r with the full-precision sample, 2 (1 - r) for 1 - r^2. Where a pixel's
neighbours are known, a second factor, on what the pixel is more than their mean, gives the edges theirs. These factors
alone are of all groups' samples together.

``energy`` is these factors on an estimate that is given: of named methods, at every step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from scipy import stats as scipy_stats

from ptqd import processes
from ptqd.correction.correction import Correction
from ptqd.correction.fit import ENERGY, TRAJECTORY, compose
from ptqd.correction.gate import NOTHING, StepGate
from ptqd.correction.methods.cnc_bc import cnc_bc
from ptqd.correction.methods.joint import joint
from ptqd.correction.scheduler import check_measured_on
from ptqd.correction.step_batch import StepBatch
from ptqd.diffusion.in_step import Arrival, run_in_step
from ptqd.diffusion.pipeline_parts import plain_scheduler, with_components
from ptqd.diffusion.sampling import Sampling, guidance_of
from ptqd.diffusion.trajectory import whole_samples
from ptqd.errors import InputError, MismatchError
from ptqd.noise.second_moments import (
    Estimator,
    OutputEstimate,
    fold_of,
    joint_moments,
    mean_table,
    neighbours,
    output_errors,
    ridge,
)
from ptqd.noise.stats import NoiseStats, per_sample

GROUPS = 8  # of samples, each walked with what the others fit
PENALTIES = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SURE = 2.0  # standard errors
MIN_SAMPLES = 8
MOST_LENGTHENED = 0.1
TRIMMED = 0.1  # of samples, at either end
BASES: dict[str, Estimator] = {
    "cnc+bc": cnc_bc(cnc=True, bc=True),
    **{f"joint L={coherence:g}": joint(coherence) for coherence in (1.0, 4.0, 16.0)},
}


HalfEstimate = Callable[[int | None], OutputEstimate]  # of a half of the statistics, 0 or 1, or of all of them


@dataclass(frozen=True)
class TrajectoryFit:
    """What :func:`fit_trajectory` found.

    Attributes:
        correction: to be given to :func:`ptqd.correct`.
        steps: what each step takes.
        samples: that it was fitted on.
        finals: their samples after the last step (N, ...), each corrected by what the other groups' samples gave.
    """

    correction: Correction
    steps: tuple[StepGate, ...]
    samples: tuple[int, ...]
    finals: torch.Tensor


def fit_trajectory(
    qpipe: DiffusionPipeline, stats: NoiseStats, sampling: Sampling, *, batch: int | None = None
) -> TrajectoryFit:
    """Fit a correction along the quantized pipeline's own trajectories; see the module's docstring.

    Args:
        qpipe: the pipeline that the statistics were measured on; a correction it already has does not count.
        stats: of at least 8 samples, measured in open loop; they hold the full-precision trajectories of up to 64.
        sampling: the run that was measured.
        batch: samples at once; at most 16 of the run's where it is not given.

    Raises:
        MismatchError: the statistics are of another model, scheduler or run.
        InputError: they hold too few trajectories, or the scheduler's response is not known.
    """
    bases = {name: of_halves(stats, estimator) for name, estimator in BASES.items()}
    return _walked(qpipe, stats, sampling, (TRAJECTORY,), bases, len(stats.paths), batch)


def of_halves(stats: NoiseStats, estimator: Estimator) -> HalfEstimate:
    """What an estimator makes of the half of the statistics of even or odd folds, or of all."""

    def estimate(half: int | None) -> OutputEstimate:
        folds = slice(half, None, 1 if half is None else 2)
        samples = stats.fold_samples[folds]
        if int(samples.sum()) < 2:
            folds, samples = slice(None), stats.fold_samples
        return estimator(mean_table(stats.joint[folds], samples), stats.layout)

    return estimate


def fit_energy(
    qpipe: DiffusionPipeline,
    stats: NoiseStats,
    sampling: Sampling,
    methods: Sequence[str],
    estimate: HalfEstimate,
    *,
    samples: int | None = None,
    batch: int | None = None,
) -> TrajectoryFit:
    """Give samples full precision's energy along trajectories that are corrected by a given estimate.

    Args:
        qpipe: as in :func:`fit_trajectory`, also the others.
        stats: likewise.
        sampling: likewise.
        methods: that the estimate is of, for the record.
        estimate: of one half of the statistics, or of all of them.
        samples: that walk, if not all.
        batch: samples at once; at most 16 of the run's where it is not given.

    Raises:
        MismatchError: as :func:`fit_trajectory`.
        InputError: likewise.
    """
    count = min(samples or len(stats.paths), len(stats.paths))
    return _walked(qpipe, stats, sampling, (*methods, ENERGY), {"+".join(methods): estimate}, count, batch)


def _walked(
    qpipe: DiffusionPipeline,
    stats: NoiseStats,
    sampling: Sampling,
    methods: Sequence[str],
    bases: Mapping[str, HalfEstimate],
    count: int,
    batch: int | None,
) -> TrajectoryFit:
    check_run(qpipe, stats, sampling)
    if not stats.response.exact:
        raise InputError(
            f"a trajectory cannot be fitted: how {stats.measured_on.scheduler} steps is not known; name another method"
        )
    if len(stats.paths) < MIN_SAMPLES:
        raise InputError(
            f"the statistics hold full-precision trajectories of {len(stats.paths)} samples, and {MIN_SAMPLES} are "
            "needed; measure more samples, in open loop (where one's trajectory is not above 64 MiB)"
        )
    if not bool(torch.isfinite(stats.paths).all()):
        raise InputError("the full-precision trajectories hold NaN or infinite values; try a wider dtype")
    run = sampling.with_seed_for("measuring")
    indices = stats.final_indices[:count]
    plain = with_components(qpipe, scheduler=plain_scheduler(qpipe.scheduler))
    size = batch or min(sampling.batch, processes.SHARED_BATCH)
    batches = indices.split(size)
    walk = _Walk(stats, indices, [len(part) for part in batches], bases, regress=tuple(methods) == (TRAJECTORY,))
    ends = run_in_step(plain, run, [part.tolist() for part in batches], walk.decide)
    finals = [whole_samples(rows, len(part), stats.paths.shape[2]) for rows, part in zip(ends, batches, strict=True)]
    return TrajectoryFit(
        compose(stats, methods, walk.estimate, None),
        tuple(walk.steps),
        tuple(indices.tolist()),
        torch.cat(finals).detach().cpu(),
    )


def check_run(qpipe: DiffusionPipeline, stats: NoiseStats, sampling: Sampling) -> None:
    """Whether whole trajectories of a run can be held against what statistics know of it.

    Raises:
        MismatchError: the statistics are of another model, scheduler, guidance scale or number of steps, or of other
            seeds or arguments of the call.
        InputError: of statistics that were carried over, or of a pipeline whose noise depends on the batch.
    """
    measured = stats.measured_on
    check_measured_on(qpipe, measured)
    if measured.interpolated_from is not None:
        raise InputError("statistics carried over to other steps have no full-precision samples to check against")
    required = {
        "seed": sampling.with_seed_for("measuring").seed,
        "steps": sampling.steps,
        "guidance": guidance_of(qpipe, sampling),
        "inputs": sampling.inputs_digest,
    }
    for fact, value in required.items():
        if getattr(measured, fact) != value:
            what = "arguments of the call (--call, --shared)" if fact == "inputs" else f"another {fact}"
            raise MismatchError(
                f"the statistics were measured with {'other ' * (fact == 'inputs')}{what}; give the run they were "
                "measured with"
            )
    if not measured.repeatable and (stats.response.draws or not stats.response.exact):
        raise InputError(
            f"{type(qpipe).__name__} takes no generator for its noise, so a sample depends on its batch and no "
            "trajectory can be checked; name methods instead, such as cnc,bc"
        )


class _Walk:
    """Samples on their way.

    Attributes:
        estimate: of each step that was taken, fitted on all samples.
        steps: what each of them keeps.
    """

    def __init__(
        self,
        stats: NoiseStats,
        indices: torch.Tensor,
        sizes: Sequence[int],
        bases: Mapping[str, HalfEstimate],
        regress: bool,
    ) -> None:
        self.stats, self.layout, self.sizes, self.regress = stats, stats.layout, sizes, regress
        groups = fold_of(indices) % GROUPS
        present, self.group = groups.unique(return_inverse=True)  # numbered without gaps
        self.members = [(self.group == j).nonzero().flatten() for j in range(len(present))]
        self.estimate = OutputEstimate.nothing(mean_table(stats.joint, stats.fold_samples), self.layout)
        self.bases = {NOTHING: self.estimate.copy()} if regress else {}  # T,...
        own = {name: [estimate] * len(present) for name, estimate in self.bases.items()}
        for name, estimate in bases.items():
            by_half = [estimate(half) for half in (0, 1)]
            self.bases[name] = estimate(None)
            own[name] = [by_half[1 - int(n) % 2] for n in present]  # what the other half of the samples gave
        self.of_group = OutputEstimate.stack([OutputEstimate.stack(each) for each in own.values()])  # B,J,T,...
        self.steps: list[StepGate] = []
        self.gain = stats.response.outputs.diagonal() * stats.attenuation()
        self.clips = stats.clips().tolist()
        self.penalties = torch.tensor(PENALTIES, dtype=torch.float64)

    def decide(self, step: int, arrivals: Sequence[Arrival]) -> list[torch.Tensor]:
        """The output that each of this process's batches goes on with."""
        gain = float(self.gain[step])
        moves = abs(gain) > 1e-9 * max(1e-12, float(self.gain.abs().max())) and not self.clips[step]
        wanted = self.stats.paths[: len(self.group), step].split(self.sizes)
        with processes.failing_alike():
            batches = [
                _Walked(arrival, self.stats, rows, gain if moves else 1.0)
                for arrival, rows in zip(arrivals, processes.mine(wanted), strict=True)
            ]
        bases = OutputEstimate(
            self.of_group.output[:, :, step], self.of_group.sample[:, :, step], self.of_group.bias[:, :, step]
        )
        if moves and self.regress:
            overall, each, gate = self._regressed(batches, bases, step)
        else:
            overall, each, gate = self._as_given(batches, bases, step)
        overall, each, gate = processes.as_main((overall, each, gate))
        self._correct(batches, each)
        if moves:
            overall = self._lengthen(batches, overall, step, gain)
        self.estimate.output[step], self.estimate.sample[step], self.estimate.bias[step] = (
            overall.output,
            overall.sample,
            overall.bias,
        )
        self.steps.append(gate)
        return [batch.full_output() for batch in batches]

    def _correct(self, batches: Sequence["_Walked"], each: OutputEstimate) -> None:
        """Correct every sample by its group's estimate (J, ...)."""
        with processes.failing_alike():
            for batch, group in zip(batches, processes.mine(self.group.split(self.sizes)), strict=True):
                samples = [(group == j).nonzero().flatten() for j in range(len(self.members))]
                batch.correct(((own, each.at(j)) for j, own in enumerate(samples)), self.layout)

    def _as_given(
        self, batches: Sequence["_Walked"], bases: OutputEstimate, step: int
    ) -> tuple[OutputEstimate, OutputEstimate, StepGate]:
        """Of a step that clips, or moves nothing: the base that leads nearest, by the step itself."""
        errors = []
        for base in range(len(self.bases)):
            self._correct(batches, bases.at(base))
            errors.append(torch.cat(processes.spread(_Walked.error, batches)))
        best = int(torch.stack(errors).log().mean(-1).argmin())
        name = list(self.bases)[best]
        return self.bases[name].at(step), bases.at(best), self._gate(name, errors[0], errors[best])

    def _regressed(
        self, batches: Sequence["_Walked"], bases: OutputEstimate, step: int
    ) -> tuple[OutputEstimate, OutputEstimate, StepGate]:
        """The estimate fitted on all samples, those of the groups (J, ...), and how they were chosen."""
        tables = torch.cat(processes.spread(_Walked.tables, batches))  # N,G,K,K
        total = tables.sum(0)
        others = torch.stack([(total - tables[m].sum(0)) / max(1, len(tables) - len(m)) for m in self.members])
        shrunk = ridge(others, self.layout, bases, self.penalties.view(-1, 1, 1, 1))
        errors, tried = self._errors(tables, bases), self._errors(tables, shrunk)  # B,N and P,B,N
        scores = errors.log().mean(-1)
        penalties: list[int | None] = [None] * len(errors)  # by which each base is improved on
        for base in range(len(errors)):
            least = int(tried[:, base].log().mean(-1).argmin())
            gained = tried[least, base].log() - errors[base].log()
            if float(gained.mean()) < -SURE * float(gained.std()) / len(gained) ** 0.5:
                penalties[base], scores[base] = least, tried[least, base].log().mean()
        best = int(scores.argmin())
        name, penalty = list(self.bases)[best], penalties[best]
        overall, own, error, kept = self.bases[name].at(step), bases.at(best), errors[best], name
        if penalty is not None:
            own, error = shrunk.at(penalty).at(best), tried[penalty, best]
            overall = ridge(total / len(tables), self.layout, overall, self.penalties[penalty : penalty + 1])
            kept = f"ridge {PENALTIES[penalty]:g}" + (f" to {name}" if name != NOTHING else "")
        return overall, own, self._gate(kept, errors[0], error)

    def _gate(self, kept: str, before: torch.Tensor, error: torch.Tensor) -> StepGate:
        """What a step keeps, from samples' errors (N,) without and with it."""
        saved, size = before - error, float(before.mean())
        half_width = float(scipy_stats.t.ppf(0.975, max(1, len(saved) - 1)) * saved.std() / len(saved) ** 0.5)
        channels = 0 if kept == NOTHING else self.layout.groups * self.layout.channels
        return StepGate(kept, float(saved.mean()) / size, half_width / size, channels)

    def _errors(self, tables: torch.Tensor, estimates: OutputEstimate) -> torch.Tensor:
        """Mean squared error of each sample (..., N), by the estimates of its group (..., J, G, C, taps C)."""
        own = OutputEstimate(
            estimates.output[..., self.group, :, :, :],
            estimates.sample[..., self.group, :, :, :],
            estimates.bias[..., self.group, :, :],
        )
        return output_errors(tables, own).mean((-1, -2)).clamp(min=1e-30)

    def _lengthen(
        self, batches: Sequence["_Walked"], overall: OutputEstimate, step: int, gain: float
    ) -> OutputEstimate:
        """Give the next sample full precision's energy, by factors of each channel on what the step makes of its input:
        on the whole of it, and where neighbours are known on its edges, what it is more than their mean.
        """
        layout, state = self.layout, float(self.stats.response.own_state[step])
        parts = processes.spread(lambda batch: batch.energies(state, edges=layout.taps > 1), batches)
        ratios = torch.cat([part[0] for part in parts])  # N,F,C
        sizes, moved, mean = (torch.cat([part[i] for part in parts]).mean(0) for i in (1, 2, 3))
        shift = torch.from_numpy(scipy_stats.trim_mean(ratios.numpy(), TRIMMED, axis=0))
        cut, ordered = int(TRIMMED * len(ratios)), ratios.sort(0).values
        spread = ratios.clamp(ordered[cut], ordered[len(ratios) - 1 - cut]).std(0)  # winsorized
        error = spread / ((1 - 2 * TRIMMED) * len(ratios) ** 0.5)
        factors = _factors(torch.where(shift.abs() > SURE * error, shift, 0.0), sizes, moved)
        if not bool(factors.any()):
            return overall
        for batch in batches:
            batch.lengthen(factors, mean, state)
        own = list(range(layout.channels))
        whole = factors[0].view_as(overall.bias)
        edges = factors[1].view_as(overall.bias) if layout.taps > 1 else torch.zeros_like(whole)
        output, sample = ((1 + whole[..., None]) * part for part in (overall.output, overall.sample))
        output[..., own, own] -= whole + edges
        sample[..., own, own] -= (whole + edges) * state / gain
        for tap in range(1, layout.taps):
            near = [tap * layout.channels + c for c in own]
            output[..., own, near] += edges / (layout.taps - 1)
            sample[..., own, near] += edges / (layout.taps - 1) * state / gain
        return OutputEstimate(output, sample, (1 + whole) * overall.bias + whole * mean.view_as(whole) / gain)


def _factors(shift: torch.Tensor, sizes: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Factors (F, C) that shift the logarithm of energies by so much (F, C), 0 where it is not significant.

    Args:
        shift: wanted; of the whole and, if F is 2, of the edges.
        sizes: the energies (F, C).
        moved: half of what each energy grows by with each factor (F energies, F factors, C).
    """
    response = 2 * moved / sizes[:, None].clamp(min=1e-30)
    factors = torch.zeros_like(shift)
    factors[0] = torch.where(moved[0, 0].abs() > 1e-12, shift[0] / response[0, 0], 0.0)
    if len(shift) == 2:
        (a, b), (c, d) = response
        determinant = a * d - b * c
        both = (shift[1] != 0) & (determinant.abs() > 0.01 * (a * d).abs())
        solved = torch.stack([d * shift[0] - b * shift[1], a * shift[1] - c * shift[0]]) / determinant
        factors = torch.where(both, solved, factors)
    return torch.where((shift != 0).any(0), factors, 0.0).clamp(-MOST_LENGTHENED, MOST_LENGTHENED)


class _Walked(StepBatch):
    """A step of some samples whose full-precision samples after it are known (n, m, ...)."""

    def __init__(self, arrival: Arrival, stats: NoiseStats, wanted: torch.Tensor, gain: float) -> None:
        super().__init__(arrival, stats, len(wanted))
        rows = wanted.flatten(0, 1)
        self.wanted = rows.repeat(self.copies, *[1] * (rows.ndim - 1)).to(self.x.device, self.x.dtype)
        self.gain = gain

    def tables(self) -> torch.Tensor:
        """Moments of what the step knows and of the output that leads to the full-precision sample (n, G, K, K)."""
        off = (self.wanted - self.arrival.stepped(self.arrival.output)).float()
        moments = joint_moments(self.x, self.eps_q.float() + off / self.gain, self.eps_q, self.axis)
        return per_sample(moments, self.samples, self.each)

    def error(self) -> torch.Tensor:
        """Mean squared error of the next sample that the chosen output gives (n,)."""
        off = self._flat(self.arrival.stepped(self.full_output()) - self.wanted)
        return self._samples(off.square().mean((1, 2))).clamp(min=1e-30)

    def energies(self, state: float, edges: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each sample and channel: the log of the energy that the next sample should have over what it has, that
        energy (n, F, C), half of what it grows by with each of the factors that :meth:`lengthen` takes (n, F, F, C),
        and the mean of what the factors are on (n, C). F is 2 with the edges' energy, else 1.
        """
        part = self._by_channel(state * self.x.float() + self.gain * self.chosen.float())
        mean = part.flatten(2).mean((0, 2)).view(1, -1, *[1] * (part.ndim - 2))
        directions = [part - mean]
        own, wanted = (
            rows - rows.flatten(2).mean((0, 2)).view_as(mean)
            for rows in map(self._by_channel, (self.arrival.stepped(self.full_output()), self.wanted))
        )
        views = [(own, wanted, directions)]
        if edges:
            directions.append(_edges(self._by_channel(state * self.x.float() + self.gain * self.eps_q.float())))
            views.append((_edges(own), _edges(wanted), [_edges(direction) for direction in directions]))
        ratios, sizes, moved = [], [], []
        for mine, right, along in views:
            has, should = (self._samples(value.square().flatten(2).mean(2)) for value in (mine, right))
            ratios.append((should.clamp(min=1e-30) / has.clamp(min=1e-30)).log())
            sizes.append(has)
            moved.append(torch.stack([self._samples((mine * d).flatten(2).mean(2)) for d in along], dim=1))
        each = mean.flatten().expand(self.samples, -1)
        return torch.stack(ratios, dim=1), torch.stack(sizes, dim=1), torch.stack(moved, dim=1), each

    def lengthen(self, factors: torch.Tensor, mean: torch.Tensor, state: float) -> None:
        """Lengthen the step's own part of the next sample around its mean, and its edges (factors (F, C))."""
        shape = [1] * self.x.ndim
        shape[self.axis] = -1
        f, m = (value.float().to(self.x.device).view(shape) for value in (factors[0], mean))
        chosen = self.chosen.float()
        part = state * self.x.float() + self.gain * chosen
        longer = chosen + f * (part - m) / self.gain
        if len(factors) == 2:
            before = state * self.x.float() + self.gain * self.eps_q.float()
            longer += factors[1].float().to(self.x.device).view(shape) * _edges(before) / self.gain
        self.chosen = longer.to(self.chosen.dtype)

    def _by_channel(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.detach().cpu().double().movedim(self.axis, 1)

    def _flat(self, rows: torch.Tensor) -> torch.Tensor:
        return self._by_channel(rows).flatten(2)

    def _samples(self, rows: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(self.samples, *rows.shape[1:], dtype=rows.dtype).index_add_(0, self.sample_of, rows)
        return sums * self.samples / len(rows)


def _edges(x: torch.Tensor) -> torch.Tensor:
    """What each pixel is more than the mean of its four neighbours (..., H, W)."""
    return x - torch.stack(neighbours(x)).mean(0)
