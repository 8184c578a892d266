"""Images to numbers with intervals, from features; nothing here knows of quantization.

Pure functions give values; those that end in ``_statistic`` give the influence of each sample too, from which
:mod:`ptqd.metrics.bootstrap` makes intervals and paired differences. In features other than Inception's the Frechet
distance (Heusel et al., arXiv 1706.08500), the same of spatial features (Nash et al., arXiv 2103.03841) and the kernel
distance (Binkowski et al., arXiv 1801.01401) are not FID, sFID or KID, and are never called so.
"""

from ptqd.metrics.bootstrap import Metric, Statistic, intervals
from ptqd.metrics.evaluator import ImageFeatures, extract_features, latent_statistic, statistics
from ptqd.metrics.features.extractor import Features, Reference, extract
from ptqd.metrics.features.fashion_classifier import FashionClassifier
from ptqd.metrics.features.image_encoder import ImageEncoder
from ptqd.metrics.features.inception import Inception, resized
from ptqd.metrics.features.lpips import Lpips
from ptqd.metrics.frechet import extrapolated_frechet, frechet_distance, frechet_statistic, paired_frechet_statistic
from ptqd.metrics.image_quality import mean_metric, mean_statistic, psnr, share_metric, ssim
from ptqd.metrics.images import Pixels, open_images
from ptqd.metrics.kernel import kernel_distance, kernel_statistic
from ptqd.metrics.moments import ROWS, Moments
from ptqd.metrics.precision_recall import density_coverage
from ptqd.metrics.references import load_reference
from ptqd.metrics.scores import clip_scores, inception_score, inception_statistic

__all__ = [
    "ROWS",
    "FashionClassifier",
    "Features",
    "ImageEncoder",
    "ImageFeatures",
    "Inception",
    "Lpips",
    "Metric",
    "Moments",
    "Pixels",
    "Reference",
    "Statistic",
    "clip_scores",
    "density_coverage",
    "extract",
    "extract_features",
    "extrapolated_frechet",
    "frechet_distance",
    "frechet_statistic",
    "inception_score",
    "inception_statistic",
    "intervals",
    "kernel_distance",
    "kernel_statistic",
    "latent_statistic",
    "load_reference",
    "mean_metric",
    "mean_statistic",
    "open_images",
    "paired_frechet_statistic",
    "psnr",
    "resized",
    "share_metric",
    "ssim",
    "statistics",
]
