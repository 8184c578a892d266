"""The metrics by name: what tables call them, and those that a file of its own registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class MetricSpec:
    """How a metric is shown.

    Attributes:
        title: of its column.
        better: whether lower or higher values are better.
        factor: that values are shown times.
        digits: behind the point.
        detail: shown in pages and JSON alone, where there is room.
        inception_title: of Inception's features, in which alone it has its usual name.
    """

    title: str
    better: Literal["lower", "higher"]
    factor: float = 1.0
    digits: int = 2
    detail: bool = False
    inception_title: str | None = None


METRICS: dict[str, MetricSpec] = {
    "frechet_distance": MetricSpec("Frechet", "lower", inception_title="FID"),
    "extrapolated_frechet_distance": MetricSpec(
        "Frechet, N to infinity", "lower", inception_title="FID, N to infinity"
    ),
    "spatial_frechet_distance": MetricSpec("spatial Frechet", "lower", inception_title="sFID"),
    "kernel_distance": MetricSpec("kernel x 1000", "lower", factor=1000.0, inception_title="KID x 1000"),
    "frechet_distance_to_full_precision": MetricSpec("Frechet to FP", "lower", digits=3, inception_title="FID to FP"),
    "class_agreement": MetricSpec("class agreement %", "higher", factor=100.0, digits=1),
    "psnr": MetricSpec("PSNR to FP dB", "higher"),
    "ssim": MetricSpec("SSIM to FP", "higher", digits=3),
    "lpips": MetricSpec("LPIPS to FP", "lower", digits=3),
    "latent_distance": MetricSpec("latents to FP", "lower", digits=4),
    "inception_score": MetricSpec("classes' score", "higher", detail=True, inception_title="Inception score"),
    "precision": MetricSpec("precision %", "higher", factor=100.0, digits=1, detail=True),
    "recall": MetricSpec("recall %", "higher", factor=100.0, digits=1, detail=True),
    "density": MetricSpec("density", "higher", detail=True),
    "coverage": MetricSpec("coverage %", "higher", factor=100.0, digits=1, detail=True),
    "clip_score": MetricSpec("CLIP score", "higher"),
}

PairedMetric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PAIRED_METRICS: dict[str, PairedMetric] = {}


def paired_metric(name: str, spec: MetricSpec) -> Callable[[PairedMetric], PairedMetric]:
    """Register a metric of images and full-precision images of the same seeds.

    The function takes both (n, C, H, W) in [0, 1] and gives one number an image (n,). Its mean, the interval and paired
    differences follow from these, in every table and page.
    """

    def register(metric: PairedMetric) -> PairedMetric:
        METRICS[name], PAIRED_METRICS[name] = spec, metric
        return metric

    return register
