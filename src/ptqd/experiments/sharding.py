"""Measuring, sampling and looking at images batch by batch: shared among processes, kept against a kill."""

from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ptqd import processes
from ptqd.diffusion.sampling import Sampling, run_batch
from ptqd.diffusion.trajectory import last_samples
from ptqd.errors import ArtifactError, InputError
from ptqd.files import is_whole, join_tensors, opened_tensors, read_tensors, write_tensors
from ptqd.metrics.bootstrap import Metric, Statistic
from ptqd.metrics.evaluator import (
    Evaluator,
    ImageFeatures,
    extract_features,
    latent_statistic,
    statistics,
    with_intervals,
)
from ptqd.metrics.images import ImageSet, check_labels, check_paired, is_picture, open_images
from ptqd.mixed_precision.measure_widths import widths_measurement
from ptqd.noise.measure import PairedMeasurement
from ptqd.noise.stats import NoiseStats
from ptqd.outputs import cache_folder
from ptqd.run_folder import RunFolder, make_shards, read_record, whole_file

SHOWN = 100  # images that are kept for people where the others are not


def measure_shards(
    pipe: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampling: Sampling,
    path: Path,
    scratch: Path,
    *,
    title: str | None,
) -> NoiseStats | None:
    """Measure into ``path``, each process its share of the batches, through ``scratch``: a kill costs one batch.

    Returns:
        The statistics in the main process, which wrote them.
    """
    measurement = PairedMeasurement(pipe, {0: quantized}, sampling)

    def write(indices: range, shard: Path) -> None:
        measurement.batch(indices)[0].save(shard)

    shards = make_shards(list(sampling.batches()), scratch, write, title=title)
    if not processes.is_main():
        return None
    stats = _merged(shards)
    stats.save(path)
    return stats


def measure_width_shards(
    pipe: DiffusionPipeline,
    quantized: DiffusionPipeline,
    sampling: Sampling,
    folder: Path,
    scratch: Path,
    *,
    title: str | None,
) -> None:
    """Measure every width into ``folder/BITS.safetensors``, as :func:`measure_shards` does one."""
    measurement = widths_measurement(pipe, quantized, sampling)

    def write(indices: range, shard: Path) -> None:
        parts = measurement.batch(indices)
        for bits, stats in parts.items():
            stats.save(_of_width(shard, bits))
        write_tensors(shard, {"widths": torch.tensor(list(parts))}, {})  # all are there

    def whole(shard: Path) -> bool:
        widths = read_tensors(shard)[0]["widths"].tolist() if is_whole(shard) else []
        return bool(widths) and all(is_whole(_of_width(shard, bits)) for bits in widths)

    shards = make_shards(list(sampling.batches()), scratch, write, title=title, whole=whole)
    if processes.is_main():
        for bits in read_tensors(shards[0])[0]["widths"].tolist():
            parts = [_of_width(shard, bits) for shard in shards]
            _merged(parts).save(folder / f"{bits}.safetensors")


def _of_width(shard: Path, bits: int) -> Path:
    return shard.with_name(f"{shard.stem}-{bits}.safetensors")


def _merged(shards: Sequence[Path]) -> NoiseStats:
    """One after the other, so that the sums are those of a single process."""
    total = NoiseStats.load(shards[0])
    for shard in shards[1:]:
        total = NoiseStats.merge([total, NoiseStats.load(shard)])
    return total


def sample_images(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    path: Path,
    scratch: Path,
    *,
    title: str | None,
    judge: Evaluator | None = None,
    keep: bool = True,
    floats: bool = False,
) -> None:
    """Sample into ``path``, each process its share of the batches, through ``scratch``.

    Args:
        pipe: any whose output is images.
        sampling: how.
        path: a safetensors file of ``images``, uint8 (N, H, W, C); of a pipeline that is given classes ``labels`` (N,);
            and, of one that does not diffuse pixels, ``latents``, the samples after the last step (N, ...).
        scratch: a folder that survives a kill.
        title: of a progress bar.
        judge: what it sees is kept too.
        keep: whether images are; else, with a judge, the first :data:`SHOWN` alone.
        floats: keep ``latents`` of a pipeline that diffuses pixels too: its samples in the range that it diffuses.
    """

    def write(indices: range, shard: Path) -> None:
        with last_samples(pipe, len(indices)) as latents:
            images = torch.from_numpy(np.rint(run_batch(pipe, sampling, indices) * 255).astype(np.uint8))
        tensors = {"images": images}
        labels = labels_of(sampling, indices)
        if labels is not None:
            tensors["labels"] = labels
        in_pixels = images.ndim == 4 and latents and latents[0].shape[1:] == images.permute(0, 3, 1, 2).shape[1:]
        if latents and (floats or not in_pixels):
            tensors["latents"] = latents[0].float()
        if judge is not None:
            tensors |= extract_features(images, judge, texts=texts_of(sampling, indices)).tensors()
        if not keep:
            tensors["images"] = images[: max(0, SHOWN - indices.start)]
        write_tensors(shard, tensors, {"ptqd.samples": scratch.name})

    shards = make_shards(list(sampling.batches()), scratch, write, title=title)
    if processes.is_main():
        networks = {} if judge is None else {"ptqd.networks": judge.networks_key}
        join_tensors(path, shards, {"ptqd.samples": str(sampling.samples), **networks})


