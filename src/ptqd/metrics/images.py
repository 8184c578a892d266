"""Sets of images, read batch by batch: from a folder, ADM's .npz, a dataset, or a file of ptqd's."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image

from ptqd.errors import InputError, MissingDependencyError
from ptqd.files import read_tensors, replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
NAMED = 3  # of many broken images
BATCH = 250


class ImageSet(Protocol):
    """N images of one size."""

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


@dataclass(frozen=True)
class Pixels:
    """Images in memory, or mapped from disk: uint8 (N, H, W, C)."""

    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def part(self, indices: range) -> torch.Tensor:
        """Some of them."""
        return self.images[indices.start : indices.stop]

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
    """

    sources: Sequence["Path | _Row"]
    grey: bool
    what: str

    def __len__(self) -> int:
        return len(self.sources)

    def part(self, indices: range) -> torch.Tensor:
        """Some of them."""
        try:
            pictures = [self._read(self.sources[i]) for i in indices]
            first = self._read(self.sources[0]).shape if indices.start else pictures[0].shape
        except _UNREADABLE:
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
            image = picture.convert("L" if self.grey else "RGB")
        return np.asarray(image).reshape(image.height, image.width, -1)

    def _complaint(self) -> InputError:
        broken, others, size = [], [], None
        for source in self.sources:
            try:
                height, width, _ = self._read(source).shape
            except _UNREADABLE:
                broken.append(source.name)
                continue
            size = size or (width, height)
            if (width, height) != size:
                others.append(source.name)
        if broken:
            return InputError(f"{self._some(broken)} cannot be read; replace or remove them")
        assert size is not None
        return InputError(f"{self._some(others)} are not {size[0]} x {size[1]} as the first is; resize them alike")

    def _some(self, names: Sequence[str]) -> str:
        shown = ", ".join(names[:NAMED])
        return f"{len(names)} of {len(self)} images in {self.what} ({shown}{', ...' if len(names) > NAMED else ''})"


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
        files = sorted(result for result in path.rglob("*") if result.suffix.lower() in SUFFIXES)
        if files or not any(result.suffix in (".arrow", ".parquet") for result in path.rglob("*")):
            if len(files) < 2:
                raise InputError(
                    f"{path} holds {len(files)} images; a set needs at least two ({', '.join(SUFFIXES)}), or a dataset"
                )
            return Pictures(files, grey, str(path))
        return _dataset(path, grey)
    if not path.is_file():
        folder = Path(str(path).partition(":")[0])
        if not folder.is_dir() and (path.is_absolute() or path.suffix):
            raise InputError(
                f"{path} does not exist; give a folder of images, a dataset, an .npz or a .safetensors file"
            )
        return _dataset(path, grey)
    if path.suffix == ".npz":
        arrays = read_npz(path, ("arr_0",))
        if "arr_0" not in arrays or arrays["arr_0"].dtype != np.uint8 or arrays["arr_0"].ndim != 4:
            raise InputError(f"{path} holds no arr_0 of uint8 images (N, H, W, C)")
        return Pixels(torch.from_numpy(arrays["arr_0"]))
    tensors, metadata = read_tensors(path)
    if "ptqd.samples" not in metadata or "images" not in tensors:
        raise InputError(f"{path} holds no samples; write them with 'ptqd sample'")
    if len(tensors["images"]) < int(metadata["ptqd.samples"]):
        raise InputError(
            f"{path} kept no images, only what a judge saw of them; give it that judge, or sample again without "
            "--no-images"
        )
    return Pixels(tensors["images"])


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some arrays of an .npz file, without pickle, mapped from disk where they are not compressed.

    Args:
        path: the file.
        names: of the arrays that are wanted.

    Raises:
        InputError: it is damaged, or something else.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            result = {name: _mapped(path, file.zip, f"{name}.npy") for name in file.files if name in names}
            missing = {name: file[name] for name, array in result.items() if array is None}
            return {name: array for name, array in result.items() if array is not None} | missing
    except (OSError, ValueError, TypeError, EOFError, AttributeError, KeyError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as .npz: {error}") from error


def _mapped(path: Path, archive: ZipFile, member: str) -> np.ndarray | None:
    """An array that is stored as it is; None where it is compressed."""
    info = archive.getinfo(member)
    if info.compress_type != ZIP_STORED:
        return None
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        head = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
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
    """
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
