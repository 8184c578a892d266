import copy
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    TCDScheduler,
)

from conftest import stats_of, tiny_pipeline
from ptqd import Correction, InputError, MismatchError, NoiseStats, Sampling, correct, fit_correction, load, measure
from ptqd.correction import compose, corrected_class, gated
from ptqd.diffusion import added_variance, linear_response, noise_scales, run_batch, with_components
from ptqd.noise import MeasuredOn, fold_of, fold_sums, joint_moments


@pytest.fixture(scope="module")
def stats(pipe: Any, qpipe: Any, run: Sampling) -> NoiseStats:
    return measure(pipe, qpipe, run)


def latents(pipe: Any, run: Sampling) -> torch.Tensor:
    result: torch.Tensor = run_batch(pipe, run, range(4), "latent")
    return result


def test_an_empty_correction_is_bit_identical(qpipe: Any, run: Sampling, stats: NoiseStats) -> None:
    assert torch.equal(latents(correct(qpipe, stats, ()), run), latents(qpipe, run))
    nothing = [[0.0] * 4] * 4
    zeros = {**fit_correction(stats, ()).to_dict(), "output": nothing, "bias": nothing, "noise": [1.0] * 4}
    assert torch.equal(latents(correct(qpipe, Correction.from_dict(zeros)), run), latents(qpipe, run))


def test_each_method_changes_what_it_should(qpipe: Any, run: Sampling, stats: NoiseStats) -> None:
    plain = latents(qpipe, run)
    for methods in (("cnc",), ("bc",), ("vsc",), ("joint",)):
        assert not torch.equal(latents(correct(qpipe, stats, methods), run), plain)
    fit = stats.fit()
    eps_q = torch.randn(2, 4, 8, 8)
    bias = fit.bias.value[1].float().view(1, 4, 1, 1)
    want = (eps_q - bias) / (1 + fit.k.value[1].item())
    assert torch.allclose(fit_correction(stats).corrector()(eps_q, eps_q, 1), want, atol=1e-6)
    alone = fit_correction(stats, ("bc",))
    assert torch.allclose(torch.tensor(alone.bias), stats.fit(slope=False).bias.value.float(), atol=1e-6)
    assert alone.output == ()


def test_a_corrected_scheduler_is_still_the_users_own(qpipe: Any, stats: NoiseStats) -> None:
    scheduler = correct(qpipe, stats, ("cnc", "bc", "vsc")).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert type(scheduler).__name__ == "CorrectedDDIMScheduler"
    assert inspect.signature(scheduler.step) == inspect.signature(qpipe.scheduler.step)
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(qpipe.scheduler.set_timesteps)
    assert scheduler.config.beta_end == qpipe.scheduler.config.beta_end
    assert type(qpipe.scheduler) is DDIMScheduler


@pytest.mark.parametrize("methods", [("cnc", "bc", "vsc"), ("joint",)])
def test_a_corrected_pipeline_saves_and_loads(
    qpipe: Any, run: Sampling, stats: NoiseStats, tmp_path: Path, methods: tuple[str, ...]
) -> None:
    corrected = correct(qpipe, stats, methods)
    corrected.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.scheduler.correction == corrected.scheduler.correction
    assert torch.equal(latents(again, run), latents(corrected, run))
    assert torch.equal(latents(correct(again, stats, ()), run), latents(qpipe, run))  # corrects the plain class anew


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_vsc_changes_the_drawn_noise(kind: Any, pipe: Any, qpipe: Any, run: Sampling) -> None:
    scheduler = kind.from_config(pipe.scheduler.config)
    plain, noisy = (with_components(p, scheduler=kind.from_config(scheduler.config)) for p in (pipe, qpipe))
    stats = measure(plain, noisy, run)
    assert torch.equal(latents(correct(noisy, stats, ()), run), latents(noisy, run))
    shrunk, kept = (
        latents(correct(noisy, stats, ("cnc", "bc", "vsc")), run),
        latents(correct(noisy, stats, ("cnc", "bc")), run),
    )
    assert not torch.equal(shrunk, kept)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_small_log", "learned", "learned_range"])
