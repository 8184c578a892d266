"""Reference statistics from images, ADM's .npz files, or a file of our own; what images give is kept by content."""

from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from ptqd import processes
from ptqd.errors import InputError
from ptqd.files import read_tensors, write_tensors
from ptqd.metrics.features.extractor import Extractor, Features, Reference, Summing, extract
from ptqd.metrics.images import ImageSet, batches, open_images, read_npz
from ptqd.outputs import cache_folder
from ptqd.run_folder import RunFolder, make_shards


def load_reference(path: Path, extractor: Extractor, cache: Path | None = None) -> Reference:
    """The reference that a path stands for.

    Processes share images, batch by batch; a kill costs a batch of each.

    Args:
        path: images, as :func:`ptqd.metrics.images.open_images` takes them; an .npz with ``mu`` and ``sigma`` (and
            ``mu_s``, ``sigma_s``), as ADM's evaluations publish, whose images, if it holds some too, are the sample;
            or what :meth:`Reference.save` wrote.
        extractor: of the features; moments that are read were made by it too, which cannot be checked.
        cache: where statistics of images are kept, by the images' content and the extractor; by default in the user's
            cache, which has to be one that all processes see.

    Raises:
        InputError: nothing there, images that cannot be read or are not all of one size, or a file of another kind.
    """
    cache = cache or cache_folder("references")
    moments = _moments_of(path) if path.suffix == ".npz" and path.is_file() else None
    if moments is not None and moments.count == 0:
        return moments
    if path.is_file() and path.suffix == ".safetensors" and "ptqd.samples" not in read_tensors(path)[1]:
        return Reference.load(path)
    grey = extractor.image_shape is not None and extractor.image_shape[-1] == 1
    result = _of_images(open_images(path, grey=grey), extractor, cache)
    if moments is None or len(moments.mean) != len(result.mean):
        return result
    spatial = moments if len(moments.spatial_mean) == len(result.spatial_mean) else result
    return replace(moments, spatial_mean=spatial.spatial_mean, spatial_covariance=spatial.spatial_covariance,
                   sample=result.sample)  # fmt: skip


def _of_images(images: ImageSet, extractor: Extractor, cache: Path) -> Reference:
    content = processes.agreed(images.digest() if processes.is_main() else "")
    inputs = {"images": content, "extractor": extractor.key, "ptqd": version("ptqd")}
    name = sha256(str(inputs).encode()).hexdigest()[:32]

    def build(path: Path, scratch: Path) -> None:
        def write(indices: range, shard: Path) -> None:
            features = extract(extractor, images.part(indices))
            write_tensors(shard, {"pooled": features.pooled, "spatial": features.spatial}, {"ptqd.features": name})

        shards = make_shards(batches(images), scratch, write, title="looking at the reference")
        if processes.is_main():
            summing = Summing(len(images))
            for shard in shards:
                tensors, _ = read_tensors(shard)
                summing.add(Features(tensors["pooled"], tensors["spatial"], tensors["pooled"][:, :0]))
            summing.reference().save(path)

    return RunFolder(cache, "cache").value(f"{name}.safetensors", inputs, build, Reference.load, shared=True)


def _moments_of(path: Path) -> Reference | None:
    """Those of an .npz, None where it has none; ``count`` is 0 where it has no images."""
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"))
    images = "arr_0" in read_npz(path, ("arr_0",))
    if not {"mu", "sigma"} <= set(arrays):
        if not images:
            raise InputError(f"{path} holds neither mu and sigma nor arr_0, uint8 images (N, H, W, C)")
        return None
    for name, other in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if name in arrays and (arrays[name].ndim != 1 or not arrays[name].size):
            raise InputError(f"{path}: {name} must be a vector; it is of shape {arrays[name].shape}: write it again")
        if name in arrays and (other not in arrays or arrays[other].shape != (len(arrays[name]),) * 2):
            raise InputError(f"{path}: {other} is no square matrix as wide as {name}; write it again")
    known = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    for name, tensor in known.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite values; write it again")
        if name.startswith("sigma") and (bool((tensor.diagonal() < 0).any()) or not torch.allclose(tensor, tensor.T)):
            raise InputError(f"{path}: {name} is no covariance: it is not symmetric, or has variances below 0")
    none = torch.zeros(0, dtype=torch.float64)
    spatial = (known.get("mu_s", none), known.get("sigma_s", none.view(0, 0)))
    return Reference(known["mu"], known["sigma"], *spatial, torch.zeros(0, len(known["mu"])), int(images))
