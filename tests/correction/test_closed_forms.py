"""What the methods must come to where closed forms say it: shares of noise, gates, slopes, zero terminal SNR."""

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from conftest import stats_of
from gaussian import GaussianDenoiser, GaussianPipeline, gaussian_pipeline
from ptqd import (
    InputError,
    NoiseStats,
    Sampling,
    correct,
    fit_correction,
    measure,
    paper_plan,
    sample,
    search_correction,
)
from ptqd.correction import ResidualNoise, compose, gated_cnc_bc, qdrift, stepbaq
from ptqd.correction.methods.cnc_bc import cnc_bc, differs_by_channel
from ptqd.diffusion import Levels, linear_response, noise_levels, x0_coefficients
from ptqd.mixed_precision.paper_rule import quantized_snr
from ptqd.noise.second_moments import mean_table


def latents(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.cat([batch for _, batch in sample(pipe, run, output="latent")]).double()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between the pixels of two sets of samples, each channel a Gaussian."""
    means = (a.mean((0, 2, 3)) - b.mean((0, 2, 3))) ** 2
    return float((means + (a.std((0, 2, 3)) - b.std((0, 2, 3))) ** 2).sum())


V, STEPS = 0.01, 50
RUN = Sampling(STEPS, 1.0, 64, 64)


@pytest.fixture(scope="module")
def drawing() -> NoiseStats:
    return measure(gaussian_pipeline(), gaussian_pipeline(v=V), RUN)


def vsc_shares(stats: NoiseStats) -> torch.Tensor:
    estimate = cnc_bc(cnc=True, bc=True)(mean_table(stats.joint, stats.fold_samples), stats.layout)
    return torch.tensor(compose(stats, ("cnc", "bc", "vsc"), estimate, "vsc").noise, dtype=torch.float64)


def test_vsc_draws_what_the_paper_says(drawing: NoiseStats) -> None:
    """64 samples of independent noise: within 0.02 of ``sqrt(1 - B^2 V / sigma^2)`` up to step 45 of 50."""
    response = drawing.response
    drawn = response.noise.diagonal() ** 2
    share = (1 - response.outputs.diagonal() ** 2 * V / torch.where(drawn > 0, drawn, 1.0)).clamp(min=0).sqrt()
    assert (vsc_shares(drawing) - share)[:46].abs().max() < 0.02
    assert vsc_shares(drawing)[-2] < 0.99 * vsc_shares(drawing)[-10]  # where there is something to take, it is taken


def test_correlations_that_are_chance_take_no_noise_away(drawing: NoiseStats) -> None:
    """Residuals that repeat from step to step by 0.01 change no share of drawn noise by more than 0.02."""
    size = drawing.cross[STEPS:, STEPS:].diagonal().sqrt()
    cross = drawing.cross.clone()
    cross[STEPS:, STEPS:] = 0.01 * size[:, None] * size[None, :]
    cross[STEPS:, STEPS:].diagonal()[:] = size**2
    repeated = dataclasses.replace(drawing, cross=cross)
    assert repeated.residual_correlation()[10, 30] == pytest.approx(0.01, abs=0.005)
    assert (vsc_shares(repeated) - vsc_shares(drawing)).abs().max() < 0.02


def test_the_gate_keeps_a_slope_that_amplifies() -> None:
    """k = -0.04 beside a residual of 0.35: to divide by 0.96 raises one step's error, and takes away what adds up."""
    run = Sampling(20, 0.0, 64, 64)
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(k=-0.04, bias=(0.03, -0.02), v=0.35**2)
    stats = measure(exact, noisy, run)
    estimate, steps = gated_cnc_bc(stats)
    assert sum("cnc" in step.kept for step in steps) >= 15
    test = run.replace(samples=2000, batch=1000, seed=5)
    want = latents(exact, test)
    kept = correct(noisy, compose(stats, ("cnc", "bc"), estimate, None))
    pipes = (noisy, correct(noisy, stats, ("cnc", "bc")), kept)
    none, plain, gated = (frechet(latents(pipe, test), want) for pipe in pipes)
    assert gated < 1.05 * plain
    assert gated < none


def test_the_gate_leaves_out_what_is_chance() -> None:
    """Without slope or bias, chance passes ``t^2 > 2`` at a sixth of the steps; a bias that is there, at every step."""
    exact, run = gaussian_pipeline(), Sampling(40, 1.0, 64, 64)
    _, steps = gated_cnc_bc(measure(exact, gaussian_pipeline(v=0.02), run))
    assert sum("cnc" in step.kept for step in steps) < 16
    assert sum("bc" in step.kept for step in steps) < 16
    _, steps = gated_cnc_bc(measure(exact, gaussian_pipeline(v=0.02, bias=(0.05, 0.0)), run))
    assert all("bc" in step.kept for step in steps)


@pytest.mark.parametrize(("scheduler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("euler ancestral", 0.0)])
def test_auto_is_not_behind_the_papers_correction(scheduler: str, eta: float) -> None:
    noise: dict[str, Any] = {"k": 0.1, "bias": (0.05, -0.03), "v": 0.01}
    exact, noisy = gaussian_pipeline(scheduler), gaussian_pipeline(scheduler, **noise)
    run = Sampling(12, eta, 64, 64)
    stats = measure(exact, noisy, run)
    choice = search_correction(noisy, stats, run)
    assert {"none", "cnc+bc", "joint", "trajectory"} <= {trial.name for trial in choice.trials}
    test = run.replace(samples=1000, batch=1000, seed=9)
    want, auto = latents(exact, test), latents(correct(noisy, choice), test)
    plain = latents(correct(noisy, stats, ("cnc", "bc")), test)
    assert ((auto - want) ** 2).mean() < 1.02 * ((plain - want) ** 2).mean()
    assert frechet(auto, want) < 1.1 * frechet(plain, want) + 1e-3


def zero_terminal(prediction: str = "v_prediction") -> ResidualNoise:
    """DDIM whose schedule begins at pure noise."""
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction, clip_sample=False
    )
    scheduler.set_timesteps(8)
    timesteps = list(scheduler.timesteps)
    response = linear_response(scheduler, DDIMScheduler.step, timesteps, {})
    levels = noise_levels(scheduler, timesteps)
    assert levels is not None
    return ResidualNoise(
        "DDIMScheduler",
        dict(scheduler.config),
        torch.tensor([float(t) for t in timesteps], dtype=torch.float64),
        dataclasses.replace(levels, alpha=torch.where(levels.alpha < 1e-3, 0.0, levels.alpha)),
        response,
        False,
        response.outputs.diagonal() ** 2 * 0.01,
    )


def test_at_zero_terminal_snr_nothing_is_nan() -> None:
    residuals = zero_terminal()
    for method in (qdrift, stepbaq):
        steps = method(residuals)
        assert bool(torch.isfinite(steps.gain).all())
        assert bool(torch.isfinite(steps.sample).all())
    steps = qdrift(residuals)
    assert steps.gain[0] == 1  # the first step stays as it is
    assert steps.sample[0] == 0
    assert bool((steps.gain[1:-1] != 1).all())


def test_a_v_prediction_says_the_clean_sample_at_pure_noise() -> None:
    levels = Levels("vp", torch.tensor([0.0, 0.6]), torch.tensor([1.0, 0.8]))
    p, r = x0_coefficients(levels, "v_prediction")
    assert p.tolist() == pytest.approx([-1, -0.8])
    assert r.tolist() == pytest.approx([0, 0.6])


class _OtherPrediction(GaussianDenoiser):
    """The same network, and the same error in eps, that says v or the clean sample."""

    prediction = "epsilon"

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        eps = super().forward(x, t)
        a = self.a_bar[int(t)]  # type: ignore[index]
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        velocity = a.sqrt() * eps - (1 - a).sqrt() * clean
        return {"epsilon": eps, "sample": clean, "v_prediction": velocity}[self.prediction]


def predicting(prediction: str, v: float) -> GaussianPipeline:
    scheduler = DDIMScheduler.from_config(gaussian_pipeline().scheduler.config, prediction_type=prediction)
    model = _OtherPrediction((0.6, 0.6), 0.0, (0.0, 0.0), v, 0.0)
    model.prediction = prediction
    return GaussianPipeline(model, scheduler)


def test_the_papers_rule_is_of_the_noise_whatever_is_predicted() -> None:
    run = Sampling(20, 0.0, 32, 32)
    plans, ratios = {}, {}
    for prediction in ("epsilon", "v_prediction", "sample"):
        widths = {
            bits: measure(predicting(prediction, 0.0), predicting(prediction, v), run)
            for bits, v in ((4, 0.3), (6, 0.05), (8, 0.002))
        }
        for bits, stats in widths.items():  # the denoiser has no timestep by a name that is known
            widths[bits] = dataclasses.replace(
                stats,
                measured_on=dataclasses.replace(stats.measured_on, model_timesteps=tuple(stats.timesteps.tolist())),
            )
        plans[prediction], ratios[prediction] = paper_plan(widths).bits, quantized_snr(widths[4])
    assert plans["epsilon"] == plans["v_prediction"] == plans["sample"]
    assert len(set(plans["epsilon"])) > 1
    assert torch.allclose(ratios["v_prediction"], ratios["epsilon"], rtol=1e-3)
    assert torch.allclose(ratios["sample"], ratios["epsilon"], rtol=1e-3)


def test_one_step_of_chance_does_not_reject_a_correction() -> None:
    """Where the interval of k reaches above -1, that step's k counts as 0; where it is surely below, it is refused."""
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(4, 1, 4, 4, generator=g)
    noise = torch.randn(4, 1, 4, 4, generator=g)
    noise = 40 * (noise - (noise * eps).sum() / (eps**2).sum() * eps)
    scales = torch.tensor([-9.0, 2.0, -8.0, 4.0]).view(-1, 1, 1, 1)
    chance = stats_of(eps, (1 + scales) * eps + noise)
    fit = chance.fit().k
    assert fit.value[0] < -1 < fit.high[0]
    correction = fit_correction(chance, ("cnc", "bc"))
    assert correction.output == ()
    with pytest.raises(InputError, match=r"the noise undoes the output \(1 \+ k <= 0\)"):
        fit_correction(stats_of(eps, -0.5 * eps), ("cnc",))


def test_a_slope_for_each_channel() -> None:
    """k of 0.3 and -0.3 leave nothing to a shared slope; by channel both are divided out."""
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(32, 2, 8, 8, generator=g)
    k = torch.tensor([0.3, -0.3]).view(1, 2, 1, 1)
    stats = stats_of(eps, (1 + k) * eps)
    shared, apart = fit_correction(stats, ("cnc", "bc")), fit_correction(stats, ("cnc-channel", "bc"))
    x = torch.zeros_like(eps)
    assert (shared.corrector()((1 + k) * eps, x, 0) - eps).abs().max() > 0.5
    assert torch.allclose(apart.corrector()((1 + k) * eps, x, 0), eps, atol=1e-4)
    assert differs_by_channel(stats)
    assert not differs_by_channel(stats_of(eps, 1.3 * eps + 0.1 * torch.randn(eps.shape, generator=g)))
    with pytest.raises(InputError, match="cnc and cnc-channel are each a whole correction"):
        fit_correction(stats, ("cnc", "cnc-channel"))


def test_a_constant_output_has_no_shape() -> None:
    """Residuals that are rounding have neither skewness nor kurtosis; a heavy tail's interval is above its value."""
    g = torch.Generator().manual_seed(0)
    eps = torch.full((8, 1, 8, 8), 3.0)
    fit = stats_of(eps, eps * (1 + 1e-7) + 1e-7 * torch.randn(eps.shape, generator=g)).fit()
    assert fit.skewness.value.abs().max() < 1
    assert fit.kurtosis.value.abs().max() < 1
    tails = torch.distributions.StudentT(5.0).sample((16, 1, 16, 16))
    heavy = stats_of(torch.zeros_like(tails), tails).fit().kurtosis
    assert bool((heavy.low > -3).all())
    assert heavy.high - heavy.value > heavy.value - heavy.low


@pytest.mark.parametrize("asked", [-0.6, 0.4])
def test_a_learned_variance_counts_as_it_was(asked: float) -> None:
    """VSC takes the residual from the noise that is drawn, not from the most that could be."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(10)
    response = linear_response(
        scheduler, DDPMScheduler.step, list(scheduler.timesteps), {}, learned_variance=[asked] * 10
    )
    for i, t in enumerate(scheduler.timesteps[:-1]):
        share = (asked + 1) / 2
        least, most = (scheduler._get_variance(t, variance_type=name) for name in ("fixed_small", "fixed_large"))
        wanted = torch.exp(share * most.log() + (1 - share) * least.log())
        assert float(response.noise[i, i] ** 2) == pytest.approx(float(wanted), rel=1e-3)
