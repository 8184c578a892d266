"""Sets of images, read batch by batch: from a folder, ADM's .npz, a dataset, or a file of ptqd's."""

import math
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image

from ptqd import processes
from ptqd.errors import InputError, MissingDependencyError, lack_of
from ptqd.files import check_readable, read_tensors, replacing
from ptqd.names import natural_key
from ptqd.outputs import MARK, say

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")  # formats that Pillow knows by name, or through another program
_TOLD: set[Path] = set()  # folders of which it was said what was passed over
NAMED = 3  # of many broken images
BATCH = 250
DEEPEST = 65_535  # of 16 bits
TRANSPARENT = "have transparent pixels, whose colour is not known: flatten them"
REPORT = "report.json"  # of a run folder
OURS = "grid.png"  # of 'ptqd sample', beside its images


@cache
def suffixes() -> frozenset[str]:
    """Those of the files that Pillow reads."""
    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _STUBS
    )


class ImageSet(Protocol):
    """N images of one size."""

    @property
    def labels(self) -> torch.Tensor | None:
        """Asked-for classes (N,), where they were kept with the images."""

    @property
    def names(self) -> Sequence[str] | None:
        """Of the images, without suffixes, where they have names."""

    def __len__(self) -> int:
        """N."""

    def part(self, indices: range) -> torch.Tensor:
        """Some of them, uint8 (n, H, W, C).

        Raises:
            InputError: images that cannot be read, or are not of one size; all are looked at before they are named.
        """

    def digest(self) -> str:
        """A hash of their content."""


def batches(images: ImageSet, size: int = BATCH) -> list[range]:
    """All indices, in batches."""
    return [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]


_LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601-2 as Pillow converts to grey


@dataclass(frozen=True)
class Pixels:
    """Images in memory, or mapped from disk: uint8 (N, H, W, C).

    Attributes:
        images: all of them.
        grey: read as one channel.
        labels: asked-for classes (N,).
        names: none: they have an order alone.
    """

    images: torch.Tensor
    grey: bool = False
    labels: torch.Tensor | None = None
    names: None = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, indices: range) -> torch.Tensor:
        """Some of them."""
        part = self.images[indices.start : indices.stop]
        if not self.grey or part.ndim != 4 or part.shape[-1] != len(_LUMA):
            return part
        weighted = (part.to(torch.int64) * torch.tensor(_LUMA)).sum(-1, keepdim=True)
        return ((weighted + (1 << 15)) >> 16).to(torch.uint8)

    def digest(self) -> str:
        """A hash of their content."""
        result = sha256(str(self.images.shape).encode())
        for indices in batches(self):
            result.update(self.part(indices).numpy().tobytes())
        return result.hexdigest()


@dataclass(frozen=True)
class Pictures:
    """Encoded images, by their names: files, or a dataset's rows.

    Attributes:
        sources: a path, or where and under what key a dataset's bytes are.
        grey: read as one channel instead of RGB.
        what: they are, in messages.
        names: of files, without suffixes, from the folder on.
        labels: none.
    """

    sources: Sequence["Path | _Row"]
    grey: bool
    what: str
    names: Sequence[str] | None = None
    labels: None = None

    def __len__(self) -> int:
        return len(self.sources)

    def part(self, indices: range) -> torch.Tensor:
        """Some of them."""
        try:
            pictures = [self._read(self.sources[i]) for i in indices]
            first = self._read(self.sources[0]).shape if indices.start else pictures[0].shape
        except _UNREADABLE as error:
            if lack_of(error) is not None:
                raise
            raise self._complaint() from None
        if any(picture.shape != first for picture in pictures):
            raise self._complaint()
        return torch.from_numpy(np.stack(pictures))

    def digest(self) -> str:
        """A hash of their content."""
        result = sha256(b"grey" if self.grey else b"")
        for source in self.sources:
            result.update(sha256(source.read_bytes()).digest())
        return result.hexdigest()

    def _read(self, source: "Path | _Row") -> np.ndarray:
        opened: Path | BinaryIO = source if isinstance(source, Path) else BytesIO(source.read_bytes())
        with Image.open(opened) as picture:
            image = _in_8_bits(picture).convert("L" if self.grey else "RGB")
        return np.asarray(image).reshape(image.height, image.width, -1)

    def _complaint(self) -> InputError:
        broken, others, size = dict[str, list[str]](), [], None
        for source in self.sources:
            try:
                height, width, _ = self._read(source).shape
            except _UnusableError as error:
                broken.setdefault(str(error), []).append(source.name)
                continue
            except _UNREADABLE as error:
                if lack_of(error) is not None:
                    raise
                denied = isinstance(error, PermissionError)
                broken.setdefault("cannot be read" + ": Permission denied" * denied, []).append(source.name)
                continue
            size = size or (width, height)
            if (width, height) != size:
                others.append(source.name)
        if broken:
            reason, names = next(iter(broken.items()))
            return InputError(f"{self._some(names)} {reason}; replace or remove them")
        assert size is not None
        return InputError(f"{self._some(others)} are not {size[0]} x {size[1]} as the first is; resize them alike")

    def _some(self, names: Sequence[str]) -> str:
        shown = ", ".join(names[:NAMED])
        return f"{len(names)} of {len(self)} images in {self.what} ({shown}{', ...' if len(names) > NAMED else ''})"


