"""Steps of a plan that hold the output of the step before: the denoiser is not called."""

import copy
import dataclasses
import itertools
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import nn

from conftest import tiny_pipeline
from ptqd import (
    InputError,
    NoiseStats,
    PrecisionPlan,
    Recipe,
    Sampling,
    apply_plan,
    correct,
    export,
    load,
    measure,
    measure_widths,
    quantize,
    search_plan,
)
from ptqd.correction import fit_trajectory
from ptqd.diffusion import run_batch, with_components
from ptqd.diffusion.held_outputs import HeldOutputs, Place, hold_outputs, stop_holding
from ptqd.diffusion.trajectory import record, replay
from ptqd.mixed_precision import StepSeconds, measure_seconds, planning_problem
from ptqd.mixed_precision.holding import HeldErrors, sources
from ptqd.quantization import at_width, plan_of, run_cost


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(attention=True)


@pytest.fixture(scope="module")
def qpipe(pipe: Any, run: Sampling) -> Any:
    return quantize(pipe, Recipe.from_dict({**Recipe.parse("w4a8").to_dict(), "calibration_samples": 4}), run)


@pytest.fixture(scope="module")
def timesteps(pipe: Any, run: Sampling) -> tuple[float, ...]:
    pipe.scheduler.set_timesteps(run.steps)
    return tuple(float(t) for t in pipe.scheduler.timesteps)


@pytest.fixture(scope="module")
def plan(timesteps: tuple[float, ...]) -> PrecisionPlan:
    return PrecisionPlan.uniform(timesteps, 8).holding((1, 2))


@pytest.fixture(scope="module")
def held(qpipe: Any, plan: PrecisionPlan) -> Any:
    return apply_plan(qpipe, plan)


def sampled(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(3), "latent"))


def test_text_of_a_plan_that_holds(plan: PrecisionPlan, tmp_path: Path) -> None:
    assert plan.held == (False, True, True, False)
    assert plan.to_dict()["bits"] == ["0: t 751, bits 8", "1: t 501, hold", "2: t 251, hold", "3: t 1, bits 8"]
    plan.save(tmp_path / "plan.toml")
    assert PrecisionPlan.load(tmp_path / "plan.toml") == plan
    assert plan.holding(()).bits == ((8,),) * 4
    assert plan.holding((3,)).held == (False, False, False, True)
    two = PrecisionPlan(plan.timesteps, ((4, 8), (4, 6), (6, 8), (8, 8)), (("down", ("down*",)), ("rest", ("*",))))
    assert PrecisionPlan.from_dict(two.holding((1,)).to_dict()).bits == ((4, 8), (0, 0), (6, 8), (8, 8))
    with pytest.raises(InputError, match="first step of the plan holds"):
        plan.holding((0,))
    with pytest.raises(InputError, match="no step 4 to hold"):
        plan.holding((4,))
    with pytest.raises(InputError, match="step 1 of the plan holds some groups only"):
        two.replace(bits=((4, 8), (0, 6), (6, 8), (8, 8)))


def test_text_of_a_plan_that_goes_on_from_two_outputs(timesteps: tuple[float, ...], tmp_path: Path) -> None:
    plan = PrecisionPlan.uniform(timesteps, 8).holding((2, 3)).replace(extrapolation={2: (1.5, -0.5), 3: (2.0, -1e-3)})
    assert plan.to_dict()["bits"][2:] == ["2: t 251, hold 1.5 -0.5", "3: t 1, hold 2 -0.001"]
    plan.save(tmp_path / "plan.toml")
    assert PrecisionPlan.load(tmp_path / "plan.toml") == plan
    assert plan.holding((2,)).extrapolation == {}
    edited = plan.to_dict() | {"bits": [*plan.to_dict()["bits"][:3], "3: t 1, hold"]}
    assert PrecisionPlan.from_dict(edited).extrapolation == {2: (1.5, -0.5)}
    for line, message in (
        ("hold 1.5", "is no step"),
        ("hold 1 2 3", "is no step"),
        ("hold 1.5 -", "two weights of outputs"),
        ("hold 1e9 0", "two weights of outputs"),
    ):
        with pytest.raises(InputError, match=message):
            PrecisionPlan.from_dict(plan.to_dict() | {"bits": [*plan.to_dict()["bits"][:3], f"3: t 1, {line}"]})
    with pytest.raises(InputError, match="step 1, which does not hold"):
        plan.replace(extrapolation={1: (1.0, 0.0)})
    with pytest.raises(InputError, match="one was computed before it"):
        PrecisionPlan.uniform(timesteps, 8).holding((1,)).replace(extrapolation={1: (1.0, 0.0)})


