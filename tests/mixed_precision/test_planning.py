"""Plans against what can be known otherwise: brute force, closed forms, runs that are disturbed by hand."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
)
from torch import nn

from conftest import quick_recipe
from gaussian import SCHEDULE, GaussianPipeline, gaussian_pipeline
from ptqd import (
    InputError,
    NoiseStats,
    Recipe,
    Sampling,
    apply_plan,
    correct,
    measure,
    measure_widths,
    paper_plan,
    quantize,
    sample,
    search_plan,
)
from ptqd.diffusion import run_batch, with_components
from ptqd.mixed_precision import (
    Problem,
    final_coefficients,
    forward_snr,
    measure_sensitivity,
    pareto,
    planning_problem,
    priced,
    rated,
    solve,
    uniform,
)
from ptqd.mixed_precision.contributions import contributions
from ptqd.mixed_precision.sensitivity import _Probe
from ptqd.quantization import at_width, insert_quantizers, layer_quantizers, run_cost
from ptqd.quantization.numerics import fake_quantize, rounded_weight
from tiny import CASES


@pytest.fixture(scope="module")
def wide(pipe: Any, run: Sampling) -> Any:
    return quantize(pipe, quick_recipe("w8a4+6+8", 4), run)


@pytest.fixture(scope="module")
def stats(pipe: Any, wide: Any, run: Sampling) -> dict[int, NoiseStats]:
    return measure_widths(pipe, wide, run)


def test_the_papers_rule_by_hand(pipe: Any, stats: dict[int, NoiseStats]) -> None:
    plan = paper_plan(stats)
    alphas = pipe.scheduler.alphas_cumprod.double()
    for i, t in enumerate(plan.timesteps):
        limit = float(alphas[int(t)] / (1 - alphas[int(t)]))
        snr = {}
        for bits, found in stats.items():
            moments = found.moments[:, i].mean((0, 1))  # over samples and channels; columns 2 and 4: eps^2, delta^2
            snr[bits] = float(moments[2] / moments[4])
        want = min((b for b, value in snr.items() if value > limit), default=8)
        assert plan.bits[i] == (want,)


def test_the_papers_rule_takes_few_bits_early_and_all_where_none_suffice(stats: dict[int, NoiseStats]) -> None:
    def with_noise(found: NoiseStats, size: float) -> NoiseStats:
        own = torch.arange(found.layout.channels)
        q, e = found.layout.blocks[0].start + own, found.layout.blocks[2].start + own
        joint = torch.zeros_like(found.joint)  # of folds; one holds all
        joint[0, ..., e, e], joint[0, ..., q, q], joint[0, ..., q, e] = 1.0, 1 + size, 1.0
        return dataclasses.replace(found, joint=joint * found.samples)

    plan = paper_plan({4: with_noise(stats[4], 1.0), 6: with_noise(stats[6], 1e-1), 8: with_noise(stats[8], 1e-2)})
    forward = forward_snr(stats[4]).tolist()  # rises
    want = [4 if f < 1 else 6 if f < 10 else 8 for f in forward]
    assert [row[0] for row in plan.bits] == want
    assert want[0] == 4
    assert want[-1] == 8
    unknown = {b: dataclasses.replace(s, levels=None) for b, s in stats.items()}
    with pytest.raises(InputError, match="not known of DDIMScheduler; plan by a budget instead"):
        paper_plan(unknown)


RUNS = [
    ("ddim", 0.0, None),
    ("ddim", 1.0, None),
    ("euler", 0.0, EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")),
    ("dpm-solver++", 0.0, DPMSolverMultistepScheduler(**SCHEDULE)),
]


@pytest.mark.parametrize(("name", "eta", "scheduler"), RUNS, ids=[f"{n} {e}" for n, e, _ in RUNS])
def test_coefficients_are_what_a_disturbed_run_shows(name: str, eta: float, scheduler: Any) -> None:
    """Gaussian data has a linear denoiser: one output moved by hand moves the final sample by exactly c_j."""
    pipe = gaussian_pipeline()
    if scheduler is not None:
        pipe = with_components(pipe, scheduler=scheduler)
    run = Sampling(steps=12, eta=eta, samples=400, batch=400)
    found = measure(pipe, gaussian_pipeline(v=0.01) if scheduler is None else pipe, run)
    coefficients = final_coefficients(found)[0]
    want = run_batch(pipe, run, range(2), "latent")
    for j in (0, 3, 7, 11):
        calls = [0]

        def move(module: Any, args: Any, output: torch.Tensor, j: int = j, calls: list[int] = calls) -> torch.Tensor:
            calls[0] += 1
            return output + 0.01 * (calls[0] - 1 == j)

        hook = pipe.unet.register_forward_hook(move)
        moved = run_batch(pipe, run, range(2), "latent")
        hook.remove()
        assert float((moved - want).mean()) / 0.01 == pytest.approx(float(coefficients[j]), rel=0.04, abs=2e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_contributions_add_up_to_the_error_of_the_final_sample(eta: float) -> None:
    run = Sampling(steps=20, eta=eta, samples=300, batch=300)
    exact, noisy = gaussian_pipeline(), gaussian_pipeline(v=0.05)
    expected = contributions(measure(exact, noisy, run))
    assert bool((expected >= 0).all())
    longer = run.replace(samples=600)
    pairs = zip(sample(exact, longer, output="latent"), sample(noisy, longer, output="latent"), strict=True)
    error = torch.cat([(a - b).square() for (_, a), (_, b) in pairs]).mean()
    assert float(expected.sum()) == pytest.approx(float(error), rel=0.15)


def test_without_a_known_response_every_step_counts_alike(stats: dict[int, NoiseStats]) -> None:
    unknown = dataclasses.replace(stats[4], response=dataclasses.replace(stats[4].response, exact=False))
    assert bool((final_coefficients(unknown) == 1).all())


class Chain(ModelMixin):
    """A linear denoiser of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, sample: torch.Tensor, timestep: float) -> tuple[torch.Tensor]:
        return (self.second(self.first(sample)),)


