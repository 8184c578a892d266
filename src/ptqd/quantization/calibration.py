"""The inputs a denoiser really sees, drawn over its sampling steps.

Rows of the denoiser's batch, guidance's halves included, are taken from whole trajectories of the full-precision
pipeline. Which steps a sample gives depends on its seed alone, so neither batch size nor order changes what is drawn.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_processor
from torch import nn

from ptqd import processes
from ptqd.diffusion.call_rows import CallLayout, Row, join_rows, padded
from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import bring_like
from ptqd.diffusion.pipeline_parts import denoiser_of
from ptqd.diffusion.plain_copy import is_plain, plain_copy
from ptqd.diffusion.plain_values import NotPlainError, as_plain, from_plain
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.step_state import StepIndex
from ptqd.diffusion.trajectory import Trajectory, record, replay
from ptqd.errors import InputError
from ptqd.progress import track
from ptqd.quantization.activation_profile import ActivationProfile, ActivationProfiler
from ptqd.quantization.budget import device_of
from ptqd.quantization.checkpoints import PassCheckpoint
from ptqd.quantization.modules.adapters import tuned_layers, without_merged
from ptqd.quantization.modules.attention import attention_modules
from ptqd.quantization.numerics.observer import Observer
from ptqd.quantization.recipe import CalibrationSteps

PTQ4DM_MEAN, PTQ4DM_DEVIATION = 0.4, 0.4  # of the way from the data (0) to noise (1)
ERROR_SAMPLES = 8
BATCH = 64  # rows that a denoiser is called with at once, at most
OBSERVERS_AT_ONCE = 256  # whose histograms processes tell each other


class CalibrationInputs:
    """Rows of calls of a denoiser, all steps mixed, in random order.

    Rows whose tensors have the same shapes, and which share the same other arguments, can be called together: they are
    a kind. Prompts of other lengths, and images of other sizes, are of other kinds.

    Args:
        rows: in order.
        steps: of each row (N,), by number.
    """

    def __init__(self, rows: Sequence[Row], steps: torch.Tensor) -> None:
        self.rows, self.steps = list(rows), steps
        self._kinds: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            self._kinds.setdefault(row.kind, []).append(i)

    def __len__(self) -> int:
        return len(self.rows)

    def call(self, rows: Iterable[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call with some of the rows, of one kind; one may come more than once."""
        args, kwargs = join_rows([self.rows[i] for i in rows])
        return args, kwargs

    def run(self, model: nn.Module, rows: Iterable[int]) -> Any:
        """What a denoiser gives for some of the rows, of one kind."""
        args, kwargs = self.call(rows)
        return model(*args, **kwargs)

    def kinds(self) -> list[list[int]]:
        """The rows of each kind, by number; the commonest kind first."""
        return sorted(self._kinds.values(), key=lambda rows: (-len(rows), rows[0]))

    def batches(self, size: int) -> Iterator[list[int]]:
        """Rows by number, of one kind each time, at most so many at once."""
        for rows in self.kinds():
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def first(self, rows: int) -> "CalibrationInputs":
        """The first rows of it."""
        return CalibrationInputs(self.rows[:rows], self.steps[:rows])


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

    def moved(indices: range) -> list[float]:
        with record(pipe) as trajectory:
            run_batch(pipe, sampling, indices, "latent")
        with replay(qpipe, trajectory) as answer:
            run_batch(qpipe, sampling, indices, "latent")
        return [value * len(indices) for value in answer.step_changes]

    parts = processes.spread(moved, processes.mine(list(sampling.batches())))
    totals = [sum(step) for step in zip(*parts, strict=True)]
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


def as_calibrated(model: nn.Module) -> nn.Module:
    """A denoiser as it computes, without what is done to it for speed or memory: itself, or a copy that is plain."""
    fused = any(getattr(module, "fused_projections", False) for _, module in attention_modules(model))
    merged = any(layer.merged_adapters for _, layer in tuned_layers(model))
    if is_plain(model) and not fused and not merged:
        return model
    own: nn.Module = plain_copy(model, shares_weights=True)
    bring_like(own, model)
    without_merged(own)
    for _, attention in attention_modules(own):
        if getattr(attention, "fused_projections", False):
            _unfuse(attention)
    return own


