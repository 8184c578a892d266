"""Interception: taking the place of a scheduler's ``step``, and hooks on modules, for the time of a block."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.hooks import RemovableHandle

from ptqd.diffusion.pipeline_parts import scheduler_of
from ptqd.errors import UnsupportedError


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that were registered on modules, removed at the end of the block whatever happens in it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stepping(pipe: DiffusionPipeline, step: Any) -> Iterator[None]:
    """Let ``pipe``'s scheduler call ``step(plain_step, model_output, timestep, sample, ...)`` for the block's time.

    Its class is what changes: copies that the pipeline makes of it, to step something else, are seen and refused.
    """
    scheduler = scheduler_of(pipe)
    kind: Any = type(scheduler)

    @functools.wraps(kind.step)  # pipelines look at the signature
    def wrapped(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(kind.step, self)
        if self is not scheduler:
            raise UnsupportedError(f"{type(pipe).__name__} steps copies of its scheduler; ptqd follows a single one")
        if not sample.is_floating_point():
            raise UnsupportedError(f"{kind.__name__} steps discrete samples; ptqd needs continuous ones")
        return step(plain, model_output, timestep, sample, *args, **kwargs)

    with stepping_as(scheduler, wrapped):
        yield


@contextmanager
def stepping_as(scheduler: object, step: object) -> Iterator[None]:
    """Let a scheduler have another ``step`` for the block's time: a subclass that is otherwise its own class."""
    kind: Any = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = kind


Draw = Callable[..., torch.Tensor]


def step_with_noise(step: object, draw: Draw) -> Any:
    """A scheduler's ``step`` that draws its noise from ``draw`` instead of diffusers' ``randn_tensor``.

    It is the same code with its own globals: nothing shared with other schedulers or threads is touched.
    """
    if not isinstance(step, types.FunctionType):
        return step
    changed = types.FunctionType(
        step.__code__, {**step.__globals__, "randn_tensor": draw}, step.__name__, step.__defaults__, step.__closure__
    )
    changed.__kwdefaults__ = step.__kwdefaults__
    return changed
