"""VSC, DNS, Q-Drift and StepbaQ where their claims can be checked: by formula, and on Gaussian data."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gaussian import SCHEDULE, SHAPE, GaussianPipeline, gaussian_pipeline
from ptqd import InputError, NoiseStats, Sampling, correct, fit_correction, measure, sample
from ptqd.correction import ResidualNoise, overshoot
from ptqd.diffusion import Levels, linear_response, noise_levels, timesteps_at, x0_coefficients

V = 0.02


def deterministic(name: str, prediction: str, steps: int = 12, v: float = V) -> tuple[Any, ResidualNoise]:
    """A scheduler, and residuals of variance v in its network's output."""
    kind = getattr(diffusers, name)
    config = {} if prediction == "flow" else {**SCHEDULE, "prediction_type": prediction}
    if name == "DDIMScheduler":
        config["clip_sample"] = False
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    timesteps = list(scheduler.timesteps)
    response = linear_response(scheduler, kind.step, timesteps, {})
    residuals = ResidualNoise(
        name,
        dict(scheduler.config),
        torch.tensor([float(t) for t in timesteps], dtype=torch.float64),
        noise_levels(scheduler, timesteps),
        response,
        False,
        response.outputs.diagonal() ** 2 * v,
    )
    return scheduler, residuals


RUNS = [
    ("DDIMScheduler", "epsilon"),
    ("DDIMScheduler", "v_prediction"),
    ("DDIMScheduler", "sample"),
    ("EulerDiscreteScheduler", "epsilon"),
    ("EulerDiscreteScheduler", "v_prediction"),
    ("FlowMatchEulerDiscreteScheduler", "flow"),
]


@pytest.mark.parametrize(("name", "prediction"), RUNS)
@pytest.mark.parametrize("method", ["dns", "qdrift", "stepbaq"])
def test_without_a_residual_nothing_changes(name: str, prediction: str, method: str) -> None:
    from ptqd.correction import VARIANCE_METHODS

    _, residuals = deterministic(name, prediction, v=0.0)
    reshaped = VARIANCE_METHODS[method](residuals)
    assert torch.allclose(reshaped.gain, torch.ones_like(reshaped.gain), atol=1e-4)
    assert reshaped.sample.abs().max() < 1e-4
    if method == "stepbaq":
        assert torch.allclose(
            torch.tensor(reshaped.model_timesteps, dtype=torch.float64), residuals.timesteps, atol=0.05
        )


