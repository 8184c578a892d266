"""Files: written under a temporary name and renamed, read without pickle."""

import ctypes
import json
import math
import mmap
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ptqd.errors import ArtifactError, InputError

_MADV_PAGEOUT = 21  # of linux/mman.h
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_BYTES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it, file or folder, when the block ends well.

    Raises:
        InputError: the disk is full or the folder not writable; nothing is left behind.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            path.replace(old)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path}: {reason}; free some space or choose another folder") from error
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


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
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; what is infinite or NaN becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: object) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


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
    if not path.is_file():
        raise InputError(f"{path} does not exist")
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
    layout = {name: (_DTYPES[value.dtype], list(value.shape)) for name, value in tensors.items()}
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
        size = math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with replacing(path) as temporary, temporary.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            _release(tensor)


def _release(tensor: torch.Tensor) -> None:
    """Let the system take back the memory of a tensor that is mapped from disk, where it can be told so (Linux)."""
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
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no whole safetensors file ({error}); write it again") from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or no safetensors file.
    """
    with opened_tensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
