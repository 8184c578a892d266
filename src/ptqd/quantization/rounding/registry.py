"""What a method of a recipe does: a handler by the class of its options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import nn

from ptqd.quantization.budget import Budget, device_of, rows_that_fit
from ptqd.quantization.calibration import BATCH, CalibrationInputs
from ptqd.quantization.methods import Method


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        model: the quantized denoiser, changed in place. A method that changes layers finds its quantizers bypassed; one
            that chooses codes finds ranges fixed and weights rounded to nearest.
        full: the same denoiser in full precision.
        inputs: rows of its calls; None where no method of the recipe asks for any.
        exempt: layers that stay as they are.
        scratch: a folder of the method's own.
        seed: of all that is drawn.
        title: of a progress bar; None for none.
        budget: of memory and time.
        keeps: whether the folder survives a kill.
    """

    model: nn.Module
    full: nn.Module
    inputs: CalibrationInputs | None
    exempt: frozenset[str]
    scratch: Path
    seed: int
    title: str | None
    budget: Budget = field(default_factory=Budget)
    keeps: bool = True

    @property
    def kept(self) -> Path | None:
        """The folder, if it survives a kill."""
        return self.scratch if self.keeps else None

    def spare(self) -> int:
        """Bytes that may be taken beside what is held now."""
        return self.budget.spare(device_of(self.model))

    def rows_at_once(self, most: int = BATCH) -> int:
        """Rows that the model can be called with, without gradients, in half of the memory that there is."""
        assert self.inputs is not None
        return rows_that_fit(self.model, self.inputs.call(self.inputs.kinds()[0][:1]), self.spare() // 2, most)

    def rows(self, count: int) -> CalibrationInputs:
        """The first rows of the inputs, which are in random order."""
        assert self.inputs is not None
        return self.inputs.first(count)


Options = TypeVar("Options", bound=Method)
HANDLERS: dict[type[Method], Callable[[Task, Method], None]] = {}


def handles(kind: type[Options]) -> Callable[[Callable[[Task, Options], None]], Callable[[Task, Options], None]]:
    """Register what a method does, by the class of its options; subclasses have the same handler."""

    def register(handler: Callable[[Task, Options], None]) -> Callable[[Task, Options], None]:
        HANDLERS[kind] = handler  # type: ignore[assignment]  # it is called with these options alone
        return handler

    return register


def apply_method(task: Task, method: Method) -> None:
    """Let a method do what it does."""
    kind = next(base for base in type(method).__mro__ if base in HANDLERS)
    HANDLERS[kind](task, method)
