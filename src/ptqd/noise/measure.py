"""Measuring: pairs of outputs at the same samples, batch by batch, into NoiseStats.

The full-precision pipeline is recorded; the quantized one is replayed along the recorded samples
(:mod:`ptqd.diffusion.trajectory`). Several quantized pipelines, one for each activation width, are replayed along one
recording: statistics of all
widths cost one full-precision run and one quantized run each.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.diffusion.fingerprints import activation_bits_of, denoisers_fingerprint, schedule_of
from ptqd.diffusion.noise_schedule import noise_levels
from ptqd.diffusion.pipeline_parts import scheduler_of
from ptqd.diffusion.sampling import Sampling, guidance_of, run_batch
from ptqd.diffusion.scheduler_response import Response, linear_response
from ptqd.diffusion.trajectory import (
    Replayed,
    Trajectory,
    next_sample,
    record,
    replay,
    rows_of_samples,
    whole_samples,
)
from ptqd.errors import InputError, UnsupportedError
from ptqd.noise.bands import measured_bands, principal_directions
from ptqd.noise.measured_on import MeasuredOn
from ptqd.noise.second_moments import fold_sums, joint_moments
from ptqd.noise.stats import CHECKED, NoiseStats, cross_moments, paired_moments, paths_kept, per_sample
from ptqd.progress import track


def measure(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    *,
    start: int = 0,
    closed_loop: bool = False,
    progress: str | bool = False,
) -> NoiseStats:
    """Measure what quantization does to every step.

    Args:
        pipe: full precision.
        qpipe: the same pipeline, quantized by any means; with a plan, each step at its own bits.
        sampling: how it samples; ``sampling.samples`` are measured, one batch's trajectory is in memory at a time.
            Their seeds are derived from the run's, and are not those of its images.
        start: first sample, to share the work among several calls whose statistics are then merged.
        closed_loop: measure along the trajectory of ``qpipe``, as it is corrected or not, instead of that of
            ``pipe``. Whole trajectories cannot be checked with such statistics.
        progress: show a bar, with that title.

    Raises:
        MismatchError: the two pipelines do not take the same steps.
        InputError: the denoiser's output is NaN or infinite at some step, or the run has no samples.
    """
    return PairedMeasurement(pipe, {0: qpipe}, sampling, closed_loop=closed_loop).all(start, progress)[0]


class PairedMeasurement:
    """Some quantized pipelines, by any key, measured along the same recordings, batch by batch.

    The denoisers' weights are hashed once, when it is made.

    Args:
        pipe: full precision.
        quantized: pipelines by key.
        run: as for :func:`measure`.
        closed_loop: as for :func:`measure`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        quantized: Mapping[int, DiffusionPipeline],
        sampling: Sampling,
        *,
        closed_loop: bool = False,
    ) -> None:
        self.pipe, self.quantized, self.closed_loop = pipe, quantized, closed_loop
        self.run = sampling.with_seed_for("measuring")
        model = denoisers_fingerprint(pipe)
        self.measured_on = {key: self._measured_on(qpipe, model) for key, qpipe in quantized.items()}
        self._first: dict[int, NoiseStats] = {}  # whose scheduler was asked how it steps

    def _measured_on(self, qpipe: DiffusionPipeline, model: str) -> MeasuredOn:
        correction = getattr(scheduler_of(qpipe), "correction", None)
        if self.closed_loop and correction is not None and correction.model_timesteps:
            raise InputError("along shifted timesteps nothing can be measured; correct without stepbaq, then measure")
        return MeasuredOn(
            model=model,
            quantized=denoisers_fingerprint(qpipe),
            activation_bits=activation_bits_of(qpipe),
            **schedule_of(self.pipe),
            steps=self.run.steps,
            guidance=guidance_of(self.pipe, self.run),
            call=self.run.shared_call,
            seed=self.run.seed,
            inputs=self.run.inputs_digest,
            closed_loop=self.closed_loop,
            corrected=correction.methods if self.closed_loop and correction is not None else (),
        )

    def all(self, start: int = 0, progress: str | bool = False) -> dict[int, NoiseStats]:
        """Statistics of the samples of the run from ``start`` on, by key; shared inside `ptqd.processes.together`.

        Raises:
            InputError: there are none.
        """
        totals: dict[int, NoiseStats] = {}
        rounds = processes.rounds(list(self.run.batches(start)))
        for batches in track(rounds, "measuring" if progress is True else progress or None):
            for parts in processes.spread(self.batch, processes.mine(batches)):
                for key, part in parts.items():
                    totals[key] = NoiseStats.merge([totals[key], part]) if key in totals else part
        if not totals:
            raise InputError(f"no samples to measure from {start} to {self.run.samples}; ask for more")
        return totals

    def batch(self, indices: Sequence[int]) -> dict[int, NoiseStats]:
        """Statistics of some samples, by key."""
        if self.closed_loop:
            return {key: self._closed(key, indices) for key in self.quantized}
        with record(self.pipe) as trajectory:
            run_batch(self.pipe, self.run, indices, "latent")
        return {key: self._open(key, indices, trajectory) for key in self.quantized}

    def _open(self, key: int, indices: Sequence[int], trajectory: Trajectory) -> NoiseStats:
        """Along the full-precision trajectory."""
        replayed = self._replay(self.quantized[key], indices, trajectory)
        part = self._batch_stats(key, trajectory, trajectory.outputs, replayed.outputs, indices)
        changes = torch.tensor(replayed.step_changes, dtype=torch.float64) * len(indices)
        return dataclasses.replace(part, moved=changes)

    def _closed(self, key: int, indices: Sequence[int]) -> NoiseStats:
        """Along the quantized one: the recorded next samples are its own, there is nothing to compare with."""
        with record(self.quantized[key]) as trajectory:
            run_batch(self.quantized[key], self.run, indices, "latent")
        replayed = self._replay(self.pipe, indices, trajectory)
        part = self._batch_stats(key, trajectory, replayed.outputs, trajectory.outputs, indices)
        return dataclasses.replace(
            part,
            moved=part.unclipped(),
            finals=part.finals[:0],
            final_indices=part.final_indices[:0],
            paths=part.paths[:0],
        )

    def _replay(self, pipe: DiffusionPipeline, indices: Sequence[int], trajectory: Trajectory) -> Replayed:
        with replay(pipe, trajectory) as replayed:
            run_batch(pipe, self.run, indices, "latent")
        return replayed

    def _batch_stats(
        self,
        key: int,
        trajectory: Trajectory,
        outputs: Sequence[torch.Tensor],
        outputs_q: Sequence[torch.Tensor],
        samples: Sequence[int],
    ) -> NoiseStats:
        """Statistics of one batch's steps; how the scheduler steps is asked of the first batch alone."""
        _check_samples(type(self.pipe).__name__, trajectory)
        indices = torch.tensor(list(samples))
        axis = trajectory.channel_axis
        channels = trajectory.samples[0].shape[axis]  # a learned variance follows the mean
        means, means_q = ([e.narrow(axis, 0, channels) for e in es] for es in (outputs, outputs_q))
        timesteps = [float(t) for t in trajectory.timesteps]
        keywords = trajectory.keywords
        measured_on = dataclasses.replace(
            self.measured_on[key],
            channel_axis=axis,
            model_timesteps=tuple(trajectory.model_timesteps),
            eta=float(keywords.get("eta", 0.0)),  # also where the scheduler has one of its own
            keywords={k: v for k, v in keywords.items() if isinstance(v, int | float | str | None)},
            learned_variance=outputs[0].shape != trajectory.samples[0].shape,
            repeatable=trajectory.repeatable,
            scales=trajectory.guidance,
        )
        rows, tables = [], []
        for x, eps, eps_q in zip(trajectory.samples, means, means_q, strict=True):
            rows.append(per_sample(paired_moments(eps, eps_q, axis), len(indices)))
            tables.append(fold_sums(per_sample(joint_moments(x, eps, eps_q, axis), len(indices)), indices))
        each = rows_of_samples(trajectory.samples[-1], len(indices)).shape[1]  # rows of a sample
        final = whole_samples(trajectory.final, len(indices), each)
        first = self._first.get(key)
        cross = cross_moments(means, means_q) * len(final) / len(means[0])
        stats = NoiseStats(
            timesteps=torch.tensor(timesteps, dtype=torch.float64),
            indices=indices,
            moments=torch.stack(rows, dim=1),  # n,T,C,14
            elements=final[0].numel() // channels,
            measured_on=measured_on,
            response=_response(trajectory) if first is None else first.response,
            levels=noise_levels(trajectory.scheduler, trajectory.timesteps) if first is None else first.levels,
            joint=torch.stack(tables, dim=1),  # 16,T,G,K,K
            cross=cross,
            moved=torch.zeros(len(timesteps), dtype=torch.float64),
            finals=final[:CHECKED].cpu().float(),
            final_indices=indices[:CHECKED].clone(),
            paths=self._paths(trajectory, len(indices), each),
            bands=measured_bands(
                means, means_q, trajectory.samples, principal_directions(final), cross, axis, len(indices), each
            ),
        )
        self._first.setdefault(key, stats)
        return stats

    def _paths(self, trajectory: Trajectory, samples: int, rows: int) -> torch.Tensor:
        """The samples after every step (P, T, m, ...); of several quantized pipelines, none is kept."""
        each = [rows_of_samples(next_sample(result), samples, rows) for result in trajectory.results]
        one = torch.stack([part[:1] for part in each], dim=1)
        kept = 0 if len(self.quantized) > 1 else paths_kept(one)
        return torch.stack([part[:kept].cpu() for part in each], dim=1) if kept else one[:0].cpu()


def _check_samples(pipeline: str, trajectory: Trajectory) -> None:
    """Refuse steps of which no moments can be taken.

    Raises:
        UnsupportedError: samples without places beside their channels, or that come in batches of several sizes.
    """
    shapes = {tuple(sample.shape) for sample in trajectory.samples}
    if len(shapes) > 1:
        raise UnsupportedError(f"{pipeline} steps samples of several shapes in one run; ptqd measures those of one")
    if trajectory.samples[0].ndim < 3:
        raise UnsupportedError(f"{pipeline} steps vectors, not images, frames or tokens; ptqd cannot measure these")


def _response(trajectory: Trajectory) -> Response:
    scheduler, sample, axis = trajectory.scheduler, trajectory.samples[0], trajectory.channel_axis
    channels, whole = sample.shape[axis], trajectory.outputs[0].shape[axis]
    variance = [float(out.narrow(axis, channels, whole - channels).float().mean()) for out in trajectory.outputs]
    return linear_response(
        scheduler,
        getattr(scheduler, "plain_class", type(scheduler)).step,
        trajectory.timesteps,
        trajectory.keywords,
        learned_variance=None if whole == channels else variance,
        device=sample.device,
    )
