"""Steps of a plan that compute the outer blocks of the network only: its deep part gives what it gave before."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ptqd import InputError, PrecisionPlan, Sampling, apply_plan, correct, load, measure, quantize, search_plan
from ptqd.diffusion import run_batch
from ptqd.diffusion.deep_part import Features, deep_modules, follow_deep_part, is_deep, leave_deep_part, using
from ptqd.mixed_precision import StepSeconds, measure_seconds, planning_problem
from ptqd.mixed_precision.shallow import ShallowErrors
from ptqd.mixed_precision.solver import rated
from ptqd.quantization import plan_of, run_cost
from tiny import dit, pixel_unet

STEPS = Sampling(6, 1.0, samples=16, batch=16, call={"class_labels": [0, 1], "guidance_scale": 2.0})


@pytest.fixture(scope="module")
def full() -> Any:
    torch.manual_seed(0)
    return dit()


def sampled(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(3), "latent"))


@pytest.fixture(scope="module")
def timesteps(pipe: Any) -> tuple[float, ...]:
    pipe.scheduler.set_timesteps(STEPS.steps)
    return tuple(float(t) for t in pipe.scheduler.timesteps)


@pytest.fixture(scope="module")
def plan(timesteps: tuple[float, ...]) -> PrecisionPlan:
    return PrecisionPlan.uniform(timesteps, 8).replace(shallow=(1, 2, 4))


def test_a_plan_says_which_steps_are_shallow(plan: PrecisionPlan, tmp_path: Path) -> None:
    assert plan.describe(1) == "bits 8 shallow"
    assert plan.describe(3) == "bits 8"
    plan.save(tmp_path / "plan.toml")
    assert PrecisionPlan.load(tmp_path / "plan.toml") == plan
    held = plan.holding((2,))
    assert (held.shallow, held.held[2]) == ((1, 4), True)
    for bad in ((0,), (6,), (-1,)):
        with pytest.raises(InputError, match="cannot be shallow"):
            plan.replace(shallow=bad)
    with pytest.raises(InputError, match="step 2 of the plan cannot be shallow"):
        held.replace(shallow=(2,))
    with pytest.raises(InputError, match="takes some timestep twice"):
        PrecisionPlan.uniform((9, 9, 5), 8).replace(shallow=(2,))
    with pytest.raises(InputError, match="only ptqd reads"):
        plan.step_policy()


def test_the_deep_part_of_a_unet_is_what_the_outer_blocks_enclose() -> None:
    unet = pixel_unet(2)
    deep = deep_modules(unet)
    assert not is_deep("conv_in", deep)
    assert not is_deep("down_blocks.0.resnets.0.conv1", deep)
    assert is_deep("down_blocks.1.resnets.0.conv1", deep)
    assert is_deep("mid_block.attentions.0.to_q", deep)
    assert is_deep("up_blocks.0.resnets.0.conv1", deep)
    assert not is_deep(f"up_blocks.{len(unet.up_blocks) - 1}.resnets.0.conv1", deep)
    with pytest.raises(InputError, match="does not know the deep part of Linear"):
        deep_modules(nn.Linear(2, 2))


@torch.no_grad()
def test_features_of_another_sample_are_held_and_the_outer_blocks_see_this_one() -> None:
    torch.manual_seed(0)
    unet: UNet2DModel = pixel_unet(2)
    x, y = torch.randn(2, 2, *[unet.config.sample_size] * 2), torch.randn(2, 2, *[unet.config.sample_size] * 2)
    want = unet(x, 5).sample
    follow_deep_part(unet)
    kept = Features(x.shape)
    with using(kept):
        assert torch.equal(unet(x, 5).sample, want)
    kept.known = True
    computed: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *args, name=name: computed.append(name))
        for name, module in unet.named_modules()
        if "resnets" in name and name.endswith("conv1")
    ]
    with using(kept):
        assert torch.equal(unet(x, 5).sample, want)
        other = unet(y, 5).sample
    for hook in hooks:
        hook.remove()
    assert {name.split(".")[0] + name.split(".")[1] for name in computed} == {
        "down_blocks0",
        f"up_blocks{len(unet.up_blocks) - 1}",
    }
    plain = unet(y, 5).sample
    assert not torch.equal(other, want)
    assert not torch.equal(other, plain)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        with using(kept):
            assert torch.equal(twin(x, 5).sample, want)
    leave_deep_part(unet)
    assert torch.equal(unet(y, 5).sample, plain)
    assert all(type(module).__module__ != "ptqd.diffusion.deep_part" for module in unet.modules())


@torch.no_grad()
def test_of_a_transformer_what_its_inner_blocks_add_is_held() -> None:
    class Block(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + self.weight * hidden_states**2

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList([Block(0.1 * i) for i in range(1, 6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.transformer_blocks:
                x = block(hidden_states=x)
            return x

    network = Network()
    x, y = torch.rand(3), torch.rand(3)
    first, last = network.transformer_blocks[0], network.transformer_blocks[4]
    inside = first(x)
    for block in network.transformer_blocks[1:4]:
        inside = block(inside)
    want = last(first(y) + inside - first(x))
    follow_deep_part(network)
    kept = Features(x.shape)
    with using(kept):
        network(x)
    kept.known = True
    with using(kept):
        assert torch.allclose(network(y), want)


def test_a_run_computes_the_deep_part_at_full_steps_only(
    pipe: Any, qpipe: Any, plan: PrecisionPlan, timesteps: tuple[float, ...], tmp_path: Path
) -> None:
    """Also saved and loaded, with any batch; and the cost is that of what is computed."""
    shallow = apply_plan(qpipe, plan)
    calls: list[int] = []
    hook = shallow.unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *args: calls.append(1))
    want = sampled(shallow, STEPS)
    hook.remove()
    assert len(calls) == 3
    assert not torch.equal(want, sampled(apply_plan(qpipe, PrecisionPlan.uniform(timesteps, 8)), STEPS))
    shallow.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert plan_of(again) == plan
    assert torch.allclose(sampled(again, STEPS), want, atol=1e-5)
    one = torch.as_tensor(run_batch(shallow, STEPS, range(1), "latent"))
    assert torch.allclose(one, want[:1], atol=1e-4)
    cost, uniform = run_cost(shallow, STEPS), run_cost(apply_plan(qpipe, PrecisionPlan.uniform(timesteps, 8)), STEPS)
    deep = deep_modules(shallow.unet)
    inner = torch.tensor([is_deep(name, deep) for name in cost.macs.layers])
    assert torch.equal(cost.bops[3], uniform.bops[3])
    assert float(cost.bops[1][inner].sum()) == 0
    assert torch.equal(cost.bops[1][~inner], uniform.bops[1][~inner])
    corrected = correct(shallow, measure(pipe, shallow, STEPS), ("cnc", "bc"))
    assert torch.isfinite(sampled(corrected, STEPS)).all()


def test_the_patterns_are_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    for steps, ages in ((7, 3), (6, 5)):
        errors = ShallowErrors(np.maximum.accumulate(draw.random((steps, ages)), axis=1))
        patterns = errors.patterns
        assert len(patterns) == steps - -(-steps // (ages + 1)) + 1
        for n, pattern in enumerate(patterns):
            assert sum(pattern) == n
            others = (p for p in itertools.product((False, True), repeat=steps - 1) if sum(p) == n)
            assert errors.error(pattern) == pytest.approx(min(errors.error((False, *p)) for p in others))


def test_features_age_over_held_steps_and_beyond_what_was_measured() -> None:
    """As a plan that was written by hand has them."""
    errors = ShallowErrors(np.array([[1.0, 2.0]] * 6))
    assert errors.error((False, True, True, True, False, True)) == pytest.approx(1 + 2 + 2 * (3 / 2) ** 2 + 1)
    assert errors.error((False, False, True), (False, True, False)) == 2


def test_a_budget_is_met_by_shallow_steps(pipe: Any, qpipe: Any, timesteps: tuple[float, ...]) -> None:
    stats = {8: measure(pipe, qpipe, STEPS)}
    whole = run_cost(qpipe, STEPS).ratio
    plan = search_plan(pipe, qpipe, STEPS, stats, budget=1.2 * whole, hold_deep=True)
    assert plan.shallow
    assert plan.made["shallow_steps"] == len(plan.shallow)
    assert run_cost(apply_plan(qpipe, plan), STEPS).ratio >= 1.2 * whole
    problem = planning_problem(pipe, qpipe, STEPS, stats, hold=True, hold_deep=True)
    again = rated(problem, plan)
    assert again.ratio == pytest.approx(run_cost(apply_plan(qpipe, plan), STEPS).ratio, rel=1e-6)
    assert again.decibels == pytest.approx(plan.made["expected_snr_db"], abs=0.01)
    with pytest.raises(InputError, match="and the deep part at the fewest steps"):
        search_plan(pipe, qpipe, STEPS, stats, budget=50 * whole, hold_deep=True)
    either = search_plan(pipe, qpipe, STEPS, stats, budget=1.2 * whole, hold=True, hold_deep=True)
    assert either.made["expected_snr_db"] >= plan.made["expected_snr_db"]


def test_a_budget_in_seconds_is_met_by_shallow_steps(pipe: Any, qpipe: Any, timesteps: tuple[float, ...]) -> None:
    """A shallow step takes what it was timed to take: of given seconds, the fewest that meet the budget."""
    stats = {8: measure(pipe, qpipe, STEPS)}
    seconds = StepSeconds({8: 1.0}, 0.1, 0.5)
    for budget, fewest in ((1.0, 0), (1.05, 1), (1.3, 3), (1.7, 5)):
        plan = search_plan(pipe, qpipe, STEPS, stats, budget=budget, hold_deep=True, seconds=seconds)
        assert len(plan.shallow) == fewest
        assert plan.made["times_faster"] == pytest.approx(6 / (6 - 0.5 * fewest), rel=1e-3)
    with pytest.raises(InputError, match=r"the nearest is 1\.71x"):
        search_plan(pipe, qpipe, STEPS, stats, budget=2.1, hold_deep=True, seconds=seconds)
    problem = planning_problem(pipe, qpipe, STEPS, stats, hold_deep=True, timed=True)
    with pytest.raises(InputError, match="was not timed"):
        problem.in_seconds(measure_seconds(qpipe, STEPS, timesteps, (8,)))
    assert measure_seconds(qpipe, STEPS, timesteps, (8,), deep=True).shallow is not None


def test_a_network_whose_deep_part_is_not_known_is_refused(full: Any) -> None:
    quantized = quantize(full, "w8a8", STEPS.replace(eta=0.0))
    steps = tuple(float(t) for t in range(6, 0, -1))
    with pytest.raises(InputError, match="let steps hold their output"):
        apply_plan(quantized, PrecisionPlan.uniform(steps, 8).replace(shallow=(1,)))
