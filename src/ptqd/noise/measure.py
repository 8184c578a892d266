"""Measuring: pairs of outputs at the same samples, batch by batch, into NoiseStats.

The full-precision pipeline is recorded; the quantized one is replayed along the recorded samples
(:mod:`ptqd.diffusion.trajectory`). Several quantized pipelines, one for each activation width, are replayed along one
recording: statistics of all
widths cost one full-precision run and one quantized run each.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion.fingerprints import activation_bits, fingerprint, schedule_of
from ptqd.diffusion.noise_schedule import noise_levels
from ptqd.diffusion.pipeline_parts import denoiser_name, scheduler_of
from ptqd.diffusion.sampling import Sampling, guidance_of, run_batch
from ptqd.diffusion.scheduler_response import Response, linear_response
from ptqd.diffusion.trajectory import Answer, Trajectory, record, replay, whole_samples
from ptqd.errors import InputError
from ptqd.noise.second_moments import fold_of, fold_sums, joint_moments
from ptqd.noise.stats import CHECKED, NoiseStats, cross_moments, paired_moments, per_sample
from ptqd.progress import track


def measure(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    run: Sampling,
    *,
    start: int = 0,
    resume: NoiseStats | None = None,
    keep: Callable[[NoiseStats], None] | None = None,
    closed_loop: bool = False,
    progress: str | bool = False,
) -> NoiseStats:
    """Measure what quantization does to every step.

    Args:
        pipe: full precision.
        qpipe: the same pipeline, quantized by any means; with a plan, each step at its own bits.
        run: how it samples; ``run.samples`` are measured, one batch's trajectory is in memory at a time. Their seeds
            are derived from the run's, and are not those of its images.
        start: first sample, to share the work.
        resume: what was measured before, of the first samples; the rest is added.
        keep: called after each batch with all that is measured so far, to be kept against a kill.
        closed_loop: measure along the trajectory of ``qpipe``, as it is corrected or not, instead of that of
            ``pipe``. Whole trajectories cannot be checked with such statistics.
        progress: show a bar, with that title.

    Raises:
        MismatchError: the two pipelines do not take the same steps.
        InputError: the denoiser's output is NaN or infinite at some step.
    """
    measured = _Measuring(pipe, {0: qpipe}, run.with_seed_for("measuring"), closed_loop)
    before = {} if resume is None else {0: resume}
    return measured.go(start, before, None if keep is None else lambda stats: keep(stats[0]), progress)[0]


class _Measuring:
    """Some quantized pipelines, by any key, along the same recordings."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        quantized: Mapping[int, DiffusionPipeline],
        run: Sampling,
        closed_loop: bool = False,
    ) -> None:
        self.pipe, self.quantized, self.run, self.closed_loop = pipe, quantized, run, closed_loop
        model = fingerprint(getattr(pipe, denoiser_name(pipe)))
        self.sources = {key: self._source(qpipe, model) for key, qpipe in quantized.items()}

    def _source(self, qpipe: DiffusionPipeline, model: str) -> dict[str, Any]:
        correction = getattr(scheduler_of(qpipe), "correction", None)
        if self.closed_loop and correction is not None and correction.model_timesteps:
            raise InputError("along shifted timesteps nothing can be measured; correct without stepbaq, then measure")
        denoiser = getattr(qpipe, denoiser_name(qpipe))
        return {
            "model": model,
            "quantized": fingerprint(denoiser),
            "activation_bits": activation_bits(denoiser),
            **schedule_of(self.pipe),
            "steps": self.run.steps,
            "eta": 0.0,
            "guidance": guidance_of(self.pipe, self.run),
            "call": self.run.shared_call,
            "seed": self.run.seed,
            "inputs": self.run.inputs_digest,
            "closed_loop": self.closed_loop,
            "corrected": list(correction.methods) if self.closed_loop and correction is not None else [],
        }

    def go(
        self,
        start: int,
        before: Mapping[int, NoiseStats],
        keep: Callable[[Mapping[int, NoiseStats]], None] | None,
        progress: str | bool,
    ) -> dict[int, NoiseStats]:
        totals = dict(before)
        start = next((stats.samples for stats in before.values()), start)
        for indices in track(list(self.run.batches(start)), "measuring" if progress is True else progress or None):
            if self.closed_loop:
                parts = {key: self._closed(key, indices, totals.get(key)) for key in self.quantized}
            else:
                with record(self.pipe) as trajectory:
                    run_batch(self.pipe, self.run, indices, "latent")
                parts = {key: self._open(key, indices, trajectory, totals.get(key)) for key in self.quantized}
            for key, part in parts.items():
                totals[key] = NoiseStats.merge([totals[key], part]) if key in totals else part
            if keep is not None:
                keep(totals)
        if set(totals) != set(self.quantized):
            raise InputError(f"no samples to measure from {start} to {self.run.samples}; ask for more")
        return totals

    def _open(self, key: int, indices: Sequence[int], trajectory: Trajectory, before: NoiseStats | None) -> NoiseStats:
        """Along the full-precision trajectory."""
        answer = self._answer(self.quantized[key], indices, trajectory)
        part = _batch_stats(trajectory, trajectory.outputs, answer.outputs, indices, self.sources[key], before)
        return dataclasses.replace(part, moved=torch.tensor(answer.moved, dtype=torch.float64) * len(indices))

    def _closed(self, key: int, indices: Sequence[int], before: NoiseStats | None) -> NoiseStats:
        """Along the quantized one: the recorded next samples are its own, there is nothing to compare with."""
        with record(self.quantized[key]) as trajectory:
            run_batch(self.quantized[key], self.run, indices, "latent")
        answer = self._answer(self.pipe, indices, trajectory)
        part = _batch_stats(trajectory, answer.outputs, trajectory.outputs, indices, self.sources[key], before)
        return dataclasses.replace(
            part, moved=part.unclipped(), finals=part.finals[:0], final_indices=part.final_indices[:0]
        )

    def _answer(self, pipe: DiffusionPipeline, indices: Sequence[int], trajectory: Trajectory) -> Answer:
        with replay(pipe, trajectory) as answer:
            run_batch(pipe, self.run, indices, "latent")
        return answer


