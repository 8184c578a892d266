import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ptqd import InputError, QuantSpec, Recipe, Sampling, load, quantize
from ptqd.diffusion import StepIndex, fingerprint, record, run_batch
from ptqd.quantization import RangeSteps, StepRanges, draw_inputs, group_steps, range_steps_of, step_weights
from ptqd.quantization.modules import ActivationQuantizer
from ptqd.quantization.numerics import Observer


def squared(logs: torch.Tensor, cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(logs)]
    parts = [logs[a:b] for a, b in itertools.pairwise(edges)]
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_are_the_best_of_all(count: int) -> None:
    widths = (torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * 2).exp()
    groups = group_steps(widths, count)
    cuts = tuple(i for i in range(1, 8) if groups[i] != groups[i - 1])
    logs = widths.double().log()
    best = min(squared(logs, c) for c in itertools.combinations(range(1, 8), count - 1))
    assert squared(logs, cuts) == pytest.approx(best)
    assert groups[0] == 0
    assert max(groups) == count - 1


def test_no_more_groups_than_steps() -> None:
    assert group_steps(torch.ones(2, 1), 5) in ((0, 0), (0, 1))


def test_the_clock_takes_the_nearest_step() -> None:
    ranges = StepRanges((900.0, 500.0, 100.0), (0, 0, 1), ("a",))
    clock = RangeSteps(ranges, StepIndex(), StepIndex())
    assert [clock.index_at(t) for t in (999.0, 701.0, 699.0, 100.0, 0.0)] == [0, 0, 1, 2, 2]
    clock.set([2])
    assert (clock.step.index, clock.group.index) == (2, 1)
    clock.set([0, 2])
    assert torch.as_tensor(clock.step.index).tolist() == [0, 2]
    assert torch.as_tensor(clock.group.index).tolist() == [0, 1]
    assert StepRanges.from_dict(ranges.to_dict()) == ranges
    assert (ranges.of_layer("a"), ranges.of_layer("b")) == (3, 2)
    with pytest.raises(InputError, match="2 timesteps with 1 groups"):
        StepRanges((1.0, 2.0), (0,))


def test_rows_of_several_steps_round_as_each_alone() -> None:
    quantizer = ActivationQuantizer(QuantSpec(4, symmetric=False), ranges=3)
    quantizer.observe()
    for i in range(3):
        quantizer.step.index = i
        quantizer(torch.randn(5, 6) * 10.0**i)
    quantizer.freeze()
    x = torch.randn(3, 2, 6)
    alone = []
    for i in range(3):
        quantizer.step.index = i
        alone.append(quantizer(x[i]))
    quantizer.step.index = torch.arange(3)
    assert torch.equal(quantizer(x), torch.stack(alone))
    heads = quantizer(x.repeat_interleave(4, 0))  # heads follow their sample
    assert torch.equal(heads, torch.stack(alone).repeat_interleave(4, 0))
    with pytest.raises(InputError, match="4 rows of an activation cannot be told the steps of 3 samples"):
        quantizer(torch.randn(4, 6))


def test_a_step_that_was_never_seen_gets_the_range_of_all() -> None:
    quantizer = ActivationQuantizer(QuantSpec(8, symmetric=False, range="minmax"), ranges=2)
    quantizer.observe()
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.freeze()
    assert quantizer.scale[0].item() == pytest.approx(quantizer.scale[1].item())


def test_observers_merge() -> None:
    parts, whole = [Observer(), Observer()], Observer()
    for part, x in zip(parts, (torch.randn(4000), 30 * torch.randn(4000)), strict=True):
        part.update(x)
        whole.update(x)
    merged = Observer.merged(parts)
    assert (merged.low, merged.high, merged.exponent) == (whole.low, whole.high, whole.exponent)
    assert merged.counts.sum() == whole.counts.sum()
    grid = QuantSpec(4, symmetric=False).grid
    a, b = (observer.range(grid, "pnorm", 99.9, 2.4) for observer in (merged, whole))
    assert a[1].item() == pytest.approx(b[1].item(), rel=0.05)


