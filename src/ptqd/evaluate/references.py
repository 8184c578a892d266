"""Reference statistics from a folder of images, ADM's .npz files, or a file of our own; kept by content."""

import os
import zlib
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from ptqd import processes
from ptqd.errors import InputError
from ptqd.evaluate.features import Extractor, Reference, Summing, extract

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
BATCH = 250
NAMED = 3  # of many broken files


def load_reference(path: Path, extractor: Extractor, key: str, cache: Path | None = None) -> tuple[Reference, str]:
    """The reference that a path stands for, and a key that changes with its content and the extractor.

    Of several processes the main one looks at images, and the others wait for what it keeps.

    Args:
        path: a folder of images (searched through); an .npz with ``arr_0``, images (N, H, W, C), or, without them, with
            ``mu`` and ``sigma`` (and ``mu_s``, ``sigma_s``), as ADM's evaluations publish; or what
            :meth:`Reference.save` wrote.
        extractor: of the features; moments that are read were made by it too, which cannot be checked.
        key: changes with the extractor's weights, and with how it takes images.
        cache: where statistics of images are kept, by the images' content and the key; by default in the user's cache.

    Raises:
        InputError: nothing there, images that cannot be read or are not all of one size, or a file of another kind.
    """
    key = f"{version('ptqd')} {key}"
    if path.is_dir():
        return _of_folder(path, extractor, key, cache or _cache())
    if not path.is_file():
        raise InputError(
            f"the reference {path} does not exist; give a folder of images, an .npz or a .safetensors file"
        )
    found = _of_npz(path, extractor) if path.suffix == ".npz" else Reference.load(path)
    return found, sha256(key.encode() + path.read_bytes()).hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqd" / "references"


def _of_folder(folder: Path, extractor: Extractor, key: str, cache: Path) -> tuple[Reference, str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise InputError(f"{folder} holds {len(files)} images; a reference needs at least two ({', '.join(SUFFIXES)})")
    digest = sha256(key.encode())
    for path in files:
        digest.update(sha256(path.read_bytes()).digest())
    kept = cache / f"{digest.hexdigest()[:32]}.safetensors"
    if processes.is_main() and not kept.is_file():
        _extracted(files, extractor).save(kept)
    processes.wait()
    return Reference.load(kept), digest.hexdigest()


def _extracted(files: list[Path], extractor: Extractor) -> Reference:
    grey = extractor.image_shape is not None and extractor.image_shape[-1] == 1
    summing = Summing(len(files))
    for images in _images(files, "L" if grey else "RGB"):
        summing.add(extract(extractor, images))
    return summing.reference()


def _images(files: list[Path], mode: str) -> Iterator[torch.Tensor]:
    """uint8 images (n, H, W, C), in batches; all files are looked at before a broken one is an error."""
    size: tuple[int, int] | None = None
    broken: list[Path] = []
    others: list[Path] = []
    batch: list[np.ndarray] = []
    for path in files:
        try:
            with Image.open(path) as opened:
                image = opened.convert(mode)
        except (OSError, SyntaxError, ValueError):
            broken.append(path)
            continue
        size = size or image.size
        if image.size != size:
            others.append(path)
        elif not broken and not others:
            batch.append(np.asarray(image).reshape(*image.size[::-1], -1))
            if len(batch) == BATCH:
                yield torch.from_numpy(np.stack(batch))
                batch = []
    if broken:
        raise InputError(f"{_some(broken, files)} cannot be read; replace or remove them")
    if others:
        assert size is not None
        raise InputError(f"{_some(others, files)} are not {size[0]} x {size[1]} as the first is; resize them alike")
    if batch:
        yield torch.from_numpy(np.stack(batch))


def _some(paths: list[Path], files: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:NAMED])
    return f"{len(paths)} of {len(files)} images ({names}{', ...' if len(paths) > NAMED else ''})"


def _of_npz(path: Path, extractor: Extractor) -> Reference:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            names = ("arr_0",) if "arr_0" in file else ("mu", "sigma", "mu_s", "sigma_s")
            arrays = {name: file[name] for name in names if name in file}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as .npz: {error}") from error
    if {"mu", "sigma"} <= set(arrays):
        for name, other in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if name in arrays and arrays.get(other, np.zeros(0)).shape != (len(arrays[name]),) * 2:
                raise InputError(f"{path}: {other} is no square matrix as wide as {name}; write it again")
        mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
        none = torch.zeros(0, dtype=torch.float64)
        spatial = [torch.from_numpy(arrays[name]).double() for name in ("mu_s", "sigma_s") if name in arrays]
        spatial_mean, spatial_covariance = spatial if len(spatial) == 2 else (none, none.view(0, 0))
        nothing = torch.zeros(0, len(mean))
        return Reference(mean, covariance, spatial_mean, spatial_covariance, nothing, 0)
    if "arr_0" not in arrays or arrays["arr_0"].dtype != np.uint8 or arrays["arr_0"].ndim != 4:
        raise InputError(f"{path} holds neither mu and sigma nor arr_0, uint8 images (N, H, W, C)")
    images = torch.from_numpy(arrays["arr_0"])
    summing = Summing(len(images))
    for part in images.split(BATCH):
        summing.add(extract(extractor, part))
    return summing.reference()
