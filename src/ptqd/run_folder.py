"""A run folder: stages that are skipped when their inputs are unchanged, written atomically, resumed after a kill."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ptqd import processes
from ptqd.errors import ArtifactError, InputError
from ptqd.files import (
    is_temporary,
    is_whole,
    make_folder,
    opened_tensors,
    read_json,
    remove,
    replacing,
    tidy_up,
    write_json,
)
from ptqd.names import inside
from ptqd.outputs import FIXED, MARK, Kind, Mark, claim, lock, say
from ptqd.progress import track

Build = Callable[[Path, Path], None]
T = TypeVar("T")


@dataclass(frozen=True)
class StageRecord:
    """What ``.stages/NAME.json`` says of a finished stage.

    Attributes:
        key: hash of its inputs.
        inputs: everything that it was made from, plain.
        seconds: it took.
        sizes: bytes of each of its files, by their paths inside it; none in records of earlier versions.
    """

    key: str
    inputs: dict[str, Any]
    seconds: float
    sizes: dict[str, int] | None = None


class RunFolder:
    """Results of named stages, each beside a record of the inputs it was made from.

    ``NAME`` is the result; ``.stages/NAME.json`` holds the hash of its inputs, the seconds it took and its files'
    sizes; ``.partial/NAME-HASH`` is where an unfinished stage keeps what it has, for the next start.

    What a kill or a loss of power left unfinished or unreadable, a record, a part or a result, is made again.

    Args:
        folder: a new or an empty one, or one of the same kind.
        kind: of folder, for its mark.
        shared: every process makes one, and they wait for each other; else the main one alone.

    Raises:
        InputError: the folder is another's, or not writable.
    """

    def __init__(self, folder: Path, kind: Kind = "run", *, shared: bool = True) -> None:
        self.folder = Path(os.path.realpath(folder))
        if processes.is_main():
            mark = claim(folder, kind)
            make_folder(self.folder)
            for name in (".stages", ".partial", ".locks"):
                self.path(name)
            if not _has_mark(self.folder) or not set(FIXED.get(kind, ())) <= set(mark.files):
                Mark(kind, tuple(sorted({*mark.files, *FIXED.get(kind, ())}))).save(self.folder)
            tidy_up([path for path in _walk(self.folder) if is_temporary(path.name)])
        if shared:
            processes.wait()

    def path(self, name: str) -> Path:
        """A path inside the folder, links followed.

        Raises:
            InputError: it leads out of it.
        """
        return inside(self.folder, name, f"the folder {self.folder}")

    def own(self, names: Sequence[str], *, only: bool = False) -> None:
        """Note in the mark which files that are no stages ptqd writes here, before it does.

        Args:
            names: paths inside the folder.
            only: remove those that are noted and not among them: they were made of results that are no more.

        Raises:
            InputError: one is there that ptqd did not write.
        """
        mark = Mark.load(self.folder)
        known = set() if mark is None else set(mark.files)
        for name in set(names) - known:
            if os.path.lexists(self.path(name)):
                raise InputError(f"{self.folder / name} is not ptqd's and would be replaced; move it")
        for name in known - set(names) if only else ():
            inside(self.folder, name, MARK).unlink(missing_ok=True)
        files = set(names) if only else known | set(names)
        if mark is not None and files != known:
            Mark(mark.kind, tuple(sorted(files))).save(self.folder)

    def stage(self, name: str, inputs: Mapping[str, object], build: Build, *, shared: bool = False) -> Path:
        """The result of a stage, made now if it is missing or was made from other inputs.

        Of several processes the main one makes it, and the others wait. Of several runs in one folder the first makes
        it, and the others take what it made.

        Args:
            name: path of the result inside the folder.
            inputs: everything the result depends on, as plain JSON values.
            build: called with the path to write to and a scratch folder that survives a kill.
            shared: every process calls ``build``, to do its share; inside :func:`ptqd.processes.together` what the
                library shares is shared. The main one alone writes the result, the others help in the scratch folder.

        Returns:
            The path of the result.
        """
        plain = json.loads(json.dumps(inputs, sort_keys=True, default=str))
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
        if processes.agreed(key) != key:
            raise InputError(
                f"{name}: this process was started with other arguments than the main one; start all alike"
            )
        target = inside(self.folder, name, "a stage")

        def build_together(path: Path, scratch: Path) -> None:
            with processes.together():
                build(path, scratch)
            processes.wait()  # until then the scratch folder is somebody's

        if processes.agreed(processes.is_main() and self._is_made(name, key)):
            return target
        scratch = self.folder / ".partial" / f"{_flat(name)}-{key[:16]}"
        with self._alone(name):
            if processes.agreed(processes.is_main() and self._is_made(name, key)):
                return target  # another run made it meanwhile
            if processes.is_main():
                self._say_what_changed(name, plain, key)
                self._make(name, StageRecord(key, plain, 0.0), build_together if shared else build, scratch)
            elif shared:
                make_folder(scratch)
                build_together(target, scratch)
            processes.wait()
        return target

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

        for last in (False, True):
            path = self.stage(name, inputs, keep, shared=shared)
            value, damage = built[0] if built else None, None
            if value is None:
                try:
                    value = load(path)
                except ArtifactError as error:  # of the right size, and damaged all the same
                    damage = error
            sound, given_up = processes.agreed((damage is None, last or bool(built)))  # as the main process finds it
            if value is not None and sound:
                return value
            if sound or given_up:
                raise damage or ArtifactError(f"{path} is damaged; start the same command again")
            if processes.is_main():
                say(f"{damage}; it is made again")
                self.unmake(name)
            processes.wait()
        raise AssertionError

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """No other run makes this stage meanwhile."""
        if not processes.is_main():
            yield
            return
        with lock(self.folder / ".locks" / f"{_flat(name)}.lock", f"{self.folder}, {name}"):
            yield

    def _make(self, name: str, record: StageRecord, build: Build, scratch: Path) -> None:
        target, path = self.folder / name, self._record(name)
        old = self._read_record(name)
        begun = path.exists() or any((self.folder / ".partial").glob(f"{glob.escape(_flat(name))}-*"))
        if os.path.lexists(target) and not begun:
            raise InputError(f"{target} is not ptqd's and would be replaced; move it")
        make_folder(scratch)
        spent = scratch / "seconds.json"
        before, started = _seconds_in(spent), time.monotonic()
        path.unlink(missing_ok=True)  # from here on, what is there counts for nothing
        try:
            with replacing(target) as temporary:
                build(temporary, scratch)
                sizes = _sizes(temporary)
                if old is not None and old.sizes is not None:
                    _keep_others(target, temporary, old.sizes)
        except BaseException:
            with contextlib.suppress(InputError, OSError):
                write_json(spent, before + time.monotonic() - started)
            raise
        seconds = before + time.monotonic() - started
        write_json(path, msgspec.to_builtins(StageRecord(record.key, record.inputs, seconds, sizes)))
        remove(scratch)

    def _is_made(self, name: str, key: str) -> bool:
        """Whether a result is there, whole, of the inputs that a key stands for."""
        record = self._read_record(name)
        target = self.folder / name
        if record is None or record.key != key or not target.exists():
            return False
        there = _sizes(target)  # others may have put something beside them
        return record.sizes is None or all(there.get(path) == size for path, size in record.sizes.items())

    def _say_what_changed(self, name: str, inputs: Mapping[str, Any], key: str) -> None:
        record = self._read_record(name)
        if record is None or record.key == key or not (self.folder / name).exists():
            return
        changes = [
            f"{what} {_brief(before)} before, {_brief(after)} now"
            for what, before, after in _changes(record.inputs, inputs)
        ]
        say(f"{self.folder / name} is made again, and what was there is replaced: {', '.join(changes[:4])}")

    def unmake(self, name: str) -> None:
        """Note that a finished stage is damaged, so that it is made again."""
        write_json(self._record(name), {"damaged": name})

    def seconds(self, name: str) -> float:
        """How long the stage took when it was made; 0 for one that never was."""
        record = self._read_record(name)
        return 0.0 if record is None else record.seconds

    def key(self, name: str) -> str:
        """The hash of a finished stage's inputs, for stages that depend on it.

        Raises:
            ArtifactError: it is not finished, or its record is damaged.
        """
        record = self._read_record(name)
        if record is None:
            raise ArtifactError(f"{self._record(name)} is damaged or missing; start the same command again")
        return record.key

    def _read_record(self, name: str) -> StageRecord | None:
        return read_record(self.folder, name)

    def _record(self, name: str) -> Path:
        return inside(self.folder, f".stages/{name}.json", "a stage")


def read_record(folder: Path, name: str) -> StageRecord | None:
    """The record of a stage, also in a folder that is only read; None where there is none that is whole."""
    path = inside(folder, f".stages/{name}.json", "a stage")
    if not path.is_file():
        return None
    try:
        return msgspec.convert(read_json(path), StageRecord)
    except (ArtifactError, msgspec.ValidationError):  # after a loss of power
        return None


def _has_mark(folder: Path) -> bool:
    try:
        return Mark.load(folder) is not None
    except ArtifactError:  # damaged, in a folder whose stages say what is theirs
        return False


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(root) / name


def _sizes(target: Path) -> dict[str, int]:
    files = [target] if target.is_file() else [path for path in _walk(target) if path.is_file()]
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in sorted(files)}


def _keep_others(target: Path, temporary: Path, ours: Mapping[str, int]) -> None:
    """Take over what others put into a result that is made again."""
    for path in list(_walk(target)) if target.is_dir() and temporary.is_dir() else []:
        name = path.relative_to(target)
        if path.is_dir() and not path.is_symlink():
            continue
        if name.as_posix() not in ours and not os.path.lexists(temporary / name):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, temporary / name, follow_symlinks=False)


def _flat(name: str) -> str:
    """A stage's name as that of one file, short enough for any disk."""
    flat = name.replace("/", "-")
    return flat if len(flat) <= 120 else f"{flat[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new)
        elif old != new:
            yield name, old, new


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def make_shards(
    batches: Sequence[range],
    scratch: Path,
    write: Callable[[range, Path], None],
    *,
    title: str | None,
    whole: Callable[[Path], bool] | None = None,
) -> list[Path]:
    """The results of batches, each its own file, each process its share; what is there already is kept.

    Args:
        batches: indices of samples.
        scratch: a folder that survives a kill.
        write: called with a batch and the file, to be written atomically.
        title: of a progress bar.
        whole: whether a file is there and whole; by default :func:`is_whole`.

    Returns:
        All files, in order, once all processes have written theirs.

    Raises:
        InputError: some are missing, after a process of another kind or on another disk.
    """
    make_folder(scratch)
    shards = {indices: scratch / f"{indices.start:08d}.safetensors" for indices in batches}
    for indices in track(processes.share(batches), title):
        if not (whole or is_whole)(shards[indices]):
            write(indices, shards[indices])
    processes.wait()
    missing = [shard for shard in shards.values() if not shard.exists()] if processes.is_main() else []
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} shards ({missing[0].name}, ...) are not in {scratch}; start again, with "
            "a folder that all processes see"
        )
    return list(shards.values())


def whole_file(path: Path) -> Path:
    """A path, if a file of safetensors is there and whole.

    Raises:
        ArtifactError: it is not.
    """
    with opened_tensors(path):
        return path


def _seconds_in(path: Path) -> float:
    try:
        return float(read_json(path))
    except (InputError, TypeError, ValueError):
        return 0.0