def test_dynamic_ranges_follow_tokens_and_samples() -> None:
    x = torch.randn(4, 5, 8) * torch.tensor([0.01, 1, 100, 1e4]).view(4, 1, 1)
    spec = QuantSpec(8, symmetric=False, dynamic=True)
    by_token, by_sample = ActivationQuantizer(spec), ActivationQuantizer(spec, axis=1, rowwise=True)
    for quantizer in (by_token, by_sample):
        error = (quantizer(x) - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert (error < 0.01).all()
        assert torch.equal(quantizer(x)[1:2], quantizer(x[1:2]))
        assert torch.equal(quantizer(torch.zeros(2, 3, 8)), torch.zeros(2, 3, 8))
    assert (by_token(x) - x).square().sum() < (by_sample(x) - x).square().sum()


def few(recipe: str, **changes: Any) -> Recipe:
    return Recipe.from_dict({**Recipe.parse(recipe).to_dict(), "calibration_samples": 4, **changes})


def test_ranges_by_step_lower_the_error_and_are_saved(pipe: Any, run: Sampling, tmp_path: Path) -> None:
    plain, stepped = quantize(pipe, few("w8a4"), run), quantize(pipe, few("w8a4-steps4-time"), run)
    clock = range_steps_of(stepped.unet)
    assert clock is not None
    assert clock.ranges.count == 4
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} <= set(clock.ranges.temporal)
    assert all("attn" not in name and "conv" not in name for name in clock.ranges.temporal)
    assert stepped.unet.time_embedding.linear_1.input.ranges == run.steps
    stepped.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert fingerprint(again.unet) == fingerprint(stepped.unet)
    a, b = (run_batch(p, run, range(3), "latent") for p in (stepped, again))
    assert torch.equal(a, b)
    errors = []
    for quantized in (plain, stepped):
        with record(pipe) as trajectory:
            run_batch(pipe, run, range(4), "latent")
        errors.append(float((run_batch(quantized, run, range(4), "latent") - trajectory.final).square().mean()))
    assert errors[1] < errors[0]
    with torch.no_grad():  # another schedule takes the nearest steps' ranges
        run_batch(stepped, run.replace(steps=7), range(2), "latent")


def test_calibration_draws_the_same_whatever_the_batch(pipe: Any, run: Sampling) -> None:
    pools = [draw_inputs(pipe, run.replace(batch=batch), 12, step_weights("uniform", 4)) for batch in (8, 3)]
    assert torch.equal(pools[0].steps, pools[1].steps)
    both = [[x for x in tree_leaves(pool.call(range(12))) if isinstance(x, torch.Tensor)] for pool in pools]
    for a, b in zip(*both, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-5)
    assert len(pools[0]) == 12
    args, kwargs = pools[0].call(range(5))
    with torch.no_grad():
        assert pipe.unet(*args, **kwargs).sample.shape == (5, 4, 8, 8)
    assert (
        len(draw_inputs(pipe, run.replace(samples=2), 1000, step_weights("uniform", 4))) == 2 * 4 * 2
    )  # all there are


def test_step_weights() -> None:
    for kind in ("uniform", "ptq4dm", "error"):
        weights = step_weights(kind, 11, torch.arange(11.0))
        assert weights.sum() == pytest.approx(1)
        assert (weights > 0).all()
    assert step_weights("ptq4dm", 11).argmax() == 6  # 0.4 of the way from the data, which comes last
    assert step_weights("error", 11, torch.arange(11.0))[-1] == pytest.approx((1 / 11 + 10 / 55) / 2)
    assert step_weights("error", 3, torch.zeros(3)).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("kind", ["ptq4dm", "error"])
def test_ranges_are_found_on_drawn_steps(kind: str, pipe: Any, run: Sampling) -> None:
    drawn = quantize(pipe, few("w8a8", calibration_steps=kind), run)
    assert fingerprint(drawn.unet) != fingerprint(quantize(pipe, few("w8a8"), run).unet)


def test_drawn_steps_follow_the_weights(pipe: Any, run: Sampling) -> None:
    weights = step_weights("ptq4dm", 4)
    pool = draw_inputs(pipe, run.replace(samples=32, batch=16), 400, weights)
    share = torch.bincount(pool.steps, minlength=4) / len(pool)
    assert torch.allclose(share, torch.from_numpy(weights).float(), atol=0.08)


@pytest.mark.parametrize(("batch", "guidance", "labels"), [(3, 2.0, [0, 1, 2]), (1, 1.0, [3]), (4, 1.0, [3])])
def test_layers_that_see_the_step_alone_whatever_the_run(batch: int, guidance: float, labels: Any, pipe: Any) -> None:
    run = Sampling(steps=3, samples=4, batch=batch, call={"class_labels": labels, "guidance_scale": guidance})
    clock = range_steps_of(quantize(pipe, few("w8a8-time"), run).unet)
    assert clock is not None
    assert len(clock.ranges.temporal) == 10
    assert not any("attn" in name for name in clock.ranges.temporal)
