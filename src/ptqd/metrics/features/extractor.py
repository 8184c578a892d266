"""Images to features, and the references that they are compared with."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ptqd.errors import InputError
from ptqd.files import read_tensors, write_tensors
from ptqd.metrics.moments import Moments
from ptqd.schema import check_tensors

SAMPLE = 10_000  # pooled features that a reference keeps, as many as ADM's precision and recall have


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

    @property
    def classifies(self) -> bool:
        """Whether its logits' classes are those that images are asked for by."""

    @property
    def inception(self) -> bool:
        """Whether distances in its features are called FID, sFID and KID."""

    @property
    def key(self) -> str:
        """Changes with its weights, and with how it takes images."""

    def features(self, images: torch.Tensor) -> Features:
        """Pooled and spatial features and class logits."""


@torch.no_grad()
def extract(extractor: Extractor, images: torch.Tensor, batch: int = 500) -> Features:
    """Features of uint8 images (N, H, W, C), in batches.

    Raises:
        InputError: the extractor takes images of another shape.
    """
    shape = tuple(images.shape[1:])
    if shape[-1] not in (1, 3) and extractor.image_shape is None:
        raise InputError(f"images of {shape[-1]} channels are neither grey nor RGB; judge them by none")
    if extractor.image_shape not in (None, shape):
        raise InputError(f"the extractor takes images of shape {extractor.image_shape}; these are {shape}")

    def batches() -> Iterator[Features]:
        for part in images.split(batch):
            output = extractor.features(part.permute(0, 3, 1, 2).float() / 127.5 - 1)
            yield Features(*(tensor.cpu() for tensor in output))

    return Features(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: moments of a set's features, and some of the features themselves.

    Attributes:
        mean: of pooled features (D,).
        covariance: of pooled features (D, D).
        spatial_mean: of spatial features (S,).
        spatial_covariance: of spatial features (S, S).
        sample: pooled features (M, D), for what is no function of moments.
        count: images the moments are of.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    spatial_mean: torch.Tensor
    spatial_covariance: torch.Tensor
    sample: torch.Tensor
    count: int

    @cached_property
    def key(self) -> str:
        """A hash of all of it."""
        result = sha256(str(self.count).encode())
        for tensor in (self.mean, self.covariance, self.spatial_mean, self.spatial_covariance, self.sample):
            result.update(tensor.contiguous().numpy().tobytes())
        return result.hexdigest()

    @classmethod
    def of(cls, features: Features, sample: int = SAMPLE) -> "Reference":
        """The reference that a set of features makes."""
        summing = Summing(len(features.pooled), sample)
        summing.add(features)
        return summing.reference()

    def save(self, path: Path) -> None:
        """Write a safetensors file: float32 moments (upper triangles of the covariances), the sample as it is."""
        tensors = {
            "mean": self.mean.float(),
            "covariance": _triangle(self.covariance).float(),
            "spatial_mean": self.spatial_mean.float(),
            "spatial_covariance": _triangle(self.spatial_covariance).float(),
            "sample": self.sample,
        }
        write_tensors(path, tensors, {"ptqd.reference": str(self.count)})

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, truncated, or something else.
        """
        tensors, metadata = read_tensors(path)
        count = metadata.get("ptqd.reference", "")
        if not (count.isascii() and count.isdigit() and len(count) < 16):
            raise InputError(f"{path} is no reference; make one with Reference.of(features).save(path)")
        shapes = {"mean": ("features",), "spatial_mean": ("spatial",), "sample": (None, "features")}
        check_tensors(tensors, shapes, str(path))
        wide, spatial = len(tensors["mean"]), len(tensors["spatial_mean"])
        triangles = {"covariance": (wide * (wide + 1) // 2,), "spatial_covariance": (spatial * (spatial + 1) // 2,)}
        check_tensors(tensors, triangles, str(path))
        return cls(
            tensors["mean"],
            _full(tensors["covariance"], len(tensors["mean"])),
            tensors["spatial_mean"],
            _full(tensors["spatial_covariance"], len(tensors["spatial_mean"])),
            tensors["sample"].float(),
            int(count),
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
        if not bool(torch.isfinite(pooled.total).all() and torch.isfinite(spatial.total).all()):
            raise InputError(
                "the features of some of the reference's images are not finite; look at the network and them"
            )
        remaining = torch.cat(self.kept)
        return Reference(pooled.mean, pooled.covariance, spatial.mean, spatial.covariance, remaining, pooled.n)


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _full(triangle: torch.Tensor, size: int) -> torch.Tensor:
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[rows, columns] = triangle.double()
    matrix[columns, rows] = triangle.double()
    return matrix