def test_a_step_that_goes_on_from_two_outputs(
    qpipe: Any, run: Sampling, timesteps: tuple[float, ...], tmp_path: Path
) -> None:
    plan = PrecisionPlan.uniform(timesteps, 8).holding((2, 3)).replace(extrapolation={2: (1.5, -0.5), 3: (1.75, -1.0)})
    planned = apply_plan(qpipe, plan)
    with record(planned) as path:
        want = sampled(planned, run)
    first, second, *rest = path.outputs
    assert not torch.equal(first, second)
    for output, (a, b) in zip(rest, plan.extrapolation.values(), strict=True):
        torch.testing.assert_close(output, a * second + b * first)
    planned.save_pretrained(tmp_path)
    assert torch.equal(sampled(load(tmp_path), run), want)


def test_a_step_that_holds_does_not_call_the_denoiser(qpipe: Any, held: Any, run: Sampling) -> None:
    calls: list[int] = []
    hook = held.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with record(held) as path:
        sampled(held, run)
    hook.remove()
    assert len(calls) == 2
    assert torch.equal(path.outputs[1], path.outputs[0])
    assert torch.equal(path.outputs[2], path.outputs[0])
    assert not torch.equal(path.outputs[3], path.outputs[0])
    with record(qpipe) as plain:
        sampled(qpipe, run)
    assert torch.equal(plain.outputs[0], path.outputs[0])  # and the same numbers where it computes
    with torch.no_grad():
        assert isinstance(held.unet, type(qpipe.unet))
        assert type(held.unet).__name__ == type(qpipe.unet).__name__


def test_it_is_saved_loaded_and_taken_back(qpipe: Any, held: Any, run: Sampling, tmp_path: Path) -> None:
    want = sampled(held, run)
    held.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(sampled(loaded, run), want)
    assert plan_of(loaded).held == (False, True, True, False)
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"2: t 251, hold"', '"2: t 251, bits 8"'))
    assert not torch.equal(sampled(load(tmp_path), run), want)
    again = apply_plan(held, plan_of(held).holding((2,)))
    assert plan_of(again).held == (False, False, True, False)
    assert torch.equal(sampled(held, run), want)  # the one it was made from still holds two
    config.write_text(config.read_text().replace('"0: t 751, bits 8"', '"0: t 751, hold"'))
    with pytest.raises(InputError, match="first step of the plan holds"):
        load(tmp_path)


def test_bit_operations(qpipe: Any, held: Any, run: Sampling) -> None:
    """Half the steps, half the operations, of the same full precision."""
    whole, half = run_cost(qpipe, run), run_cost(held, run)
    assert half.macs.total == whole.macs.total
    assert half.total == whole.total // 2
    assert half.ratio == pytest.approx(2 * whole.ratio)


def test_widths_and_held_steps_in_one_plan(pipe: Any, run: Sampling, timesteps: tuple[float, ...]) -> None:
    wide = quantize(pipe, Recipe.from_dict({**Recipe.parse("w4a4+8").to_dict(), "calibration_samples": 4}), run)
    planned = apply_plan(wide, PrecisionPlan(timesteps, ((8,), (4,), (0,), (4,))))
    seen: list[int] = []
    conv = planned.unet.up_blocks[0].resnets[0].conv1
    conv.register_forward_hook(lambda *_: seen.append(conv.input.bits))
    sampled(planned, run)
    assert seen == [8, 4, 4]
    with pytest.raises(InputError, match="asks for 4 bits, the model has ranges for 8"):
        apply_plan(quantize(pipe, "w4a8", run), PrecisionPlan(timesteps, ((8,), (4,), (0,), (8,))))


def error(stats: NoiseStats) -> list[float]:
    """Squared error of each step's output."""
    q, e = (stats.layout.blocks[i].start + torch.arange(stats.layout.channels) for i in (0, 2))
    table = stats.joint.sum(0)  # T,G,K,K
    squares = table[..., q, q] - 2 * table[..., q, e] + table[..., e, e]
    total: list[float] = squares.sum((-1, -2)).tolist()
    return total


