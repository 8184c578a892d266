"""A run folder: stages that are skipped when their inputs are unchanged, written atomically, resumed after a kill."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from ptqd import processes
from ptqd.errors import InputError
from ptqd.files import make_folder, read_json, replacing, write_json
from ptqd.progress import track

Build = Callable[[Path, Path], None]
T = TypeVar("T")


class RunFolder:
    """Results of named stages, each beside a record of the inputs it was made from.

    ``NAME`` is the result; ``.stages/NAME.json`` holds the hash of its inputs and the seconds it took;
    ``.partial/NAME-HASH`` is where an unfinished stage keeps what it has, for the next start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)
        if processes.is_main():
            for leftover in folder.rglob(".*.tmp"):  # of a run that was killed
                if not _is_written(leftover):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        processes.wait()

    def stage(self, name: str, inputs: Mapping[str, object], build: Build, *, shared: bool = False) -> Path:
        """The result of a stage, made now if it is missing or was made from other inputs.

        Of several processes the main one makes it, and the others wait. Of several runs in one folder the first makes
        it, and the others take what it made.

        Args:
            name: path of the result inside the folder.
            inputs: everything the result depends on, as plain JSON values.
            build: called with the path to write to and a scratch folder that survives a kill.
            shared: every process calls ``build``, to do its share in the scratch folder; all but the main one return
                without a result.

        Returns:
            The path of the result.
        """
        with self._alone(name):
            return self._stage(name, inputs, build, shared=shared)

    def value(
        self,
        name: str,
        inputs: Mapping[str, object],
        build: "Callable[[Path, Path], T | None]",
        load: "Callable[[Path], T]",
        *,
        shared: bool = False,
    ) -> "T":
        """The value of a stage: the one just built, or one that is read where the stage was skipped.

        Args:
            name: as for :meth:`stage`.
            inputs: as for :meth:`stage`.
            build: as for :meth:`stage`; returns the value that it wrote, or None in a process that wrote none.
            load: reads it from its path.
            shared: as for :meth:`stage`.
        """
        built: list[T | None] = []

        def keep(path: Path, scratch: Path) -> None:
            built.append(build(path, scratch))

        path = self.stage(name, inputs, keep, shared=shared)
        value = built[0] if built else None
        return load(path) if value is None else value

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """No other run makes this stage meanwhile."""
        if not processes.is_main():
            yield
            return
        lock = self.folder / ".locks" / f"{name.replace('/', '-')}.lock"
        make_folder(lock.parent)
        with FileLock(lock):
            yield

    def _stage(self, name: str, inputs: Mapping[str, object], build: Build, *, shared: bool) -> Path:
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if processes.agreed(key) != key:
            raise InputError(
                f"{name}: this process was started with other arguments than the main one; start all alike"
            )
        target, record = self.folder / name, self._record(name)
        if processes.agreed(target.exists() and record.exists() and read_json(record).get("key") == key):
            return target
        scratch = self.folder / ".partial" / f"{name.replace('/', '-')}-{key[:16]}"
        if shared or processes.is_main():
            make_folder(scratch)
        if not processes.is_main():
            if shared:
                build(target, scratch)
            processes.wait()
            return target
        spent = scratch / "seconds.json"
        before = _seconds_in(spent)
        started = time.monotonic()
        record.unlink(missing_ok=True)  # from here on, what is there counts for nothing
        try:
            with replacing(target) as temporary:
                build(temporary, scratch)
        except BaseException:
            with contextlib.suppress(InputError):
                write_json(spent, before + time.monotonic() - started)
            raise
        write_json(record, {"key": key, "inputs": inputs, "seconds": before + time.monotonic() - started})
        shutil.rmtree(scratch)
        processes.wait()
        return target

    def seconds(self, name: str) -> float:
        """How long the stage took when it was made; 0 for one that never was."""
        record = self._record(name)
        return float(read_json(record)["seconds"]) if record.exists() else 0.0

    def key(self, name: str) -> str:
        """The hash of a finished stage's inputs, for stages that depend on it."""
        return str(read_json(self._record(name))["key"])

    def _record(self, name: str) -> Path:
        return self.folder / ".stages" / f"{name}.json"


def make_shards(
    batches: Sequence[range], scratch: Path, write: Callable[[range, Path], None], *, title: str | None
) -> list[Path]:
    """The results of batches, each its own file, each process its share; what is there already is kept.

    Args:
        batches: indices of samples.
        scratch: a folder that survives a kill.
        write: called with a batch and the file, to be written atomically.
        title: of a progress bar.

    Returns:
        All files, in order, once all processes have written theirs.

    Raises:
        InputError: some are missing, after a process of another kind or on another disk.
    """
    make_folder(scratch)
    shards = {indices: scratch / f"{indices.start:08d}.safetensors" for indices in batches}
    for indices in track(processes.share(batches), title):
        if not shards[indices].exists():
            write(indices, shards[indices])
    processes.wait()
    missing = [shard for shard in shards.values() if not shard.exists()] if processes.is_main() else []
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards ({missing[0].name}, ...) are not in {scratch}; start again, with "
            "a folder that all processes see"
        )
    return list(shards.values())


def _is_written(temporary: Path) -> bool:
    """Whether the process that a temporary name belongs to is still there."""
    result = re.search(r"\.(\d+)(?:\.old)?\.tmp$", temporary.name)
    if result is None or int(result[1]) == os.getpid():
        return False
    try:
        os.kill(int(result[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _seconds_in(path: Path) -> float:
    try:
        return float(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return 0.0