def noise_to_signal(residuals: ResidualNoise, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma / alpha after each step but the last, of a single clean image that the network knows, with residuals.

    The network is exact for data that is one point: x_0 = 0 in truth, so the sample is noise alone, and its signal is
    followed apart, from an image of ones.
    """
    from ptqd.correction import VARIANCE_METHODS

    reshaped = VARIANCE_METHODS[method](residuals)
    levels = residuals.levels
    assert levels is not None
    told = torch.tensor(reshaped.model_timesteps, dtype=torch.float64) if reshaped.model_timesteps else None
    state, own = residuals.response.own_state, residuals.response.outputs.diagonal()
    prediction = residuals.config.get("prediction_type", "flow")
    alpha, variance = levels.alpha[0].clone(), levels.sigma[0] ** 2
    found, wanted = [], []
    for i in range(len(state) - 1):
        seen = levels
        if told is not None:  # the network answers for the level that it is told
            ratio = (levels.sigma**2 + (residuals.added[i - 1] if i else 0)).sqrt() / levels.alpha
            seen = Levels.at_ratio(levels.family, ratio) if i else levels
        p, r = x0_coefficients(seen, prediction)
        # the network's answer to x: x_0 = a constant, so out = (x_0 - R x) / P
        gain, drift = reshaped.gain[i], reshaped.sample[i]
        by_x = state[i] + own[i] * (drift - gain * r[i] / p[i])
        by_x0 = own[i] * gain / p[i]
        alpha = by_x * alpha + by_x0
        variance = by_x**2 * variance + (own[i] * gain) ** 2 * V
        found.append((variance / alpha**2).sqrt())
        expected = levels.sigma[i + 1] / levels.alpha[i + 1]
        if method == "stepbaq":  # the residual stays in, and is known to be there
            expected = (levels.sigma[i + 1] ** 2 + residuals.added[i]).sqrt() / levels.alpha[i + 1]
        wanted.append(expected)
    return torch.stack(found), torch.stack(wanted)


@pytest.mark.parametrize(("name", "prediction"), [run for run in RUNS if run[1] != "sample"])
def test_dns_lands_on_the_schedule(name: str, prediction: str) -> None:
    """For data that is one point the claim is exact: after every step noise and residual are the schedule's."""
    _, residuals = deterministic(name, prediction)
    found, wanted = noise_to_signal(residuals, "dns")
    assert torch.allclose(found[:-1], wanted[:-1], rtol=1e-3)
    assert found[-1] > wanted[-1]  # so close to clean data no overshoot takes up all of it
    plain, _ = noise_to_signal(residuals, "stepbaq")
    assert bool((plain[:-1] > wanted[:-1]).all())


@pytest.mark.parametrize(("name", "prediction"), [run for run in RUNS if run[1] != "sample"])
def test_stepbaq_steps_from_where_the_sample_is(name: str, prediction: str) -> None:
    _, residuals = deterministic(name, prediction, v=V)
    found, wanted = noise_to_signal(residuals, "stepbaq")
    assert torch.allclose(found, wanted, rtol=0.02)  # the residual of the next step is taken as that of the plain one


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_stepbaqs_shift_is_the_papers(family: str) -> None:
    """``a_bar_tau = a_bar / (1 + s^2)``, the sample scaled by ``1 / sqrt(1 + s^2)``."""
    name, prediction = ("DDIMScheduler", "epsilon") if family == "vp" else ("FlowMatchEulerDiscreteScheduler", "flow")
    scheduler, residuals = deterministic(name, prediction)
    from ptqd.correction import stepbaq

    told = torch.tensor(stepbaq(residuals).model_timesteps, dtype=torch.float64)
    levels, s2 = residuals.levels, residuals.added[:-1]
    assert levels is not None
    if family == "vp":
        index = told[1:]
        table = scheduler.alphas_cumprod.double()
        low = index.floor().long()
        weight = index - low
        logits = (table / (1 - table)).log()
        a_tau = ((1 - weight) * logits[low] + weight * logits[(low + 1).clamp(max=999)]).sigmoid()
        assert torch.allclose(a_tau, levels.alpha[1:] ** 2 / (1 + s2), rtol=1e-4)
    else:
        ratio = (levels.sigma[1:] ** 2 + s2).sqrt() / levels.alpha[1:]
        assert torch.allclose(told[1:] / 1000, ratio / (1 + ratio), rtol=1e-6)


def test_an_overshoot_solves_its_equation() -> None:
    start, end = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.7, 0.4, 0.1]).double()
    added = torch.tensor([0.01, 0.002, -0.001]).double()
    f = overshoot(start, end, added)
    reached = start - f * (start - end)
    left = (reached**2 + f**2 * added) / (1 - reached) ** 2
    assert torch.allclose(left, (end / (1 - end)) ** 2, rtol=1e-9)
    assert bool((f[:2] > 1).all())
    assert f[2] < 1
    assert torch.allclose(overshoot(start, end, 0 * added), torch.ones(3).double())
    too_much = overshoot(start, end, torch.full((3,), 5.0).double())
    assert bool(torch.isfinite(too_much).all())


def test_to_first_order_dns_is_qdrift() -> None:
    from ptqd.correction import dns, qdrift

    _, residuals = deterministic("EulerDiscreteScheduler", "epsilon", steps=200, v=1e-4)
    a, b = dns(residuals).gain[20:150] - 1, qdrift(residuals).gain[20:150] - 1
    assert torch.allclose(a, b, rtol=0.1)
    sigma = residuals.levels.sigma if residuals.levels else torch.zeros(0)
    c = 1e-4 * (sigma[20:150] - sigma[21:151]) / (2 * sigma[20:150])
    assert torch.allclose(b, c, rtol=1e-3)  # V |d sigma| / (2 sigma)


