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

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from scipy import stats as scipy_stats

from ptqd.components import denoiser_name, fingerprint, schedule_of
from ptqd.errors import InputError, MismatchError
from ptqd.files import read_tensors, write_tensors
from ptqd.joint import FOLDS, fold_of, fold_sums, joint_moments
from ptqd.progress import track
from ptqd.replay import Trajectory, record, replay
from ptqd.response import Response, linear_response
from ptqd.sampling import Sampling, run_batch

POWERS = tuple((i, j) for order in range(1, 5) for i in range(order, -1, -1) for j in (order - i,))
RESPONSE = ("response_outputs", "response_noise", "response_state")
_COLUMN = {power: n for n, power in enumerate(POWERS)}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; tensors of one shape."""

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


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
        kurtosis: excess, of the residual (T,).
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


@dataclass(frozen=True)
class NoiseStats:
    """Paired moments of the full-precision output and the quantization noise.

    Attributes:
        timesteps: the schedule (T,), float64.
        indices: which samples (N,), int64, ascending.
        moments: E[eps^i delta^j] over each sample's elements (N, T, C, 14), float64, columns as in ``POWERS``.
        elements: elements of one channel of one sample.
        source: plain facts of what was measured: the models' fingerprints, the scheduler and its
            configuration, steps, eta, call arguments. Statistics only merge with the same; corrections only apply to
            the same model, scheduler, steps and eta.
        response: how the run's samples answer to its outputs and its noise.
        joint: second moments of (1, eps_q, x_t, eps), summed over each fold's samples (16, T, G, K, K), float64; see
            :mod:`ptqd.joint`.
    """

    timesteps: torch.Tensor
    indices: torch.Tensor
    moments: torch.Tensor
    elements: int
    source: Mapping[str, Any]
    response: Response
    joint: torch.Tensor

    @property
    def samples(self) -> int:
        """How many samples were measured."""
        return len(self.indices)

    @property
    def fold_samples(self) -> torch.Tensor:
        """How many samples each fold of ``joint`` holds (16,)."""
        return torch.bincount(fold_of(self.indices), minlength=FOLDS)

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

        def estimate(name: str) -> Estimate:
            error = ((n - 1) * jackknife[name].var(0, unbiased=False)).sqrt() * quantile
            return Estimate(values[name], values[name] - error, values[name] + error)

        count = n * self.elements * mean.shape[1]
        pairs = zip(values["skewness"].tolist(), values["kurtosis"].tolist(), strict=True)
        normality = [normality_p_value(skewness, kurtosis, count) for skewness, kurtosis in pairs]
        return NoiseFit(
            **{name: estimate(name) for name in values}, normality=torch.tensor(normality, dtype=torch.float64)
        )

    @classmethod
    def merge(cls, parts: Sequence["NoiseStats"]) -> "NoiseStats":
        """One of several, measured apart; but for rounding, the result depends on neither split nor order.

        Raises:
            MismatchError: they were not measured on the same models and schedule, or share a sample.
        """
        first = parts[0]
        for other in parts[1:]:
            different = [k for k in {**first.source, **other.source} if first.source.get(k) != other.source.get(k)]
            if different or not torch.equal(first.timesteps, other.timesteps):
                what = ", ".join(different) or "timesteps"
                raise MismatchError(f"statistics differ in {what}; merge only those of one model and schedule")
        indices = torch.cat([part.indices for part in parts])
        order = indices.argsort()
        if len(indices.unique()) != len(indices):
            raise MismatchError("statistics share samples; give each process its own range")
        moments = torch.cat([part.moments for part in parts])[order]
        joint = sum((part.joint for part in parts), torch.zeros_like(first.joint))
        return cls(first.timesteps, indices[order], moments, first.elements, first.source, first.response, joint)

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        tensors = {
            "timesteps": self.timesteps,
            "indices": self.indices,
            "moments": self.moments,
            "response_outputs": self.response.outputs,
            "response_noise": self.response.noise,
            "response_state": self.response.state,
            "joint": self.joint,
        }
        facts = json.dumps(
            {"elements": self.elements, "exact": self.response.exact, "source": dict(self.source)}, sort_keys=True
        )
        write_tensors(path, tensors, {"ptqd.noise": facts})

    @classmethod
    def load(cls, path: Path) -> "NoiseStats":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, truncated, or something else.
        """
        tensors, metadata = read_tensors(path)
        names = {"timesteps", "indices", "moments", "joint", *RESPONSE}
        if "ptqd.noise" not in metadata or not names <= set(tensors):
            raise InputError(f"{path} holds no noise statistics of this version; write them with 'ptqd measure'")
        facts = json.loads(metadata["ptqd.noise"])
        outputs, noise, state = (tensors[name] for name in RESPONSE)
        response = Response(outputs, noise, state, facts["exact"])
        timesteps, indices, moments = (tensors[name] for name in ("timesteps", "indices", "moments"))
        return cls(timesteps, indices, moments, facts["elements"], facts["source"], response, tensors["joint"])


