"""What a step takes, by activation width, where the pipeline runs now: in simulation, on an engine, on a GPU."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.plan import PrecisionPlan

ROUNDS = 3


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one step of a batch.

    Attributes:
        computed: by activation width.
        held: of a step that holds its output; 0 where none can.
        shallow: of a step at the widest that computes the outer blocks only; None where that was not timed.
    """

    computed: Mapping[int, float]
    held: float
    shallow: float | None = None


def measure_seconds(
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    timesteps: Sequence[float],
    widths: Sequence[int],
    *,
    deep: bool = False,
) -> StepSeconds:
    """Time a pipeline at each width, and where all steps but the first hold: in turn, the median of three rounds.

    Args:
        qpipe: quantized by ptqd, or exported.
        sampling: how it samples; one batch of it is timed, up to the latents.
        timesteps: that the denoiser is told (T,).
        widths: activation bits; of an exported pipeline of one width, that one.
        deep: time also where all steps but the first hold the deep part.

    Raises:
        InputError: the deep part is not known, or the pipeline was exported without it.
    """
    steps = len(timesteps)
    plans = {bits: PrecisionPlan.uniform(timesteps, bits) for bits in widths}
    pipes: dict[object, DiffusionPipeline] = {bits: apply_plan(qpipe, plan) for bits, plan in plans.items()}
    later = range(1, steps) if len(set(timesteps)) == steps else ()  # a schedule that repeats a timestep holds nothing
    if later:
        pipes["held"] = apply_plan(qpipe, plans[widths[-1]].holding(later))
        if deep:
            pipes["shallow"] = apply_plan(qpipe, plans[widths[-1]].replace(shallow=tuple(later)))
    batch = next(iter(sampling.batches()))
    taken: dict[object, list[float]] = {key: [] for key in pipes}
    for round_number in range(ROUNDS + 1):
        for key, pipe in pipes.items():
            start = time.perf_counter()
            run_batch(pipe, sampling, batch, "latent")
            _wait(pipe)
            if round_number:  # the first compiles and allocates
                taken[key].append(time.perf_counter() - start)
    whole = {key: statistics.median(values) for key, values in taken.items()}
    first = whole[widths[-1]] / steps  # of the runs that hold, their one computed step
    kept = {key: min(first, max(0.0, (whole[key] - first) / len(later))) for key in ("held", "shallow") if key in whole}
    shallow = kept.get("shallow", first) if deep else None  # one step alone is whole
    return StepSeconds({bits: whole[bits] / steps for bits in widths}, kept.get("held", 0.0), shallow)


def _wait(pipe: DiffusionPipeline) -> None:
    """Until a GPU has done what it was given."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    elif pipe.device.type == "mps":
        torch.mps.synchronize()