def test_qdrift_in_flow_scales_the_velocity() -> None:
    """As published; the signal goes further with it, so that on flow the variance does not come back, as with DNS."""
    from ptqd.correction import qdrift

    _, residuals = deterministic("FlowMatchEulerDiscreteScheduler", "flow")
    reshaped, levels = qdrift(residuals), residuals.levels
    assert levels is not None
    c = V * (levels.sigma[:-1] - levels.sigma[1:]) / (2 * levels.sigma[:-1])
    assert torch.allclose(reshaped.gain[:-1], 1 + c, rtol=1e-6)
    assert reshaped.sample.abs().max() < 1e-9
    run = Sampling(steps=25, samples=2000, batch=1000)
    exact, noisy = flow_pipeline(0.0), flow_pipeline(0.8)
    stats = measure(exact, noisy, run.replace(samples=100, seed=7))
    assert variance(correct(noisy, stats, ("cnc", "bc", "qdrift")), run) > variance(noisy, run)


class FlowDenoiser(torch.nn.Module):
    """The exact velocity for data N(m, s^2) on x = (1 - sigma) x_0 + sigma eps, plus noise of variance v."""

    def __init__(self, v: float) -> None:
        super().__init__()
        self.register_buffer("noise", torch.tensor([v]))
        self.v, self.generator = v, torch.Generator().manual_seed(5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma, m, s = float(t) / 1000, 0.5, 0.6
        total = (1 - sigma) ** 2 * s**2 + sigma**2
        velocity = -m + (sigma - (1 - sigma) * s**2) / total * (x - (1 - sigma) * m)
        noisy: torch.Tensor = velocity + self.v**0.5 * torch.randn(x.shape, generator=self.generator)
        return noisy


def flow_pipeline(v: float) -> GaussianPipeline:
    return GaussianPipeline(FlowDenoiser(v), FlowMatchEulerDiscreteScheduler())  # type: ignore[arg-type]


def variance(pipe: Any, run: Sampling) -> float:
    return float(torch.cat([batch for _, batch in sample(pipe, run, output="latent")]).var())


@pytest.mark.parametrize(
    ("method", "scheduler"),
    [
        (method, scheduler)
        for method in ("dns", "qdrift", "stepbaq")
        for scheduler in ("ddim", "euler", "flow")
        if (method, scheduler) != ("qdrift", "flow")
    ],
)
def test_without_drawn_noise_the_variance_comes_back(
    scheduler: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Monte Carlo on Gaussian data: what VSC cannot do at eta 0, these can, but for what the last two steps leave."""
    import gaussian

    euler = diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
    monkeypatch.setitem(gaussian.SCHEDULERS, "euler", euler)
    v = 0.8 if scheduler == "flow" else 0.15
    exact, noisy = (
        (flow_pipeline(0.0), flow_pipeline(v))
        if scheduler == "flow"
        else (gaussian_pipeline(scheduler), gaussian_pipeline(scheduler, v=v))
    )
    run = Sampling(steps=25, samples=3000, batch=1000)
    stats = measure(exact, noisy, run.replace(samples=200, seed=7))
    want, bad = variance(exact, run), variance(noisy, run)
    got = variance(correct(noisy, stats, ("cnc", "bc", method)), run)
    assert bad / want - 1 > 0.05
    assert abs(got - want) < 0.4 * (bad - want)


def test_methods_that_rewrite_a_step_say_where_they_cannot() -> None:
    _, residuals = deterministic("LMSDiscreteScheduler", "epsilon")
    from ptqd.correction import dns, stepbaq

    with pytest.raises(InputError, match="LMSDiscreteScheduler remembers others"):
        dns(residuals)
    _, residuals = deterministic("DDIMScheduler", "epsilon")
    from dataclasses import replace

    with pytest.raises(InputError, match="which is not known"):
        dns(replace(residuals, levels=None))
    with pytest.raises(InputError, match="dns would lengthen steps that DDIMScheduler clips"):
        dns(replace(residuals, clips=True))
    with pytest.raises(InputError, match="not known of MyScheduler"):
        stepbaq(replace(residuals, scheduler="MyScheduler"))
    with pytest.raises(InputError, match="stepbaq needs the timestep of any noise level"):
        stepbaq(replace(residuals, timesteps=residuals.timesteps / 1000))
    with pytest.raises(InputError, match="no prediction type 'colour'"):
        stepbaq(replace(residuals, config={**residuals.config, "prediction_type": "colour"}))
    levels = residuals.levels
    assert levels is not None
    with pytest.raises(InputError, match="needs to know how DDIMScheduler steps"):
        stepbaq(replace(residuals, levels=Levels("vp", levels.alpha.flip(0), levels.sigma.flip(0))))


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ],
)
def test_the_levels_of_every_scheduler_are_those_it_noises_at(name: str) -> None:
    flow = name.startswith("FlowMatch")
    scheduler = getattr(diffusers, name)(**({} if flow else SCHEDULE))
    scheduler.set_timesteps(9)
    timesteps = list(scheduler.timesteps)
    levels = noise_levels(scheduler, timesteps)
    assert levels is not None
    clean, noise = torch.ones(1, 1, 1, 1), 2 * torch.ones(1, 1, 1, 1)
    add = scheduler.scale_noise if flow else scheduler.add_noise
    for i in (0, 3, len(timesteps) - 1):
        fresh = getattr(diffusers, name)(**({} if flow else SCHEDULE))
        fresh.set_timesteps(9)
        add = fresh.scale_noise if flow else fresh.add_noise
        t = fresh.timesteps[i : i + 1]
        got = add(clean, t, noise) if flow else add(clean, noise, t)
        assert got.item() == pytest.approx((levels.alpha[i] + 2 * levels.sigma[i]).item(), rel=1e-3)
    told = timesteps_at(scheduler, levels)
    if told is not None and not flow:
        want = torch.tensor([float(t) for t in timesteps], dtype=torch.float64)
        assert torch.allclose(told, want, atol=0.6)


def test_clipping_is_measured_and_counted() -> None:
    """A step that clips lets less of the residual through, so VSC takes away less of the noise."""
    shares = {}
    for clip in (False, True):
        pipes = []
        for v in (0.0, V):
            pipe: Any = gaussian_pipeline("ddpm", v=v)
            config = {**pipe.scheduler.config, "clip_sample": clip, "clip_sample_range": 0.2}
            pipe.scheduler = type(pipe.scheduler).from_config(config)
            pipes.append(pipe)
        stats = measure(pipes[0], pipes[1], Sampling(steps=10, samples=64, batch=64))
        shares[clip] = (stats.attenuation(), fit_correction(stats, ("bc", "vsc")).noise)
    assert shares[False][0].min() > 0.999
    assert shares[True][0].max() < 0.95
    assert shares[True][1][5] > shares[False][1][5]


def test_the_networks_timesteps_are_told_and_taken_back(tmp_path: Any) -> None:
    """StepbaQ: the pipeline's loop sees other timesteps, the scheduler's own step its own; saved with the pipeline."""
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(v=V)
    run = Sampling(steps=10, samples=8, batch=8)
    stats = measure(exact, noisy, run.replace(samples=64))
    pipe = correct(noisy, stats, ("stepbaq",))
    pipe.scheduler.set_timesteps(10)
    own = noisy.scheduler.timesteps.double()
    assert pipe.scheduler.timesteps[0] == own[0]
    assert bool((pipe.scheduler.timesteps[1:] > own[1:]).all())
    first = torch.cat([b for _, b in sample(copy.copy(pipe), run, output="latent")])
    assert first.shape == (8, *SHAPE)
    pipe.scheduler.save_pretrained(tmp_path)
    again = type(pipe.scheduler).from_pretrained(tmp_path)
    again.set_timesteps(10)
    assert torch.equal(again.timesteps, pipe.scheduler.timesteps)


def test_statistics_know_that_residuals_repeat() -> None:
    """Noise that is a fixed picture at every step is fully correlated; independent noise is not at all."""
    run = Sampling(steps=6, samples=32, batch=32)
    independent = measure(gaussian_pipeline(), gaussian_pipeline(v=V), run).residual_correlation()
    off = independent - torch.eye(6, dtype=torch.float64)
    assert off.abs().max() < 0.2
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    repeating = gaussian_pipeline()
    plain = repeating.unet.forward
    repeating.unet.forward = lambda x, t: plain(x, t) + 0.1 * picture
    stats: NoiseStats = measure(gaussian_pipeline(), repeating, run)
    assert stats.residual_correlation().min() > 0.95
