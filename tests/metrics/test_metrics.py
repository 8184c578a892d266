import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from ptqd import InputError
from ptqd.metrics import (
    Features,
    Moments,
    Reference,
    clip_scores,
    density_coverage,
    extract,
    extrapolated_frechet,
    frechet_distance,
    frechet_statistic,
    inception_score,
    kernel_distance,
    kernel_statistic,
    mean_metric,
    mean_statistic,
    paired_frechet_statistic,
    psnr,
    share_metric,
    ssim,
)
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.metrics.precision_recall import precision_recall


def features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + shift


@settings(max_examples=20)
@given(st.integers(1, 29), st.booleans())
def test_moments_are_those_of_any_split(cut: int, swapped: bool) -> None:
    x = features(30, 4)
    parts = [Moments.of(x[:cut]), Moments.of(x[cut:])]
    joined = parts[swapped] + parts[1 - swapped]
    assert torch.allclose(joined.mean, x.mean(0))
    assert torch.allclose(joined.covariance, x.T.cov())
    assert torch.allclose((joined - parts[0]).total, parts[1].total)


def test_frechet_agrees_with_scipys_matrix_square_root() -> None:
    a, b = Moments.of(features(500, 12)), Moments.of(features(400, 12, seed=1, shift=0.3) * 1.3)
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy())
    traces = np.trace((a.covariance + b.covariance).numpy()) - 2 * np.trace(root.real)
    want = ((a.mean - b.mean) ** 2).sum().item() + traces
    got = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert got == pytest.approx(float(want), rel=1e-8)


def test_frechet_of_commuting_gaussians_in_closed_form() -> None:
    std_a, std_b = torch.tensor([1.0, 2, 0]).double(), torch.tensor([3.0, 0.5, 1]).double()
    mean = torch.tensor([1.0, -1, 0.5]).double()
    want = (mean**2).sum() + ((std_a - std_b) ** 2).sum()
    got = frechet_distance(mean, torch.diag(std_a**2), torch.zeros(3).double(), torch.diag(std_b**2))
    assert got == pytest.approx(want.item())
    assert frechet_distance(mean, torch.diag(std_a**2), mean, torch.diag(std_a**2)) == pytest.approx(0, abs=1e-12)


def test_kernel_distance_agrees_with_its_definition() -> None:
    x, y = features(30, 5), features(20, 5, seed=2, shift=0.2)

    def kernel(u: torch.Tensor, v: torch.Tensor) -> float:
        return float((u @ v / 5 + 1) ** 3)

    xx = [kernel(x[i], x[j]) for i in range(30) for j in range(30) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(20) for j in range(20) if i != j]
    xy = [kernel(u, v) for u in x for v in y]
    want = float(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))
    assert kernel_distance(x, y) == pytest.approx(want)
    metric = kernel_statistic(x, y).interval()
    assert metric.value == pytest.approx(want)
    assert metric.low < want < metric.high