def load_images(path: Path) -> torch.Tensor:
    """uint8 images (N, H, W, C) that :func:`sample_images` wrote, mapped from disk.

    Raises:
        InputError: the file is missing, truncated, or something else.
    """
    tensors, metadata = read_tensors(path)
    if "ptqd.samples" not in metadata:
        raise InputError(f"{path} holds no samples; write them with 'ptqd sample'")
    images = tensors.get("images")
    if images is None or not is_picture(images):
        raise ArtifactError(f"{path} holds no images of 8 bits (N, H, W, C); write them again")
    return images


def observe_images(
    images: ImageSet,
    judge: Evaluator,
    sampling: Sampling,
    path: Path,
    scratch: Path,
    *,
    title: str | None,
    same_seed: ImageSet | None = None,
) -> None:
    """What a judge sees of images, into ``path``, each process its share of the batches, through ``scratch``.

    Raises:
        InputError: images that cannot be read or are not alike, or others in number, names or size than those of the
            seeds.
    """
    if same_seed is not None:
        check_paired(images, same_seed)

    def write(indices: range, shard: Path) -> None:
        mine, full = _alike(images.part(indices), None if same_seed is None else same_seed.part(indices))
        seen = extract_features(mine, judge, same_seed=full, texts=texts_of(sampling, indices))
        write_tensors(shard, seen.tensors(), {"ptqd.observed": scratch.name})

    required = list(sampling.replace(samples=max(1, len(images))).batches())
    shards = make_shards(required, scratch, write, title=title)
    if processes.is_main():
        join_tensors(path, shards, {"ptqd.networks": judge.networks_key})


