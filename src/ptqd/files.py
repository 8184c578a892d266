"""Files: written under a temporary name and renamed, read without pickle."""

import ctypes
import errno
import itertools
import json
import math
import mmap
import os
import pickle
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ptqd.errors import ArtifactError, InputError, lack_of
from ptqd.names import shown

STALE = 86_400.0  # seconds after which what an unseen process wrote is left over
SILENT = 5.0  # seconds of waiting before it is said
LARGEST_TEXT = 1 << 28  # bytes of a JSON or TOML file
_MADV_PAGEOUT = 21  # of linux/mman.h
DTYPES = {  # by the names that safetensors has for them
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it, file or folder, when the block ends well.

    What is written is on the disk before it has the name, so that a loss of power leaves the old or the new one. A
    device, a pipe or a socket is written to; a link keeps its name, and what it leads to is replaced.

    Args:
        path: of the file or folder.
        lasting: wait for the disk; of many files that are made again in any case that takes too long.

    Raises:
        InputError: the disk is full or the folder not writable; nothing is left behind.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder, explained(path):
            yield Path(folder) / "written"
            with (Path(folder) / "written").open("rb") as written, _stream(path) as stream:
                shutil.copyfileobj(written, stream)
        return
    path = Path(os.path.realpath(path))
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path)
        temporary, old = temporary_name(path), temporary_name(path, ".old.tmp")
        try:
            yield temporary
            settle(temporary, lasting=lasting)
            if path.is_dir() and temporary.is_dir():
                path.replace(old)
            try:
                temporary.replace(path)
            except OSError as error:
                if error.errno != errno.EBUSY or not temporary.is_file():
                    raise
                shutil.copyfile(temporary, path)  # a mount point: its name cannot be given away
            if lasting:
                _sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.replace(path)
            for leftover in (temporary, old):
                remove(leftover)


def is_stream(path: Path) -> bool:
    """Whether writing to a path means a device, a pipe, a socket or an open file, and not a file of its name."""
    text = str(path.absolute())
    if text.startswith(("/dev/fd/", "/proc/")) or text in ("/dev/stdout", "/dev/stderr", "/dev/stdin"):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def _stream(path: Path) -> Any:
    """What is written to of a device, a pipe, or an open file, which goes on where it is."""
    text = str(path.absolute())
    number = re.fullmatch(r"/dev/fd/([0-9]{1,9})|/proc/(?:self|[0-9]+)/fd/([0-9]{1,9})", text)
    if text in _STANDARD or number is not None:
        sys.stdout.flush()
        return os.fdopen(os.dup(_STANDARD[text] if number is None else int(number[1] or number[2])), "wb")
    if not path.is_fifo():
        return path.open("wb")
    started, told = time.monotonic(), False
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if not told and time.monotonic() - started > SILENT:
                told = True
                print(f"ptqd: {shown(path)}: waiting for a process that reads this pipe", file=sys.stderr, flush=True)
            time.sleep(0.1)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of what the disk refuses what it is and what to do.

    Raises:
        InputError: the disk is full, or does not let something be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"cannot write {path}: {error}; free some space or choose another folder") from error
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(path.parent))
        if error.errno not in _REFUSALS or elsewhere:
            raise
        raise InputError(f"cannot write {path}: {error.strerror}; {_REFUSALS[error.errno]}") from error


_SPACE = "free some space or choose another folder"
_REFUSALS: dict[int | None, str] = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EIO: _SPACE,
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another folder, or ask who owns it",
    errno.EPERM: "choose another folder, or ask who owns it",
    errno.ENOTDIR: "a part of the path is no folder; choose another",
    errno.EISDIR: "choose another name",
    errno.EEXIST: "choose another name",
    errno.EBUSY: "choose another folder",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ELOOP: "its links go in a circle; choose another",
}


def temporary_name(path: Path, suffix: str = ".tmp") -> Path:
    """A name beside ``path`` that only this process gives, and that tells others which process on which machine."""
    own = f"{os.getpid()}.{_started(os.getpid())}.{_NAMESPACE}"
    return path.with_name(f"{_prefix(path.name)}{own}-{next(_COUNT)}{suffix}")


def _prefix(name: str) -> str:
    kept = name if len(name.encode(errors="replace")) <= 100 else sha256(name.encode(errors="replace")).hexdigest()[:32]
    return f".{kept.removeprefix('.')}.ptqd-{_HOST}-"


def tidy(path: Path) -> None:
    """Remove what processes of this machine that are no more left of ``path``; put back what one was replacing.

    A folder is looked through once by a process: it may hold very many files.
    """
    if path.parent not in _LEFT:
        left: dict[str, list[Path]] = {}
        with os.scandir(path.parent) as entries:
            for entry in entries:
                if (named := _TEMPORARY.fullmatch(entry.name)) is not None:
                    left.setdefault(named["prefix"], []).append(Path(entry))
        _LEFT[path.parent] = left
    tidy_up(_LEFT[path.parent].pop(_prefix(path.name), []), path)


