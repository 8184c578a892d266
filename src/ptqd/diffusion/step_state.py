"""Which sampling step a denoiser is at, for everything in it that changes from step to step.

One :class:`StepState` sits on the denoiser as a forward pre-hook, reads the timestep of each call once, and tells it to
the tables that hang on it: a plan's bit widths, activation ranges. It is torch's own hook and not a ``ModelHook`` of
diffusers, because those replace ``forward`` by a closure over the original module, so that a deep copy of a denoiser
would go on calling the original.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ptqd.diffusion.timesteps import model_timesteps


class StepIndex:
    """Which of several entries holds now; shared by all modules that change together.

    Attributes:
        index: an integer, or a tensor with one for each row of the batch (N,).
        place: the integer as a tensor, for code that is compiled: it is then an input, and no constant.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @property
    def index(self) -> int | torch.Tensor:
        """See the class."""
        return self._index

    @index.setter
    def index(self, index: int | torch.Tensor) -> None:
        self._index = index
        self.place = index if isinstance(index, torch.Tensor) else torch.tensor(index)


class StepTable(ABC):
    """Something with an entry for each step of a schedule.

    Attributes:
        timesteps: of the schedule (T,).
    """

    timesteps: tuple[float, ...]

    @abstractmethod
    def enter(self, timesteps: Sequence[float], model: nn.Module) -> None:
        """Let the entries of a call's timesteps hold: one timestep, or one for each row of the batch."""


class StepState:
    """The sampling step of a denoiser's call, and what follows it.

    Attributes:
        plan: bit widths by step.
        ranges: activation ranges by step.
        aliases: the plan's timestep for each timestep that the denoiser gets instead of it; empty where a sampler gives
            the denoiser the schedule's own.
    """

    def __init__(self) -> None:
        self.plan: StepTable | None = None
        self.ranges: StepTable | None = None
        self.aliases: Mapping[float, float] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "StepState | None":
        """The state of a denoiser; None where nothing in it changes from step to step."""
        return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, cls)), None)

    @classmethod
    def on(cls, model: nn.Module) -> "StepState":
        """The state of a denoiser, made and registered if it has none."""
        state = cls.of(model)
        if state is None:
            state = cls()
            model.register_forward_pre_hook(state, with_kwargs=True)
        return state

    @torch.compiler.disable  # a number is read off a tensor
    def __call__(self, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Before each call of the denoiser."""
        timesteps = model_timesteps(model, args, kwargs)
        if timesteps is None:
            return
        if self.ranges is not None:
            self.ranges.enter(timesteps, model)
        if self.plan is not None:
            self.plan.enter([self._planned(max(timesteps))], model)

    def _planned(self, timestep: float) -> float:
        if not self.aliases:
            return timestep
        return self.aliases[min(self.aliases, key=lambda known: abs(known - timestep))]