def _batch_stats(
    trajectory: Trajectory,
    outputs: Sequence[torch.Tensor],
    outputs_q: Sequence[torch.Tensor],
    samples: Sequence[int],
    source: dict[str, Any],
    before: NoiseStats | None,
) -> NoiseStats:
    """Statistics of one batch's steps; how the scheduler steps is asked of the first batch alone."""
    indices = torch.tensor(list(samples))
    source["channel_axis"] = axis = trajectory.channel_axis
    source["told"] = trajectory.model_timesteps
    channels = trajectory.samples[0].shape[axis]  # a learned variance follows the mean
    means, means_q = ([e.narrow(axis, 0, channels) for e in es] for es in (outputs, outputs_q))
    timesteps = [float(t) for t in trajectory.timesteps]
    source["eta"] = float(trajectory.keywords.get("eta", 0.0))  # also where the scheduler has one of its own
    source["keywords"] = {k: v for k, v in trajectory.keywords.items() if isinstance(v, int | float | str | None)}
    source["learned_variance"] = outputs[0].shape != trajectory.samples[0].shape
    source["repeatable"] = trajectory.repeatable
    rows, tables = [], []
    for x, eps, eps_q in zip(trajectory.samples, means, means_q, strict=True):
        rows.append(per_sample(paired_moments(eps, eps_q, axis), len(indices)))
        tables.append(fold_sums(per_sample(joint_moments(x, eps, eps_q, axis), len(indices)), indices))
    odd = (fold_of(indices) % 2 == 1).nonzero().flatten()[:CHECKED]
    final = whole_samples(trajectory.final, len(indices))
    return NoiseStats(
        timesteps=torch.tensor(timesteps, dtype=torch.float64),
        indices=indices,
        moments=torch.stack(rows, dim=1),  # n,T,C,14
        elements=final[0].numel() // channels,
        source=source,
        response=_response(trajectory) if before is None else before.response,
        levels=noise_levels(trajectory.scheduler, trajectory.timesteps) if before is None else before.levels,
        joint=torch.stack(tables, dim=1),  # 16,T,G,K,K
        cross=cross_moments(means, means_q) * len(final) / len(means[0]),
        moved=torch.zeros(len(timesteps), dtype=torch.float64),
        finals=final[odd.to(final.device)].cpu().float(),
        final_indices=indices[odd],
    )


def _response(trajectory: Trajectory) -> Response:
    scheduler, output, sample = trajectory.scheduler, trajectory.outputs[0], trajectory.samples[0]
    return linear_response(
        scheduler,
        getattr(scheduler, "plain_class", type(scheduler)).step,
        trajectory.timesteps,
        trajectory.keywords,
        learned_variance=output.shape != sample.shape,
        device=sample.device,
    )
