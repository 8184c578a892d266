"""Reference statistics from images, ADM's .npz files, or a file of our own; what images give is kept by content."""

import os
import shutil
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ptqd import processes
from ptqd.errors import InputError
from ptqd.evaluate.features import Extractor, Features, Reference, Summing, extract
from ptqd.evaluate.images import ImageSet, batches, open_images, read_npz
from ptqd.files import read_tensors, write_tensors
from ptqd.stages import make_shards


def load_reference(path: Path, extractor: Extractor, cache: Path | None = None) -> Reference:
    """The reference that a path stands for.

    Processes share images, batch by batch; a kill costs a batch of each.

    Args:
        path: images, as :func:`ptqd.evaluate.images.open_images` takes them; an .npz without them but with ``mu`` and
            ``sigma`` (and ``mu_s``, ``sigma_s``), as ADM's evaluations publish; or what :meth:`Reference.save` wrote.
        extractor: of the features; moments that are read were made by it too, which cannot be checked.
        cache: where statistics of images are kept, by the images' content and the extractor; by default in the user's
            cache, which has to be one that all processes see.

    Raises:
        InputError: nothing there, images that cannot be read or are not all of one size, or a file of another kind.
    """
    if path.suffix == ".npz" and path.is_file():
        found = _moments_of(path)
        if found is not None:
            return found
    if path.is_file() and path.suffix == ".safetensors" and "ptqd.samples" not in read_tensors(path)[1]:
        return Reference.load(path)
    grey = extractor.image_shape is not None and extractor.image_shape[-1] == 1
    return _of_images(open_images(path, grey=grey), extractor, cache or cache_folder("references"))


def cache_folder(what: str) -> Path:
    """Where ptqd keeps something for the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqd" / what


def _of_images(images: ImageSet, extractor: Extractor, cache: Path) -> Reference:
    key = processes.agreed(
        sha256(f"{version('ptqd')} {extractor.key} {images.digest() if processes.is_main() else ''}".encode())
        .hexdigest()[:32]
    )  # fmt: skip
    kept = cache / f"{key}.safetensors"
    if processes.agreed(kept.is_file()):
        return Reference.load(kept)
    scratch = cache / f".{key}"

    def write(indices: range, shard: Path) -> None:
        features = extract(extractor, images.part(indices))
        write_tensors(shard, {"pooled": features.pooled, "spatial": features.spatial}, {"ptqd.features": key})

    try:
        shards = make_shards(batches(images), scratch, write, title="looking at the reference")
    except InputError:
        shutil.rmtree(scratch, ignore_errors=True)  # mended images have another key
        raise
    if processes.is_main():
        summing = Summing(len(images))
        for shard in shards:
            tensors, _ = read_tensors(shard)
            summing.add(Features(tensors["pooled"], tensors["spatial"], tensors["pooled"][:, :0]))
        summing.reference().save(kept)
        shutil.rmtree(scratch)
    processes.wait()
    return Reference.load(kept)


def _moments_of(path: Path) -> Reference | None:
    """Of an .npz without images."""
    if "arr_0" in read_npz(path, ("arr_0",)):
        return None
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"))
    if not {"mu", "sigma"} <= set(arrays):
        raise InputError(f"{path} holds neither mu and sigma nor arr_0, uint8 images (N, H, W, C)")
    for name, other in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if name in arrays and arrays.get(other, np.zeros(0)).shape != (len(arrays[name]),) * 2:
            raise InputError(f"{path}: {other} is no square matrix as wide as {name}; write it again")
    mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    none = torch.zeros(0, dtype=torch.float64)
    spatial = [torch.from_numpy(arrays[name]).double() for name in ("mu_s", "sigma_s") if name in arrays]
    spatial_mean, spatial_covariance = spatial if len(spatial) == 2 else (none, none.view(0, 0))
    return Reference(mean, covariance, spatial_mean, spatial_covariance, torch.zeros(0, len(mean)), 0)