def test_ddpm_removes_exactly_the_residuals_variance(variance_type: str) -> None:
    base = DDPMScheduler(beta_schedule="scaled_linear", variance_type=variance_type, clip_sample=False)
    base.set_timesteps(10)
    steps = [float(t) for t in base.timesteps]
    v, index = 0.002, 4
    learned = variance_type.startswith("learned")
    asked = 0.3 if variance_type == "learned_range" else 0.8  # what the network says of the variance
    response = linear_response(
        base, DDPMScheduler.step, list(base.timesteps), {}, learned_variance=[asked] * 10 if learned else None
    )
    noise = noise_scales(response, added_variance(response, torch.full((10,), v)))
    correction = Correction(("vsc",), tuple(steps), (), (), (), tuple(noise), (), 1.0, MeasuredOn())
    corrected = corrected_class(DDPMScheduler).from_config(base.config, correction=correction.to_dict())
    corrected.set_timesteps(10)
    t = int(steps[index])
    x, out = torch.zeros(4000, 1, 1, 1), torch.zeros(4000, 2 if learned else 1, 1, 1)
    out[:, 1:] = asked
    corrected._position = index
    draws = [
        scheduler.step(out, t, x, generator=torch.Generator().manual_seed(0)).prev_sample.double().var().item()
        for scheduler in (base, corrected)
    ]
    a_t, a_s = base.alphas_cumprod[t].item(), base.alphas_cumprod[t - 100].item()
    removed = (1 - a_t / a_s) ** 2 / (a_t / a_s * (1 - a_t)) * v  # B^2 V
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double().var().item()
    assert (draws[0] - draws[1]) / z == pytest.approx(removed, rel=2e-3)


def test_other_steps_eta_model_and_schedule_are_refused(
    pipe: Any, qpipe: Any, run: Sampling, stats: NoiseStats
) -> None:
    corrected = correct(qpipe, stats, ("cnc", "bc", "vsc"))
    with pytest.raises(MismatchError, match="measured on 4 steps"):
        latents(corrected, run.replace(steps=5))
    with pytest.raises(MismatchError, match=r"measured at eta 1, the pipeline runs at 0\.5"):
        latents(corrected, run.replace(eta=0.5))
    with pytest.raises(MismatchError, match="another unet"):
        correct(pipe, stats, ("cnc", "bc", "vsc"))
    ddpm = with_components(qpipe, scheduler=DDPMScheduler.from_config(qpipe.scheduler.config))
    with pytest.raises(MismatchError, match="another scheduler"):
        correct(ddpm, stats, ("cnc", "bc", "vsc"))
    other = with_components(qpipe, scheduler=DDIMScheduler.from_config(qpipe.scheduler.config, beta_end=0.02))
    with pytest.raises(MismatchError, match="another scheduler"):
        correct(other, stats, ("cnc", "bc", "vsc"))


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_that_draw_nothing_are_corrected_in_the_mean_alone(
    kind: Any, pipe: Any, run: Sampling, caplog: pytest.LogCaptureFixture
) -> None:
    """A denoiser that answers 1.2 eps + 0.1: with k and b divided out, the samples are the full-precision ones."""
    scaled = copy.deepcopy(pipe.unet)
    scaled.conv_out.weight.data *= 1.2
    scaled.conv_out.bias.data.mul_(1.2).add_(0.1)
    plain, noisy = (
        with_components(pipe, unet=unet, scheduler=kind.from_config(pipe.scheduler.config))
        for unet in (pipe.unet, scaled)
    )
    stats = measure(plain, noisy, run)
    with caplog.at_level("WARNING"):
        correct(noisy, stats, ("cnc", "bc", "vsc"))
    assert f"vsc changes nothing here: {kind.__name__} draws no noise" in caplog.text
    want = latents(plain, run)
    error = (latents(correct(noisy, stats, ("cnc", "bc")), run) - want).abs().max()
    assert error < 1e-3 * (latents(noisy, run) - want).abs().max()


