"""Where results go: folders that bear ptqd's mark, checked before any work, and replaced without losing anything.

A folder that ptqd makes has ``.ptqd.json``, which says what kind of folder it is and which files ptqd wrote there.
Nothing is written into a folder with files but without the mark, and only files that the mark names are replaced.

A folder that is there is never renamed, as it may be a mount point, a shell's working folder, or what a link leads to.
Its new files are written into a temporary folder inside it, which is renamed to ``.ptqd-ready`` when all are on the
disk, and then moved one by one. A process that ends meanwhile has lost nothing: the next one moves what is left.
"""

import contextlib
import errno
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from ptqd import processes
from ptqd.errors import ArtifactError, InputError, PtqdError
from ptqd.files import (
    explained,
    is_stream,
    is_temporary,
    make_folder,
    opened_tensors,
    read_json,
    remove,
    settle,
    temporary_name,
    tidy,
    tidy_up,
    write_json,
)
from ptqd.names import inside, shown

MARK, READY = ".ptqd.json", ".ptqd-ready"
VERSION = 1
Kind = Literal["pipeline", "run", "samples", "engines", "cache", "scratch"]
WORDS: dict[Kind, str] = {
    "pipeline": "a pipeline",
    "run": "a run of 'ptqd run'",
    "samples": "samples of 'ptqd sample'",
    "engines": "exported pipelines of 'ptqd bench'",
    "cache": "a cache",
    "scratch": "unfinished work",
}
FIXED: dict[Kind, tuple[str, ...]] = {"run": ("manifest.json", "report.json")}  # files that are no stages
SYSTEM = ("lost+found", ".DS_Store", "Thumbs.db", "desktop.ini")  # what disks and desktops put into folders
PATIENCE = 5.0  # seconds before a lock is told of
AGAIN = 60.0  # seconds before it is told of again


@dataclass(frozen=True)
class Mark:
    """What ``.ptqd.json`` says.

    Attributes:
        kind: of folder.
        files: that ptqd wrote, as relative paths; of a run folder those that are no stages.
        version: of this schema.
    """

    kind: Kind
    files: tuple[str, ...] = ()
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write it, atomically."""
        write_json(folder / MARK, msgspec.to_builtins(self))

    @classmethod
    def load(cls, folder: Path) -> "Mark | None":
        """A folder's mark; None where it has none.

        Raises:
            ArtifactError: it is damaged, or of a newer version.
        """
        path = folder / MARK
        if path.is_symlink() or not path.is_file():
            return None
        remedy = f"remove {folder} yourself if it can go, or choose another folder"
        try:
            values = read_json(path)
            if isinstance(values, dict) and isinstance(values.get("version"), int) and values["version"] > VERSION:
                raise ArtifactError(f"{path} was written by a newer ptqd; {remedy}")
            return msgspec.convert(values, cls)
        except (msgspec.ValidationError, ArtifactError) as error:
            if "newer" in str(error):
                raise
            raise ArtifactError(f"{path} is damaged ({error}); {remedy}") from error


def check_output(path: Path, inputs: Iterable["str | Path | None"] = ()) -> None:
    """Refuse an output that is an input, or holds one.

    Args:
        path: of a file or folder that will be written.
        inputs: paths that are read; names that are no path, such as hub ids, and None are passed over.

    Raises:
        InputError: it is one of them, or holds one.
    """
    output = Path(os.path.realpath(path))
    for given in inputs:
        if given is None or not str(given) or not os.path.lexists(given):
            continue
        source = Path(os.path.realpath(given))
        if source == output or _is_same(source, output):
            raise InputError(f"{path} is what is read; choose another output")
        if output in source.parents:
            raise InputError(f"{path} holds {given}, which is read; choose another output")


def _is_same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


def check_files(files: dict[str, "Path | None"], inputs: Iterable["str | Path | None"] = ()) -> None:
    """Refuse output files that are inputs, or one another; by the option that gives each.

    Raises:
        InputError: either of these.
    """
    given = {option: path for option, path in files.items() if path is not None}
    for option, path in given.items():
        check_output(path, inputs)
        for other, same in given.items():
            if other != option and os.path.realpath(same) == os.path.realpath(path) and not is_stream(path):
                raise InputError(f"{option} and {other} are one file, {path}; give each its own")


def check_file(path: Path | None, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse a file to write that cannot be written, or that holds something else than ptqd would write there.

    Args:
        path: the file; None passes.
        is_ours: whether a file that is there is one that ptqd wrote, or may be.
        what: ptqd writes there, for messages.

    Raises:
        InputError: either of these.
    """
    if path is None or is_stream(path):
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file for {what}")
    real = Path(os.path.realpath(path))
    if real.exists():
        try:
            ours = real.stat().st_size == 0 or is_ours(real)
        except PtqdError:
            ours = False
        if not ours:
            raise InputError(f"{path} is there already and is no {what} that ptqd wrote; choose another file")
    check_writable(real.parent)


