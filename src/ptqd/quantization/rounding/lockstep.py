"""Several calls of a denoiser that go from unit to unit together, so that each unit can be changed in one pass.

A method that rounds unit by unit needs each unit's inputs behind the units that are rounded already. To run the
denoiser anew up to every unit costs half a run for each of them. Here every call is in a thread of its own, one of
which runs at a time, and waits before each unit until all calls have come there; then the unit may be changed, and they
go on. It costs one run, and the memory of what is between two units, of all calls at once (``live_bytes``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.offload import send_home
from ptqd.paused import PausedThread
from ptqd.quantization.step_ranges import range_steps_of

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class _Call:
    """One call, which waits before each unit with what the unit is to be called with."""

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        self._model, self._given, self._steps = model, arguments, range_steps_of(model)
        self._indices: tuple[Any, Any] | None = None
        self.thread = PausedThread(self._run)
        self.passed: set[str] = set()  # units that it has waited before

    @property
    def unit(self) -> str | None:
        """That it waits before; None once it is over."""
        return self.thread.brought[0] if self.thread.waiting else None

    @property
    def arguments(self) -> Arguments:
        """That the unit is to be called with."""
        arguments: Arguments = self.thread.brought[1]
        return arguments

    def advance(self) -> None:
        """Let it go on to the next unit, or to its end; raises what it raises."""
        with self.here():
            self.thread.advance()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside the block the steps' ranges are those of this call."""
        if self._steps is not None and self._indices is not None:
            self._steps.step.index, self._steps.group.index = self._indices
        yield
        if self._steps is not None:
            self._indices = (self._steps.step.index, self._steps.group.index)

    def _run(self) -> None:
        with torch.no_grad():
            args, kwargs = self._given
            self._model(*args, **kwargs)


def in_lockstep(
    model: nn.Module,
    calls: Sequence[Arguments],
    units: Sequence[str],
    visit: Callable[[str, Callable[[], None]], None],
    beside: tuple[nn.Module, Callable[[str], nn.Module]] | None = None,
) -> None:
    """Call a denoiser several times at once, and visit each unit before the calls go through it.

    Args:
        model: the denoiser.
        calls: arguments of each call.
        units: names of modules, none inside another; one that a call reaches again is not visited again.
        visit: is given the unit's name and a function that calls the unit as all the calls would, in their order.
        beside: another denoiser that is called with the same arguments, and gives its own module for a unit's name.
            The function calls that before the unit, each time, where the same call of it has come there too.

    Raises:
        Exception: what a call raised.
    """
    running = [_Call(model, arguments) for arguments in calls]
    others = [] if beside is None else [_Call(beside[0], arguments) for arguments in calls]
    every = [*running, *others]

    def arrive(module: object, args: Any, kwargs: Any, unit: str) -> None:
        for call in every:
            if call.thread.is_here and unit not in call.passed:
                call.passed.add(unit)
                call.thread.wait((unit, (args, kwargs)))

    modules = {unit: [model.get_submodule(unit), *([] if beside is None else [beside[1](unit)])] for unit in units}
    hooks = [
        module.register_forward_pre_hook(partial(arrive, unit=unit), with_kwargs=True)
        for unit, own in modules.items()
        for module in own
    ]
    order = {unit: place for place, unit in enumerate(units)}
    with hooked(*hooks):
        try:
            for call in every:
                call.advance()
            while waiting := [call for call in running if call.unit is not None]:
                unit = min((call.unit or "" for call in waiting), key=lambda name: order[name])
                here = [call for call in waiting if call.unit == unit]
                near = [_come_to(unit, others[running.index(call)], order) if others else None for call in here]
                visit(unit, partial(_call_unit, modules[unit], here, near))
                for call in (*here, *(other for other in near if other is not None)):
                    call.advance()
        finally:
            for call in every:
                call.thread.abandon()
            for each in (model, *(() if beside is None else (beside[0],))):
                send_home(each)


def _come_to(unit: str, call: _Call, order: Mapping[str, int]) -> _Call | None:
    """A call that waits before a unit, past those that only it reaches; None where it does not come there."""
    while call.unit is not None and order[call.unit] < order[unit]:
        call.advance()
    return call if call.unit == unit else None


def _call_unit(modules: Sequence[nn.Module], here: Sequence[_Call], near: Sequence[_Call | None]) -> None:
    """Call a unit as each call would, the other denoiser's before it."""
    for call, other in zip(here, near, strict=True):
        for module, one in zip(reversed(modules), (other, call)[2 - len(modules) :], strict=True):
            if one is not None:
                args, kwargs = one.arguments
                with one.here(), torch.no_grad():
                    module(*args, **kwargs)
