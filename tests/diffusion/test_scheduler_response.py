"""The linear response, read off ``step``, against the coefficients that papers state."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from ptqd.diffusion import Response, added_variance, linear_response, noise_scales

BETAS: dict[str, Any] = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
STEPS = 12
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def response_of(scheduler: Any, **keywords: Any) -> Response:
    scheduler.set_timesteps(STEPS)
    response = linear_response(scheduler, type(scheduler).step, list(scheduler.timesteps), keywords)
    assert response.exact
    return response


def alphas(scheduler: Any) -> list[tuple[float, float]]:
    """The cumulative alpha product at each step, and at the next."""
    products = scheduler.alphas_cumprod.double().tolist()
    spacing = 1000 // STEPS
    steps = [int(t) for t in scheduler.timesteps]
    last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return [(products[t], products[t - spacing] if t >= spacing else last) for t in steps]


def x0_slope(a: float, prediction: str) -> float:
    """``D = d x_0 / d out``."""
    return {"epsilon": -math.sqrt((1 - a) / a), "v_prediction": -math.sqrt(1 - a), "sample": 1.0}[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(prediction: str, eta: float) -> None:
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction)
    response = response_of(scheduler, eta=eta)
    for i, (a, a_s) in enumerate(alphas(scheduler)):
        sigma = eta * math.sqrt((1 - a_s) / (1 - a) * (1 - a / a_s))
        slope = x0_slope(a, prediction)
        direction = -math.sqrt(a / (1 - a)) * slope
        want = math.sqrt(a_s) * slope + math.sqrt(max(0, 1 - a_s - sigma**2)) * direction
        assert response.outputs[i, i].item() == pytest.approx(want, abs=2e-5)
        assert response.noise[i, i].item() == pytest.approx(sigma, abs=2e-5)
    assert response.draws == (eta > 0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm(prediction: str) -> None:
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction)
    response = response_of(scheduler)
    for i, (a, a_s) in enumerate(alphas(scheduler)):
        want = math.sqrt(a_s) * (1 - a / a_s) / (1 - a) * x0_slope(a, prediction)
        assert response.outputs[i, i].item() == pytest.approx(want, rel=1e-4, abs=2e-5)
        if prediction == "epsilon":  # PTQD's own form
            beta = 1 - a / a_s
            assert want == pytest.approx(-beta / math.sqrt((1 - beta) * (1 - a)))
        variance = (1 - a_s) / (1 - a) * (1 - a / a_s)
        assert response.noise[i, i].item() == pytest.approx(math.sqrt(variance) if i < STEPS - 1 else 0, abs=2e-5)


def ve_slope(sigma: float, prediction: str) -> float:
    """``D' = d x_0 / d out`` for ``x = x_0 + sigma eps``."""
    return {"epsilon": -sigma, "v_prediction": -sigma / math.sqrt(sigma**2 + 1), "sample": 1.0}[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_euler(name: str, prediction: str) -> None:
    scheduler = getattr(diffusers, name)(**BETAS, prediction_type=prediction)
    response = response_of(scheduler)
    sigmas = scheduler.sigmas.double().tolist()
    for i in range(STEPS):
        sigma, s = sigmas[i], sigmas[i + 1]
        up = s * math.sqrt(1 - (s / sigma) ** 2) if "Ancestral" in name else 0.0
        down = math.sqrt(s**2 - up**2)
        want = -(down - sigma) / sigma * ve_slope(sigma, prediction)
        assert response.outputs[i, i].item() == pytest.approx(want, rel=1e-4)
        assert response.noise[i, i].item() == pytest.approx(up, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sde", [False, True])
def test_dpm_solver_multistep_history_included(prediction: str, order: int, sde: bool) -> None:
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, prediction_type=prediction, solver_order=order, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    response = response_of(scheduler)
    sigmas = scheduler.sigmas.double()  # of the variance-exploding form
    a = 1 / (1 + sigmas**2)
    log_snr = -sigmas.log()
    h = log_snr.diff()
    for i in range(1, STEPS - 1):
        kept = math.exp(-(2 if sde else 1) * h[i].item())
        base = math.sqrt(a[i + 1].item()) * (1 - kept)
        own = base * x0_slope(a[i].item(), prediction)
        ratio = (h[i] / h[i - 1]).item() if order == 2 else 0.0  # 1 / r
        assert response.outputs[i, i].item() == pytest.approx(own * (1 + ratio / 2), rel=1e-3)
        variance = (1 - a[i + 1].item()) * (1 - kept) if sde else 0.0
        assert response.noise[i, i].item() == pytest.approx(math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("sde", [False, True])
def test_an_output_acts_again_where_it_is_remembered(sde: bool) -> None:
    """Predicting the sample itself, the first output reaches x_2 through x_1 and, remembered, by ``-1 / (2 r)``."""
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type="sample", algorithm_type=algorithm)
    response = response_of(scheduler)
    sigmas = scheduler.sigmas[:3].double()
    a, h = 1 / (1 + sigmas**2), -sigmas.log().diff()
    kept = torch.exp(-(2 if sde else 1) * h[1])
    x_slope = sigmas[2] / sigmas[1] * (a[2] / a[1]).sqrt() * (torch.exp(-h[1]) if sde else 1)
    remembered = -a[2].sqrt() * (1 - kept) * h[1] / h[0] / 2
    want = x_slope * response.outputs[0, 0] + remembered
    assert response.outputs[1, 0].item() == pytest.approx(want.item(), rel=1e-3)


def test_lcm() -> None:
    scheduler = diffusers.LCMScheduler(**BETAS)
    response = response_of(scheduler)
    products, steps = scheduler.alphas_cumprod.double().tolist(), [int(t) for t in scheduler.timesteps]
    for i, t in enumerate(steps[:-1]):
        a, a_s = products[t], products[steps[i + 1]]
        scaled = t * 10.0
        c_out = scaled / math.sqrt(scaled**2 + 0.25)
        assert response.outputs[i, i].item() == pytest.approx(math.sqrt(a_s) * c_out * x0_slope(a, "epsilon"), rel=1e-3)
        assert response.noise[i, i].item() == pytest.approx(math.sqrt(1 - a_s), rel=1e-3)


def test_flow_matching() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    response = response_of(scheduler)
    assert torch.allclose(response.outputs.diagonal(), scheduler.sigmas.diff().double(), atol=1e-6)
    assert not response.draws


@pytest.mark.parametrize(
    ("name", "config", "draws"),
    [
        ("PNDMScheduler", {}, False),
        ("PNDMScheduler", {"skip_prk_steps": True}, False),
        ("LMSDiscreteScheduler", {}, False),
        ("HeunDiscreteScheduler", {}, False),
        ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, False),
        ("DEISMultistepScheduler", {}, False),
        ("UniPCMultistepScheduler", {}, False),
        ("KDPM2AncestralDiscreteScheduler", {}, True),
        ("TCDScheduler", {}, True),
        ("SASolverScheduler", {}, True),
    ],
)
def test_every_run_is_the_sum_of_its_parts(name: str, config: dict[str, Any], draws: bool) -> None:
    """Started at 0 with random outputs, the scheduler's own run is what the response says, but for what it draws."""
    scheduler = getattr(diffusers, name)(**BETAS, **config)
    response = response_of(scheduler)
    assert response.draws == draws
    g = torch.Generator().manual_seed(1)
    steps = len(scheduler.timesteps)
    outputs = torch.randn(2, steps, generator=g, dtype=torch.float64)
    ends = []
    for row in outputs:  # two runs of the same noise: their difference has none
        run = getattr(diffusers, name)(**BETAS, **config)
        run.set_timesteps(STEPS)
        noise = {"generator": torch.Generator().manual_seed(2)} if draws else {}
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        for t, out in zip(run.timesteps, row, strict=True):
            run.scale_model_input(x, t)
            x = run.step(out.view(1, 1, 1, 1), t, x, return_dict=False, **noise)[0]
        ends.append(x.item())
    want = (response.outputs[-1] @ (outputs[0] - outputs[1])).item()
    assert ends[0] - ends[1] == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_a_step_that_draws_nothing_answers_for_its_own_residual() -> None:
    """Whether it draws nothing or next to nothing, the step after it draws the same."""
    triangle = torch.ones(3, 3, dtype=torch.float64).tril()
    variance = torch.full((3,), 0.1)
    shares = []
    for drawn in (0.0, 1e-6):
        noise = triangle * torch.tensor([drawn, drawn, 1.0])
        response = Response(triangle, noise, triangle, torch.ones(3), exact=True)
        shares.append(noise_scales(response, added_variance(response, variance))[2])
    assert shares[0] == pytest.approx(math.sqrt(0.9))
    assert shares[1] == pytest.approx(shares[0])


def test_the_flow_form_of_heun() -> None:
    assert not response_of(diffusers.FlowMatchHeunDiscreteScheduler()).draws


def test_the_stochastic_flow_step() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    response = response_of(scheduler)
    sigmas = scheduler.sigmas.double()
    assert torch.allclose(response.outputs.diagonal(), -(1 - sigmas[1:]) * sigmas[:-1], atol=1e-6)
    assert torch.allclose(response.noise.diagonal(), sigmas[1:], atol=1e-6)


def test_a_scheduler_that_draws_out_of_reach_is_known_as_such() -> None:
    class Drawing(DDIMScheduler):
        def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output + torch.randn_like(model_output), *args, **kwargs)

    scheduler = Drawing(**BETAS)
    scheduler.set_timesteps(STEPS)
    state = torch.random.get_rng_state()
    response = linear_response(scheduler, Drawing.step, list(scheduler.timesteps), {})
    assert not response.exact
    assert not response.draws
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_step_that_is_not_linear_is_known_as_such() -> None:
    class Squaring(DDIMScheduler):
        def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().step(model_output**2, *args, **kwargs)

    scheduler = Squaring(**BETAS)
    scheduler.set_timesteps(STEPS)
    assert not linear_response(scheduler, Squaring.step, list(scheduler.timesteps), {}).exact