def is_json_of(*keys: str, each: bool = False) -> Callable[[Path], bool]:
    """Whether a file is JSON of ptqd's.

    Args:
        keys: of the object that it is.
        each: of every object in the list, or in the object, that it is.
    """

    def fits(path: Path) -> bool:
        values = read_json(path)
        objects = [values]
        if each:
            objects = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else []
        return bool(objects) and all(isinstance(v, dict) and set(keys) <= set(v) for v in objects)

    return fits


def is_text_of(mark: str) -> Callable[[Path], bool]:
    """Whether a file is text with a line that ptqd marks its own by."""

    def fits(path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            return mark.encode() in file.read()

    return fits


def is_tensors_of(key: str) -> Callable[[Path], bool]:
    """Whether a file is of safetensors with one of ptqd's keys in its metadata."""

    def fits(path: Path) -> bool:
        with opened_tensors(path) as file:
            return key in (file.metadata() or {})

    return fits


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        InputError: so it is.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"{there} is no folder, so {folder} cannot be made; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} is not yours to write to; choose another folder, or ask who owns it")


def claim(folder: Path, kind: Kind) -> Mark:
    """Check that a folder may be written, before any work: it is new, empty, or bears the mark of its kind.

    What dead processes left in it is removed, and what one was moving is moved.

    Raises:
        InputError: it is something else, holds what ptqd did not make, or cannot be written to.
    """
    if is_stream(folder) or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is no folder; choose a new or an empty one")
    folder = Path(os.path.realpath(folder))
    check_writable(folder)
    if not folder.exists():
        return Mark(kind)
    finish(folder)
    mark = _mark_of(folder, kind)
    if mark is None:
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in SYSTEM and not is_temporary(p.name))
        if foreign:
            names = ", ".join(map(shown, foreign[:3])) + (", ..." if len(foreign) > 3 else "")
            raise InputError(f"{folder} holds what ptqd did not write ({names}); choose a new or an empty folder")
        mark = Mark(kind)
    elif mark.kind != kind:
        raise InputError(f"{folder} holds {WORDS[mark.kind]}; choose a new or an empty folder")
    for name in mark.files:
        inside(folder, name, str(folder / MARK))
    for name in FIXED.get(kind, ()):
        if name not in mark.files and os.path.lexists(folder / name):
            raise InputError(f"{folder / name} is not ptqd's and would be replaced; move it, or choose another folder")
    tidy_up([path for path in folder.iterdir() if is_temporary(path.name)])
    return mark


def _mark_of(folder: Path, kind: Kind) -> Mark | None:
    """The mark; of a folder with stages that an earlier version made, the one that it would have."""
    try:
        mark = Mark.load(folder)
    except ArtifactError as error:
        if "damaged" in str(error) and (folder / ".stages").is_dir():  # a loss of power: stages say what is theirs
            mark = None
        else:
            raise
    if mark is not None or not (folder / ".stages").is_dir():
        return mark
    if not any(_is_record(path) for path in (folder / ".stages").rglob("*.json")):
        return None
    if (folder / "samples.safetensors").is_file():
        return Mark("samples", tuple(sorted(p.name for p in folder.iterdir() if _SAMPLED.fullmatch(p.name))))
    names = [p.relative_to(folder).as_posix() for p in (*folder.glob("*"), *folder.glob("*/*/plan.png"))]
    names = sorted(name for name in names if _REPORTED.fullmatch(name))
    without_report = not (folder / "report.json").is_file() and kind in ("cache", "engines")
    return Mark(kind if without_report else "run", tuple(names))


