"""NoiseStats: what quantization did to the denoiser, step by step (He et al., arXiv 2305.10657, section 4.1).

Per step, with ``delta = eps_q - eps`` and the slope shared by the channels,

    delta = k eps + b + r,        k   = sum_c Cov_c(eps, delta) / sum_c Var_c(eps)
                                  b_c = E_c[delta] - k E_c[eps]
                                  V   = mean_c Var_c(r),    R^2 = 1 - V / mean_c Var_c(delta)
                                  SNR = E[eps^2] / E[delta^2]

Everything is computed from moments E[eps^i delta^j], i + j <= 4, kept per sample, step and channel in float64: so
intervals (samples are independent, the pixels of one are not), merges over processes and half-splits are exact,
and the residual's skewness and kurtosis are known for any k.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from scipy import stats as scipy_stats

from ptqd.diffusion.fingerprints import scheduler_facts
from ptqd.diffusion.noise_schedule import Family, Levels, noise_levels
from ptqd.diffusion.pipeline_parts import channel_axis
from ptqd.diffusion.sampling import MOST_SAMPLES
from ptqd.diffusion.scheduler_response import CLIPPING_OPTIONS, Response, linear_response
from ptqd.diffusion.trajectory import rows_of_samples
from ptqd.errors import ArtifactError, InputError, MismatchError
from ptqd.files import parse_json, read_tensors, write_tensors
from ptqd.noise.bands import SIZES, Bands
from ptqd.noise.measured_on import MeasuredOn
from ptqd.noise.regression import _COLUMN, POWERS, Estimate, normality_p_value, regression
from ptqd.noise.second_moments import CROSS, FOLDS, Layout, between_tables, covariance, fold_of, mean_table
from ptqd.schema import check_tensors, typed

LARGEST = 1e100  # of any moment
CHECKED = 64  # samples whose full-precision ends and trajectories are kept, to fit and check corrections on
CLIPPED = 0.02  # share of a change by which a step that clips differs
PATH_BYTES = 2**29  # of all trajectories that are kept; of fewer samples where they are larger
RESPONSE = ("response_outputs", "response_noise", "response_state", "response_start")
SUMS = ("joint", "cross", "moved")
BANDS = ("cross", "known")


@dataclass(frozen=True)
class NoiseFit:
    """The regression of the noise on the full-precision output, per step.

    Attributes:
        k: slope, the correlated part (T,).
        bias: intercept (T, C).
        variance: of the residual (T,).
        r2: share of the noise's variance that the slope explains (T,).
        snr: of the quantized output (T,).
        skewness: of the residual (T,).
        kurtosis: excess, of the residual (T,); its interval is that of log(kurtosis + 3). Under heavy tails, where a
            few values decide, read it as a lower bound.
        normality: p-value of D'Agostino and Pearson's test (T,), as if all elements were independent.
    """

    k: Estimate
    bias: Estimate
    variance: Estimate
    r2: Estimate
    snr: Estimate
    skewness: Estimate
    kurtosis: Estimate
    normality: torch.Tensor


@dataclass(frozen=True, repr=False)
class NoiseStats:
    """Paired moments of the full-precision output and the quantization noise.

    Attributes:
        timesteps: the schedule (T,), float64.
        indices: which samples (N,), int64, ascending.
        moments: E[eps^i delta^j] over each sample's elements (N, T, C, 14), float64, columns as in ``POWERS``.
        elements: elements of one channel of one sample.
        measured_on: models, scheduler, steps, eta, call. Statistics only merge with the same; corrections only apply to
            the same.
        response: how the run's samples answer to its outputs and its noise.
        levels: where its samples stand on the noise schedule; None where that is not known.
        joint: second moments of (1, eps_q, x_t, eps), summed over each fold's samples (16, T, G, K, K), float64; see
            :mod:`ptqd.noise.second_moments`.
        cross: second moments of (eps, delta) over all pairs of steps, mean over elements, summed over the samples
            (2 T, 2 T), float64.
        moved: ``E|x'_q - x'|^2`` of the next samples that the scheduler's own step makes of eps_q and of eps, summed
            over the samples (T,), float64.
        finals: full-precision final samples of the first 64 samples (F, ...).
        final_indices: which samples those are (F,).
        paths: the samples after every step of the full-precision trajectories (P, T, m, ...), of the first P of
            ``final_indices``, in m rows as the scheduler steps them; as many as 512 MiB hold.
        bands: second moments by bands of directions; None where they were not measured.
    """

    timesteps: torch.Tensor
    indices: torch.Tensor
    moments: torch.Tensor
    elements: int
    measured_on: MeasuredOn
    response: Response
    levels: Levels | None
    joint: torch.Tensor
    cross: torch.Tensor
    moved: torch.Tensor
    finals: torch.Tensor
    final_indices: torch.Tensor
    paths: torch.Tensor
    bands: Bands | None = None

    def __repr__(self) -> str:
        """In a line; its tensors would fill screens."""
        on = self.measured_on
        steps = f"{len(self.timesteps)} steps of {on.scheduler}" + (f" at eta {on.eta:g}" if on.eta else "")
        guidance = "" if on.guidance is None else f", guidance {on.guidance:g}"
        return f"NoiseStats({self.samples} samples, {steps}{guidance}, {self.moments.shape[2]} channels)"

    @property
    def samples(self) -> int:
        """How many samples were measured."""
        return len(self.indices)

    @property
    def fold_samples(self) -> torch.Tensor:
        """How many samples each fold of ``joint`` holds (16,)."""
        return torch.bincount(fold_of(self.indices), minlength=FOLDS)

    @property
    def layout(self) -> Layout:
        """Of ``joint``'s tables."""
        return Layout.read(self.joint, self.moments.shape[2])

    def by_bands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By bands of directions: the residuals' covariance over the steps (B, T, T), and how the output answers to the
        sample, ``Cov(eps, x) / Var(x)`` (B, T). One band of all directions where bands were not measured.
        """
        layout = self.layout
        own = torch.arange(layout.channels)
        x, e = layout.blocks[1].start + own, layout.blocks[2].start + own
        table = mean_table(self.joint, self.fold_samples)  # T,G,K,K
        if self.bands is None:
            _, cov = covariance(table)
            known = torch.stack([cov[..., x, other].mean((1, 2)) for other in (x, e)], -1)[None]
        else:
            known = self.bands.known
        positive = known[..., 0] > 1e-12 * known[..., 0].sum(0).clamp(min=1e-300)
        answer = torch.where(positive, known[..., 1] / torch.where(positive, known[..., 0], 1.0), 0.0)
        return self._of_residuals(self.noise_by_bands()), answer

    def noise_by_bands(self) -> torch.Tensor:
        """Covariance of (eps, delta) over all pairs of steps by bands of directions, each a mean over all elements (B,
        2 T, 2 T). One band of all directions where bands were not measured.
        """
        return self._noise_covariance()[None] if self.bands is None else self.bands.cross / self.samples

    def _noise_covariance(self) -> torch.Tensor:
        """Covariance of (eps, delta) over all pairs of steps, mean over elements (2 T, 2 T)."""
        mean = torch.cat([self.moments.mean(0)[..., _COLUMN[power]] for power in ((1, 0), (0, 1))])  # 2T,C
        return self.cross / self.samples - mean @ mean.T / mean.shape[1]

    def _of_residuals(self, covariances: torch.Tensor) -> torch.Tensor:
        """Covariances of the residuals ``delta - k eps`` (..., T, T), from those of (eps, delta) (..., 2 T, 2 T)."""
        k = regression(self.moments.mean(0), slope=True)["k"]
        weights = torch.cat([-torch.diag(k), torch.eye(len(k), dtype=k.dtype)], dim=1)  # T,2T
        return weights @ covariances @ weights.T

    def residual_correlation(self) -> torch.Tensor:
        """Correlation of the residuals of any two steps (T, T), 1 on the diagonal.

        The residual is that of :meth:`fit`; where it repeats from step to step, variances do not simply add up.
        """
        residual = self._of_residuals(self._noise_covariance())
        size = residual.diagonal().clamp(min=0).sqrt()
        scale = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)
        correlation = (residual * scale[:, None] * scale[None, :]).clamp(-1, 1)
        correlation.fill_diagonal_(1.0)
        return correlation

    def attenuation(self) -> torch.Tensor:
        """What a step lets through of a change of its output, against the linear response (T,), within 0 and 1.

        Less than 1 where the step clips. Of a scheduler with history, or none that is known, it is taken as 1.
        """
        return self._moved_share().sqrt().clamp(0, 1)

    def clips(self) -> torch.Tensor:
        """Whether a step clips: answers to a change of its output otherwise than the linear response says (T,).

        Only a scheduler that is configured to clip does; of one with history, it is taken to do so at every step. A
        step that clips may let more through, not less: DDIM's clean sample and its noise answer with opposite signs,
        and only the first is clipped.
        """
        if not any(self.measured_on.config.get(name) for name in CLIPPING_OPTIONS):
            return torch.zeros_like(self.moved, dtype=torch.bool)
        if not self.response.one_step:
            return torch.ones_like(self.moved, dtype=torch.bool)
        return (self._moved_share() - 1).abs() > CLIPPED

    def _moved_share(self) -> torch.Tensor:
        """What a change of the output moved, as a share of what is moved where nothing is clipped (T,)."""
        if not self.response.one_step:
            return torch.ones_like(self.moved)
        expected = self.unclipped()
        return torch.where(expected > 0, self.moved / torch.where(expected > 0, expected, 1.0), 1.0)

    def unclipped(self) -> torch.Tensor:
        """What :attr:`moved` is where nothing is clipped (T,), of a step without history."""
        noise = self.moments[..., _COLUMN[0, 2]].mean((0, 2))
        return self.response.outputs.diagonal() ** 2 * noise * self.samples

    # above 60 lines: every field of the statistics is carried over here, and nowhere else
    def at(self, scheduler: SchedulerMixin) -> "NoiseStats":
        """The same statistics on the steps of another run, interpolated over log-SNR.

        An estimate, and marked as one (``measured_on.interpolated_from``): a quantized denoiser's noise depends on
        where on the noise schedule it is asked, hardly on how many steps are taken to get there.

        Args:
            scheduler: of the same kind and configuration, its timesteps set.

        Raises:
            MismatchError: it is of another kind or configuration.
            InputError: its noise schedule is not known.
        """
        known: Any = scheduler
        timesteps = list(known.timesteps)
        required = torch.tensor([float(t) for t in timesteps], dtype=torch.float64)
        if torch.equal(required, self.timesteps):
            return self
        result, mine = scheduler_facts(scheduler), self.measured_on
        for fact in ("scheduler", "config"):
            if result[fact] != getattr(mine, fact):
                raise MismatchError(
                    f"the statistics were measured on another scheduler ({fact} differs); measure again"
                )
        levels = noise_levels(scheduler, timesteps)
        if self.levels is None or levels is None:
            raise InputError(
                f"statistics of {len(self.timesteps)} steps cannot be carried over to {len(timesteps)}: "
                f"the noise schedule of {result['scheduler']} is not known; measure these steps"
            )
        here, there = self.levels.log_snr, levels.log_snr
        right = torch.searchsorted(here, there).clamp(1, len(here) - 1)
        left = right - 1
        gap = here[right] - here[left]
        weight = torch.where(gap > 0, (there - here[left]) / torch.where(gap > 0, gap, 1.0), 0.0).clamp(0, 1)

        def between(values: torch.Tensor, axis: int) -> torch.Tensor:
            shape = [-1 if i == axis else 1 for i in range(values.ndim)]
            w = weight.view(shape)
            return (1 - w) * values.index_select(axis, left) + w * values.index_select(axis, right)

        parts = (self.joint.index_select(1, left), self.joint.index_select(1, right))
        near = torch.where(weight < 0.5, left, right)
        steps = len(self.timesteps)
        pair = torch.cat([near, near + steps])
        step = getattr(type(scheduler), "plain_class", type(scheduler)).step
        response = linear_response(
            scheduler,
            step,
            timesteps,
            mine.keywords,
            learned_variance=[1.0] * len(timesteps) if mine.learned_variance else None,  # the most: what VSC leaves
            device=known.timesteps.device,
        )
        there_now = dataclasses.replace(
            self,
            timesteps=required,
            moments=between(self.moments, 1),
            measured_on=dataclasses.replace(
                mine, steps=len(timesteps), interpolated_from=mine.steps, model_timesteps=()
            ),
            response=response,
            levels=levels,
            joint=between_tables(*parts, weight, self.layout),
            cross=self.cross[pair][:, pair],
            bands=None if self.bands is None else self.bands.at(near),
            finals=self.finals[:0],
            final_indices=self.final_indices[:0],
            paths=self.paths[:0],
        )
        return dataclasses.replace(there_now, moved=self.attenuation()[near] ** 2 * there_now.unclipped())

    def fit(self, *, slope: bool = True) -> NoiseFit:
        """The regression per step, with jackknife intervals over samples.

        Args:
            slope: False fixes k at 0: the bias is then the noise's mean, the residual all the rest.

        Raises:
            InputError: fewer than two samples.
        """
        n = self.samples
        if n < 2:
            raise InputError(f"statistics of {n} sample have no interval; measure at least two samples")
        mean = self.moments.mean(0)  # T,C,14
        left_out = (n * mean - self.moments) / (n - 1)  # N,T,C,14
        quantile = float(scipy_stats.t.ppf(0.975, n - 1))

        values, jackknife = regression(mean, slope=slope), regression(left_out, slope=slope)

        def half_width(each: torch.Tensor) -> torch.Tensor:
            return ((n - 1) * each.var(0, unbiased=False)).sqrt() * quantile

        def estimate(name: str) -> Estimate:
            if name == "kurtosis":
                factor = half_width((jackknife[name] + 3).clamp(min=1e-9).log()).clamp(max=700).exp()
                whole = values[name] + 3
                return Estimate(values[name], whole / factor - 3, whole * factor - 3)
            error = half_width(jackknife[name])
            return Estimate(values[name], values[name] - error, values[name] + error)

        count = n * self.elements * mean.shape[1]
        pairs = zip(values["skewness"].tolist(), values["kurtosis"].tolist(), strict=True)
        normality = [normality_p_value(skewness, kurtosis, count) for skewness, kurtosis in pairs]
        return NoiseFit(
            **{name: estimate(name) for name in values}, normality=torch.tensor(normality, dtype=torch.float64)
        )

    @classmethod
    def merge(cls, parts: Sequence["NoiseStats"]) -> "NoiseStats":
        """One of several, measured apart.

        But for rounding, the result depends on neither split nor order; except ``bands``, whose directions are those of
        each batch.

        Raises:
            MismatchError: they were not measured on the same models and schedule, or share a sample.
        """
        first = parts[0]
        for other in parts[1:]:
            different = first.measured_on.differences(other.measured_on)
            if different or not torch.equal(first.timesteps, other.timesteps):
                what = ", ".join(different) or "timesteps"
                raise MismatchError(f"statistics differ in {what}; merge only those of one model and schedule")
        indices = torch.cat([part.indices for part in parts])
        order = indices.argsort()
        if len(indices.unique()) != len(indices):
            raise MismatchError("statistics share samples; give each process its own range")
        finals = torch.cat([part.final_indices for part in parts])
        remaining = finals.argsort()[:CHECKED]
        paths, walked = first.paths, first.final_indices[: len(first.paths)]
        if len(paths) < paths_kept(paths) or bool((order[1:] < order[:-1]).any()):
            paths = torch.cat([part.paths for part in parts if len(part.paths)] or [paths])
            walked = torch.cat([part.final_indices[: len(part.paths)] for part in parts])
            paths = _in_order(paths, walked.argsort())[: paths_kept(paths)]
            walked = walked.sort().values[: len(paths)]
        if not torch.equal(walked, finals[remaining][: len(walked)]):  # some part kept none
            paths = paths[:0]
        sums = {name: sum(getattr(part, name) for part in parts[1:]) + getattr(first, name) for name in SUMS}
        return dataclasses.replace(
            first,
            indices=indices[order],
            moments=_in_order(torch.cat([part.moments for part in parts]), order),
            finals=torch.cat([part.finals for part in parts])[remaining],
            final_indices=finals[remaining],
            paths=paths,
            bands=_added([part.bands for part in parts]),
            **sums,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {name: getattr(self, name) for name in (*_TENSORS, "paths")}
        if self.bands is not None:
            tensors |= {f"bands_{name}": getattr(self.bands, name) for name in BANDS}
        tensors |= {name: getattr(self.response, name.removeprefix("response_")) for name in RESPONSE}
        facts = {"elements": self.elements, "exact": self.response.exact, "source": self.measured_on.to_dict()}
        if self.levels is not None:
            tensors |= {"alpha": self.levels.alpha, "sigma": self.levels.sigma}
            facts["family"] = self.levels.family
        write_tensors(Path(path), tensors, {"ptqd.noise": json.dumps(facts, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "NoiseStats":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, truncated, or something else.
        """
        tensors, metadata = read_tensors(Path(path))
        if "ptqd.noise" not in metadata or not {*_TENSORS, *RESPONSE} <= set(tensors):
            raise ArtifactError(f"{path} holds no noise statistics of this version; write them with 'ptqd measure'")
        plain = parse_json(metadata["ptqd.noise"], str(path), finite=False)  # schedulers have infinite sigmas
        facts: _Facts = typed(plain, _Facts, str(path), "measure again with 'ptqd measure'")
        shapes = _SHAPES if facts.family is None else _SHAPES | {"alpha": ("T",), "sigma": ("T",)}
        check_tensors(tensors, shapes, str(path))
        _check_tables(tensors, facts, str(path))
        return cls(
            **{name: tensors[name] for name in _TENSORS},
            paths=tensors.get("paths", tensors["finals"][:0]),  # files of earlier versions have none, and no bands
            bands=_stored_bands(tensors, str(path)),
            elements=facts.elements,
            measured_on=MeasuredOn.from_dict(facts.source),
            response=Response(**{n.removeprefix("response_"): tensors[n] for n in RESPONSE}, exact=facts.exact),
            levels=None if facts.family is None else Levels(facts.family, tensors["alpha"], tensors["sigma"]),
        )