def test_a_step_that_refuses_to_be_probed_is_known_as_such() -> None:
    class Particular(DDIMScheduler):
        def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if model_output.shape[1] != 4:
                raise ValueError("four channels, please")
            return super().step(model_output, *args, **kwargs)

    scheduler = Particular(**BETAS)
    scheduler.set_timesteps(STEPS)
    assert not linear_response(scheduler, Particular.step, list(scheduler.timesteps), {}).exact


def test_probing_leaves_the_scheduler_as_it_was_and_looks_behind_clipping() -> None:
    clipped = DDIMScheduler(**BETAS, clip_sample=True)
    free = DDIMScheduler(**BETAS, clip_sample=False)
    assert torch.equal(response_of(clipped).outputs, response_of(free).outputs)
    assert clipped.config.clip_sample


def shares_of(response: Response, variance: torch.Tensor) -> list[float]:
    return noise_scales(response, added_variance(response, variance))


def test_without_history_the_share_of_noise_is_ptqds() -> None:
    """``sigma_c^2 = max(0, sigma^2 - B^2 V)`` at every step, also after one that had too little."""
    scheduler = DDIMScheduler(**BETAS)
    response = response_of(scheduler, eta=0.6)
    variance = torch.rand(STEPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    variance[5] = 50.0
    b, sigma = response.outputs.diagonal(), response.noise.diagonal()
    want = ((sigma**2 - b**2 * variance).clamp(min=0) / sigma**2).sqrt()
    want[sigma == 0] = 1
    assert torch.allclose(torch.tensor(shares_of(response, variance), dtype=torch.float64), want, atol=1e-4)
    assert want[5] == 0
    assert shares_of(response, torch.zeros(STEPS)) == [1.0] * STEPS


@pytest.mark.parametrize("order", [1, 2])
def test_with_history_the_samples_variance_is_kept(order: int) -> None:
    """Independent residuals and the reduced noise together have the variance of the noise alone, at every step."""
    scheduler = DPMSolverMultistepScheduler(**BETAS, solver_order=order, algorithm_type="sde-dpmsolver++")
    response = response_of(scheduler)
    variance = torch.full((STEPS,), 1e-3, dtype=torch.float64)
    scales = torch.tensor(shares_of(response, variance), dtype=torch.float64)
    drawn = response.noise.diagonal() > 0
    want = (response.noise**2).sum(1)
    have = response.noise**2 @ scales**2 + response.outputs**2 @ variance
    assert torch.allclose(have[drawn], want[drawn], rtol=1e-6)
    assert scales[drawn].mean() < 1
    if order == 1:  # else what one step adds too much, remembered, the next takes back
        assert bool((scales[drawn] < 1).all())


def test_independent_residuals_add_what_their_own_step_makes_of_them() -> None:
    response = response_of(DDIMScheduler(**BETAS), eta=0.6)
    size = torch.rand(STEPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    added = added_variance(response, size**2)
    assert torch.allclose(added, response.outputs.diagonal() ** 2 * size**2, rtol=1e-4)
    assert torch.allclose(response.state**2 @ added, response.outputs**2 @ size**2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "one_step"),
    [
        ("DDIMScheduler", True),
        ("DDPMScheduler", True),
        ("EulerDiscreteScheduler", True),
        ("FlowMatchEulerDiscreteScheduler", True),
        ("LMSDiscreteScheduler", False),
        ("HeunDiscreteScheduler", False),
        ("DPMSolverMultistepScheduler", False),
        ("UniPCMultistepScheduler", False),
    ],
)
def test_a_step_that_remembers_others_is_known_as_such(name: str, one_step: bool) -> None:
    config = {} if name.startswith("FlowMatch") else BETAS
    assert response_of(getattr(diffusers, name)(**config)).one_step == one_step