def paired_moments(eps: torch.Tensor, eps_q: torch.Tensor) -> torch.Tensor:
    """Moments of one step.

    Args:
        eps: (N, C, ...), or (N, L, C) for tokens.
        eps_q: like ``eps``.

    Returns:
        E[eps^i (eps_q - eps)^j] over the elements of a channel (N, C, 14), float64.
    """
    axis = channel_axis(eps)
    e = eps.cpu().movedim(axis, 1).flatten(2).double()  # N,C,M; not every device has float64
    d = eps_q.cpu().movedim(axis, 1).flatten(2).double() - e
    powers_e, powers_d = [torch.ones_like(e)], [torch.ones_like(d)]
    for _ in range(4):
        powers_e.append(powers_e[-1] * e)
        powers_d.append(powers_d[-1] * d)
    return torch.stack([(powers_e[i] * powers_d[j]).mean(2) for i, j in POWERS], dim=2)


def per_sample(moments: torch.Tensor, samples: int) -> torch.Tensor:
    """Moments (samples, ...) of a step's rows (m samples, ...): some pipelines step both halves of a guided batch.

    Raises:
        InputError: the rows are not a whole number of batches.
    """
    if len(moments) % samples:
        raise InputError(f"the pipeline steps {len(moments)} rows for {samples} samples; ask for one image a sample")
    return moments.view(-1, samples, *moments.shape[1:]).mean(0)


def channel_axis(x: torch.Tensor) -> int:
    """Where the channels are: second in images and video, last in tokens (N, L, C)."""
    return x.ndim - 1 if x.ndim == 3 else 1


def regression(m: torch.Tensor, *, slope: bool) -> dict[str, torch.Tensor]:
    """Slope, intercept and residual from moments (..., T, C, 14); see the module's docstring."""

    def moment(i: int, j: int) -> torch.Tensor:
        return m[..., _COLUMN[i, j]]  # ...,T,C

    var_eps = (moment(2, 0) - moment(1, 0) ** 2).clamp(min=0)
    var_delta = (moment(0, 2) - moment(0, 1) ** 2).clamp(min=0)
    cov = moment(1, 1) - moment(1, 0) * moment(0, 1)
    total = var_eps.sum(-1)  # ...,T
    k = _ratio(cov.sum(-1), total) if slope else torch.zeros_like(total)
    kc = k[..., None]
    bias = moment(0, 1) - kc * moment(1, 0)
    # raw moments of delta - k eps, then central ones, of which the mean over channels is taken
    raw2 = moment(0, 2) - 2 * kc * moment(1, 1) + kc**2 * moment(2, 0)
    raw3 = moment(0, 3) - 3 * kc * moment(1, 2) + 3 * kc**2 * moment(2, 1) - kc**3 * moment(3, 0)
    raw4 = moment(0, 4) - 4 * kc * moment(1, 3) + 6 * kc**2 * moment(2, 2) - 4 * kc**3 * moment(3, 1)
    raw4 = raw4 + kc**4 * moment(4, 0)
    central2 = (raw2 - bias**2).clamp(min=0).mean(-1)
    central3 = (raw3 - 3 * bias * raw2 + 2 * bias**3).mean(-1)
    central4 = (raw4 - 4 * bias * raw3 + 6 * bias**2 * raw2 - 3 * bias**4).mean(-1)
    return {
        "k": k,
        "bias": bias,
        "variance": central2,
        "r2": 1 - _ratio(central2, var_delta.mean(-1), empty=1.0),
        "snr": _ratio(moment(2, 0).mean(-1), moment(0, 2).mean(-1), empty=math.inf),
        "skewness": _ratio(central3, central2**1.5),
        "kurtosis": _ratio(central4, central2**2, empty=3.0) - 3.0,
    }