class _UnusableError(ValueError):
    """A picture that Pillow reads, and that is no picture of 8 bits without holes."""


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """A picture whose pixels are as they would be with 8 bits: a deep value g * 257 is g.

    Raises:
        _UnusableError: it has several frames, transparent pixels, or numbers whose range is not known.
    """
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # a camera's, which has a small copy behind
        raise _UnusableError(f"have several frames ({frames})")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if "transparency" in picture.info and bool((values == picture.info["transparency"]).any()):
            raise _UnusableError(TRANSPARENT)
        if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
            raise _UnusableError(f"have numbers of 32 bits (mode {picture.mode}), whose range is not known")
        return Image.fromarray(((values.clip(0, DEEPEST).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        if whole.getchannel("A").getextrema() != (255, 255):
            raise _UnusableError(TRANSPARENT)
        return whole.convert("RGB")
    return picture


@dataclass(frozen=True)
class _Row:
    """One row of a dataset."""

    dataset: Any
    index: int
    column: str

    @property
    def name(self) -> str:
        return f"row {self.index}"

    def read_bytes(self) -> bytes:
        result = self.dataset[self.index][self.column]
        data: bytes = result["bytes"] if result["bytes"] is not None else Path(result["path"]).read_bytes()
        return data


def open_images(path: Path, *, grey: bool) -> ImageSet:
    """The images that a path stands for.

    Args:
        path: a folder of images (searched through); an .npz with ``arr_0`` (N, H, W, C); samples of ``ptqd sample`` or
            ``ptqd run``, the file or its folder; or a dataset of the datasets library with a column of images, a folder
            or hub id, if wanted with ``:SPLIT`` behind.
        grey: read encoded images as one channel.

    Raises:
        InputError: nothing there, or nothing with images.
    """
    if path.is_dir() and (path / "samples.safetensors").is_file():
        path = path / "samples.safetensors"  # beside the same images as PNG files, perhaps
    if path.is_dir():
        files, passed = _pictures_in(path)
        if files or not any(result.suffix in (".arrow", ".parquet") for result in path.rglob("*")):
            if passed and len(files) >= 2 and path not in _TOLD and processes.is_main():
                _TOLD.add(path)
                say(f"{path}: passed over {passed}")
            if len(files) < 2:
                raise InputError(
                    f"{path} holds {len(files)} images; a set needs at least two (PNG, JPEG, or what else Pillow "
                    f"reads), or a dataset{f'; passed over: {passed}' if passed else ''}"
                )
            names = [file.relative_to(path).with_suffix("").as_posix() for file in files]
            return Pictures(files, grey, str(path), names)
        return _dataset(path, grey)
    if not path.is_file():
        return _dataset(path, grey) if _may_be_dataset(path) else _none(path)
    check_readable(path)
    if path.suffix == ".npz":
        return _of_npz(path, grey)
    if path.suffix != ".safetensors":
        what = "one image; give a folder of them" if path.suffix.lower() in suffixes() else f"none of these: {KINDS}"
        raise InputError(f"{path} is {what}")
    return _of_samples(path, grey)


KINDS = "a folder of images, a dataset, an .npz or a .safetensors file"


def _may_be_dataset(path: Path) -> bool:
    """Whether a path that is no file may be a dataset's hub id, or a folder with ``:SPLIT`` behind."""
    folder = Path(str(path).partition(":")[0])
    return not path.exists() and (folder.is_dir() or not (path.is_absolute() or path.suffix))


def _none(path: Path) -> ImageSet:
    raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give {KINDS}")


def _of_samples(path: Path, grey: bool) -> Pixels:
    tensors, metadata = read_tensors(path)
    count = metadata.get("ptqd.samples", "")
    images = tensors.get("images")
    if not (count.isascii() and count.isdigit()) or images is None or not is_picture(images):
        raise InputError(f"{path} holds no samples; write them with 'ptqd sample'")
    if len(images) < int(count):
        raise InputError(
            f"{path} kept no images, only what a judge saw of them; give it that judge, or sample again without "
            "--no-images"
        )
    return Pixels(images, grey, check_labels(tensors.get("labels"), len(images), path))


def is_picture(images: torch.Tensor) -> bool:
    """Whether a tensor can be images or frames: uint8 (N, ..., C)."""
    return images.dtype == torch.uint8 and images.ndim >= 2


def _pictures_in(folder: Path) -> tuple[list[Path], str]:
    """The pictures of a folder and those inside it, links followed, in natural order; and what was passed over."""
    ours = (folder / MARK).is_file()
    if ours and (folder / REPORT).is_file():
        raise InputError(f"{folder} is a run folder; give the samples.safetensors of one of its rows")
    seen: set[str] = set()
    files: list[Path] = []
    passed: Counter[str] = Counter()
    for root, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # links in a circle, or two to one folder
            passed["links to folders that were looked into"] += 1
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        passed["hidden folders"] += 0 if ours else len(hidden)
        for name in names:
            path = Path(root) / name
            if name.startswith("."):
                passed["hidden files"] += not ours
            elif not path.is_file():
                passed["pipes, devices and links that lead nowhere"] += 1
            elif path.suffix.lower() not in suffixes():
                passed[f"files of type {path.suffix.lower() or 'none'}"] += 1
            elif name == OURS and (Path(root) / MARK).is_file():
                passed[f"ptqd's {OURS}"] += 1
            else:
                files.append(path)
    files.sort(key=lambda path: [natural_key(part) for part in path.relative_to(folder).parts])
    return files, ", ".join(f"{count} {what}" for what, count in passed.items() if count)


def _unreadable(error: OSError) -> None:
    raise InputError(
        f"{error.filename} cannot be looked into: {error.strerror}; make it readable, or move it"
    ) from error


def _of_npz(path: Path, grey: bool) -> Pixels:
    """Images as ADM's evaluation has them, and their labels.

    Raises:
        InputError: others, which are named with what they are.
    """
    arrays = read_npz(path, ("arr_0", "arr_1"))
    if "arr_0" not in arrays:
        raise InputError(f"{path} holds no arr_0 of uint8 images (N, H, W, C)")
    images = arrays["arr_0"]
    if images.ndim == 3:  # grey, without an axis for it
        images = images[..., None]
    is_named = images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        reason = f"it is {images.dtype} of shape {images.shape}"
        if is_named:
            reason += ", channels first (NCHW): write np.transpose(images, (0, 2, 3, 1))"
        elif images.ndim == 4 and 4 in (images.shape[1], images.shape[3]):
            reason += ", with an alpha channel (RGBA): write its RGB alone"
        raise InputError(f"{path}: arr_0 must be uint8 images (N, H, W, C) of 1 or 3 channels; {reason}")
    labels = torch.from_numpy(np.array(arrays["arr_1"])) if "arr_1" in arrays else None
    return Pixels(torch.from_numpy(images), grey, check_labels(labels, len(images), path))


def check_labels(labels: torch.Tensor | None, count: int, path: Path) -> torch.Tensor | None:
    """Labels that were kept with images.

    Raises:
        InputError: they are no whole numbers, or of another count.
    """
    if labels is None:
        return None
    if labels.ndim != 1 or len(labels) != count or not _is_whole_number(labels):
        raise InputError(
            f"{path}: its labels must be {count} whole numbers; they are {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.long()


def _is_whole_number(labels: torch.Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def check_paired(images: ImageSet, same_seed: ImageSet) -> None:
    """Refuse two sets that are not of the same seeds, as far as their counts and names say.

    Raises:
        InputError: they differ in number, or in the names of their files.
    """
    if len(same_seed) != len(images):
        raise InputError(
            f"images and those of the same seeds differ in number: {len(images)} against {len(same_seed)}; sample both "
            "alike"
        )
    for names in (images.names, same_seed.names):
        if names is not None and len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise InputError(
                f"two images are called {twice!r}, so it is not known which is paired; give one name to one"
            )
    if images.names is not None and same_seed.names is not None:
        for mine, other in zip(images.names, same_seed.names, strict=True):
            if mine != other:
                raise InputError(
                    f"images are paired by their files' names, and {mine!r} stands where the other folder has "
                    f"{other!r}; give both the same names"
                )


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of an .npz file, without pickle, mapped from disk where they are not compressed.

    Args:
        path: the file.
        names: of the arrays that are wanted.

    Raises:
        InputError: it is damaged, or something else.
    """
    check_readable(path)
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            result = {name: _mapped(path, file.zip, f"{name}.npy") for name in file.files if name in names}
            missing = {name: file[name] for name, array in result.items() if array is None}
            found = {name: array for name, array in result.items() if array is not None} | missing
            return {name: _native(path, name, array) for name, array in found.items()}
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, AttributeError, KeyError, BadZipFile, zlib.error) as error:
        if lack_of(error) is not None:
            raise
        raise InputError(f"{path} cannot be read as .npz: {error}") from error


def _native(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """An array of real numbers in this machine's order of bytes.

    Raises:
        InputError: it holds something else.
    """
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: {name} holds {array.dtype}, which are no real numbers; write it again")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _mapped(path: Path, archive: ZipFile, member: str) -> np.ndarray | None:
    """An array that is stored as it is; None where it is compressed."""
    info = archive.getinfo(member)
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        head = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if math.prod(shape) * dtype.itemsize != info.file_size - head:  # before anything is allocated
        raise ValueError(f"{member} says that it is of shape {shape}, and has {info.file_size:,} bytes")
    if info.compress_type != ZIP_STORED:
        return None
    with path.open("rb") as opened:
        opened.seek(info.header_offset + 26)  # lengths of the name and of what follows it
        lengths = np.frombuffer(opened.read(4), "<u2")
    start = info.header_offset + 30 + int(lengths.sum()) + head
    return (
        np.memmap(path, dtype, "c", start, shape, "F" if fortran else "C") if np.prod(shape) else np.zeros(shape, dtype)
    )


def write_npz(path: Path, images: torch.Tensor, labels: torch.Tensor | None) -> None:
    """Images as ADM's evaluation takes them: ``arr_0``, uint8 RGB (N, H, W, 3), and ``arr_1``, labels (N,), if any.

    Args:
        path: file to write, atomically.
        images: uint8 (N, H, W, C), mapped from disk perhaps; grey ones are written as RGB.
        labels: of classes.

    Raises:
        InputError: images of other than 1 or 3 channels.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"images of shape {tuple(images.shape[1:])} are neither grey nor RGB; leave --npz and --png out"
        )
    arrays = [images.expand(-1, -1, -1, 3).numpy()] + ([] if labels is None else [labels.numpy()])
    with replacing(path) as temporary, temporary.open("wb") as written:
        np.savez(written, *arrays)


def _dataset(path: Path, grey: bool) -> Pictures:
    name, _, split = str(path).partition(":")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is no folder or file; as a dataset it needs: pip install datasets"
        ) from error
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            result = datasets.load_from_disk(name)
        else:
            result = datasets.load_dataset(name)
    except Exception as error:  # of many kinds, none of them its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} is no folder of images, file or dataset ({reason}); give one that is there, or a hub id"
        ) from error
    if isinstance(result, datasets.DatasetDict):
        split = split or next(iter(result))
        if split not in result:
            raise InputError(f"the dataset {name} has no split {split!r}; it has {', '.join(result)}")
        result = result[split]
    columns = [column for column, kind in result.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise InputError(f"the dataset {name} has no column of images; it has {', '.join(result.features)}")
    encoded = result.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))
    return Pictures([_Row(encoded, i, columns[0]) for i in range(len(encoded))], grey, name)