def test_a_learned_variance_is_left_alone(stats: NoiseStats) -> None:
    base = DDPMScheduler(variance_type="learned_range")
    base.set_timesteps(4)
    steps = tuple(float(t) for t in base.timesteps)
    correction = Correction(("bc",), steps, (), (), ((0.5,),) * 4, (), (), 1.0, MeasuredOn())
    corrected: Any = corrected_class(DDPMScheduler).from_config(base.config, correction=correction.to_dict())
    out = torch.randn(1, 2, 3, 3)
    arguments, _ = corrected._corrected(
        {"model_output": out, "timestep": base.timesteps[0], "sample": torch.randn(1, 1, 3, 3)}
    )
    assert torch.equal(arguments["model_output"][:, 1], out[:, 1])
    assert torch.allclose(arguments["model_output"][:, 0], out[:, 0] - 0.5)


def test_methods_and_fits_that_make_no_sense_are_named(stats: NoiseStats) -> None:
    with pytest.raises(InputError, match="unknown correction 'bic'"):
        fit_correction(stats, ("bic",))
    with pytest.raises(InputError, match="cnc and joint are each a whole correction of the mean"):
        fit_correction(stats, ("joint", "cnc"))
    with pytest.raises(InputError, match="vsc and dns both answer for the residual's variance"):
        fit_correction(stats, ("vsc", "dns"))
    with pytest.raises(InputError, match="dns is for steps that draw no noise; DDIMScheduler draws some: use vsc"):
        fit_correction(stats, ("joint", "dns"))
    with pytest.raises(InputError, match="statistics of 1 sample give no correction"):
        fit_correction(dataclasses.replace(stats, indices=stats.indices[:1]))
    eps = torch.randn(4, 1, 8, 8)
    with pytest.raises(InputError, match="1 \\+ k <= 0"):
        fit_correction(stats_of(eps, -0.5 * eps))


def test_a_step_that_was_not_measured_is_refused(qpipe: Any, stats: NoiseStats) -> None:
    scheduler = correct(qpipe, stats, ("cnc", "bc", "vsc")).scheduler
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(MismatchError, match="knows no step at timestep 7 here"):
        scheduler.step(x, 7, x, eta=1.0)


def test_noise_that_the_caller_draws_is_calibrated_too(qpipe: Any, stats: NoiseStats) -> None:
    x = torch.randn(1, 4, 8, 8)
    results = []
    for given in (True, False):
        scheduler = correct(qpipe, stats, ("cnc", "bc", "vsc")).scheduler
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        source = {"variance_noise": torch.randn(x.shape, generator=generator)} if given else {"generator": generator}
        results.append(scheduler.step(x, scheduler.timesteps[0], x, eta=1.0, **source).prev_sample)
    assert torch.equal(*results)
    assert scheduler.correction.noise[0] < 1


