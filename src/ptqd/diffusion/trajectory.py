"""Recording and replaying schedulers: two pipelines see the same sample at every step.

Every diffusers pipeline ends a step with ``scheduler.step(model_output, t, sample, ...)``. Record it on one
pipeline; replay it on another, which is then handed the *recorded* next sample (teacher forcing), so that its
outputs can be paired with the recorded ones, whatever its guidance, conditioning or network.
"""

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map_only

from ptqd.diffusion.intercept import hooked, stepping, stepping_as
from ptqd.diffusion.pipeline_parts import calling_pipeline, denoiser_name, denoisers_of, find_channel_axis, scheduler_of
from ptqd.diffusion.plain_copy import uncompiled
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.timesteps import model_timestep
from ptqd.errors import InputError, MismatchError, UnsupportedError

_CHANGING = {"model_output", "timestep", "sample", "generator", "variance_noise", "return_dict", "args", "kwargs"}


@dataclass
class Trajectory:
    """One batch's steps: lists over steps of tensors like the sample.

    Attributes:
        timesteps: what the scheduler was told.
        model_timesteps: the timestep that the denoiser got in each step; empty where it takes none.
        samples: ``x_t`` before each step.
        outputs: the denoiser's output, after guidance.
        results: what ``step`` returned.
        scheduler: a copy of it, as it was before the first step.
        keywords: arguments of ``step`` that are the same at every step, such as ``eta``.
        channel_axis: of samples and outputs.
        repeatable: every sample's noise comes from its own generator, whatever the batch.
        guidance: that the pipeline's call is at, by the names of its arguments.
    """

    timesteps: list[Any] = field(default_factory=list)
    model_timesteps: list[float] = field(default_factory=list)
    samples: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    scheduler: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)
    channel_axis: int = 1
    repeatable: bool = True
    guidance: dict[str, float] = field(default_factory=dict)

    @property
    def final(self) -> torch.Tensor:
        """The sample after the last step."""
        return next_sample(self.results[-1])


@dataclass
class Replayed:
    """What another pipeline made of a recorded trajectory.

    Attributes:
        outputs: its denoiser's outputs, after guidance, step by step.
        step_changes: mean squared difference of the next sample that its own step made, and the recorded one.
    """

    outputs: list[torch.Tensor] = field(default_factory=list)
    step_changes: list[float] = field(default_factory=list)


def one_timestep(timestep: Any) -> Any:
    """The timestep of a step, where a scheduler is told one for each sample.

    Raises:
        UnsupportedError: the samples are at different ones.
    """
    if not isinstance(timestep, torch.Tensor) or timestep.numel() == 1:
        return timestep
    if not bool((timestep == timestep.flatten()[0]).all()):
        raise UnsupportedError("the samples of a batch are at different timesteps; ptqd follows one for all")
    return timestep.flatten()[0]


