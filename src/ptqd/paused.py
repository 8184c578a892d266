"""Threads that take turns: each runs only while somebody waits for it, up to where it waits itself.

So several calls of code that cannot be left half-way, such as a pipeline's, go on side by side.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICES = ("cpu", "cuda", "mps")


class _AbandonedError(BaseException):
    """Ends a thread that nobody waits for any more; no error."""


class PausedThread:
    """A function in a thread that runs only while :meth:`advance` waits for it.

    Inside hold the number of torch's threads, its modes (gradients, inference, autocast) and the context variables of
    where it was made; random numbers are kept apart: what the function draws does not depend on who draws in between.

    Attributes:
        waiting: whether the function waits, for :meth:`advance`.
        brought: what it waits with.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.waiting = False
        self.brought: Any = None
        self._function = function
        self._answer: Any = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self._threads = torch.get_num_threads()
        self._random = _random_state()
        self._context, self._modes = contextvars.copy_context(), _Modes()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self, answer: object = None) -> None:
        """Let the function go on, to where it waits next or to its end.

        Args:
            answer: what :meth:`wait` gives it.

        Raises:
            Exception: what the function raised.
        """
        outside = _random_state()
        _set_random_state(self._random)
        self._answer = answer
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        self._random = _random_state()
        _set_random_state(outside)
        if self._error is not None:
            raise self._error

    def wait(self, brought: object) -> Any:
        """In the function: wait until somebody advances it; gives what they answer."""
        self.waiting, self.brought = True, brought
        self._stopped.release()
        self._go.acquire()
        self.waiting, self.brought = False, None
        if self._abandoned:
            raise _AbandonedError
        return self._answer

    @property
    def is_here(self) -> bool:
        """Whether this is called from inside the function."""
        return threading.current_thread() is self._thread

    def abandon(self) -> None:
        """End it, wherever it is."""
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # which is each thread's own
        try:
            with self._modes.here():
                self._context.run(self._function)
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stopped.release()


@dataclass(frozen=True)
class _Modes:
    """The modes of torch in a thread."""

    gradients: bool = field(default_factory=torch.is_grad_enabled)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    autocast: dict[str, torch.dtype] = field(
        default_factory=lambda: {d: torch.get_autocast_dtype(d) for d in DEVICES if torch.is_autocast_enabled(d)}
    )
    device: int | None = field(
        default_factory=lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None
    )

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside the block they hold in this thread."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for device, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            if self.device is not None:
                stack.enter_context(torch.cuda.device(self.device))
            yield


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
