"""Activation ranges by step.

Steps that follow each other form groups with a range each; layers that see nothing but the timestep have a range for
every step. At run time that is a look-up before each call of the denoiser. A timestep that was not calibrated takes the
ranges of the nearest one.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ptqd.diffusion.step_state import StepIndex, StepState, StepTable
from ptqd.errors import InputError
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.sites import layer_quantizers
from ptqd.schema import typed


@dataclass(frozen=True)
class StepRanges:
    """Which range holds at which timestep.

    Attributes:
        timesteps: that the denoiser is told, falling.
        groups: the range of each of them, by its number.
        temporal: layers with a range for every timestep.
    """

    timesteps: tuple[float, ...]
    groups: tuple[int, ...]
    temporal: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.groups) or not self.timesteps:
            raise InputError(f"{len(self.timesteps)} timesteps with {len(self.groups)} groups of ranges; give one each")
        if min(self.groups) < 0 or max(self.groups) >= len(self.groups):
            raise InputError(f"groups of ranges are numbered from 0 on; got {min(self.groups)} to {max(self.groups)}")

    @property
    def count(self) -> int:
        """How many groups there are."""
        return max(self.groups) + 1

    def of_layer(self, name: str) -> int:
        """How many ranges a layer has."""
        return len(self.timesteps) if name in self.temporal else self.count

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StepRanges":
        """From plain values.

        Raises:
            ArtifactError: some are missing, or no lists.
        """
        ranges: StepRanges = typed(values, cls, "saved ranges by step", "quantize again")
        return ranges


class RangeSteps(StepTable):
    """Activation ranges by step.

    Args:
        ranges: which range holds at which timestep.
        group: shared by the layers whose ranges are by groups of steps.
        step: shared by the layers whose ranges are by step.
    """

    def __init__(self, ranges: StepRanges, group: StepIndex, step: StepIndex) -> None:
        self.ranges, self.group, self.step = ranges, group, step
        self.timesteps = ranges.timesteps
        self._ascending = sorted((t, i) for i, t in enumerate(ranges.timesteps))
        self._groups = torch.tensor(ranges.groups)

    def enter(self, timesteps: Sequence[float], model: nn.Module) -> None:
        """Let the ranges nearest to the timesteps hold."""
        self.set([self.index_at(t) for t in timesteps])

    def set(self, steps: Sequence[int]) -> None:
        """Let steps hold from now on: one, or one for each row of the batch."""
        if len(set(steps)) == 1:
            self.step.index, self.group.index = steps[0], self.ranges.groups[steps[0]]
        else:
            index = torch.tensor(steps)
            self.step.index, self.group.index = index, self._groups[index]

    def index_at(self, t: float) -> int:
        """The step whose timestep is nearest."""
        place = bisect.bisect(self._ascending, (t, -1))
        near = self._ascending[max(0, place - 1) : place + 1]
        return min(near, key=lambda known: abs(known[0] - t))[1]


def set_ranges(model: nn.Module, ranges: StepRanges) -> None:
    """Let a quantized denoiser's ranges follow the steps from now on."""
    group, step = StepIndex(), StepIndex()
    for name, quantizer in layer_quantizers(model):
        if quantizer.ranges > 1:
            quantizer.step = step if name in ranges.temporal else group
    StepState.on(model).ranges = RangeSteps(ranges, group, step)


def range_steps_of(model: nn.Module) -> RangeSteps | None:
    """A denoiser's ranges by step; None where they are the same at every step."""
    state = StepState.of(model)
    ranges = None if state is None else state.ranges
    return ranges if isinstance(ranges, RangeSteps) else None


def group_steps(widths: torch.Tensor, count: int) -> tuple[int, ...]:
    """Split a run into groups of neighbouring steps whose measured ranges are alike.

    Args:
        widths: width of each quantizer's range at each step (T, Q), positive.
        count: of groups; as many as there are steps at most.

    Returns:
        The group of each step (T,): those with the least squared distance of log widths from their group's mean, found
        exactly by dynamic programming.
    """
    logs = widths.double().clamp(min=1e-30).log().numpy()  # T,Q
    steps = len(logs)
    count = min(count, steps)
    ones, sums, squares = (np.concatenate([[0 * part[0]], part.cumsum(0)]) for part in (logs * 0 + 1, logs, logs**2))
    cost = np.full((steps + 1, steps + 1), np.inf)  # of a group from step i up to step j
    for i in range(steps):
        n = np.maximum(ones[i + 1 :] - ones[i], 1)
        cost[i, i + 1 :] = (squares[i + 1 :] - squares[i] - (sums[i + 1 :] - sums[i]) ** 2 / n).sum(1)
    best, came = cost[0], np.zeros((count, steps + 1), dtype=int)
    for g in range(1, count):
        total = best[:, None] + cost  # i,j
        came[g], best = total.argmin(0), total.min(0)
    groups, end = [0] * steps, steps
    for g in reversed(range(count)):
        start = int(came[g, end]) if g else 0
        groups[start:end] = [g] * (end - start)
        end = start
    return tuple(groups)


def range_of(quantizer: ActivationQuantizer) -> tuple[float, float]:
    """The least and the largest number of any of its ranges, at the width it rounds to now."""
    index, grid = quantizer.active.index, quantizer.grids[quantizer.active.index]
    scale = quantizer.scale.view(quantizer.ranges, -1)[:, index]
    zero = quantizer.zero_point.view(quantizer.ranges, -1)[:, index]
    return float(((grid.qmin - zero) * scale).min()), float(((grid.qmax - zero) * scale).max())
