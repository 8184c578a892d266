import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from ptqd import InputError
from ptqd.evaluate.features import Features, Reference, evaluate, extract
from ptqd.evaluate.metrics import (
    frechet_distance,
    frechet_metric,
    jackknife_metric,
    kernel_distance,
    kernel_metric,
    mean_metric,
    psnr,
    share_metric,
)
from ptqd.evaluate.moments import Moments


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
    metric = kernel_metric(x, y)
    assert metric.value == pytest.approx(want)
    assert metric.low < want < metric.high


def test_jackknife_is_exact_for_a_mean_and_covers() -> None:
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def statistic(left_out: torch.Tensor | None) -> float:
        keep = torch.ones(len(x), dtype=torch.bool)
        if left_out is not None:
            keep[left_out] = False
        return x[keep].mean().item()

    metric = jackknife_metric(len(x), statistic)
    half = (metric.high - metric.low) / 2
    assert metric.value == pytest.approx(x.mean().item())
    assert half == pytest.approx(2.09 / math.sqrt(4000), rel=0.5)


def test_frechet_intervals_cover_the_spread_over_repetitions() -> None:
    reference = Moments.of(features(20_000, 6, seed=5))
    values, halves = [], []
    for seed in range(40):
        metric = frechet_metric(features(300, 6, seed=10 + seed, shift=0.4), reference.mean, reference.covariance)
        values.append(metric.value)
        halves.append((metric.high - metric.low) / 2)
    assert np.mean(halves) == pytest.approx(2.09 * np.std(values, ddof=1), rel=0.35)


def test_intervals_are_right_for_samples_whose_classes_take_turns() -> None:
    """Class means far apart: a block that held one class alone would make the interval many times too wide."""
    centres = 3 * features(10, 6, seed=7)
    reference = Moments.of(features(20_000, 6, seed=5) + centres.repeat(2000, 1) + 0.4)
    values, halves = [], []
    for seed in range(40):
        x = features(400, 6, seed=10 + seed) + centres.repeat(40, 1)
        metric = frechet_metric(x, reference.mean, reference.covariance)
        values.append(metric.value)
        halves.append((metric.high - metric.low) / 2)
    assert np.mean(halves) == pytest.approx(2.09 * np.std(values, ddof=1), rel=0.35)


def test_shares_have_wilsons_interval() -> None:
    metric = share_metric(torch.tensor([True] * 20))
    assert metric.value == metric.high == 1
    assert metric.low == pytest.approx(1 / (1 + 1.96**2 / 20), abs=1e-3)


def test_leaving_blocks_out_is_recomputing_without_them() -> None:
    x, y = features(60, 4), features(50, 4, seed=1)
    blocks = [torch.arange(3 * b, 3 * b + 3) for b in range(20)]
    kept = [x[[i for i in range(60) if i not in set(block.tolist())]] for block in blocks]
    values = [kernel_distance(k, y) for k in kept]
    error = math.sqrt(19 / 20 * sum((v - sum(values) / 20) ** 2 for v in values))
    metric = kernel_metric(x, y)
    assert (metric.high - metric.low) / 2 == pytest.approx(2.0930 * error, rel=1e-3)


def test_psnr_and_means() -> None:
    x = torch.rand(3, 4, 4)
    assert psnr(x, x).tolist() == [100, 100, 100]
    assert psnr(torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1)).item() == pytest.approx(20)
    metric = mean_metric(torch.tensor([1.0, 0, 1, 1]))
    assert metric.value == 0.75
    assert metric.high - metric.value == pytest.approx(3.182 * 0.5 / 2, rel=1e-3)
    assert mean_metric(torch.tensor([1.0])).high == math.inf


def test_fewer_than_two_samples_are_refused() -> None:
    with pytest.raises(InputError, match="at least three samples"):
        frechet_metric(features(2, 3), torch.zeros(3), torch.eye(3))
    with pytest.raises(InputError, match="at least two images"):
        Reference.of(Features(*[torch.zeros(1, 3)] * 3))


class Pixels:
    """An extractor whose features are a few pixels."""

    image_shape = (4, 4, 1)

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
    metrics = evaluate(images, Pixels(), reference, labels=labels, same_seed=images)
    assert metrics["frechet_distance"].value == pytest.approx(0, abs=1e-4)
    assert metrics["spatial_frechet_distance"].value == pytest.approx(0, abs=1e-4)
    assert metrics["class_agreement"].value == 1
    assert metrics["psnr"].value == 100
    assert metrics["frechet_distance_to_full_precision"].value == pytest.approx(0, abs=1e-6)
    darker = evaluate(images // 2, Pixels(), reference, same_seed=images)["frechet_distance_to_full_precision"]
    a, b = Moments.of(extract(Pixels(), images // 2).pooled), Moments.of(real.pooled)
    assert darker.value == pytest.approx(frechet_distance(a.mean, a.covariance, b.mean, b.covariance))
    assert darker.low < darker.value < darker.high
    worse = evaluate(images // 2, Pixels(), reference)
    assert worse["frechet_distance"].value > 0.1
    assert worse["kernel_distance"].value > metrics["kernel_distance"].value
    assert set(worse) == {"frechet_distance", "spatial_frechet_distance", "kernel_distance"}


def test_a_foreign_reference_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="is no reference"):
        Reference.load(tmp_path / "x.safetensors")