def _unfuse(attention: Any) -> None:
    """Let an attention have three projections again, as it is saved; they are what was fused."""
    if hasattr(attention, "unfuse_projections"):
        attention.unfuse_projections()
        return
    for name in ("to_qkv", "to_kv", "to_added_qkv"):
        if hasattr(attention, name):
            delattr(attention, name)
    attention.fused_projections = False
    processor: Any = PLAIN_PROCESSORS.get(type(attention.processor).__name__)
    if processor is not None:
        attention.set_processor(processor())


PLAIN_PROCESSORS: dict[str, Any] = {
    f"Fused{name}": getattr(attention_processor, name)
    for name in vars(attention_processor)
    if f"Fused{name}" in vars(attention_processor)
}
"""The processor that each of diffusers' processors of fused projections stands for."""


def draw_inputs(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    rows: int,
    weights: np.ndarray[Any, Any],
    *,
    progress: str | None = None,
    name: str | None = None,
    steps: Sequence[int] | None = None,
) -> "CalibrationInputs":
    """Draw rows of the denoiser's calls from ``sampling``'s trajectories; in random order.

    Args:
        pipe: in full precision, or one whose quantizers do not round yet.
        sampling: its samples are drawn from.
        rows: wanted; fewer where the run has fewer.
        weights: probability of each step (T,).
        progress: title of a bar.
        name: as for :func:`calibrate`.
        steps: as for :func:`calibrate`.

    Raises:
        InputError: the denoiser is never called.
    """
    inputs = calibrate(pipe, sampling, rows=rows, weights=weights, progress=progress, name=name, steps=steps).inputs
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
    name: str | None = None,
    steps: Sequence[int] | None = None,
    checkpoint: PassCheckpoint | None = None,
) -> Calibration:
    """Run the calibration trajectories once; observers in the denoiser see every call meanwhile.

    Inside :func:`ptqd.processes.together` each process runs its share, and has what all of them saw.

    Args:
        pipe: in full precision, or one whose quantizers do not round yet.
        sampling: the trajectories.
        rows: of the denoiser's calls to draw.
        weights: probability that a row is drawn from each of the denoiser's steps (T,), where some are.
        profile: find the layers that see nothing but the step.
        index: set to the number of the denoiser's step before each call.
        progress: title of a bar.
        name: of the denoiser, where a pipeline has two.
        steps: of the run at which the denoiser is called, by number; all where it is not said.
        checkpoint: of this pass before it was killed.

    Raises:
        InputError: a denoiser is never called.
    """
    model = denoiser_of(pipe, name)
    checkpoint = checkpoint or PassCheckpoint(None, ())
    layout = CallLayout.of(pipe, sampling, name) if weights is not None or profile else None
    if padded(pipe, sampling, name) if layout is None else layout.padded:
        sampling = sampling.replace(batch=1)  # how far a prompt is padded would depend on the batch
    count = -(-rows // sampling.samples)
    profiler = ActivationProfiler(model, layout) if profile and layout is not None else None
    taken: list[_Taken] = [_Taken(*item) for item in checkpoint.taken]
    told: Sequence[float] = checkpoint.state.get("timesteps", [])
    if profiler is not None and checkpoint.done:
        profiler.load(checkpoint.state["profile"])
    tells_steps = bool(rows or profile or index is not None)
    shared = processes.is_shared()
    batches = processes.mine(list(sampling.batches(0 if shared else checkpoint.done)))
    with processes.failing_alike():
        for indices in track([batch for batch in batches if batch.stop > checkpoint.done], progress):
            before = len(taken)
            with contextlib.ExitStack() as stack:
                trajectory = stack.enter_context(record(pipe)) if tells_steps else Trajectory()
                step = _OwnStep(trajectory, steps)
                if weights is not None and layout is not None:
                    required = [_steps_of(sampling.seed, i, count, weights) for i in indices]
                    stack.enter_context(_listening(model, step, layout, indices, required, taken))
                if index is not None:
                    stack.enter_context(_numbering(model, step, index))
                if profiler is not None:
                    stack.enter_context(profiler.watching(step))
                run_batch(pipe, sampling, indices, "latent")
            told = trajectory.model_timesteps
            fresh = [(part.sample, part.step, part.row) for part in taken[before:]]
            state = {"timesteps": list(told), "profile": None if profiler is None else profiler.state()}
            checkpoint.keep(indices.stop, fresh, state, last=indices == batches[-1])
    if shared:
        told = next(filter(None, processes.everyone(list(told))), [])
        _share_what_was_seen(taken, profiler, checkpoint.observers, device_of(model))
    taken.sort(key=lambda part: (part.sample, part.step))
    inputs = _shuffled(taken, rows, sampling.seed) if weights is not None else None
    own = told if steps is None or not told else [told[step] for step in steps]
    return Calibration(inputs, None if profiler is None else profiler.result(own))


def _share_what_was_seen(
    taken: "list[_Taken]", profiler: ActivationProfiler | None, observers: Sequence[Observer], device: torch.device
) -> None:
    """Let every process have the rows that all have drawn, and what all have seen, as one that is alone would."""
    with processes.failing_alike():
        moved: dict[int, Any] = {}
        try:
            own = [as_plain((part.sample, part.step, part.row), moved) for part in taken]
            profile = as_plain(None if profiler is None else profiler.state(), moved)
        except NotPlainError as error:
            raise InputError(
                f"the denoiser is given a {error}, which processes cannot tell each other; calibrate with one process"
            ) from None
    moved = {}
    taken[:] = [_Taken(*from_plain(item, device, moved)) for share in processes.everyone(own) for item in share]
    if profiler is not None:
        profiler.merge([from_plain(state, device, moved) for state in processes.everyone(profile)])
    observers = list({id(observer): observer for observer in observers}.values())  # neighbouring steps may share one
    for start in range(0, len(observers), OBSERVERS_AT_ONCE):
        some = observers[start : start + OBSERVERS_AT_ONCE]
        seen = zip(*processes.everyone([observer.state() for observer in some]), strict=True)
        for observer, states in zip(some, seen, strict=True):
            observer.load(Observer.merged([Observer.of(state) for state in states]).state())


class _OwnStep:
    """Which of its steps a denoiser is at, in a trajectory that is being recorded."""

    def __init__(self, trajectory: Trajectory, steps: Sequence[int] | None) -> None:
        self.trajectory = trajectory
        self.number = None if steps is None else {step: i for i, step in enumerate(steps)}

    def __call__(self) -> int:
        step = len(self.trajectory.timesteps)
        return step if self.number is None else self.number[step]


def _numbering(model: nn.Module, step: Callable[[], int], index: StepIndex) -> contextlib.AbstractContextManager[None]:
    """Inside the block an index is the number of the step."""

    def number(module: object, args: object) -> None:
        index.index = step()

    return hooked(model.register_forward_pre_hook(number))


@dataclass
class _Taken:
    """One row of one call."""

    sample: int
    step: int
    row: Row


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
    step: Callable[[], int],
    layout: CallLayout,
    samples: Sequence[int],
    wanted: Sequence[Sequence[int]],
    taken: list[_Taken],
) -> contextlib.AbstractContextManager[None]:
    """Keep the wanted samples' rows of the calls inside the block."""

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = step()
        chosen = [n for n, steps in enumerate(wanted) if here in steps]
        if not chosen:
            return
        rows = layout.rows(args, kwargs)
        for n in chosen:
            for row in rows[n :: len(samples)]:  # one in each of guidance's parts
                taken.extend([_Taken(samples[n], here, row.kept())] * wanted[n].count(here))

    return hooked(model.register_forward_pre_hook(keep, with_kwargs=True))


def _shuffled(taken: Sequence[_Taken], rows: int, seed: int) -> CalibrationInputs:
    """Rows in random order, as many as were asked for."""
    if not taken:
        raise InputError("the calibration's samples call the denoiser at none of the steps drawn; give more samples")
    order = torch.randperm(len(taken), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    return CalibrationInputs([taken[i].row for i in order], torch.tensor([taken[i].step for i in order]))
