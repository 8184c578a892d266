"""One process or many: which share of the work is whose, and where they wait.

Many are started by ``accelerate launch``, or by ``torchrun``, also where there is no accelerator. Without a launcher
there is one process, and nothing waits.
"""

import os
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from ptqd.errors import InputError

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # others wait while the main process quantizes
TOLD_AFTER = 10.0  # seconds that a launcher's processes are waited for in silence
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI = tuple(  # whose processes are not ptqd's, and of which a shell may have some left over
    f"{kind}_{what}"
    for kind in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    for what in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
)
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def check_launcher() -> int:
    """How many processes a launcher started, 1 without one; empty variables that it left over are removed.

    Raises:
        InputError: some of the launcher's variables are missing, or are no numbers.
    """
    for name in LAUNCHER:
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
    given = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    remedy = "unset what is left over, or start with torchrun or accelerate launch"
    for name in _NUMBERS:
        if name in given and not (given[name].isascii() and given[name].isdigit()):
            raise InputError(f"{name}={given[name]!r} in the environment is no number; {remedy}")
    size = int(given.get("WORLD_SIZE", "1"))
    if size > 1 and int(given.get("MASTER_PORT", "1")) not in range(1, 1 << 16):
        raise InputError(f"MASTER_PORT={given['MASTER_PORT']} in the environment is no port; {remedy}")
    missing = [name for name in LAUNCHER if name not in given]
    if size > 1 and missing:
        raise InputError(f"WORLD_SIZE={size} in the environment is a launcher's, but {missing[0]} is missing; {remedy}")
    if size < 1 or int(given.get("RANK", "0")) >= size:
        raise InputError(f"RANK={given.get('RANK')} of WORLD_SIZE={size} in the environment cannot be; {remedy}")
    return size


@cache
def _state() -> Any:
    size = check_launcher()
    told = threading.Timer(TOLD_AFTER, _tell, (size,))
    told.daemon = True
    if size > 1:
        told.start()
    import torch
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    cpu = not torch.accelerator.is_available()
    kept = {name: os.environ.pop(name) for name in (*LAUNCHER, *MPI) if size == 1 and name in os.environ}
    try:
        return PartialState(cpu=cpu, **InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs())
    finally:
        told.cancel()
        os.environ.update(kept)


def _tell(size: int) -> None:
    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    print(
        f"ptqd: waiting for {size} processes at {at}, as WORLD_SIZE={size} says; if no launcher started this command, "
        f"stop it and unset {', '.join(LAUNCHER)}",
        file=sys.stderr,
        flush=True,
    )


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

    main: T = broadcast_object_list([value])[0]
    return main


def wait() -> None:
    """Until all processes are here."""
    _state().wait_for_everyone()
