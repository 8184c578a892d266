"""What a set of images is judged by: what each image shows, kept, and from that the metrics and their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch

import ptqd.metrics.paired  # noqa: F401  # registers metrics
from ptqd.errors import ArtifactError, InputError
from ptqd.files import opened_tensors
from ptqd.metrics.bootstrap import Metric, Statistic, intervals
from ptqd.metrics.features.extractor import Extractor, Features, Reference, extract
from ptqd.metrics.features.image_encoder import ImageEncoder
from ptqd.metrics.features.lpips import SMALLEST, Lpips
from ptqd.metrics.frechet import extrapolated_frechet, frechet_statistic, paired_frechet_statistic
from ptqd.metrics.image_quality import WINDOW, mean_statistic, psnr, share_metric, ssim
from ptqd.metrics.kernel import kernel_statistic
from ptqd.metrics.moments import ROWS
from ptqd.metrics.precision_recall import density_coverage, precision_recall
from ptqd.metrics.registry import PAIRED_METRICS
from ptqd.metrics.scores import clip_scores, inception_statistic

NEAREST = 6  # samples on either side, from which on neighbours can be counted
_FEATURES, _VALUE = "features.", "value."


@dataclass(frozen=True)
class Evaluator:
    """What images are judged by; without any of it, by the distances to images of the same seeds that need no network.

    Attributes:
        extractor: of features.
        reference: in its features.
        name: of both, for people.
        lpips: perceptual distance to images of the same seeds.
        clip: how well images fit their texts.
        options: how it was asked for, for the manifest.
    """

    extractor: Extractor | None = None
    reference: Reference | None = None
    name: str = ""
    lpips: Lpips | None = None
    clip: ImageEncoder | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def inception(self) -> bool:
        """Whether distances are called FID, sFID and KID."""
        return self.extractor is not None and self.extractor.inception

    @cached_property
    def networks_key(self) -> str:
        """Changes with the networks, and so with what is observed."""
        networks = (self.extractor, self.lpips, self.clip)
        return sha256(" ".join("" if n is None else n.key for n in networks).encode()).hexdigest()

    @cached_property
    def key(self) -> str:
        """Changes with the networks and the reference."""
        result = sha256(self.networks_key.encode())
        if self.reference is not None:
            result.update(self.reference.key.encode())
        return result.hexdigest()


@dataclass(frozen=True)
class ImageFeatures:
    """What N images show, one by one, so that nothing needs to look at them again.

    Attributes:
        features: by the judge's extractor; None without one.
        values: of each image (N,): ``psnr`` in dB, ``ssim`` and ``lpips`` to the image of the same seed,
            ``clip_score``.
    """

    features: Features | None
    values: Mapping[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a safetensors file."""
        features = {} if self.features is None else self.features._asdict()
        named = {f"{_FEATURES}{name}": value.contiguous() for name, value in features.items()}
        return named | {f"{_VALUE}{name}": value for name, value in self.values.items()}

    @classmethod
    def load(cls, path: Path) -> "ImageFeatures":
        """From a file that holds :meth:`tensors`, mapped from disk.

        Raises:
            InputError: the file is missing or truncated.
        """
        with opened_tensors(path) as file:
            names = list(file.keys())
            features = [file.get_tensor(_FEATURES + name) for name in Features._fields if _FEATURES + name in names]
            values = {n.removeprefix(_VALUE): file.get_tensor(n) for n in names if n.startswith(_VALUE)}
        kept = [*features, *values.values()]
        bad = [x for x in kept if not x.is_floating_point() or not x.ndim or len(x) != len(kept[0])]
        if bad or len(features) not in (0, len(Features._fields)) or any(value.ndim != 1 for value in values.values()):
            raise ArtifactError(f"{path} holds no features of this version; look at its images again")
        return cls(Features(*features) if features else None, values)


def extract_features(
    images: torch.Tensor,
    judge: Evaluator,
    *,
    same_seed: torch.Tensor | None = None,
    texts: Sequence[str] | None = None,
) -> ImageFeatures:
    """What a judge sees in uint8 images (n, H, W, C).

    Args:
        images: some or all.
        judge: its networks.
        same_seed: full-precision images of the same seeds, like ``images``; adds ``psnr``, ``ssim`` of images that its
            window fits, and ``lpips`` where the judge has it.
        texts: that the images were asked for by; adds ``clip_score`` where the judge has a CLIP.

    Raises:
        InputError: the images are not of the size of those of the same seeds, or not what the judge takes.
    """
    values: dict[str, torch.Tensor] = {}
    if same_seed is not None:
        if same_seed.shape != images.shape:
            shapes = f"{tuple(images.shape)} against {tuple(same_seed.shape)}"
            raise InputError(
                f"images and those of the same seeds differ in number or size: {shapes}; sample both alike"
            )
        values["psnr"] = psnr(images / 255, same_seed / 255)
    if same_seed is not None and images.ndim == 4:  # of videos there is PSNR alone
        mine, full = (x.permute(0, 3, 1, 2) / 255 for x in (images, same_seed))
        if min(mine.shape[2:]) >= WINDOW:
            values["ssim"] = ssim(mine, full)
        values |= {name: metric(mine, full).double() for name, metric in PAIRED_METRICS.items()}
        if judge.lpips is not None and min(mine.shape[2:]) >= SMALLEST:
            values["lpips"] = judge.lpips.distances(2 * mine - 1, 2 * full - 1).cpu().double()
    if images.ndim != 4 and (judge.extractor or judge.clip):
        raise InputError(f"results of shape {tuple(images.shape[1:])} are no images; judge them by none")
    if judge.clip is not None and texts is not None:
        shown = judge.clip.features(images.permute(0, 3, 1, 2) / 127.5 - 1).pooled
        values["clip_score"] = clip_scores(shown.cpu(), judge.clip.text_features(texts).cpu())
    return ImageFeatures(None if judge.extractor is None else extract(judge.extractor, images), values)