def test_statistics_and_corrections(pipe: Any, qpipe: Any, held: Any, run: Sampling) -> None:
    """Measured by the ordinary paired pass: a step that holds is off by how much the output changed since."""
    run = run.replace(samples=16, batch=8)
    stats, plain = measure(pipe, held, run), measure(pipe, qpipe, run)
    assert torch.equal(stats.moments[:, 0], plain.moments[:, 0])
    assert error(stats)[2] > 2 * error(plain)[2]
    assert error(stats)[2] > error(stats)[1]
    corrected = correct(held, stats, ["joint"])
    assert not torch.equal(sampled(corrected, run), sampled(held, run))
    fit = fit_trajectory(held, stats, run)  # whose two batches take turns, step by step
    one = fit_trajectory(held, stats, run, batch=16)
    torch.testing.assert_close(fit.finals, one.finals, rtol=0, atol=1e-3)


class Network(nn.Module):
    """Told a timestep; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        self.calls += 1
        return x * 2


def holding(*held: int, **extrapolated: tuple[float, float]) -> Network:
    """One that holds at these steps, or goes on from two outputs (``at2``); its timestep is the step."""
    steps: dict[int, tuple[float, ...]] = dict.fromkeys(held, (1.0,))
    steps |= {int(name.removeprefix("at")): weights for name, weights in extrapolated.items()}
    network = Network()
    hold_outputs(network, HeldOutputs(lambda model, args, kwargs: Place(args[1], steps.get(args[1], ()))))
    return network


def test_each_call_of_a_step_holds_what_the_one_in_its_place_gave() -> None:
    network = holding(1)
    a, b = torch.ones(2), torch.full((2,), 5.0)
    network(a, 0)
    network(b, 0)
    first = network(b, 1)
    assert torch.equal(first, 2 * a)
    first += 100  # as some pipelines do
    assert torch.equal(network(a, 1), 2 * b)
    assert network.calls == 2
    network(a, 1)  # one call more than there is anything to hold
    assert network.calls == 3


def test_what_cannot_be_held_is_computed() -> None:
    network = holding(1, 2)
    x = torch.ones(2)
    assert torch.equal(network(x, 1), 2 * x)  # a run that begins midway
    assert torch.equal(network(5 * x, 2), 2 * x)
    assert torch.equal(network(torch.ones(3), 2), 2 * torch.ones(3))  # of another shape
    assert torch.equal(network(3 * x, 0), 6 * x)  # another run
    assert torch.equal(network(x, 1), 6 * x)
    assert torch.equal(network(7 * x, 1), 14 * x)  # one call more than the step before made


def test_two_outputs_times_their_weights() -> None:
    network = holding(2, at3=(1.5, -0.5), at4=(2.0, 1.0))
    x = torch.tensor([1.0, 4.0])
    network(x, 0)
    network(3 * x, 1)
    assert torch.equal(network(x, 2), 6 * x)
    assert torch.equal(network(x, 3), 1.5 * 6 * x - 0.5 * 2 * x)
    assert torch.equal(network(x, 4), 2 * 6 * x + 2 * x)
    assert network.calls == 2
    network = holding(at2=(1.5, -0.5), at3=(1.5, -0.5))
    half = x.half()
    assert torch.equal(network(half, 1), 2 * half)  # a run that begins midway
    assert torch.equal(network(5 * half, 2), 10 * half)  # which has one output, and needs two
    assert network(half, 3).dtype == torch.float16
    assert network.calls == 3


def test_threads_hold_their_own() -> None:
    network, found = holding(1), {}
    turn = threading.Barrier(2)

    def run(size: float) -> None:
        network(torch.full((2,), size), 0)
        turn.wait()
        found[size] = float(network(torch.zeros(2), 1)[0])

    threads = [threading.Thread(target=run, args=(size,)) for size in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1.0: 2.0, 2.0: 4.0}


def test_copies_hold_their_own() -> None:
    network = holding(1)
    network(torch.ones(2), 0)
    twin = copy.deepcopy(network)
    twin(torch.zeros(2), 1)
    assert twin.calls == 2  # it had nothing to hold
    stop_holding(network)
    assert type(network) is Network
    network(torch.ones(2), 1)
    assert network.calls == 2


def test_a_run_that_was_broken_off_leaves_nothing_to_hold(held: Any, run: Sampling) -> None:
    want = sampled(held, run)
    other = run.replace(seed=run.seed + 1)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = held.vae.decoder.register_forward_pre_hook(stop)
    for block in (held.vae.decoder, held.unet.conv_out):  # at its end, and at its first step
        hook.remove()
        hook = block.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run_batch(held, other, range(3))
    hook.remove()
    assert torch.equal(sampled(held, run), want)
    with torch.no_grad():
        x = torch.randn(6, 4, 8, 8)
        held.unet(x, float(plan_of(held).timesteps[0]), encoder_hidden_states=torch.zeros(6, 1, 8))
    assert torch.equal(sampled(held, run), want)


@pytest.mark.parametrize("extrapolate", [False, True])
def test_held_errors_are_those_of_the_outputs_themselves(
    pipe: Any, qpipe: Any, run: Sampling, *, extrapolate: bool
) -> None:
    """From second moments alone: what a pattern of held steps leaves, against sums over the recorded outputs."""
    run = run.replace(samples=16, batch=16)
    stats = measure(pipe, qpipe, run)
    errors = HeldErrors(stats, extrapolate=extrapolate)
    errors.coefficients = np.tile([0.5, -1.0, 2.0, 1.5], (len(errors.coefficients), 1))
    with record(pipe) as path:
        run_batch(pipe, run.with_seed_for("measuring"), range(16), "latent")
    with replay(qpipe, path) as replayed:
        run_batch(qpipe, run.with_seed_for("measuring"), range(16), "latent")
    e, q = (
        torch.stack([x.double() - x.double().mean((0, 2, 3), keepdim=True) for x in outputs])
        for outputs in (path.outputs, replayed.outputs)
    )
    for held in ((False,) * 4, (False, True, True, False), (False, False, True, False)):
        total, weights = torch.zeros_like(e[0]), errors.extrapolation(held)
        for j, s in enumerate(sources(held)):
            slope = (q[s] * e[j]).mean() / e[j].square().mean()
            output = q[s] / slope
            if j in weights:
                a, b = weights[j]
                output = a * q[s] + b * q[s - 1]
            total += errors.coefficients[0, j] * (output - e[j])
        assert errors.error(held) == pytest.approx(float(total.square().mean()), rel=1e-2 if weights else 1e-6)
    assert bool(weights) == extrapolate  # of the last pattern, rounded as a plan has them


def test_the_weights_of_two_outputs_leave_least(pipe: Any, qpipe: Any, run: Sampling) -> None:
    """Among all that keep the signal as it is: of one step by itself, in all directions alike."""
    stats = dataclasses.replace(measure(pipe, qpipe, run.replace(samples=16, batch=16)), bands=None)
    errors, held = HeldErrors(stats), (False, False, True, False)
    errors.coefficients = np.array([[0.0, 0.0, 1.0, 0.0]])
    a, b = errors.extrapolation(held)[2]
    e, q = ([errors.cross[0, i, j] for i, j in ((2, s), (2, s + 4))] for s in (1, 0))
    signal = np.array([sum(e), sum(q)])  # of the last output, and of the one before
    assert signal @ (a, b) == pytest.approx(errors.cross[0, 2, 2], rel=1e-3)
    least = errors.error(held)
    last = HeldErrors(stats, extrapolate=False)
    last.coefficients = errors.coefficients
    assert least < last.error(held)
    for change in (-0.02, 0.02):
        moved = a + change, b - change * signal[0] / signal[1]
        weights = np.zeros(8)
        weights[[2, 1, 0]] = -1, *moved
        weights[[5, 4]] = moved
        assert weights @ errors.cross[0] @ weights > least


def test_patterns_hold_one_step_more_each_time(pipe: Any, qpipe: Any, run: Sampling) -> None:
    errors = HeldErrors(measure(pipe, qpipe, run))
    patterns = errors.patterns
    assert [sum(held) for held in patterns] == [0, 1, 2, 3]
    assert not any(held[0] for held in patterns)
    for before, after in itertools.pairwise(patterns):
        trials = [[held or i == step for i, held in enumerate(before)] for step in range(1, 4) if not before[step]]
        assert errors.error(after) == pytest.approx(min(map(errors.error, trials)), rel=1e-9)


def test_a_plan_that_holds_meets_its_budget(pipe: Any, qpipe: Any, run: Sampling, timesteps: tuple[float, ...]) -> None:
    stats = {8: measure(pipe, qpipe, run)}
    whole = run_cost(qpipe, run).ratio
    for budget, most in ((whole * 0.999, 0), (whole * 1.3, 1), (whole * 1.9, 2)):
        plan = search_plan(pipe, qpipe, run, stats, budget=budget, hold=True)
        assert sum(plan.held) == most
        planned = apply_plan(qpipe, plan)
        assert run_cost(planned, run).ratio >= budget
        assert plan.made["fewer_bit_operations"] == pytest.approx(run_cost(planned, run).ratio, rel=1e-3)
    with pytest.raises(InputError, match="with the fewest bits, at the first step alone"):
        search_plan(pipe, qpipe, run, stats, budget=whole * 5, hold=True)
    with pytest.raises(InputError, match="ranges for 8-bit activations only"):
        search_plan(pipe, qpipe, run, stats, budget=whole * 1.5)


def test_where_steps_cannot_hold(pipe: Any, qpipe: Any, held: Any, run: Sampling, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes some timestep twice"):
        PrecisionPlan((9.0, 5.0, 5.0, 1.0), ((8,),) * 4).holding((3,))
    heun = with_components(pipe, scheduler=HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    still = run.replace(eta=0.0)
    stats = {8: measure(heun, with_components(qpipe, scheduler=heun.scheduler), still)}
    with pytest.raises(InputError, match="takes some timestep twice"):
        search_plan(heun, with_components(qpipe, scheduler=heun.scheduler), still, stats, budget=20, hold=True)
    with pytest.raises(InputError, match="holds steps, which torchao's pipelines cannot"):
        export(held, run, "torchao", tmp_path / "ao")


def test_a_held_denoiser_is_pickled(held: Any, run: Sampling) -> None:
    again = pickle.loads(pickle.dumps(held.unet))
    assert torch.equal(sampled(with_components(held, unet=again), run), sampled(held, run))


def test_widths_and_held_steps_are_chosen_together(pipe: Any, run: Sampling) -> None:
    """No worse than without, as expected; and what is expected to cost is what it costs."""
    wide = quantize(pipe, Recipe.from_dict({**Recipe.parse("w4a4+8").to_dict(), "calibration_samples": 4}), run)
    stats = measure_widths(pipe, wide, run)
    budget = run_cost(at_width(wide, 4), run).ratio * 0.99
    plans = [search_plan(pipe, wide, run, stats, budget=budget, hold=hold) for hold in (False, True)]
    assert plans[1].made["expected_snr_db"] >= plans[0].made["expected_snr_db"]
    for plan in plans:
        cost = run_cost(apply_plan(wide, plan), run)
        assert cost.ratio >= budget
        assert plan.made["fewer_bit_operations"] == pytest.approx(cost.ratio, rel=1e-3)
    kept = search_plan(pipe, wide, run, stats, floor=plans[1].made["expected_snr_db"] - 0.01, hold=True)
    assert kept.made["fewer_bit_operations"] >= plans[1].made["fewer_bit_operations"] * 0.999


def test_a_budget_of_seconds(pipe: Any, qpipe: Any, run: Sampling, timesteps: tuple[float, ...]) -> None:
    """A held step takes what the scheduler takes: of given seconds, the fewest steps are held that meet the budget."""
    stats = {8: measure(pipe, qpipe, run)}
    seconds = StepSeconds({8: 1.0}, 0.1)
    for budget, most in ((1.0, 0), (1.25, 1), (1.8, 2), (3.0, 3)):
        plan = search_plan(pipe, qpipe, run, stats, budget=budget, hold=True, seconds=seconds)
        assert sum(plan.held) == most
        assert plan.made["times_faster"] == pytest.approx(4 / (4 - 0.9 * most), rel=1e-3)
    with pytest.raises(InputError, match=r"the nearest is 3\.07x"):
        search_plan(pipe, qpipe, run, stats, budget=4, hold=True, seconds=seconds)
    found = measure_seconds(qpipe, run, timesteps, (8,))
    assert 0 <= found.held < found.computed[8]
    heun = with_components(qpipe, scheduler=HeunDiscreteScheduler.from_config(qpipe.scheduler.config))
    told = measure(
        with_components(pipe, scheduler=heun.scheduler), heun, run.replace(eta=0.0)
    ).measured_on.model_timesteps
    found = measure_seconds(heun, run.replace(eta=0.0), told, (8,))  # which takes some timesteps twice
    assert found.held == 0 < found.computed[8]


def test_in_seconds_groups_share_a_step_by_their_operations(pipe: Any, run: Sampling) -> None:
    wide = quantize(pipe, Recipe.from_dict({**Recipe.parse("w8a4+8").to_dict(), "calibration_samples": 4}), run)
    problem = planning_problem(pipe, wide, run, measure_widths(pipe, wide, run), hold=True)
    timed = problem.in_seconds(StepSeconds({4: 0.5, 8: 1.0}, 0.1))
    shape = problem.errors.shape[:2]
    for index, seconds in ((0, 0.5), (1, 1.0)):
        choice = np.full(shape, index)
        assert timed.cost(choice, np.zeros(0, dtype=np.int64)) == pytest.approx(4 * seconds)
    held = timed.holding((False, True, True, False))
    assert held.cost(np.full(shape, 1), np.zeros(0, dtype=np.int64)) == pytest.approx(2 * 1.0 + 2 * 0.1)