def _alike(images: torch.Tensor, full: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and those of the same seeds, both in colour where one of them is: grey ones are kept as RGB too."""
    if full is None or images.ndim != 4 or {images.shape[-1], full.shape[-1]} != {1, 3}:
        return images, full
    return images.expand(-1, -1, -1, 3), full.expand(-1, -1, -1, 3)


def observed_samples(
    path: Path,
    against: Path | None,
    judge: Evaluator,
    sampling: Sampling,
    *,
    title: str | None,
    kept_labels: bool = True,
) -> tuple[int, dict[str, Metric]]:
    """Metrics of any images, by what a judge sees of them, or saw as they were sampled.

    Args:
        path: images, as :func:`ptqd.metrics.images.open_images` takes them, or what
            :func:`sample_images` kept of them.
        against: the same of full-precision images of the same seeds.
        judge: of all.
        sampling: the classes or prompts they were asked for; without classes, those that were kept with the images.
        title: of a progress bar.
        kept_labels: False passes over classes that were kept with the images.

    Returns:
        How many there are, and, in the main process, their metrics.

    Raises:
        InputError: images that cannot be read, are not alike, or are not there any more.
    """
    files = [_samples_file(p) for p in (path, against) if p is not None]
    folder = RunFolder(cache_folder("observed"), "cache")
    output: list[tuple[Path, Path]] = []
    for file in files:
        full = against is not None and file == files[0] and _has_images(files[1])
        if is_observed(file, judge) and not (full and _has_images(file)):
            output.append((file, file))
            continue
        images, same_seed = _images(file, judge), _images(files[1], judge) if full else None
        digests = [x.digest() for x in (images, same_seed) if x is not None] if processes.is_main() else []
        inputs = {"images": processes.agreed(digests), "networks": judge.networks_key, "asked": sampling.to_dict()}
        name = sha256(f"{inputs} {version('ptqd')}".encode()).hexdigest()[:32]

        def build(seen: Path, scratch: Path, images: Any = images, same_seed: Any = same_seed) -> None:
            observe_images(images, judge, sampling, seen, scratch, title=title, same_seed=same_seed)

        output.append((folder.value(f"{name}.safetensors", inputs, build, whole_file, shared=True), file))
    if not processes.is_main():
        return 0, {}
    with opened_tensors(output[0][0]) as opened:
        names = [name for name in opened.keys() if name not in ("images", "latents", "labels")]  # noqa: SIM118
        count = opened.get_slice(names[0]).get_shape()[0] if names else 0
    labels = labels_of(sampling, range(count))
    labels = _kept_labels(files[0], labels, count) if kept_labels else labels
    return count, with_intervals(judged(*output[0], judge, labels, output[1] if len(output) > 1 else None), labels)


def _kept_labels(path: Path, given: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """The classes that images were asked for: what was kept with them, else what is given.

    Raises:
        InputError: both, and they differ.
    """
    kept: torch.Tensor | None = None
    if path.suffix == ".safetensors" and path.is_file():
        tensors = read_tensors(path)[0]
        kept = check_labels(tensors.get("labels"), len(tensors.get("labels", ())), path)
    elif path.suffix == ".npz" and path.is_file():
        kept = open_images(path, grey=False).labels
    if kept is not None and count and len(kept) != count:
        raise InputError(f"{path} holds {len(kept)} labels for {count} images; write it again")
    if kept is None or given is None:
        return given if kept is None else kept
    if not torch.equal(kept, given):
        raise InputError(f"{path} was asked for other classes than --classes says; leave --classes out")
    return kept


def check_same_seeds(path: Path, against: Path | None) -> None:
    """Refuse two folders of ``ptqd sample`` that were sampled from other seeds, or asked for other things.

    Raises:
        InputError: so they were.
    """
    records = [
        None if folder is None or not folder.is_dir() else read_record(folder, "samples.safetensors")
        for folder in (path, against)
    ]
    found = [record.inputs.get("setting") for record in records if record is not None]
    settings = [setting for setting in found if isinstance(setting, dict)]
    if len(settings) < 2:
        return
    for name in ("seed", "call"):
        mine, other = (setting.get(name) for setting in settings)
        if mine != other and not (name == "call" and _asked(mine) == _asked(other)):
            raise InputError(f"{path} and {against} are not of the same seeds: their {name} differs; sample both alike")


def _asked(call: object) -> list[object]:
    return [call.get(name) for name in ("class_labels", "prompt")] if isinstance(call, dict) else [call]


def _samples_file(path: Path) -> Path:
    inside = path / "samples.safetensors"
    return inside if inside.is_file() else path


def _has_images(path: Path) -> bool:
    """Whether all images are there, and not only what a judge saw."""
    if path.suffix != ".safetensors" or not path.is_file():
        return True
    with opened_tensors(path) as file:
        names, required = list(file.keys()), (file.metadata() or {}).get("ptqd.samples")
        return "images" in names and file.get_slice("images").get_shape()[0] == int(required or 0)


def _images(path: Path, judge: Evaluator) -> ImageSet:
    shape = None if judge.extractor is None else judge.extractor.image_shape
    return open_images(path, grey=shape is not None and shape[-1] == 1)


def is_observed(path: Path, judge: Evaluator) -> bool:
    """Whether a file holds what this judge sees."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with opened_tensors(path) as file:
        return bool((file.metadata() or {}).get("ptqd.networks") == judge.networks_key)


def judged(
    observed: Path,
    samples: Path,
    judge: Evaluator,
    labels: torch.Tensor | None,
    full: tuple[Path, Path] | None = None,
) -> dict[str, Statistic]:
    """Everything a set of samples is judged by.

    Args:
        observed: what the judge saw of them.
        samples: with their latents.
        judge: the same.
        labels: asked-for classes (N,).
        full: both of full-precision samples of the same seeds; adds ``latent_distance`` where both have latents, and
            distances between the two sets.
    """
    mine = ImageFeatures.load(observed)
    result = statistics(mine, judge, full=None if full is None else ImageFeatures.load(full[0]), labels=labels)
    latents = [] if full is None else [_latents(path) for path in (samples, full[1])]
    if latents and all(result is not None for result in latents):
        result["latent_distance"] = latent_statistic(*latents)  # type: ignore[arg-type]
    return result


def _latents(path: Path) -> torch.Tensor | None:
    if path.suffix != ".safetensors":
        return None
    with opened_tensors(path) as file:
        return file.get_tensor("latents") if "latents" in file.keys() else None  # noqa: SIM118


def labels_of(sampling: Sampling, indices: range) -> torch.Tensor | None:
    """The classes that some samples of a run were asked for (n,), int64; None where it names none by number."""
    labels = {**sampling.call, **sampling.shared}.get("class_labels")
    labels = [labels] if isinstance(labels, int) else labels
    if labels is None or not all(isinstance(label, int) for label in labels):
        return None
    return torch.tensor([labels[i % len(labels)] for i in indices])


def texts_of(sampling: Sampling, indices: Sequence[int]) -> list[str] | None:
    """The prompts that some samples of a run were asked for; None where it has none."""
    prompt = sampling.call_for(indices).get("prompt")
    return [prompt] * len(indices) if isinstance(prompt, str) else prompt


def few_samples(count: int, judge: Evaluator) -> str | None:
    """What fewer samples than features do to a Frechet distance, in words; None where there are enough."""
    if judge.reference is None or count > len(judge.reference.mean):
        return None
    return (
        f"{count} samples are no more than the {len(judge.reference.mean)} features: Frechet distances are far above "
        "what they would be with infinitely many, which stand beside them"
    )
