"""The inputs a denoiser really sees, drawn over its sampling steps.

Rows of the denoiser's batch, guidance's halves included, are taken from whole trajectories of the full-precision
pipeline. Which steps a sample gives depends on its seed alone, so neither batch size nor order changes what is drawn.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.diffusion.sampling import Sampling, run_batch, sample
from ptqd.diffusion.step_state import StepIndex
from ptqd.diffusion.timesteps import timestep_argument
from ptqd.diffusion.trajectory import Trajectory, record, replay
from ptqd.errors import InputError
from ptqd.progress import track
from ptqd.quantization.activation_profile import ActivationProfile, ActivationProfiler
from ptqd.quantization.recipe import CalibrationSteps

PTQ4DM_MEAN, PTQ4DM_DEVIATION = 0.4, 0.4  # of the way from the data (0) to noise (1)
ERROR_SAMPLES = 8


@dataclass
class CalibrationInputs:
    """Rows of calls of a denoiser, all steps mixed.

    Attributes:
        leaves: what the calls were given: tensors of which the rows are stacked (N, ...), and what all calls share.
        stacked: which of the leaves are stacked.
        structure: how leaves make arguments.
        steps: of each row (N,), by number.
    """

    leaves: list[Any]
    stacked: list[bool]
    structure: Any
    steps: torch.Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def call(self, rows: torch.Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call with some of the rows."""
        leaves = [x[rows] if stacked else x for x, stacked in zip(self.leaves, self.stacked, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of neighbouring rows."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def first(self, rows: int) -> "CalibrationInputs":
        """The first rows of it; they are in random order."""
        keep = slice(0, rows)
        leaves = [x[keep] if stacked else x for x, stacked in zip(self.leaves, self.stacked, strict=True)]
        return CalibrationInputs(leaves, self.stacked, self.structure, self.steps[keep])


def step_weights(kind: CalibrationSteps, steps: int, errors: torch.Tensor | None = None) -> np.ndarray[Any, Any]:
    """The probability that a row is drawn from each step, first step (noise) first.

    Args:
        kind: see :class:`ptqd.Recipe`.
        steps: T.
        errors: measured at each step (T,), for ``"error"``.
    """
    flat = np.full(steps, 1 / steps)
    if kind == "ptq4dm":
        place = np.linspace(1, 0, steps)
        weights = np.exp(-(((place - PTQ4DM_MEAN) / PTQ4DM_DEVIATION) ** 2) / 2)
        return np.asarray(weights / weights.sum())
    if kind == "error" and errors is not None and float(errors.sum()) > 0:
        share = errors.double().numpy() / float(errors.double().sum())
        return np.asarray((flat + share) / 2)
    return flat


def measured_errors(pipe: DiffusionPipeline, qpipe: DiffusionPipeline, sampling: Sampling) -> torch.Tensor:
    """What quantization changes at each step: the sum over samples of the squared change of the next sample (T,)."""
    totals: list[float] = []
    for indices in sampling.batches():
        with record(pipe) as trajectory:
            run_batch(pipe, sampling, indices, "latent")
        with replay(qpipe, trajectory) as answer:
            run_batch(qpipe, sampling, indices, "latent")
        moved = [value * len(indices) for value in answer.step_changes]
        totals = moved if not totals else [a + b for a, b in zip(totals, moved, strict=True)]
    return torch.tensor(totals, dtype=torch.float64)


@dataclass(frozen=True)
class Calibration:
    """What one pass over the calibration trajectories gave.

    Attributes:
        inputs: rows of the denoiser's calls; None where none were asked for.
        profile: which layers see the step alone; None where that was not asked.
    """

    inputs: "CalibrationInputs | None"
    profile: ActivationProfile | None


def draw_inputs(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    rows: int,
    weights: np.ndarray[Any, Any],
    *,
    progress: str | None = None,
) -> "CalibrationInputs":
    """Draw rows of the denoiser's calls from ``sampling``'s trajectories; in random order.

    Args:
        pipe: in full precision, or one whose quantizers do not round yet.
        sampling: its samples are drawn from.
        rows: wanted; fewer where the run has fewer.
        weights: probability of each step (T,).
        progress: title of a bar.

    Raises:
        InputError: calls differ in an argument that is not the batch's, so that their rows cannot be mixed.
    """
    inputs = calibrate(pipe, sampling, rows=rows, weights=weights, progress=progress).inputs
    assert inputs is not None
    return inputs


def calibrate(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    *,
    rows: int = 0,
    weights: np.ndarray[Any, Any] | None = None,
    profile: bool = False,
    index: StepIndex | None = None,
    progress: str | None = None,
) -> Calibration:
    """Run the calibration trajectories once; observers in the denoiser see every call meanwhile.

    Args:
        pipe: in full precision, or one whose quantizers do not round yet.
        sampling: the trajectories.
        rows: of the denoiser's calls to draw.
        weights: probability that a row is drawn from each step (T,), where some are.
        profile: find the layers that see nothing but the step.
        index: set to the number of the step before each call.
        progress: title of a bar.

    Raises:
        InputError: calls differ in an argument that is not the batch's, so that their rows cannot be mixed.
    """
    if not rows and not profile and index is None:  # nothing that needs the steps told apart
        for _ in sample(pipe, sampling, output="latent", progress=progress):
            pass
        return Calibration(None, None)
    model = getattr(pipe, denoiser_name(pipe))
    count = -(-rows // sampling.samples)
    taken: list[_Taken] = []
    profiler = ActivationProfiler(model) if profile else None
    for indices in track(list(sampling.batches()), progress):
        with record(pipe) as trajectory, contextlib.ExitStack() as stack:
            if weights is not None:
                required = [_steps_of(sampling.seed, i, count, weights) for i in indices]
                stack.enter_context(_listening(model, trajectory, indices, required, taken))
            if index is not None:
                stack.enter_context(_numbering(model, trajectory, index))
            if profiler is not None:
                stack.enter_context(profiler.watching(trajectory, len(indices)))
            run_batch(pipe, sampling, indices, "latent")
    taken.sort(key=lambda part: (part.sample, part.step))
    inputs = _stack(taken, rows, sampling.seed) if weights is not None else None
    return Calibration(inputs, None if profiler is None else profiler.result(trajectory.model_timesteps))


def _numbering(model: nn.Module, trajectory: Trajectory, index: StepIndex) -> contextlib.AbstractContextManager[None]:
    """Inside the block an index is the number of the step."""

    def number(module: object, args: object) -> None:
        index.index = len(trajectory.timesteps)

    return hooked(model.register_forward_pre_hook(number))


@dataclass
class _Taken:
    """One sample's rows of one call; of leaves that are shared, the leaf itself."""

    sample: int
    step: int
    leaves: list[Any]
    stacked: list[bool]
    structure: Any


def _steps_of(seed: int, sample: int, count: int, weights: np.ndarray[Any, Any]) -> list[int]:
    """The steps that a sample gives, by its own seed; where all are alike, none twice."""
    random = np.random.default_rng([seed, sample])
    alike = bool(np.allclose(weights, weights[0]))
    chosen: list[int] = random.choice(
        len(weights), min(count, len(weights)) if alike else count, not alike, weights
    ).tolist()
    return chosen


def _listening(
    model: nn.Module,
    trajectory: Trajectory,
    samples: Sequence[int],
    wanted: Sequence[Sequence[int]],
    taken: list[_Taken],
) -> contextlib.AbstractContextManager[None]:
    """Keep the wanted samples' rows of the calls inside the block."""

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = len(trajectory.timesteps)
        chosen = [n for n, steps in enumerate(wanted) if step in steps]
        if not chosen:
            return
        sample = next(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and x.ndim > 1)
        batch = len(sample)
        leaves, structure = tree_flatten(_with_timesteps_by_row(module, args, kwargs, batch, sample.device))
        stacked = [isinstance(x, torch.Tensor) and x.ndim > 0 and len(x) == batch for x in leaves]
        for n in chosen:
            rows = torch.arange(n, batch, len(samples))  # one in each of guidance's parts
            parts = [x[rows.to(x.device)] if by_row else x for x, by_row in zip(leaves, stacked, strict=True)]
            taken.extend([_Taken(samples[n], step, parts, stacked, structure)] * wanted[n].count(step))

    return hooked(model.register_forward_pre_hook(keep, with_kwargs=True))


def _with_timesteps_by_row(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], batch: int, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with one timestep for each row of the batch, so that rows of several steps can be mixed."""
    argument = timestep_argument(model)
    if argument is None:
        return args, dict(kwargs)
    name, position = argument
    timestep = kwargs[name] if name in kwargs else args[position]
    timestep = torch.as_tensor(timestep).to(device)
    timestep = timestep.expand(batch) if timestep.numel() == 1 else timestep
    if name in kwargs:
        return args, {**kwargs, name: timestep}
    return (*args[:position], timestep, *args[position + 1 :]), dict(kwargs)


def _stack(taken: list[_Taken], rows: int, seed: int) -> CalibrationInputs:
    first = taken[0]
    for part in taken[1:]:
        for known, leaf, by_row in zip(first.leaves, part.leaves, first.stacked, strict=True):
            same = by_row or (torch.equal(known, leaf) if isinstance(known, torch.Tensor) else known == leaf)
            if not same or part.stacked != first.stacked:
                raise InputError(
                    "the denoiser is called with arguments that differ from step to step and are not one a sample; "
                    "methods that learn cannot mix such calls: use a recipe without methods"
                )
    sizes = [next(len(x) for x, by_row in zip(part.leaves, part.stacked, strict=True) if by_row) for part in taken]
    steps = torch.tensor([part.step for part in taken]).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))[:rows]
    leaves: list[Any] = [
        torch.cat([part.leaves[i] for part in taken])[order.to(leaf.device)] if first.stacked[i] else leaf
        for i, leaf in enumerate(first.leaves)
    ]
    return CalibrationInputs(leaves, first.stacked, first.structure, steps[order])
