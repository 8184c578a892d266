"""The closed form: Gaussian data has an exact denoiser, so that what a correction must reach is known."""

import pytest
import torch

from gaussian import SCHEDULERS, gaussian_pipeline
from ptqd import NoiseStats, Sampling, correct, measure, sample
from ptqd.noise.regression import regression

K, BIAS, V = 0.1, (0.05, -0.03), 0.02
SAMPLES = 3000
STOCHASTIC = [("ddim", 1.0), ("ddim", 0.5), *((name, 0.0) for name in SCHEDULERS if name != "ddim")]


def moments(pipe: object, run: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel's pixels of the final samples."""
    x = torch.cat([batch for _, batch in sample(pipe, run, output="latent")])
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


def run_of(eta: float, samples: int, seed: int = 0) -> Sampling:
    return Sampling(steps=25, eta=eta, samples=samples, batch=1000, seed=seed)


@pytest.fixture(scope="module")
def stats_and_truth() -> NoiseStats:
    return measure(gaussian_pipeline(), gaussian_pipeline(k=K, bias=BIAS, v=V), run_of(1.0, 400))


def test_estimates_hit_the_truth_within_their_intervals(stats_and_truth: NoiseStats) -> None:
    fit = stats_and_truth.fit()
    truth = {"k": torch.tensor(K), "bias": torch.tensor(BIAS), "variance": torch.tensor(V)}
    for name, value in truth.items():
        estimate = getattr(fit, name)
        inside = (estimate.low <= value) & (value <= estimate.high)
        # 95 % each: with 25 to 50 intervals, fewer than 80 % inside happens once in ten thousand times
        assert inside.double().mean() >= 0.8, name
        half = estimate.high - estimate.value
        assert bool(((estimate.value - value).abs() < 2.5 * half).all()), name
        assert half.median() < 0.005, name
    assert fit.normality.median() > 0.01  # the injected residual is Gaussian
    assert fit.kurtosis.value.abs().max() < 0.2


@pytest.mark.parametrize(("scheduler", "eta"), STOCHASTIC)
def test_corrected_samples_have_the_full_precision_mean_and_variance(scheduler: str, eta: float) -> None:
    exact = gaussian_pipeline(scheduler)
    noisy = gaussian_pipeline(scheduler, k=K, bias=BIAS, v=V)
    stats = measure(exact, noisy, run_of(eta, 400, seed=7))
    run = run_of(eta, SAMPLES)
    want_mean, want_var = moments(exact, run)
    bad_mean, bad_var = moments(noisy, run)
    mean, var = moments(correct(noisy, stats, ("cnc", "bc", "vsc")), run)
    error = (want_var / (SAMPLES * 16)).sqrt().max()  # of a mean over samples and pixels
    assert (mean - want_mean).abs().max() < 6 * error
    assert (var / want_var - 1).abs().max() < 0.03
    assert (bad_mean - want_mean).abs().max() > 20 * error
    assert (bad_var / want_var - 1).abs().max() > 0.08
    # the variance is VSC's work: without it too much is drawn
    _, unshrunk = moments(correct(noisy, stats, ("cnc", "bc")), run)
    last = stats.response.outputs[-1, -1] ** 2 * V / (1 + K) ** 2  # added by a step that draws nothing to shrink
    assert (var / want_var - 1).abs().max() < (unshrunk / want_var - 1).abs().max() / 2 + last / want_var.min()


def test_a_deterministic_sampler_is_corrected_in_the_mean() -> None:
    """At eta 0 nothing is drawn: the mean comes back, the residual's variance stays."""
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(k=K, bias=BIAS, v=V)
    stats = measure(exact, noisy, run_of(0.0, 400, seed=7))
    run = run_of(0.0, SAMPLES)
    want_mean, want_var = moments(exact, run)
    bad_mean, _ = moments(noisy, run)
    mean, var = moments(correct(noisy, stats, ("cnc", "bc", "vsc")), run)
    error = (want_var / (SAMPLES * 16)).sqrt().max()
    assert (mean - want_mean).abs().max() < 6 * error
    assert (bad_mean - want_mean).abs().max() > 20 * error
    assert bool((var > want_var * 1.005).all())


def test_noise_correlated_with_the_sample_is_not_fresh_variance() -> None:
    """Noise ``c x_t`` is a linear function of eps too, here; but with one k for channels of different variance, part
    of it stays in the residual. That part repeats from step to step, so it does not add up like fresh noise: VSC, which
    counts it as such, leaves the variance wrong although the residual's variance is measured exactly.
    """
    std = (0.25, 1.6)
    exact, noisy = gaussian_pipeline(std=std), gaussian_pipeline(std=std, c=0.12)
    stats = measure(exact, noisy, run_of(1.0, 400, seed=7))
    assert stats.fit().variance.value.max() > 1e-4
    run = run_of(1.0, SAMPLES)
    _, want_var = moments(exact, run)
    _, var = moments(correct(noisy, stats, ("cnc", "bc", "vsc")), run)
    assert (var / want_var - 1).abs().max() > 0.1
    _, var = moments(correct(noisy, stats, ("joint",)), run)  # knows the sample
    assert (var / want_var - 1).abs().max() < 0.005


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_joint_estimate_restores_mean_and_variance(eta: float) -> None:
    """Noise of every kind at once; at eta 0 the fresh part, which nothing can take away, is small."""
    v = 0.001 if eta == 0 else V
    exact, noisy = gaussian_pipeline(std=(0.25, 1.6)), gaussian_pipeline(std=(0.25, 1.6), k=K, bias=BIAS, v=v, c=0.12)
    stats = measure(exact, noisy, run_of(eta, 400, seed=7))
    run = run_of(eta, SAMPLES)
    want_mean, want_var = moments(exact, run)
    bad_mean, bad_var = moments(noisy, run)
    mean, var = moments(correct(noisy, stats, ("joint",)), run)
    error = (want_var / (SAMPLES * 16)).sqrt()
    assert bool(((mean - want_mean).abs() < 6 * error).all())
    assert bool(((bad_mean - want_mean).abs() > 20 * error).all())
    assert (var / want_var - 1).abs().max() < 0.04
    assert (bad_var / want_var - 1).abs().max() > 0.3


def test_one_channel_alone_absorbs_noise_that_is_linear_in_the_sample(stats_and_truth: NoiseStats) -> None:
    """For Gaussian data eps is linear in x_t: with equal channels, k and b explain all of ``c x_t``."""
    stats = measure(gaussian_pipeline(), gaussian_pipeline(c=0.1), run_of(1.0, 50))
    fit = regression(stats.moments.mean(0), slope=True)
    assert fit["r2"].min() > 0.999