_LEFT: dict[Path, dict[str, list[Path]]] = {}  # by folder and prefix, what was there at the first look


def tidy_up(leftovers: Sequence[Path], path: Path | None = None) -> None:
    """Remove temporary files and folders of this machine's dead processes; see :func:`tidy`."""
    for leftover in leftovers:
        named = _TEMPORARY.fullmatch(leftover.name)
        if named is None or _is_alive(leftover, named):
            continue
        if named["old"] and path is not None and not path.exists():
            leftover.replace(path)
        remove(leftover)


def is_temporary(name: str) -> bool:
    """Whether a name is one that :func:`temporary_name` gives, here or elsewhere."""
    return _ANYBODYS.fullmatch(name) is not None


def _is_alive(leftover: Path, named: re.Match[str]) -> bool:
    """Whether the process that gave a temporary name is still there, as far as can be told."""
    if named["space"] != _NAMESPACE:  # a container of the same name; its processes are not seen here
        with suppress(OSError):
            return time.time() - leftover.lstat().st_mtime < STALE
        return True
    pid = int(named["pid"])
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return named["started"] in ("0", _started(pid))


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; "0" where that is not known."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()[19]
    return "0"


def _namespace() -> str:
    """Of process numbers, which containers have their own of."""
    with suppress(OSError):
        return f"{Path('/proc/self/ns/pid').stat().st_ino:x}"
    return "0"


_HOST = sha256(platform.node().encode()).hexdigest()[:8]
_NAMESPACE = _namespace()
_NAME = (
    r"(?P<prefix>\..*\.ptqd-%s-)(?P<pid>[0-9]+)\.(?P<started>[0-9]+)\.(?P<space>[0-9a-f]+)-[0-9]+(?P<old>\.old)?\.tmp"
)
_TEMPORARY, _ANYBODYS = re.compile(_NAME % _HOST), re.compile(_NAME % "[0-9a-f]{8}")
_COUNT = itertools.count()
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle(path: Path, *, lasting: bool = True) -> None:
    """Give a file, or all of a folder, the rights that the user's umask gives, and bring it to the disk."""
    parts = [path]
    if path.is_dir():
        parts += [Path(root) / name for root, folders, files in os.walk(path) for name in (*folders, *files)]
    for part in parts:
        if not part.is_symlink():
            part.chmod((0o777 if part.is_dir() else 0o666) & ~_UMASK)
            if lasting:
                _sync(part)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # no right to read it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def reserve(path: Path, size: int) -> None:
    """Make a file of so many bytes that the disk has: one that is written through a map could not say that it is full.

    Raises:
        OSError: the disk has not so much.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
            return
        except AttributeError:  # macOS and Windows
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            file.write(zeros[: size - start])


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}; choose another") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; what is infinite or NaN becomes null."""
    write_text(path, to_json(value) + "\n")


def to_json(value: object) -> str:
    """JSON, indented; what is infinite or NaN becomes null, which JSON has no numbers for."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_readable(path: Path, largest: int | None = None) -> None:
    """Refuse what cannot be read as a file of its own.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        InputError: it is missing, no file, not this user's to read, or too large.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputError(f"{path} does not exist") from error
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{path} cannot be read: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder; give a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: Permission denied; ask who owns it")
    if largest is not None and status.st_size > largest:
        raise InputError(f"{path} has {status.st_size:,} bytes, more than the {largest:,} that such a file may have")