def statistics(
    mine: ImageFeatures,
    judge: Evaluator,
    *,
    full: ImageFeatures | None = None,
    labels: torch.Tensor | None = None,
) -> dict[str, Statistic]:
    """Everything one set of images is judged by, with what each image does to it.

    Args:
        mine: by :func:`extract_features`.
        judge: that it was observed by.
        full: the same of full-precision images of the same seeds; adds ``frechet_distance_to_full_precision``.
        labels: asked-for classes (N,); adds ``class_agreement`` where the extractor knows them.

    Returns:
        ``frechet_distance``, ``extrapolated_frechet_distance`` (without the bias of few samples),
        ``spatial_frechet_distance``, ``kernel_distance``, ``precision``, ``recall``, ``density``, ``coverage`` and
        ``inception_score`` (of the extractor's classes), all in the extractor's features, without those that the
        extractor or the reference has nothing for; those above; and the means of the observed values.

    Raises:
        InputError: a reference in other features, or features that are not finite.
    """
    features, reference = mine.features, judge.reference
    result: dict[str, Statistic] = {}
    if features is not None and reference is not None:
        result |= _to_reference(features, reference)
    if features is not None and features.logits.shape[1]:
        result["inception_score"] = inception_statistic(features.logits)
        if labels is not None and judge.extractor is not None and judge.extractor.classifies:
            known = features.logits.shape[1]
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
                asked = f"{int(labels.min())} to {int(labels.max())}"
                raise InputError(
                    f"images were asked for classes {asked}, and the judge knows 0 to {known - 1}; judge them by "
                    "another, or give --classes 0"
                )
            result["class_agreement"] = mean_statistic(features.logits.argmax(1) == labels)
    if features is not None and full is not None and full.features is not None:
        paired = paired_frechet_statistic(features.pooled, full.features.pooled)
        result["frechet_distance_to_full_precision"] = paired
    return result | {name: mean_statistic(values) for name, values in mine.values.items()}


def _to_reference(features: Features, reference: Reference) -> dict[str, Statistic]:
    for what, wide, known in (
        ("features", features.pooled.shape[1], len(reference.mean)),
        ("spatial features", features.spatial.shape[1], len(reference.spatial_mean)),
    ):
        if wide != known and (what == "features" or (wide and known)):
            raise InputError(
                f"the reference is of {known} {what}, the extractor gives {wide}; use the one that it was made with"
            )
    of_pooled = (features.pooled, reference.mean, reference.covariance)
    result = {"frechet_distance": frechet_statistic(*of_pooled)}
    result["extrapolated_frechet_distance"] = extrapolated_frechet(result["frechet_distance"], *of_pooled)
    if features.spatial.shape[1] and len(reference.spatial_mean):
        spatial = (features.spatial, reference.spatial_mean, reference.spatial_covariance)
        result["spatial_frechet_distance"] = frechet_statistic(*spatial)
    if len(reference.sample) >= 2:
        result["kernel_distance"] = kernel_statistic(features.pooled, reference.sample)
    if min(len(reference.sample), len(features.pooled)) >= NEAREST:
        real = reference.sample
        result["precision"], result["recall"] = precision_recall(features.pooled, real)
        result["density"], result["coverage"] = density_coverage(features.pooled, real)
    return result


def latent_statistic(latents: torch.Tensor, reference: torch.Tensor) -> Statistic:
    """Mean squared difference of latents (N, ...), mapped from disk perhaps, to those of the same seeds.

    Raises:
        InputError: they are not alike in number or size.
    """
    if latents.shape != reference.shape:
        shapes = f"{tuple(latents.shape)} against {tuple(reference.shape)}"
        raise InputError(f"latents and those of the same seeds differ in number or size: {shapes}; sample both alike")
    if not all(bool(torch.isfinite(part).all()) for x in (latents, reference) for part in x.split(ROWS // 8)):
        raise InputError("latents hold NaN or infinite values; sample again, with a wider type")
    parts = zip(latents.split(ROWS // 8), reference.split(ROWS // 8), strict=True)
    return mean_statistic(torch.cat([(a.double() - b.double()).square().flatten(1).mean(1) for a, b in parts]))


def with_intervals(found: Mapping[str, Statistic], labels: torch.Tensor | None) -> dict[str, Metric]:
    """Statistics with 95 % intervals: of a share of images Wilson's, else the bootstrap's, within classes if given."""
    metrics = intervals(found, labels)
    if "class_agreement" in metrics:
        count = len(found["class_agreement"].influence)
        metrics["class_agreement"] = share_metric(round(metrics["class_agreement"].value * count), count)
    return metrics


def evaluate(
    images: torch.Tensor,
    judge: Evaluator,
    *,
    labels: torch.Tensor | None = None,
    same_seed: torch.Tensor | None = None,
    texts: Sequence[str] | None = None,
) -> dict[str, Metric]:
    """All metrics, with intervals, of images in memory: uint8 (N, H, W, C); see :func:`extract_features`."""
    mine = extract_features(images, judge, same_seed=same_seed, texts=texts)
    full = None if same_seed is None else extract_features(same_seed, judge)
    return with_intervals(statistics(mine, judge, full=full, labels=labels), labels)