def weighted(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of samples that are there ``weights`` times."""
    mean = weights @ x / weights.sum()
    centred = x - mean
    return mean, (centred * weights[:, None]).T @ centred / (weights.sum() - 1)


def slope(x: torch.Tensor, i: int, distance: Callable[[torch.Tensor], float], step: float = 1e-3) -> float:
    """How a distance changes with the weight of one sample, times N; the others' shares fall together."""
    values = []
    for sign in (1, -1):
        weights = torch.ones(len(x), dtype=torch.float64)
        weights[i] += sign * step
        values.append(distance(weights))
    return (values[0] - values[1]) / (2 * step) * len(x)


def test_a_samples_influence_on_frechet_is_its_derivative() -> None:
    x, reference = features(200, 5, shift=0.3), Moments.of(features(400, 5, seed=3))
    found = frechet_statistic(x, reference.mean, reference.covariance)
    own = Moments.of(x)
    want = frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
    assert found.value == pytest.approx(want)
    assert abs(found.influence.mean()) < 1e-12
    for i in (0, 7, 111):
        numeric = slope(x, i, lambda w: frechet_distance(*weighted(x, w), reference.mean, reference.covariance))
        assert found.influence[i].item() == pytest.approx(numeric, rel=0.03, abs=0.02)


def test_influence_on_the_distance_of_two_sets_of_the_same_seeds() -> None:
    x, y = features(200, 4, shift=0.3), features(200, 4, seed=3)
    found = paired_frechet_statistic(x, y)
    for i in (0, 19):
        numeric = slope(x, i, lambda w: frechet_distance(*weighted(x, w), *weighted(y, w)))
        assert found.influence[i].item() == pytest.approx(numeric, rel=0.03, abs=0.03)


def test_influence_on_the_kernel_distance() -> None:
    x, y = features(60, 4), features(50, 4, seed=1)
    found = kernel_statistic(x, y)
    left_out = torch.tensor([kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(60)])
    jackknife = 59 * (left_out.mean() - left_out)  # of first order, and a little of second
    assert torch.corrcoef(torch.stack([found.influence, jackknife.double()]))[0, 1] > 0.999
    assert found.influence.std() == pytest.approx(jackknife.std().item(), rel=0.05)


def test_intervals_of_recall_and_coverage_hold_the_spread_over_repetitions() -> None:
    reference = features(1500, 5, seed=3)
    values, halves = [], []
    for seed in range(30):
        x = 0.9 * features(150, 5, seed=10 + seed)
        found = (precision_recall(x, reference)[1], density_coverage(x, reference)[1])
        values.append([statistic.value for statistic in found])
        halves.append([(metric.high - metric.low) / 2 for metric in (statistic.interval() for statistic in found)])
    spread, mean = 1.96 * np.std(values, axis=0, ddof=1), np.mean(halves, axis=0)
    assert mean[0] == pytest.approx(spread[0], rel=0.35)
    assert spread[1] < mean[1] < 2 * spread[1]  # leaving one out is on the safe side (Efron and Stein)


@pytest.mark.parametrize("classes", [False, True], ids=["alike", "classes take turns"])
def test_frechet_intervals_cover_the_spread_over_repetitions(classes: bool) -> None:
    """With classes far apart, drawing samples as if they had none would make intervals many times too wide."""
    centres = 3 * classes * features(10, 6, seed=7)
    reference = Moments.of(features(20_000, 6, seed=5) + centres.repeat(2000, 1) + 0.4)
    strata = torch.arange(400) % 10 if classes else None
    values, halves = [], []
    for seed in range(40):
        x = features(400, 6, seed=10 + seed) + centres.repeat(40, 1)
        metric = frechet_statistic(x, reference.mean, reference.covariance).interval(strata)
        values.append(metric.value)
        halves.append((metric.high - metric.low) / 2)
    assert np.mean(halves) == pytest.approx(1.96 * np.std(values, ddof=1), rel=0.3)


def test_a_means_bootstrap_is_students() -> None:
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric, student = mean_statistic(x).interval(), mean_metric(x)
    assert metric.value == pytest.approx(student.value)
    assert metric.high - metric.low == pytest.approx(student.high - student.low, rel=0.1)


def test_differences_are_paired() -> None:
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    worse = mean_statistic(x + 0.01).minus(mean_statistic(x)).interval()
    assert worse.low == pytest.approx(0.01)
    assert worse.high == pytest.approx(0.01)
    share = mean_statistic(3 * x.exp()).above(mean_statistic(x.exp())).interval()
    assert share.low == pytest.approx(2)
    assert share.high == pytest.approx(2)
    with pytest.raises(InputError, match="needs the same seeds"):
        mean_statistic(x).minus(mean_statistic(x[:3]))


def test_groups_of_one_are_drawn_from_together() -> None:
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone, plain = mean_statistic(x).interval(torch.arange(50)), mean_statistic(x).interval()
    assert alone.low == pytest.approx(plain.low)
    assert alone.high == pytest.approx(plain.high)


def test_extrapolation_takes_the_bias_of_few_samples_away() -> None:
    reference = Moments.of(features(50_000, 12, seed=5))
    plain, extrapolated = [], []
    for seed in range(30):
        x = features(200, 12, seed=10 + seed)
        found = frechet_statistic(x, reference.mean, reference.covariance)
        plain.append(found.value)
        extrapolated.append(extrapolated_frechet(found, x, reference.mean, reference.covariance).value)
    assert np.mean(plain) > 0.1
    assert abs(np.mean(extrapolated)) < 0.15 * np.mean(plain)


def test_the_inception_score_and_its_bounds() -> None:
    certain = 50 * torch.eye(4).repeat(25, 1)
    mean, spread = inception_score(certain, splits=5)
    assert mean == pytest.approx(4)
    assert spread == pytest.approx(0, abs=1e-9)
    assert inception_score(torch.zeros(20, 4), splits=2)[0] == pytest.approx(1)
    with pytest.raises(InputError, match="10 splits need"):
        inception_score(certain[:4])


def recall_lost(balls: np.ndarray) -> float:
    """Mean over samples of what leaving one out costs, times their number."""
    total = balls.any(1).mean()
    return float(sum(total - np.delete(balls, j, axis=1).any(1).mean() for j in range(balls.shape[1])))


def test_precision_recall_density_and_coverage_by_their_definitions() -> None:
    x, y = features(40, 3), features(30, 3, seed=2, shift=0.4)

    def within(points: torch.Tensor, centres: torch.Tensor, k: int) -> np.ndarray:
        between = torch.cdist(centres, centres).numpy()
        radii = np.sort(between, axis=1)[:, k]
        return np.asarray(torch.cdist(points, centres).numpy() <= radii)

    precision, recall = precision_recall(x, y, 3)
    assert precision.value == pytest.approx(within(x, y, 3).any(1).mean())
    assert recall.value == pytest.approx(within(y, x, 3).any(1).mean())
    assert (len(precision.influence), len(recall.influence)) == (40, 40)
    balls = within(y, x, 3)
    for j in range(40):  # a generated sample left out, the others' balls as they are
        lost = balls.any(1).mean() - np.delete(balls, j, axis=1).any(1).mean()
        assert recall.influence[j].item() == pytest.approx(40 * lost - recall_lost(balls), abs=1e-9)
    density, coverage = density_coverage(x, y, 5)
    assert density.value == pytest.approx(within(x, y, 5).sum() / 5 / 40)
    assert coverage.value == pytest.approx(within(x, y, 5).any(0).mean())
    with pytest.raises(InputError, match="needs more samples"):
        precision_recall(x[:3], y)


def test_distances_agree_with_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    x, y = features(300, 8), features(250, 8, seed=1, shift=0.2)
    a, b = Moments.of(x), Moments.of(y)
    want = _compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert frechet_statistic(x, b.mean, b.covariance).value == pytest.approx(want, rel=1e-6)
    assert kernel_distance(x[:250], y) == pytest.approx(poly_mmd(x[:250], y).item(), rel=1e-6)  # alike in number
    images = torch.rand(3, 2, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    _, theirs = structural_similarity_index_measure(noisy, images, data_range=1.0, return_full_image=True)
    fits = theirs[..., 5:-5, 5:-5]  # theirs counts places where its padding is seen, Wang's and ours do not
    assert torch.allclose(ssim(noisy, images), fits.mean((1, 2, 3)).double(), rtol=1e-6)
    assert torch.allclose(ssim(images, images), torch.ones(3, dtype=torch.float64))
    with pytest.raises(InputError, match="11 x 11"):
        ssim(images[..., :8], images[..., :8])


def test_clip_scores_of_known_angles() -> None:
    images = torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    texts = torch.tensor([[2.0, 0], [1, 3**0.5], [-1, 0]])
    assert clip_scores(images, texts).mean().item() == pytest.approx((100 + 50 + 0) / 3, rel=1e-6)


def test_features_that_are_not_finite_are_counted() -> None:
    x = features(20, 3)
    x[4, 1], x[9, 0] = math.nan, math.inf
    with pytest.raises(InputError, match="the features of 2 of 20 images are not finite"):
        frechet_statistic(x, torch.zeros(3), torch.eye(3))


def test_shares_have_wilsons_interval() -> None:
    metric = share_metric(20, 20)
    assert metric.value == metric.high == 1
    assert metric.low == pytest.approx(1 / (1 + 1.96**2 / 20), abs=1e-3)


def test_psnr_and_means() -> None:
    x = torch.rand(3, 4, 4)
    assert psnr(x, x).tolist() == [100, 100, 100]
    assert psnr(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1)).item() == pytest.approx(20)
    metric = mean_metric(torch.tensor([1.0, 0, 1, 1]))
    assert metric.value == 0.75
    assert metric.high - metric.value == pytest.approx(3.182 * 0.5 / 2, rel=1e-3)
    assert mean_metric(torch.tensor([1.0])).high == math.inf


def test_fewer_than_two_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least four samples"):
        frechet_statistic(features(2, 3), torch.zeros(3), torch.eye(3))
    with pytest.raises(InputError, match="at least two images"):
        Reference.of(Features(*[torch.zeros(1, 3)] * 3))


class Pixels:
    """An extractor whose features are a few pixels."""

    image_shape = (4, 4, 1)
    classifies = True
    inception = False
    key = "pixels"

    def features(self, images: torch.Tensor) -> Features:
        flat = images.flatten(1)
        return Features(flat[:, :5], flat[:, 5:12], flat[:, :2])


def test_evaluate_and_a_reference_that_is_saved(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 4, 4, 1), generator=g, dtype=torch.uint8)
    real = extract(Pixels(), images, batch=64)
    assert torch.equal(real.pooled, extract(Pixels(), images).pooled)
    Reference.of(real, sample=100).save(tmp_path / "reference.safetensors")
    reference = Reference.load(tmp_path / "reference.safetensors")
    assert reference.count == 300
    assert len(reference.sample) == 100
    labels = real.logits.argmax(1)
    metrics = evaluate(images, Evaluator(Pixels(), reference), labels=labels, same_seed=images)
    assert metrics["frechet_distance"].value == pytest.approx(0, abs=1e-4)
    assert metrics["spatial_frechet_distance"].value == pytest.approx(0, abs=1e-4)
    assert metrics["class_agreement"].value == 1
    assert metrics["psnr"].value == 100
    assert metrics["frechet_distance_to_full_precision"].value == pytest.approx(0, abs=1e-6)
    darker = evaluate(images // 2, Evaluator(Pixels(), reference), same_seed=images)[
        "frechet_distance_to_full_precision"
    ]
    a, b = Moments.of(extract(Pixels(), images // 2).pooled), Moments.of(real.pooled)
    assert darker.value == pytest.approx(frechet_distance(a.mean, a.covariance, b.mean, b.covariance))
    assert darker.low < darker.value < darker.high
    worse = evaluate(images // 2, Evaluator(Pixels(), reference))
    assert worse["frechet_distance"].value > 0.1
    assert worse["kernel_distance"].value > metrics["kernel_distance"].value
    distances = {"frechet_distance", "spatial_frechet_distance", "kernel_distance", "extrapolated_frechet_distance"}
    assert set(worse) == distances | {"precision", "recall", "density", "coverage", "inception_score"}


def test_a_foreign_reference_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is no reference"):
        Reference.load(tmp_path / "x.safetensors")