_SAMPLED = re.compile(r"grid\.png|samples\.npz|[0-9]{6,}\.png")  # what earlier versions wrote, without a mark
_REPORTED = re.compile(r"report\.html|report\.json|manifest\.json|strips\.png|[^/]+/[^/]+/plan\.png")


def _is_record(path: Path) -> bool:
    with suppress(InputError):
        values = read_json(path)
        return isinstance(values, dict) and {"key", "inputs", "seconds"} <= set(values)
    return False


def finish(folder: Path) -> None:
    """Move the files that a process which ended had ready, if there are any.

    Raises:
        InputError: there are, and this user may not, or what others put there is in the way.
    """
    ready = folder / READY
    new = Mark.load(ready) if ready.is_dir() and not ready.is_symlink() else None
    if new is None:
        return
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} was being replaced when its process ended; let its owner run the same command")
    old = Mark.load(folder)
    ours = set(() if old is None else old.files)
    moves = {name: (inside(ready, name, str(ready)), inside(folder, name, str(ready))) for name in new.files}
    for name, (source, target) in moves.items():
        if source.is_file() and os.path.lexists(target) and name not in ours:
            raise InputError(f"{target} is not ptqd's and would be replaced; move it, or remove {ready}")
    with explained(folder):
        for source, target in moves.values():
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # moved before
                source.replace(target)
        _remove_files(folder, ours - set(new.files))
        with suppress(FileNotFoundError):
            (ready / MARK).replace(folder / MARK)
    remove(ready)


def _remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders inside it that are empty then."""
    for name in names:
        path = inside(folder, name, str(folder / MARK))
        if path.is_dir() and not path.is_symlink():
            continue
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == folder:
                break
            with suppress(OSError):
                parent.rmdir()


class OutputFolder:
    """A folder that a pipeline is written to: checked when it is made, and written at the end of the work.

    Args:
        path: of the folder.
        inputs: what is read; the folder may be none of it, nor hold any.
        kind: of folder.

    Raises:
        InputError: it may not be written; see :func:`claim` and :func:`check_output`.
    """

    def __init__(self, path: Path, inputs: Iterable["str | Path | None"] = (), kind: Kind = "pipeline") -> None:
        check_output(path, inputs)
        self.path, self.kind = path, kind
        self._mark = claim(path, kind) if processes.is_main() else Mark(kind)
        self._folder = Path(os.path.realpath(path))
        self._scratch: Path | None = None
        if self._folder.parent.is_dir() and processes.is_main():
            with explained(path):
                tidy(self._folder)

    def scratch(self, inputs: object) -> Path:
        """A folder beside it for unfinished work of some inputs, plain values, that survives a kill."""
        self._scratch = scratch_folder(self._folder, inputs)
        return self._scratch

    def forget_empty_scratch(self) -> None:
        """Remove the folder for unfinished work where nothing is in it."""
        if self._scratch is None or not processes.is_main():
            return
        if not any(path.is_file() and path.name != MARK for path in self._scratch.rglob("*")):
            remove_scratch(self._scratch)

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A temporary folder whose files become those of this one when the block ends well.

        Raises:
            InputError: the disk refuses, or a file that ptqd did not write is in the way.
        """
        exists = self._folder.is_dir()
        temporary = temporary_name(self._folder / ".ptqd" if exists else self._folder)
        with explained(self.path):
            try:
                temporary.mkdir(parents=True)
                yield temporary
                files = sorted(
                    path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()
                )
                if exists:
                    self._check_in_the_way(files)
                Mark(self.kind, tuple(files)).save(temporary)
                settle(temporary)
                if exists:
                    temporary.replace(self._folder / READY)
                    finish(self._folder)
                else:
                    temporary.replace(self._folder)
            finally:
                remove(temporary)

    def _check_in_the_way(self, files: Sequence[str]) -> None:
        for name in files:
            target = inside(self._folder, name, str(self.path))
            parents = [self._folder / part for part in Path(name).parents if part != Path()]
            if any(parent.is_symlink() or (parent.exists() and not parent.is_dir()) for parent in parents) or (
                os.path.lexists(target) and name not in self._mark.files
            ):
                raise InputError(f"{target} is not ptqd's and would be replaced; move it, or choose another folder")