def _ratio(a: torch.Tensor, b: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
    return torch.where(b == 0, empty, a / torch.where(b == 0, 1.0, b))


def normality_p_value(skewness: float, kurtosis: float, n: int) -> float:
    """D'Agostino and Pearson's omnibus test from the sample's moments (Biometrika 60, 1973; Anscombe and Glynn 1983).

    Args:
        skewness: of the sample.
        kurtosis: excess, of the sample.
        n: values, at least 8.

    Returns:
        The p-value of normality.
    """
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    beta2 = 3 * (n * n + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    w2 = -1 + math.sqrt(2 * (beta2 - 1))
    z1 = math.asinh(y / math.sqrt(2 / (w2 - 1))) / math.sqrt(0.5 * math.log(w2))

    mean = 3 * (n - 1) / (n + 1)
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis + 3 - mean) / math.sqrt(variance)
    root = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / root * (2 / root + math.sqrt(1 + 4 / root**2))
    inner = (1 - 2 / a) / (1 + x * math.sqrt(2 / (a - 4)))
    z2 = (1 - 2 / (9 * a) - math.copysign(abs(inner) ** (1 / 3), inner)) / math.sqrt(2 / (9 * a))
    return float(scipy_stats.chi2.sf(z1 * z1 + z2 * z2, 2))


def measure(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    run: Sampling,
    *,
    start: int = 0,
    progress: bool = False,
) -> NoiseStats:
    """Measure what quantization does to every step, on the full-precision trajectory.

    Args:
        pipe: full precision.
        qpipe: the same pipeline, quantized by any means.
        run: how it samples; ``run.samples`` are measured, one batch's trajectory is in memory at a time. Their seeds
            are derived from the run's, and are not those of its images.
        start: first sample, to share the work or resume.
        progress: show a bar.

    Raises:
        MismatchError: the two pipelines do not take the same steps.
        InputError: the denoiser's output is NaN or infinite at some step.
    """
    run = run.apart("measuring")
    shared = {k: v for k, v in run.to_dict()["call"].items() if not isinstance(v, list)}
    source = {
        "model": fingerprint(getattr(pipe, denoiser_name(pipe))),
        "quantized": fingerprint(getattr(qpipe, denoiser_name(qpipe))),
        **schedule_of(pipe),
        "steps": run.steps,
        "eta": 0.0,
        "call": shared,
        "seed": run.seed,
    }
    rows: list[torch.Tensor] = []
    timesteps: list[float] = []
    elements = 0
    response: Response | None = None
    joint: torch.Tensor | None = None
    for indices in track(list(run.batches(start)), "measuring" if progress else None):
        with record(pipe) as trajectory:
            run_batch(pipe, run, indices, "latent")
        with replay(qpipe, trajectory) as outputs:
            run_batch(qpipe, run, indices, "latent")
        timesteps = [float(t) for t in trajectory.timesteps]
        source["eta"] = float(trajectory.keywords.get("eta", 0.0))  # also where the scheduler has one of its own
        response = response or _response(trajectory)
        steps, tables = [], []
        for t, x, eps, eps_q in zip(timesteps, trajectory.samples, trajectory.outputs, outputs, strict=True):
            channels = x.shape[channel_axis(x)]  # a learned variance follows the mean
            mean, mean_q = (e.narrow(channel_axis(x), 0, channels) for e in (eps, eps_q))
            moments = paired_moments(mean, mean_q)
            if not bool(torch.isfinite(moments).all()):
                raise InputError(f"the denoiser's output at timestep {t:g} is NaN or infinite; try a wider dtype")
            steps.append(per_sample(moments, len(indices)))
            tables_of_samples = per_sample(joint_moments(x, mean, mean_q, channel_axis(x)), len(indices))
            tables.append(fold_sums(tables_of_samples, torch.tensor(list(indices))))
            elements = x[0].numel() // channels
        rows.append(torch.stack(steps, dim=1))  # n,T,C,14
        folds = torch.stack(tables, dim=1)  # 16,T,G,K,K
        joint = folds if joint is None else joint + folds
    if response is None or joint is None:
        raise InputError(f"no samples to measure from {start} to {run.samples}; ask for more")
    steps_taken, indices_done = torch.tensor(timesteps, dtype=torch.float64), torch.arange(start, run.samples)
    return NoiseStats(steps_taken, indices_done, torch.cat(rows), elements, source, response, joint)


def _response(trajectory: Trajectory) -> Response:
    scheduler, output, sample = trajectory.scheduler, trajectory.outputs[0], trajectory.samples[0]
    return linear_response(
        scheduler,
        getattr(scheduler, "plain_class", type(scheduler)).step,
        trajectory.timesteps,
        trajectory.keywords,
        learned_variance=output.shape[channel_axis(sample)] != sample.shape[channel_axis(sample)],
        device=sample.device,
    )