def paths_kept(paths: torch.Tensor) -> int:
    """Of how many samples trajectories (N, T, ...) are kept; of none where not even one is small enough."""
    each = paths[:1].nbytes
    return min(CHECKED, PATH_BYTES // each) if each else 0


def _added(bands: Sequence[Bands | None]) -> Bands | None:
    """The sum of bands; none where some were not measured."""
    total = bands[0]
    for other in bands[1:]:
        total = None if total is None or other is None else total + other
    return total


def _stored_bands(tensors: Mapping[str, torch.Tensor], where: str) -> Bands | None:
    """The bands in a file, if it has any."""
    found = {name: tensors[f"bands_{name}"] for name in BANDS if f"bands_{name}" in tensors}
    if not found:
        return None
    steps, count = len(tensors["timesteps"]), len(SIZES) + 1
    shapes = {"cross": (count, 2 * steps, 2 * steps), "known": (count, steps, 2)}
    right = all(
        name in found
        and tuple(found[name].shape) == shape
        and found[name].dtype == torch.float64
        and bool((found[name].abs() < LARGEST).all())
        for name, shape in shapes.items()
    )
    if not right:
        raise ArtifactError(f"{where} holds no noise statistics of this version; write them with 'ptqd measure'")
    return Bands(**found)


def _in_order(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows (N, ...) in an order (N,); not copied where they are in it already."""
    return rows if bool((order[1:] > order[:-1]).all()) else rows[order]


@dataclass(frozen=True)
class _Facts:
    """What a file's metadata says."""

    elements: int
    exact: bool
    source: dict[str, Any]
    family: Family | None = None


def _check_tables(tensors: Mapping[str, torch.Tensor], facts: _Facts, where: str) -> None:
    """What shapes alone do not say: types, samples named once and in order, tables of one layout."""
    steps, samples = len(tensors["timesteps"]), len(tensors["indices"])
    square = dict.fromkeys(RESPONSE[:3], (steps, steps)) | {RESPONSE[3]: (steps,)}
    check_tensors(tensors, square | {"cross": (2 * steps, 2 * steps)}, where, finite=facts.exact)
    whole = all(tensors[name].dtype == torch.int64 for name in ("indices", "final_indices"))
    levels = () if facts.family is None else ("alpha", "sigma")
    double = all(tensors[name].dtype == torch.float64 for name in ("timesteps", "moments", *SUMS, *RESPONSE, *levels))
    rising = all(bool((tensors[name].diff() > 0).all()) for name in ("indices", "final_indices"))
    groups, size = tensors["joint"].shape[1 + 1], tensors["joint"].shape[3]
    channels = tensors["moments"].shape[2]
    layouts = [Layout(groups, channels // max(groups, 1), taps) for taps in (1, len(CROSS))]
    fits = groups > 0 and channels % groups == 0 and any(size == layout.blocks[2].stop for layout in layouts)
    finals = tensors["finals"]
    kept = finals.ndim > 1 and finals.is_floating_point() and len(finals) == len(tensors["final_indices"])
    paths = tensors.get("paths", finals[:0])
    kept &= paths.is_floating_point() and len(paths) <= len(finals)
    if kept and len(paths):
        kept &= paths.ndim > 3 and paths.shape[1] == steps and paths[0].numel() == steps * finals[0].numel()
    named = [tensors[name] for name in ("indices", "final_indices")]
    rising &= all(bool(((x >= 0) & (x < MOST_SAMPLES)).all()) for x in named)
    sane = all(bool((tensors[name].abs() < LARGEST).all()) for name in ("moments", *SUMS))
    if not (whole and double and rising and sane and fits and kept) or facts.elements < 1 or not samples or not steps:
        raise ArtifactError(f"{where} holds no noise statistics of this version; write them with 'ptqd measure'")


_SHAPES: dict[str, tuple[Any, ...]] = {
    "timesteps": ("T",),
    "indices": ("N",),
    "moments": ("N", "T", "C", len(POWERS)),
    "final_indices": ("F",),
    "joint": (FOLDS, "T", None, "K", "K"),
    "moved": ("T",),
}
_TENSORS = ("timesteps", "indices", "moments", "finals", "final_indices", *SUMS)


def paired_moments(eps: torch.Tensor, eps_q: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Moments of one step.

    Args:
        eps: (N, C, ...), or (N, L, C) for tokens.
        eps_q: like ``eps``.
        axis: of the channels, where it is not the usual one.

    Returns:
        E[eps^i (eps_q - eps)^j] over the elements of a channel (N, C, 14), float64.
    """
    axis = channel_axis(eps) if axis is None else axis
    e = eps.cpu().movedim(axis, 1).flatten(2).double()  # N,C,M; not every device has float64
    d = eps_q.cpu().movedim(axis, 1).flatten(2).double() - e
    powers_e, powers_d = [torch.ones_like(e)], [torch.ones_like(d)]
    for _ in range(4):
        powers_e.append(powers_e[-1] * e)
        powers_d.append(powers_d[-1] * d)
    return torch.stack([(powers_e[i] * powers_d[j]).mean(2) for i, j in POWERS], dim=2)


def per_sample(moments: torch.Tensor, samples: int, each: int | None = None) -> torch.Tensor:
    """Moments (samples, ...) of a step's rows (m samples, ...), each of so many; see ``rows_of_samples``."""
    return rows_of_samples(moments, samples, each).mean(1)


def cross_moments(eps: Sequence[torch.Tensor], eps_q: Sequence[torch.Tensor]) -> torch.Tensor:
    """Second moments of (eps, delta) over all pairs of steps, mean over elements, summed over samples (2 T, 2 T)."""
    rows = len(eps[0])
    total = torch.zeros(2 * len(eps), 2 * len(eps), dtype=torch.float64)
    for n in range(rows):  # one sample's trajectory at a time, in float64
        e = torch.stack([step[n].flatten() for step in eps]).cpu().double()
        d = torch.stack([step[n].flatten() for step in eps_q]).cpu().double() - e
        both = torch.cat([e, d])
        total += both @ both.T / both.shape[1]
    return total