@contextmanager
def output_folder(
    path: Path, inputs: Iterable["str | Path | None"] = (), kind: Kind = "pipeline"
) -> Iterator[OutputFolder]:
    """An output folder that no other process writes meanwhile; see :class:`OutputFolder`.

    Work that was refused before anything of it was kept leaves nothing behind.
    """
    with alone_with(path):
        folder = OutputFolder(path, inputs, kind)
        try:
            yield folder
        except PtqdError:
            folder.forget_empty_scratch()
            raise


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """No other process of this user and machine works on an output meanwhile."""
    if not processes.is_main():
        yield
        return
    name = sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()[:32]
    locks = cache_folder("locks")
    try:
        make_folder(locks)
    except InputError:  # a home that is read-only
        yield
        return
    with lock(locks / f"{name}.lock", f"{path}"):
        yield


def scratch_folder(out: Path, inputs: object) -> Path:
    """A folder beside an output for unfinished work of some plain values, that survives a kill; it bears a mark."""
    key = sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]
    out = Path(os.path.realpath(out))
    folder = out.parent / f".{out.name[:60]}.ptqd-{key}"
    make_folder(folder)
    if Mark.load(folder) is None:
        Mark("scratch").save(folder)
    return folder


def remove_scratch(folder: Path) -> None:
    """Remove what :func:`scratch_folder` made."""
    if (folder / MARK).is_file():
        remove(folder)


def cache_folder(what: str) -> Path:
    """Where ptqd keeps something for the user; beside temporary files for one who has no home to write to.

    Raises:
        InputError: XDG_CACHE_HOME is no absolute path.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "").strip()
    if chosen and not Path(chosen).is_absolute():
        raise InputError(f"XDG_CACHE_HOME={chosen!r} in the environment is no absolute path; mend or unset it")
    with suppress(RuntimeError, OSError):  # an account without a name, or with another's home
        folder = user_cache_path("ptqd", appauthor=False)
        if not chosen and not Path.home().is_dir():
            raise RuntimeError("no home")
        there = next(part for part in (folder, *folder.parents) if part.exists())
        if folder.is_absolute() and "~" not in folder.parts and there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return folder / what
    return Path(tempfile.gettempdir()) / f"ptqd-{os.getuid() if hasattr(os, 'getuid') else 'cache'}" / what


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """No other process does this meanwhile; one that has to wait says for whom, and how to go on.

    Where a disk has no locks it goes on without, and says so.

    Args:
        path: of the lock's file, whose folder is made.
        what: is locked, for messages.
    """
    make_folder(path.parent)
    holder, locked = path.with_suffix(".holder"), FileLock(path, mode=0o666)
    has_lock = _acquire(locked, path, holder, what)
    try:
        if has_lock:
            with suppress(OSError):
                holder.write_text(f"process {os.getpid()} on {platform.node()}", "utf-8")
        yield
    finally:
        if has_lock:
            with suppress(OSError):
                holder.unlink(missing_ok=True)
            locked.release()


def _acquire(locked: FileLock, path: Path, holder: Path, what: str) -> bool:
    """Wait for a lock; False where the disk has none."""
    started, said = time.monotonic(), 0.0
    with explained(path):
        while True:
            try:
                locked.acquire(timeout=1.0 if said else PATIENCE)
            except Timeout:
                reason = _without_locks(path)
            except (NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                    raise
                reason = str(error)
            else:
                return True
            if reason is not None:
                say(f"{what}: this disk has no locks ({reason}); start one command at a time for it")
                return False
            if not said or time.monotonic() - said > AGAIN:
                said = time.monotonic()
                say(
                    f"{what}: waiting for {_holder_of(holder)} since {said - started:.0f} seconds; if there is no "
                    f"such process, remove {path}"
                )


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def _without_locks(path: Path) -> str | None:
    """Why a lock cannot be had where the disk has none; None where somebody holds it."""
    try:
        import fcntl
    except ImportError:  # Windows, which has locks of its own
        return None
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror if error.errno in _NO_LOCKS else None
    return None


def _holder_of(holder: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return shown(holder.read_text("utf-8")[:200])
    return "another process, perhaps of another machine"


def say(text: str) -> None:
    """A line on standard error for the person who waits."""
    with contextlib.suppress(OSError, ValueError):
        print(f"ptqd: {shown(text)}", file=sys.stderr, flush=True)
