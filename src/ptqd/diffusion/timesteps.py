"""The timestep among the arguments of a denoiser's call.

To read a timestep that lies on a GPU waits for it, as most schedulers' steps do.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and keywords
NAMES = ("timestep", "timesteps", "t", "timestep_ratio")  # what denoisers call it


def timestep_argument(model: nn.Module) -> tuple[str, int] | None:
    """The name and the place of the timestep among the arguments of a denoiser's call; None where it takes none."""
    parameters = call_parameters(model)
    return next(((name, parameters.index(name)) for name in NAMES if name in parameters), None)


def call_parameters(model: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a denoiser is called with, in order."""
    own: tuple[str, ...] | None = getattr(model, "call_parameters", None)  # of one that an engine runs
    return own or _parameters(type(model).forward)


@functools.cache
def _parameters(call: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(call).parameters)[1:]


def timestep_in(model: nn.Module, call: Call) -> Any:
    """The timestep among a call's arguments, as it was given; None where the denoiser takes none."""
    argument, (args, kwargs) = timestep_argument(model), call
    if argument is None:
        return None
    name, position = argument
    return kwargs[name] if name in kwargs else args[position]


def with_timestep(model: nn.Module, call: Call, timestep: object) -> Call:
    """The same call at another timestep, of a denoiser that takes one."""
    argument, (args, kwargs) = timestep_argument(model), call
    assert argument is not None
    name, position = argument
    if name in kwargs:
        return args, {**kwargs, name: timestep}
    return (*args[:position], timestep, *args[position + 1 :]), kwargs


def model_timesteps(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float] | None:
    """The timesteps among the arguments of a denoiser's call; None where it takes none.

    It may be a number, one a sample, or one a token, of which the largest counts.
    """
    timestep = timestep_in(model, (tuple(args), dict(kwargs)))
    if timestep is None:
        return None
    if not isinstance(timestep, torch.Tensor):
        return [float(timestep)]
    rows: list[float] = timestep.reshape(len(timestep) if timestep.ndim else 1, -1).amax(1).tolist()
    return rows


def model_timestep(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> float | None:
    """The largest of the timesteps among the arguments of a denoiser's call; None where it takes none."""
    timestep = model_timesteps(model, args, kwargs)
    return None if timestep is None else max(timestep)