def test_sensitivities_are_what_rounding_one_layer_does() -> None:
    """In a linear network the first order is the whole answer."""
    torch.manual_seed(0)
    full, recipe, x = Chain().requires_grad_(False), Recipe.parse("w4a3+8"), torch.randn(2000, 2, 5, 5)
    quantized = Chain().requires_grad_(False)
    quantized.load_state_dict(full.state_dict())
    insert_quantizers(quantized, recipe)
    for module in (quantized.first, quantized.second):
        module.observe()
    quantized(x, 0)
    for module in (quantized.first, quantized.second):
        module.freeze()
    probe = _Probe(full, quantized, recipe, (3, 4, 8))
    probe.add(0, (x, 0.0), {}, 2, 1, 0)
    found = probe.result(probe.taken(), 3)
    assert found.layers == found.weighted == ("first", "second")
    assert found.activations.shape == (3, 2, 2)
    want = full(x, 0)[0]
    for q, (name, quantizer) in enumerate(layer_quantizers(quantized)):
        for w, bits in enumerate((3, 8)):
            rounded = [full.first, full.second]
            inputs = x
            for layer in rounded:
                if layer is getattr(full, name):
                    inputs = fake_quantize(
                        inputs, float(quantizer.scale[w]), float(quantizer.zero_point[w]), quantizer.grids[w]
                    )
                inputs = layer(inputs)
            energy = float((inputs - want).square().mean())
            assert float(found.activations[1, q, w]) == pytest.approx(energy, rel=0.15), (name, bits)
    for n, name in enumerate(found.weighted):
        for b, bits in enumerate((3, 4, 8)):
            changed = Chain().requires_grad_(False)
            changed.load_state_dict(full.state_dict())
            spec = dataclasses.replace(recipe.weights, bits=bits)
            getattr(changed, name).weight.copy_(rounded_weight(getattr(full, name).weight, spec))
            energy = float((changed(x, 0)[0] - want).square().mean())
            # between widths the error is taken to be as white as at the fewest bits
            assert float(found.weights[2, n, b]) == pytest.approx(energy, rel=0.15 if b == 0 else 0.8), (name, bits)


