"""One process or many: which share of the work is whose, and where they wait.

Many are started by ``accelerate launch``, or by ``torchrun``, also where there is no accelerator. Without a launcher
there is one process, and nothing waits.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # others wait while the main process quantizes


@cache
def _state() -> Any:
    import torch
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.accelerator.is_available()
    return PartialState(cpu=cpu, **InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs())


def is_main() -> bool:
    """Whether this is the process that writes results and reports."""
    return bool(_state().is_main_process)


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def device() -> str | None:
    """The device that the launcher gave this process; None where there is one process, which may choose."""
    return None if count() == 1 else str(_state().device)


def share(items: Sequence[T]) -> list[T]:
    """This process's items: every one is some process's, whatever else was done before."""
    return list(items)[_state().process_index :: count()]


def agreed(value: T) -> T:
    """What the main process says."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    timestep: T = broadcast_object_list([value])[0]
    return timestep


def wait() -> None:
    """Until all processes are here."""
    _state().wait_for_everyone()
