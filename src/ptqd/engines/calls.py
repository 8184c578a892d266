"""Calls of a network as an exporter needs them: flat tensors, constants, and timesteps by row."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.timesteps import timestep_argument
from ptqd.errors import InputError

TRACED = 3  # samples of the traced call; a size that no other dimension is likely to have


@dataclass(frozen=True)
class Call:
    """How a pipeline calls a component.

    Attributes:
        parameters: the names of the call's arguments, in order.
        tensors: the arguments that are tensors, those in a dictionary under ``"NAME.KEY"``.
        constants: the others that are not None.
        batch: rows of those tensors that have one for each sample.
    """

    parameters: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]
    batch: int

    def arguments(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The call's arguments, with these tensors for its own, in their order."""
        given: dict[str, Any] = {}
        for name, value in [*zip(self.tensors, tensors, strict=True), *self.constants.items()]:
            outer, dot, inner = name.partition(".")
            if dot:
                given.setdefault(outer, {})[inner] = value
            else:
                given[name] = value
        return given

    @property
    def by_sample(self) -> tuple[str, ...]:
        """The tensors with a row for each sample."""
        return self.with_rows(self.tensors)

    def with_rows(self, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Those of some tensors that have a row for each sample."""
        return tuple(name for name, value in tensors.items() if value.ndim and len(value) == self.batch)


class _Seen(Exception):  # noqa: N818  # no error: the call that was waited for
    pass


def captured(pipe: DiffusionPipeline, sampling: Sampling, component: nn.Module, method: str = "forward") -> Call:
    """The first call that a pipeline makes of a component, when it samples as ``sampling`` says.

    Raises:
        InputError: it makes none, or one with arguments that a graph cannot have.
    """
    original, seen = getattr(component, method), []

    def record(*args: object, **kwargs: object) -> Any:
        seen.append(arguments_of(component, method, args, kwargs))
        raise _Seen

    setattr(component, method, record)
    try:
        run_batch(pipe, sampling.replace(samples=TRACED, batch=TRACED), range(TRACED))
    except _Seen:
        pass
    finally:
        delattr(component, method)
        assert getattr(component, method) == original
    if not seen:
        raise InputError(f"{type(pipe).__name__} does not call its {type(component).__name__}; nothing to export")
    return seen[0]


def arguments_of(component: nn.Module, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    """A call's arguments by their names, those in dictionaries one by one.

    Raises:
        InputError: an argument that is a list of tensors, or no plain value.
    """
    parameters = tuple(inspect.signature(getattr(type(component), method)).parameters)[1:]
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in flat_arguments(parameters, args, kwargs):
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            kind = type(component).__name__
            raise InputError(f"{kind} is given a {type(value).__name__} as {name!r}, which no graph takes")
    batch = next((len(value) for value in tensors.values() if value.ndim), 1)
    argument = timestep_argument(component) if method == "forward" else None
    if argument is not None and {argument[0]} & {*tensors, *constants}:
        timestep = constants.pop(argument[0], tensors.get(argument[0]))
        tensors[argument[0]] = timesteps_of(timestep, batch)
    return Call(parameters, tensors, constants, batch)


def timesteps_of(told: object, batch: int) -> torch.Tensor:
    """A timestep, a number or one for all or one a sample, as a graph takes it: one a sample (N,), float32."""
    values: torch.Tensor = torch.as_tensor(told).detach().cpu().float()
    return values.reshape(1).expand(batch).clone() if values.numel() == 1 else values


def flat_arguments(
    parameters: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[tuple[str, Any]]:
    """Names and values of a call's arguments; None and what changes no number of a result are left out."""
    for name, value in [*zip(parameters, args, strict=False), *kwargs.items()]:
        if value is None or name in ("return_dict", "generator"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", item) for key, item in value.items() if item is not None)
        else:
            yield name, value


FOUR_BITS = 4


CODES = "codes."  # before the name of a quantizer: what it makes of an activation