def test_where_the_noise_cannot_be_followed_the_mean_is_corrected(
    stats: NoiseStats, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = dataclasses.replace(stats, response=dataclasses.replace(stats.response, exact=False))
    with caplog.at_level("WARNING"):
        correction = fit_correction(unknown)
    assert "vsc is left out: how DDIMScheduler draws its noise is not known" in caplog.text
    assert correction == fit_correction(stats, ("cnc", "bc"))


def test_many_channels_are_estimated_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(32, 20, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    eps_q = 1.2 * eps + 0.3 * x - 0.1
    correction = fit_correction(step_stats(eps, eps_q, x), ("joint",))
    assert np.shape(correction.output) == (1, 20, 5)
    assert torch.allclose(correction.corrector()(eps_q, x, 0), eps, atol=1e-6)


def step_stats(eps: torch.Tensor, eps_q: torch.Tensor, x: torch.Tensor) -> NoiseStats:
    """Statistics of one step with that sample."""
    plain = stats_of(eps, eps_q)
    joint = fold_sums(joint_moments(x, eps, eps_q, 1), plain.indices)[:, None]
    return dataclasses.replace(plain, joint=joint)


def test_a_step_that_the_joint_estimate_does_not_help_is_left_alone() -> None:
    """A bias that changes sign from one half of the folds to the other does not hold on the other half."""
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(32, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    sign = (1.0 - 2 * (fold_of(torch.arange(32)) % 2)).view(-1, 1, 1, 1)
    refuted = fit_correction(step_stats(eps, eps + sign, x), ("joint",))
    assert torch.equal(refuted.corrector()(eps, x, 0), eps)
    held = fit_correction(step_stats(eps, eps + 1, x), ("joint",))
    assert torch.allclose(held.corrector()(eps + 1, x, 0), eps, atol=1e-4)


def test_a_step_takes_the_largest_weight_that_still_helps() -> None:
    """By the error that each weight L minimises: what is withheld counts L times what is drawn anew."""
    g = torch.Generator().manual_seed(0)
    x, eps, r = (torch.randn(64, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(3))
    stats = step_stats(eps, 0.2 * eps + 0.5 * r, x)
    weights = (1.0, 2.0, 4.0, 8.0)
    each = [gated(stats, (w,))[1][0] for w in weights]
    assert [step.kept for step in each] == ["joint L=1", "nothing", "joint L=4", "joint L=8"]
    # of 0.2 eps + 0.5 r: 0.64 and 0.25 / L without; with T = 0.2 / (0.04 + 0.25 / L) hardly less at L = 2
    for step, w in zip(each, weights, strict=True):
        t = 0.2 / (0.04 + 0.25 / w)
        before, after = 0.64 + 0.25 / w, (1 - 0.2 * t) ** 2 + (0.5 * t) ** 2 / w
        assert step.gain == pytest.approx(1 - after / before, abs=0.03)
    _, steps = gated(stats, weights)
    assert steps[0].kept == "joint L=8"
    assert steps[0].channels == 2
    alone, _ = gated(stats, (8.0,))
    assert fit_correction(stats, ("joint",)).output == compose(stats, ("joint",), alone, None).output
    with pytest.raises(InputError, match="3 samples cannot be fitted and judged apart"):
        fit_correction(step_stats(eps[:3], eps[:3], x[:3]), ("joint",))


def test_a_channel_that_is_made_worse_is_left_alone() -> None:
    """The bias of one channel holds on both halves, that of the other changes its sign."""
    g = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(32, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    shift = torch.ones(32, 2, 1, 1, dtype=torch.float64)
    shift[:, 1] = 0.3 * (1.0 - 2 * (fold_of(torch.arange(32)) % 2)).view(-1, 1, 1)
    correction = fit_correction(step_stats(eps, eps + shift, x), ("joint",))
    corrected = correction.corrector()(eps, x, 0)
    assert torch.allclose(corrected[:, 0], eps[:, 0] - 1, atol=1e-4)
    assert torch.equal(corrected[:, 1], eps[:, 1])


def test_a_correction_of_another_version_is_named(stats: NoiseStats) -> None:
    with pytest.raises(InputError, match="another version of ptqd"):
        Correction.from_dict({**fit_correction(stats).to_dict(), "k": [0.0]})


def test_a_scheduler_with_an_eta_of_its_own(qpipe: Any, pipe: Any, run: Sampling) -> None:
    """TCD's step takes eta 0.3 where nobody gives it one."""
    plain, noisy = (
        with_components(p, scheduler=TCDScheduler.from_config(pipe.scheduler.config)) for p in (pipe, qpipe)
    )
    run = run.replace(eta=0.3)
    stats = measure(plain, noisy, run)
    assert stats.measured_on.eta == pytest.approx(0.3)
    latents(correct(noisy, stats, ("cnc", "bc", "vsc")), run)


def test_names_resolve_for_schedulers_only() -> None:
    import ptqd.correction.scheduler as module

    assert module.CorrectedDDPMScheduler is corrected_class(DDPMScheduler)
    with pytest.raises(AttributeError):
        _ = module.CorrectedUNet2DModel


def test_models_of_one_shape_have_fingerprints_of_their_own() -> None:
    from ptqd.diffusion import fingerprint

    assert fingerprint(tiny_pipeline(0).unet) == fingerprint(tiny_pipeline(0).unet)
    assert fingerprint(tiny_pipeline(0).unet) != fingerprint(tiny_pipeline(1).unet)