def read_text(path: Path, what: str = "") -> str:
    """Read a text file of at most :data:`LARGEST_TEXT` bytes, in UTF-8, with a byte order mark or without.

    Args:
        path: the file.
        what: it is read as, for messages: ``" as JSON"``.

    Raises:
        InputError: it is missing, larger, not this user's to read, or no text.
    """
    try:
        check_readable(path, LARGEST_TEXT)
        with path.open("rb") as file:  # which may be a stream, without a size
            data = file.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise InputError(f"it has more than the {LARGEST_TEXT:,} bytes that such a file may have")
        return data.decode("utf-8-sig")
    except InputError as error:
        raise InputError(f"{path} cannot be read{what}: {str(error).removeprefix(f'{path} ')}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} cannot be read{what}: it is no text in UTF-8 ({error})") from error
    except OSError as error:
        if lack_of(error) is not None:
            raise
        raise InputError(f"{path} cannot be read{what}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or cannot be read.
        ArtifactError: it is no JSON.
    """
    return parse_json(read_text(path, " as JSON"), str(path))


def parse_json(text: str, where: str, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: of it.
        where: it comes from, for messages.
        finite: refuse NaN and infinite numbers, which Python writes and JSON does not have.

    Raises:
        ArtifactError: it is no JSON.
    """
    strict: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _float} if finite else {}
    strict["parse_int"] = _int
    try:
        return json.loads(text, **strict)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} cannot be read as JSON: {str(error) or 'it is nested too deep'}") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _int(text: str) -> int:
    value = int(text)
    if abs(value) >= 1 << 63:
        raise ValueError(f"{text[:20]}... is too large a number")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: it is, for messages: ``"the plan "``.

    Raises:
        InputError: the file is missing, cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(read_text(path, " as TOML"))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        reason = str(error).partition(" as TOML: ")[2] if isinstance(error, InputError) else error
        raise InputError(f"{what}{path} cannot be read as TOML: {reason}") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    with replacing(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, dict(metadata))


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors mapped from disk, or a safetensors file's tensors; never code.

    Raises:
        InputError: the file is missing, damaged, or holds anything but tensors and plain containers, which is named.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    check_readable(path)
    mapped = zipfile.is_zipfile(path)  # torch's older format cannot be
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.\w+)", str(error))
        if named is None:
            raise InputError(f"{path} is damaged or no file of torch.save; get it again") from error
        raise InputError(
            f"{path} holds {named[1]} beside tensors and plain containers; it is not loaded, as that could run code: "
            "save its state_dict alone"
        ) from error
    except Exception as error:  # a damaged pickle fails in any way
        if lack_of(error) is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no whole checkpoint ({reason}); get it again") from error


def join_tensors(path: Path, parts: Sequence[Path], metadata: Mapping[str, str]) -> None:
    """Join safetensors files along their tensors' first axis into one, atomically, a part in memory at a time.

    A tensor that only some parts have is joined of those.

    Args:
        path: file to write.
        parts: in order; their own metadata have to be equal.
        metadata: of the whole.

    Raises:
        InputError: a part is missing, truncated, or was written by another configuration.
    """
    pieces: dict[str, list[tuple[Path, str, list[int]]]] = {}
    known: dict[str, str] | None = None
    for part in parts:
        with opened_tensors(part) as file:
            result = file.metadata() or {}
            known = result if known is None else known
            if result != known:
                raise InputError(f"{part} was written by another configuration than {parts[0]}; remove it")
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                pieces.setdefault(name, []).append((part, piece.get_dtype(), piece.get_shape()))
    layout = {}
    for name, found_pieces in pieces.items():
        for part, dtype, shape in found_pieces:
            if (dtype, shape[1:]) != (found_pieces[0][1], found_pieces[0][2][1:]):
                raise InputError(f"{name} in {part} is of another shape than in {found_pieces[0][0]}; remove it")
        layout[name] = (found_pieces[0][1], [sum(piece[2][0] for piece in found_pieces), *found_pieces[0][2][1:]])

    def in_order() -> Iterator[torch.Tensor]:
        for name, found_pieces in pieces.items():
            for part, _, _ in found_pieces:
                with opened_tensors(part) as file:
                    yield file.get_tensor(name)

    _write_in_order(path, layout, in_order(), metadata)


def write_large_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time: they may be mapped from disk."""
    layout = {name: (_NAMES[value.dtype], list(value.shape)) for name, value in tensors.items()}
    _write_in_order(path, layout, iter(tensors.values()), metadata)


def _write_in_order(
    path: Path,
    layout: Mapping[str, tuple[str, list[int]]],
    tensors: Iterator[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """The format of safetensors: the header's length, the header in JSON, and the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with replacing(path) as temporary, temporary.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            release_pages(tensor)


def release_pages(tensor: torch.Tensor) -> None:
    """Let the system take back the memory of a tensor that is mapped from disk, where it can be told so (Linux).

    Pages that another process has mapped too it keeps.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    first, last = -(-start // page) * page, end // page * page
    if first < last:  # a hint that loses nothing: other memory is kept
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are mapped from disk.

    Raises:
        InputError: the file is missing, truncated, or no safetensors file.
    """
    check_readable(path)
    if not path.is_file():
        raise InputError(f"{path} is no file that can be mapped; copy it to a disk first")
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if lack_of(error) is not None:
            raise
        raise ArtifactError(f"{path} is no whole safetensors file ({error}); write it again") from error
    with opened as file:
        try:
            yield file
        except SafetensorError as error:  # a tensor that it lacks
            raise ArtifactError(f"{path} is no whole safetensors file ({error}); write it again") from error


def is_whole(path: Path) -> bool:
    """Whether a file of safetensors is there and whole; after a loss of power it may not be."""
    if not path.is_file():
        return False
    try:
        with opened_tensors(path):
            return True
    except ArtifactError:
        return False


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or no safetensors file.
    """
    with opened_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
