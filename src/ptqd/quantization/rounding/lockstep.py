"""Several calls of a denoiser that go from unit to unit together, so that each unit can be changed in one pass.

A method that rounds unit by unit needs each unit's inputs behind the units that are rounded already. To run the
denoiser anew up to every unit costs half a run for each of them. Here every call is in a thread of its own, one of
which runs at a time, and waits before each unit until all calls have come there; then the unit may be changed, and they
go on. It costs one run, and the memory of what is between two units, of all calls at once (``live_bytes``).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.quantization.step_ranges import range_steps_of

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


class _Abandoned(BaseException):  # no error: another call failed
    pass


class _Call:
    """One call, in a thread that runs only while :meth:`advance` waits for it.

    Attributes:
        unit: that it waits before; None once it is over.
        arguments: that the unit is to be called with.
    """

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        self.unit: str | None = None
        self.arguments: Arguments | None = None
        self._model, self._given, self._steps = model, arguments, range_steps_of(model)
        self._indices: tuple[Any, Any] | None = None
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def advance(self) -> None:
        """Let it go on to the next unit, or to its end.

        Raises:
            Exception: what the call raised.
        """
        with self.here():
            if self.thread.ident is None:
                self.thread.start()
            else:
                self._go.release()
            self._waits.acquire()
        if self._error is not None:
            raise self._error

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside the block the steps' ranges are those of this call."""
        if self._steps is not None and self._indices is not None:
            self._steps.step.index, self._steps.group.index = self._indices
        yield
        if self._steps is not None:
            self._indices = (self._steps.step.index, self._steps.group.index)

    def wait(self, unit: str, arguments: Arguments) -> None:
        """In the call's thread: wait before a unit."""
        self.unit, self.arguments = unit, arguments
        self._waits.release()
        self._go.acquire()
        self.unit = self.arguments = None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End it, wherever it is."""
        if self.thread.is_alive():
            self._abandoned = True
            self._go.release()
            self.thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # which is each thread's own
        try:
            with torch.no_grad():
                args, kwargs = self._given
                self._model(*args, **kwargs)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._waits.release()


def in_lockstep(
    model: nn.Module,
    calls: Sequence[Arguments],
    units: Sequence[str],
    visit: Callable[[str, Callable[[], None]], None],
) -> None:
    """Call a denoiser several times at once, and visit each unit before the calls go through it.

    Args:
        model: the denoiser.
        calls: arguments of each call.
        units: names of modules, each of which is called once in a call at most, none inside another.
        visit: is given the unit's name and a function that calls the unit as all the calls would, in their order.

    Raises:
        Exception: what a call raised.
    """
    running = {call.thread: call for call in (_Call(model, arguments) for arguments in calls)}

    def arrive(module: object, args: Any, kwargs: Any, unit: str) -> None:
        call = running.get(threading.current_thread())
        if call is not None:
            call.wait(unit, (args, kwargs))

    hooks = [
        model.get_submodule(unit).register_forward_pre_hook(partial(arrive, unit=unit), with_kwargs=True)
        for unit in units
    ]
    order = {unit: place for place, unit in enumerate(units)}
    with hooked(*hooks):
        try:
            for call in running.values():
                call.advance()
            while waiting := [call for call in running.values() if call.unit is not None]:
                unit = min((call.unit or "" for call in waiting), key=lambda name: order[name])
                here = [call for call in waiting if call.unit == unit]
                visit(unit, partial(_call_unit, model.get_submodule(unit), here))
                for call in here:
                    call.advance()
        finally:
            for call in running.values():
                call.abandon()


def _call_unit(module: nn.Module, calls: list[_Call]) -> None:
    for call in calls:
        assert call.arguments is not None
        args, kwargs = call.arguments
        with call.here(), torch.no_grad():
            module(*args, **kwargs)