def test_sensitivities_of_a_pipeline(pipe: Any, wide: Any, run: Sampling) -> None:
    before = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    found = measure_sensitivity(pipe, wide, run, weight_bits=(8, 4), steps=2, samples=2)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == before
    assert found.activations.shape == (4, len(found.layers), 3)
    assert found.weights.shape == (4, len(found.weighted), 2)
    assert "conv_in" in found.weighted
    assert "conv_in" not in found.layers  # its bits are the recipe's rule's
    assert "mid_block.attentions.0.transformer_blocks.0.attn1" in found.layers  # the products' operands
    energy = found.activations.sum((0, 1))
    assert bool((energy[:-1] > 3 * energy[1:]).all())  # two bits more are 16 times less
    again = measure_sensitivity(pipe, wide, run.replace(batch=1), weight_bits=(8, 4), steps=2, samples=2)
    assert torch.equal(found.activations, again.activations)


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
        (RuntimeError("no formula"), InputError, "cannot be differentiated .*no formula"),
    ],
)
def test_only_a_denoiser_without_gradients_is_the_users_to_mend(
    pipe: Any, wide: Any, run: Sampling, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: Any, words: str
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(torch.autograd, "backward", fail)
    with pytest.raises(expected, match=words):
        measure_sensitivity(pipe, wide, run, weight_bits=(8, 4), steps=2, samples=2)


def random_problem(seed: int, steps: int = 3, groups: int = 2, weights: int = 0) -> Problem:
    """Errors that fall with bits, by layer and step as chance has it; the same MACs at every step."""
    rng = np.random.default_rng(seed)
    widths, weight_bits = (4, 6, 8), (4, 8) if weights else ()
    falls = np.array([16.0, 1.0, 1 / 16])
    errors = rng.lognormal(0, 2, (steps, groups, 1)) * falls * rng.uniform(0.5, 1.5, (steps, groups, 3))
    group_of = rng.integers(-1, groups, weights)
    macs = rng.uniform(1, 10, weights)
    return Problem(
        timesteps=tuple(float(steps - i) for i in range(steps)),
        groups=tuple((f"layer {g}",) for g in range(groups)),
        widths=widths,
        errors=errors,
        weighted=tuple(f"weight {n}" for n in range(weights)),
        weight_bits=weight_bits,
        weight_errors=rng.lognormal(0, 2, (weights, 1)) * np.array([20.0, 1.0])[: len(weight_bits)],
        fixed_error=0.01,
        group_of=group_of,
        layer_costs=np.where(group_of >= 0, macs, 0.0)[None].repeat(steps, 0),
        costs=rng.uniform(1, 5, (1, groups, 1)).repeat(steps, 0) * np.array(widths),
        weight_costs=np.where(group_of < 0, 8 * macs, 0.0)[None].repeat(steps, 0),
        fixed_costs=np.full(steps, 7.0 / steps),
        full_cost=1000.0,
        variance=1.0,
    )


def every_choice(problem: Problem) -> Any:
    """All plans there are: error, cost, widths and weights."""
    shape = problem.errors.shape[:2]
    for flat in itertools.product(range(len(problem.widths)), repeat=shape[0] * shape[1]):
        for weights in itertools.product(problem.weight_bits or (0,), repeat=len(problem.weighted)):
            choice, bits = np.array(flat).reshape(shape), np.array(weights[: len(problem.weighted)], dtype=np.int64)
            yield problem.error(choice, bits), problem.cost(choice, bits)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_plan_for_a_budget_is_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed)
    plans = list(every_choice(problem))
    costs = sorted(cost for _, cost in plans)
    for limit in (costs[0], costs[len(costs) // 3], costs[len(costs) // 2], costs[-1]):
        best = min(error for error, cost in plans if cost <= limit * (1 + 1e-9))
        found = solve(problem, budget=problem.full_cost / limit)
        assert found.error == pytest.approx(best, rel=1e-5)
        assert found.cost <= limit * (1 + 1e-9)
        assert found.gap < 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_plan_for_a_floor_is_the_cheapest_of_all(seed: int) -> None:
    problem = random_problem(seed)
    plans = list(every_choice(problem))
    errors = sorted(error for error, _ in plans)
    for limit in (errors[0], errors[len(errors) // 4], errors[-1]):
        cheapest = min(cost for error, cost in plans if error <= limit * (1 + 1e-9))
        found = solve(problem, floor=problem.decibels(limit) - 1e-9)
        assert found.cost == pytest.approx(cheapest, rel=1e-5)
        assert found.decibels >= problem.decibels(limit) - 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_at_any_price_weights_and_activations_are_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed, steps=2, groups=2, weights=4)
    plans = list(every_choice(problem))
    for price in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        choice, weights = priced(problem, price)
        got = problem.error(choice, weights) + price * problem.cost(choice, weights)
        assert got == pytest.approx(min(error + price * cost for error, cost in plans), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_with_weights_the_plan_is_within_its_gap_of_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed, steps=2, groups=2, weights=4)
    plans = list(every_choice(problem))
    costs = sorted(cost for _, cost in plans)
    limit = costs[len(costs) // 3]
    best = min(error for error, cost in plans if cost <= limit)
    found = solve(problem, budget=problem.full_cost / limit)
    assert found.cost <= limit * (1 + 1e-9)
    assert found.error * (1 - found.gap) <= best * (1 + 1e-6) <= found.error * (1 + 2e-6)
    cheapest = min(cost for error, cost in plans if error <= best * 1.5)
    kept = solve(problem, floor=problem.decibels(best * 1.5))
    assert kept.error <= best * 1.5 * (1 + 1e-6)
    assert kept.cost * (1 - kept.gap) <= cheapest * (1 + 1e-6) <= kept.cost * (1 + 2e-6)


def test_the_nearest_budget_that_can_be_met_is_named_and_can_be_met() -> None:
    problem = random_problem(0)
    with pytest.raises(InputError, match="no plan meets a budget of 500x; the nearest is") as refused:
        solve(problem, budget=500)
    nearest = float(str(refused.value).split("the nearest is ")[1].split("x")[0])
    assert all(row == (4, 4) for row in solve(problem, budget=nearest).plan.bits)
    with pytest.raises(InputError, match="no plan keeps 90 dB; the nearest is") as refused:
        solve(problem, floor=90)
    nearest = float(str(refused.value).split("the nearest is ")[1].split(" dB")[0])
    assert solve(problem, floor=nearest).decibels >= nearest
    with pytest.raises(InputError, match="one of them"):
        solve(problem)
    with pytest.raises(InputError, match="one of them"):
        solve(problem, budget=2, floor=3)
    with pytest.raises(InputError, match="more than 0"):
        solve(problem, budget=0)


def test_steps_at_the_same_timestep_have_the_same_bits() -> None:
    problem = dataclasses.replace(random_problem(3, steps=4), timesteps=(9.0, 5.0, 5.0, 1.0))
    for budget in (4.0, 5.5, 7.0):
        plan = solve(problem, budget=budget).plan
        assert plan.bits[1] == plan.bits[2]


def test_a_pareto_curve_falls_and_holds_the_uniform_widths_below_it() -> None:
    problem = random_problem(5, steps=5, groups=3)
    curve = pareto(problem, 8)
    costs, errors = [s.cost for s in curve], [s.error for s in curve]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    for bits in problem.widths:
        same = uniform(problem, bits)
        assert solve(problem, budget=same.ratio * (1 - 1e-12)).error <= same.error * (1 + 1e-9)


@pytest.mark.parametrize("weight_bits", [(), (4, 8)])
def test_a_plan_for_a_pipeline_keeps_its_budget(
    pipe: Any, wide: Any, run: Sampling, stats: dict[int, NoiseStats], weight_bits: tuple[int, ...]
) -> None:
    problem = planning_problem(pipe, wide, run, stats, weight_bits=weight_bits)
    for budget in (19.9, 24.0):
        found = solve(problem, budget=budget)
        planned = apply_plan(wide, found.plan, pipe)
        cost = run_cost(planned, run)
        assert cost.ratio >= budget
        assert cost.ratio == pytest.approx(found.ratio, rel=1e-9)  # what was planned is what is counted
        assert found.plan.made["fewer_bit_operations"] == pytest.approx(cost.ratio, abs=1e-3)
        assert bool(found.plan.weights) == bool(weight_bits)
        assert "conv_in" not in found.plan.weights  # the recipe's rule's
        run_batch(planned, run, range(2), "latent")
    for bits in (4, 8):
        same = uniform(problem, bits)
        assert run_cost(apply_plan(wide, same.plan, pipe), run).ratio == pytest.approx(same.ratio, rel=1e-9)
    if not weight_bits:  # at uniform widths the tables add up to what was measured
        for bits in (4, 6):
            assert uniform(problem, bits).error == pytest.approx(float(contributions(stats[bits]).sum()), rel=0.02)
        rule = rated(problem, paper_plan(stats))
        assert run_cost(apply_plan(wide, rule.plan), run).ratio == pytest.approx(rule.ratio, rel=1e-9)


def test_plan_steps_from_the_outside(pipe: Any, wide: Any, run: Sampling, stats: dict[int, NoiseStats]) -> None:
    plan = search_plan(pipe, wide, run, stats, budget=20.0)
    assert run_cost(apply_plan(wide, plan), run).ratio >= 20
    assert plan.made["rule"] == "budget"
    with pytest.raises(InputError, match="no plan meets a budget of 1000x; the nearest is"):
        search_plan(pipe, wide, run, stats, budget=1000.0)
    elsewhere = {
        b: dataclasses.replace(s, measured_on=dataclasses.replace(s.measured_on, model_timesteps=()))
        for b, s in stats.items()
    }
    with pytest.raises(InputError, match="measure this schedule itself"):
        search_plan(pipe, wide, run, elsewhere, budget=20.0)


def test_a_second_order_sampler_is_planned_and_runs(pipe: Any, run: Sampling) -> None:
    """Heun asks the network twice at a timestep: those steps share their bits."""
    heun = with_components(pipe, scheduler=HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    once = run.replace(eta=0.0)
    recipe = quick_recipe("w4a4+8")
    quantized = quantize(heun, recipe, once)
    found = measure_widths(heun, quantized, once)
    plan = search_plan(heun, quantized, once, found, budget=40.0)
    assert plan.steps == 7
    assert plan.timesteps[1] == plan.timesteps[2]
    planned = apply_plan(quantized, plan)
    assert bool(torch.isfinite(torch.as_tensor(run_batch(planned, once, range(2), "latent"))).all())
    assert math.isclose(run_cost(planned, once).ratio, plan.made["fewer_bit_operations"], rel_tol=1e-3)


QUICK = ("ddpm-learned-variance", "latent-class", "dit", "sd3", "flux", "sana", "wan", "stable-audio")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_every_pipeline_is_planned_and_corrected(name: str) -> None:
    """Whatever the network, the guidance and what the denoiser is told: bits switch, the budget holds."""
    case = CASES[name]
    pipe = case.build()
    run = Sampling(case.steps, case.eta, 4, 2, 0, {**case.call, **(case.guidance or {})})
    recipe = quick_recipe("w8a4+8")
    quantized = quantize(pipe, recipe, run)
    found = measure_widths(pipe, quantized, run)
    low, high = (run_cost(at_width(quantized, bits), run).ratio for bits in (8, 4))
    budget = (low + high) / 2
    plan = search_plan(pipe, quantized, run, found, budget=budget)
    assert {bits for row in plan.bits for bits in row} == {4, 8}
    planned = apply_plan(quantized, plan)
    assert run_cost(planned, run).ratio >= budget
    corrected = correct(planned, measure(pipe, planned, run), ("cnc", "bc"))
    want = torch.as_tensor(run_batch(corrected, run, range(2), "latent"))
    assert bool(torch.isfinite(want).all())
    assert not torch.equal(want, torch.as_tensor(run_batch(quantized, run, range(2), "latent")))


class SpectrumDenoiser(nn.Module):
    """The exact denoiser of Gaussian data whose pixels vary by 1 / n, 0.9 in the mean, plus white noise."""

    def __init__(self, v: float) -> None:
        super().__init__()
        self.register_buffer("alphas", DDIMScheduler(**SCHEDULE).alphas_cumprod)
        variance = 1 / torch.arange(1, 257)
        self.register_buffer("variance", (0.9 * variance / variance.mean()).view(1, 1, 16, 16))
        self.v, self.generator = v, torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor, t: int) -> torch.Tensor:
        a: torch.Tensor = self.alphas[int(t)]  # type: ignore[index]
        eps = (1 - a).sqrt() * x / (a * self.variance + 1 - a)  # type: ignore[operator]
        noisy: torch.Tensor = eps + self.v**0.5 * torch.randn(x.shape, generator=self.generator)
        return noisy


class SpectrumPipeline(GaussianPipeline):
    shape = (1, 16, 16)


def closed_form(stats: NoiseStats, answer: torch.Tensor) -> torch.Tensor:
    """``c_j`` where the network answers by ``g_j``."""
    outputs = stats.response.outputs
    system = torch.eye(len(outputs), dtype=torch.float64)
    system[:, :-1] -= outputs[:, 1:] * answer[1:]
    response: torch.Tensor = torch.linalg.solve(system, outputs)
    return response[-1]


@pytest.mark.parametrize(
    ("eta", "wanted"), [(1.0, {0: 10.68, 7: 2.17, 13: 0.56, 19: 1.0}), (0.0, {0: 1.0, 7: 0.76, 13: 0.61, 19: 1.0})]
)
def test_noise_counts_by_how_much_data_varies_its_way(eta: float, wanted: dict[int, float]) -> None:
    """One answer for all directions is wrong by a factor of ten at eta 1; bands of directions are right."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    exact, noisy = (SpectrumPipeline(SpectrumDenoiser(v), scheduler) for v in (0.0, 0.01))  # type: ignore[arg-type]
    run = Sampling(20, eta, 300, 300)
    stats = measure(exact, noisy, run)
    lam = exact.unet.variance.flatten().double()
    a = exact.unet.alphas[stats.timesteps.long()].double()
    by_direction = (1 - a).sqrt()[:, None] / (a[:, None] * lam + (1 - a)[:, None])  # T,D
    # x_t of a direction varies by a lam + 1 - a: one answer is weighted by that
    weight = a[:, None] * lam + (1 - a)[:, None]
    scalar = closed_form(stats, (by_direction * weight).sum(1) / weight.sum(1))
    right = torch.stack([closed_form(stats, by_direction[:, d]) for d in range(256)]).square().mean(0)
    assert stats.bands is not None
    share = (stats.bands.cross.diagonal(dim1=1, dim2=2)[:, -1] / stats.cross[-1, -1])[
        :, None
    ]  # of white noise, by band
    found = (final_coefficients(stats).square() * share).sum(0)
    for j, factor in wanted.items():
        assert float(right[j] / scalar[j] ** 2) == pytest.approx(factor, rel=0.02)
        assert float(found[j] / right[j]) == pytest.approx(1, abs=0.3)
    longer = run.replace(samples=600, batch=300, seed=4)
    pairs = zip(sample(exact, longer, output="latent"), sample(noisy, longer, output="latent"), strict=True)
    error = torch.cat([(x - y).square() for (_, x), (_, y) in pairs]).mean()
    assert float(contributions(stats).sum() / error) == pytest.approx(1, abs=0.25)
