"""One process or many: which share of the work is whose, and where they wait.

Many are started by ``accelerate launch``, or by ``torchrun``, also where there is no accelerator. Without a launcher
there is one process, and nothing waits.

What writes files asks for its share outright. The library's own functions share their work only inside
:func:`together`: a script of several processes of which one quantizes waits for nobody.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from ptqd.errors import InputError, PtqdError

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = timedelta(days=30)  # others wait for what one does alone
SHARED_BATCH = 16  # samples at once, at most, of a pass that is shared: with one process too, for the same numbers
TOLD_AFTER = 10.0  # seconds that a launcher's processes are waited for in silence
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI = tuple(  # whose processes are not ptqd's, and of which a shell may have some left over
    f"{kind}_{what}"
    for kind in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")
    for what in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
)
_APART, _SHARED, _BY_MAIN = range(3)
_TOGETHER: ContextVar[int] = ContextVar("ptqd.together", default=_APART)
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
    """What the main process says; tensors come over the CPU."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    main: T = broadcast_object_list([_on_cpu(value) if is_main() else None])[0]
    return main


def wait() -> None:
    """Until all processes are here."""
    _state().wait_for_everyone()


@contextmanager
def together() -> Iterator[None]:
    """Inside the block calibrating, measuring, planning, learning and choosing corrections are shared.

    Every process has to enter it, and do the same there; each gets what one process alone would get. Without a launcher
    it does nothing.
    """
    token = _TOGETHER.set(_SHARED)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def is_shared() -> bool:
    """Whether there are several processes, inside :func:`together`."""
    return _TOGETHER.get() == _SHARED and count() > 1


def number() -> int:
    """Which of the processes this is, counted from 0."""
    return int(_state().process_index)


def beside() -> int:
    """How many processes of this machine share work and memory, this one among them."""
    return 1 if _TOGETHER.get() == _APART else int(os.environ.get("LOCAL_WORLD_SIZE") or count())


def mine(items: Sequence[T]) -> list[T]:
    """This process's share inside :func:`together`, else all."""
    return share(items) if is_shared() else list(items)


def rounds(items: Sequence[T]) -> list[Sequence[T]]:
    """Items by turns of which each process has one: for work that is put together as it comes. Alone, one by one."""
    size = count() if is_shared() else 1
    return [items[start : start + size] for start in range(0, len(items), size)]


def everyone(value: T) -> list[T]:
    """What each process says, in their order; tensors come over the CPU. Alone, the value itself."""
    if not is_shared():
        return [value]
    from accelerate.utils import gather_object

    said: list[T] = gather_object([_on_cpu(value)])
    return said


def _on_cpu(value: T) -> T:
    """A tree with its tensors on the CPU; those that are there stay the same, also where they come twice."""
    import torch
    from torch.utils._pytree import tree_map_only

    def moved(tensor: Any) -> Any:
        return tensor if tensor.device.type == "cpu" and not tensor.requires_grad else tensor.detach().cpu()

    result: T = tree_map_only(torch.Tensor, moved, value)
    return result


def as_main(value: T) -> T:
    """What the main process says, inside :func:`together`: what was computed from the same may differ in a last bit."""
    return agreed(value) if is_shared() else value


def joined(parts: Sequence[T]) -> list[T]:
    """What all processes made of their shares (:func:`mine`), in the order of the whole."""
    shares = everyone(list(parts))
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def spread(call: Callable[[S], T], own: Sequence[S]) -> list[T]:
    """What all processes' calls give, each with its share of some items, in the order of the whole.

    Raises:
        Exception: what any of the calls raised, in all processes.
    """
    with failing_alike():
        parts = [call(item) for item in own]
    return joined(parts)


def tensors_in_order(parts: Sequence[Any], total: int, like: Any) -> Iterator[Any]:
    """The same for tensors of one shape, one at a time.

    Args:
        parts: this process's.
        total: how many all processes have.
        like: a tensor of that shape.
    """
    if not is_shared():
        yield from parts
        return
    import torch

    for i in range(total):
        owner = i % count()
        part = parts[i // count()].contiguous() if owner == number() else torch.empty_like(like)
        torch.distributed.broadcast(part, owner)
        yield part


@contextmanager
def failing_alike() -> Iterator[None]:
    """What one process raises inside the block is raised by all of them at its end, so that none waits for it."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if not is_shared():
            raise
        error = caught
    if is_shared():
        said = next((each for each in everyone(_as_sent(error)) if each is not None), None)
        if said is not None:
            kind, text = said
            raise error or kind(text)


def _as_sent(error: Exception | None) -> tuple[type[Exception], str] | None:
    """What other processes raise for an error: its kind is theirs too where a user can mend it."""
    if error is None:
        return None
    return (
        (type(error), str(error))
        if isinstance(error, PtqdError)
        else (RuntimeError, f"{type(error).__name__}: {error}")
    )


def by_main(call: Callable[[], T]) -> T:
    """What the main process gets from a call, alone; the others wait for it."""
    if not is_shared():
        return call()
    found: list[T | None] = [None]
    with failing_alike():
        if is_main():
            token = _TOGETHER.set(_BY_MAIN)
            try:
                found = [call()]
            finally:
                _TOGETHER.reset(token)
    return as_main(found)[0]  # type: ignore[return-value]


def check_alike(facts: Mapping[str, str | int]) -> None:
    """Refuse to share work that is not the same in every process.

    Args:
        facts: what says which work it is.

    Raises:
        InputError: some fact is another here than in the main process.
    """
    if not is_shared():
        return
    with failing_alike():
        for name, value in agreed(dict(facts)).items():
            if facts[name] != value:
                raise InputError(f"this process has another {name} than the main one; start all alike")
