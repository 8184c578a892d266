"""Images to features, and what a set of images is judged by."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ptqd.errors import InputError
from ptqd.evaluate.intervals import Metric, Statistic
from ptqd.evaluate.metrics import (
    WINDOW,
    extrapolated_frechet,
    frechet_statistic,
    kernel_statistic,
    mean_statistic,
    paired_frechet_statistic,
    psnr,
    share_metric,
    ssim,
)
from ptqd.evaluate.moments import Moments
from ptqd.files import read_tensors, write_tensors

SAMPLE = 2000  # pooled features that a reference keeps


class Features(NamedTuple):
    """What an extractor says of N images."""

    pooled: torch.Tensor  # N,D
    spatial: torch.Tensor  # N,S, S 0 where it has none
    logits: torch.Tensor  # N,classes, 0 where it has none


class Extractor(Protocol):
    """Anything that turns images (N, C, H, W) in [-1, 1] into features."""

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the images it takes; None where it takes any."""

    def features(self, images: torch.Tensor) -> Features:
        """Pooled and spatial features and class logits."""


@torch.no_grad()
def extract(extractor: Extractor, images: torch.Tensor, batch: int = 500) -> Features:
    """Features of uint8 images (N, H, W, C), in batches.

    Raises:
        InputError: the extractor takes images of another shape.
    """
    shape = tuple(images.shape[1:])
    if extractor.image_shape not in (None, shape):
        raise InputError(f"the extractor takes images of shape {extractor.image_shape}; these are {shape}")

    def batches() -> Iterator[Features]:
        for part in images.split(batch):
            made = extractor.features(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
            yield Features(*(tensor.cpu() for tensor in made))

    return Features(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: moments of a set's features, and some of the features themselves.

    Attributes:
        mean: of pooled features (D,).
        covariance: of pooled features (D, D).
        spatial_mean: of spatial features (S,).
        spatial_covariance: of spatial features (S, S).
        sample: pooled features (M, D), for the kernel distance.
        count: images the moments are of.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    spatial_mean: torch.Tensor
    spatial_covariance: torch.Tensor
    sample: torch.Tensor
    count: int

    @classmethod
    def of(cls, features: Features, sample: int = SAMPLE) -> "Reference":
        """The reference that a set of features makes."""
        summing = Summing(len(features.pooled), sample)
        summing.add(features)
        return summing.reference()

    def save(self, path: Path) -> None:
        """Write a safetensors file: float32 moments (upper triangles of the covariances), half-precision sample."""
        tensors = {
            "mean": self.mean.float(),
            "covariance": _triangle(self.covariance).float(),
            "spatial_mean": self.spatial_mean.float(),
            "spatial_covariance": _triangle(self.spatial_covariance).float(),
            "sample": self.sample.half(),
        }
        write_tensors(path, tensors, {"ptqd.reference": str(self.count)})

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, truncated, or something else.
        """
        tensors, metadata = read_tensors(path)
        if "ptqd.reference" not in metadata:
            raise InputError(f"{path} is no reference; make one with Reference.of(features).save(path)")
        return cls(
            tensors["mean"],
            _full(tensors["covariance"], len(tensors["mean"])),
            tensors["spatial_mean"],
            _full(tensors["spatial_covariance"], len(tensors["spatial_mean"])),
            tensors["sample"].float(),
            int(metadata["ptqd.reference"]),
        )


class Summing:
    """A reference from batch after batch of features.

    Args:
        count: how many images will come.
        sample: how many pooled features are kept, evenly spaced.
    """

    def __init__(self, count: int, sample: int = SAMPLE) -> None:
        self.count, self.sample = count, min(sample, count)
        self.pooled: Moments | None = None
        self.spatial: Moments | None = None
        self.kept: list[torch.Tensor] = []

    def add(self, features: Features) -> None:
        """The next images'."""
        seen = 0 if self.pooled is None else self.pooled.n
        pooled, spatial = Moments.of(features.pooled), Moments.of(features.spatial)
        self.pooled = pooled if self.pooled is None else self.pooled + pooled
        self.spatial = spatial if self.spatial is None else self.spatial + spatial
        indices = torch.arange(seen, seen + len(features.pooled))
        first = indices * self.sample // self.count != (indices - 1) * self.sample // self.count
        self.kept.append(features.pooled[first])

    def reference(self) -> Reference:
        """Of all that came.

        Raises:
            InputError: fewer than two images.
        """
        if self.pooled is None or self.spatial is None or self.pooled.n < 2:
            raise InputError("a reference needs at least two images")
        pooled, spatial = self.pooled, self.spatial
        kept = torch.cat(self.kept)
        return Reference(pooled.mean, pooled.covariance, spatial.mean, spatial.covariance, kept, pooled.n)


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _full(triangle: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[rows, columns] = triangle.double()
    matrix[columns, rows] = triangle.double()
    return matrix


def statistics(
    images: torch.Tensor,
    extractor: Extractor,
    reference: Reference,
    *,
    labels: torch.Tensor | None = None,
    same_seed: torch.Tensor | None = None,
) -> dict[str, Statistic]:
    """Everything one set of images is judged by, with what each image does to it.

    Args:
        images: uint8 (N, H, W, C).
        extractor: gives the features.
        reference: in the same extractor's features.
        labels: asked-for classes (N,); adds ``class_agreement``.
        same_seed: full-precision images of the same seeds, like ``images``; adds ``psnr``, in dB, ``ssim`` of images
            that its window fits, and ``frechet_distance_to_full_precision``, between the two sets.

    Returns:
        ``frechet_distance``, ``extrapolated_frechet_distance`` (without the bias of few samples),
        ``spatial_frechet_distance`` and ``kernel_distance``, all in the extractor's features, and those above; without
        those that the extractor or the reference has nothing for.

    Raises:
        InputError: a reference in other features, or features that are not finite.
    """
    features = extract(extractor, images)
    of_pooled = (features.pooled, reference.mean, reference.covariance)
    if features.pooled.shape[1] != len(reference.mean):
        raise InputError(
            f"the reference is of {len(reference.mean)} features, the extractor gives {features.pooled.shape[1]}; use "
            "the one that it was made with"
        )
    found = {"frechet_distance": frechet_statistic(*of_pooled)}
    if features.spatial.shape[1] and features.spatial.shape[1] == len(reference.spatial_mean):
        spatial = (features.spatial, reference.spatial_mean, reference.spatial_covariance)
        found["spatial_frechet_distance"] = frechet_statistic(*spatial)
    if len(reference.sample):
        found["kernel_distance"] = kernel_statistic(features.pooled, reference.sample)
    found["extrapolated_frechet_distance"] = extrapolated_frechet(found["frechet_distance"], *of_pooled)
    if labels is not None and features.logits.shape[1]:
        found["class_agreement"] = mean_statistic(features.logits.argmax(1) == labels)
    if same_seed is not None:
        theirs = extract(extractor, same_seed).pooled
        found["frechet_distance_to_full_precision"] = paired_frechet_statistic(features.pooled, theirs)
        found["psnr"] = mean_statistic(psnr(images / 255, same_seed / 255))
        if min(images.shape[1:3]) >= WINDOW:
            mine, full = (x.permute(0, 3, 1, 2) / 255 for x in (images, same_seed))
            found["ssim"] = mean_statistic(ssim(mine, full))
    return found


def evaluate(
    images: torch.Tensor,
    extractor: Extractor,
    reference: Reference,
    *,
    labels: torch.Tensor | None = None,
    same_seed: torch.Tensor | None = None,
) -> dict[str, Metric]:
    """:func:`statistics` with 95 % intervals: of a share Wilson's, else the bootstrap's, within classes if given."""
    found = statistics(images, extractor, reference, labels=labels, same_seed=same_seed)
    metrics = {name: statistic.interval(labels) for name, statistic in found.items()}
    if "class_agreement" in metrics:
        metrics["class_agreement"] = share_metric(round(metrics["class_agreement"].value * len(images)), len(images))
    return metrics