def _own(result: Any) -> Any:
    """What a step returned, in tensors of its own."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, result)


def next_sample(result: Any) -> torch.Tensor:
    """The sample in what ``step`` returned, a tuple or an output object."""
    sample: torch.Tensor = result[0]
    return sample


@contextmanager
def record(pipe: DiffusionPipeline) -> Iterator[Trajectory]:
    """Record every step the pipeline takes inside the block.

    Raises:
        InputError: its scheduler cannot be followed, or was not asked for a single step; an output is NaN or infinite.
    """
    trajectory = Trajectory()
    models = denoisers_of(pipe)
    model = models[denoiser_name(pipe)]
    kind = type(scheduler_of(pipe))

    def step(plain: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if trajectory.scheduler is None:
            trajectory.scheduler = copy.deepcopy(pipe.scheduler)
            trajectory.scheduler.__class__ = kind  # without this function
            bound = inspect.signature(plain).bind(model_output, timestep, sample, *args, **kw)
            bound.apply_defaults()
            trajectory.keywords = {k: v for k, v in bound.arguments.items() if k not in _CHANGING}
            trajectory.repeatable = bound.arguments.get("generator", "none taken") is not None
            trajectory.channel_axis = find_channel_axis(model, model_output, sample)
            trajectory.guidance = calling_pipeline()[1]
        _check_finite(model_output, timestep, "the recorded pipeline")
        before = sample.detach().clone()
        result = plain(model_output, timestep, sample, *args, **kw)
        trajectory.timesteps.append(one_timestep(timestep))
        trajectory.samples.append(before)
        trajectory.outputs.append(model_output.detach())
        trajectory.results.append(_own(result))  # some pipelines change the next sample in place
        return result

    def listen(network: nn.Module, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        timestep = model_timestep(network, args, kwargs)
        told, steps = trajectory.model_timesteps, len(trajectory.timesteps)
        if timestep is not None and len(told) <= steps:  # the first call of a step
            told.extend([told[-1] if told else timestep] * (steps - len(told)))  # some step twice for one call
            told.append(timestep)

    called: dict[str, Any] = {name: getattr(pipe, name) for name in models}
    hooks = [
        called[name].register_forward_pre_hook(partial(listen, network), with_kwargs=True)
        for name, network in models.items()
    ]
    with hooked(*hooks), uncompiled(*models.values()), stepping(pipe, step):
        yield trajectory
    told = trajectory.model_timesteps
    told.extend(told[-1:] * (len(trajectory.timesteps) - len(told)))
    if not trajectory.timesteps:
        raise InputError(
            f"{type(pipe).__name__} took no step with its {kind.__name__}; ptqd needs a pipeline that calls "
            "pipe.scheduler.step, for at least one step"
        )


@contextmanager
def replay(pipe: DiffusionPipeline, trajectory: Trajectory) -> Iterator[Replayed]:
    """Inside the block the pipeline gets the recorded samples; its own outputs are collected, step by step.

    Raises:
        MismatchError: the pipeline starts elsewhere or takes other steps than were recorded.
    """
    answer = Replayed()

    def step(plain: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kw: Any) -> Any:
        i = len(answer.outputs)
        t = float(one_timestep(timestep))
        if i >= len(trajectory.timesteps) or float(trajectory.timesteps[i]) != t:
            raise MismatchError(f"replay: step {i} is at timestep {t:g}, not at the recorded one; use the same steps")
        _check_finite(model_output, timestep, "the replayed pipeline")
        if not torch.equal(sample, trajectory.samples[i]):
            raise MismatchError(
                f"replay: the sample at step {i} is not the recorded one; use the same seeds and inputs"
            )
        answer.outputs.append(model_output.detach())
        own = next_sample(plain(model_output, timestep, sample, *args, **kw))  # many schedulers count their steps
        answer.step_changes.append((own - next_sample(trajectory.results[i])).float().square().mean().item())
        return _own(trajectory.results[i])

    with stepping(pipe, step):
        yield answer
    if len(answer.outputs) != len(trajectory.timesteps):
        raise MismatchError(
            f"replay: {len(answer.outputs)} steps taken, {len(trajectory.timesteps)} recorded; use the same steps"
        )


def _check_finite(model_output: torch.Tensor, timestep: Any, whose: str) -> None:
    if not bool(torch.isfinite(model_output).all()):
        t = float(one_timestep(timestep))
        raise InputError(f"the denoiser's output at timestep {t:g} is NaN or infinite, in {whose}; try a wider dtype")


@contextmanager
def last_samples(pipe: DiffusionPipeline, samples: int) -> Iterator[list[torch.Tensor]]:
    """The samples after the last step (samples, ...), before any decoding, of what is run in the block.

    Nothing is found where the scheduler steps otherwise than ptqd can follow.
    """
    remaining: list[torch.Tensor] = []
    last: list[Any] = []  # the sample before and after the last step
    try:
        scheduler = scheduler_of(pipe)
    except InputError:
        yield remaining
        return
    kind: Any = type(scheduler)
    plain = inspect.signature(kind.step)

    @functools.wraps(kind.step)
    def step(self: object, *args: object, **kwargs: object) -> Any:
        result = kind.step(self, *args, **kwargs)
        if self is scheduler:
            after = next_sample(result)
            last[:] = [plain.bind(self, *args, **kwargs).arguments.get("sample", after), after]
        return result

    with stepping_as(scheduler, step):
        yield remaining
    if last and last[1].is_floating_point() and len(last[1]) % samples == 0:
        each = rows_of_samples(last[0], samples).shape[1]
        remaining.append(whole_samples(last[1], samples, each).detach().cpu())


def final_samples(pipe: DiffusionPipeline, sampling: Sampling, indices: Sequence[int]) -> torch.Tensor:
    """The samples after the last step (n, ...), of a pipeline run for some samples without decoding them."""
    with last_samples(pipe, len(indices)) as result:
        run_batch(pipe, sampling, indices, "latent")
    if not result:
        raise InputError(f"the samples of {type(pipe).__name__} cannot be followed through its scheduler")
    return result[0]


def rows_of_samples(rows: torch.Tensor, samples: int, each: int | None = None) -> torch.Tensor:
    """What a step sees of each sample (samples, m, ...), of all its rows (m samples, ...).

    Some pipelines step a guided batch twice, the second half a copy, which is left out; in others a sample is m rows,
    its frames. Which it is, is told by whether the rows are alike, where ``each``, m, is not known; rows before a step
    tell it, since a step may make copies differ, by a variance that is learned.

    Raises:
        InputError: the rows are not a whole number of batches.
    """
    if len(rows) % samples:
        raise InputError(f"the pipeline steps {len(rows)} rows for {samples} samples; ask for one image a sample")
    if each is not None:
        return rows[: samples * each].view(samples, each, *rows.shape[1:])
    copies = rows.view(-1, samples, *rows.shape[1:])
    if torch.equal(copies, copies[:1].expand_as(copies)):
        return copies[0][:, None]
    return rows.view(samples, -1, *rows.shape[1:])


def whole_samples(rows: torch.Tensor, samples: int, each: int | None = None) -> torch.Tensor:
    """A step's rows as whole samples (samples, C, ...), frames behind the channels; see :func:`rows_of_samples`."""
    split = rows_of_samples(rows, samples, each)
    return split[:, 0] if split.shape[1] == 1 else split.movedim(1, 2)
