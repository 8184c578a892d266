import contextlib
import copy
import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from conftest import quick_recipe, tiny_pipeline
from ptqd import InputError, QuantSpec, Recipe, Sampling, from_module, load, quantize
from ptqd.diffusion import fingerprint, record, replay, run_batch
from ptqd.diffusion.pipeline_parts import denoiser_of
from ptqd.quantization import (
    LearnedScale,
    Soft,
    Straight,
    annealed,
    checkpoints,
    fit_exactly,
    gptq,
    hessian_inputs,
    insert_quantizers,
    search_smoothing,
    smoothing,
    split_low_rank,
)
from ptqd.quantization.modules import LayerOptions, QuantConv, QuantLayer, QuantLinear
from ptqd.quantization.numerics import WeightGrid
from ptqd.quantization.rounding import adaround_brecq as learned
from ptqd.quantization.rounding.gptq import Moments, correction_for_inputs, moments_of
from ptqd.quantization.rounding.learned_parameters import straight_round
from ptqd.quantization.sites import quantized_layers

W4, A8, A4 = QuantSpec(4), QuantSpec(8, symmetric=False), QuantSpec(4, symmetric=False)


def frozen(
    layer: nn.Module, x: torch.Tensor, weights: QuantSpec = W4, extras: LayerOptions | None = None
) -> QuantLayer:
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    made: QuantLayer = kind(layer, weights, A8, (), extras)
    made.observe()
    made(x)
    made.freeze()
    return made


def plain_gptq(rows: torch.Tensor, hessian: torch.Tensor, grid: WeightGrid, damping: float) -> torch.Tensor:
    """GPTQ as optimal brain surgery says it: after each column, the rest by the inverse Hessian of the rest."""
    w = rows.double().clone()
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    result = torch.empty_like(rows)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        q = grid.rounded(w.float())[:, j].double()
        w[:, j:] -= ((w[:, j] - q) / inverse[0, 0])[:, None] * inverse[0]
        result[:, j] = q.float()
    return result


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 8])
def test_a_weight_is_what_its_codes_stand_for(bits: int, symmetric: bool, group: int) -> None:
    made = frozen(nn.Linear(40, 7), torch.randn(3, 40), QuantSpec(bits, symmetric, group=group))
    assert torch.equal(made.dequantized(), made.grid().values(made.integer_weight()))


@pytest.mark.parametrize("group", [0, 4])
def test_gptq_is_optimal_brain_surgery(group: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12) @ torch.randn(12, 12)
    rows, hessian = torch.randn(5, 12), x.T @ x
    grid = WeightGrid.find(rows, QuantSpec(3, group=group))
    got = gptq(rows, hessian, grid, order=False, damping=0.01)
    assert torch.allclose(got, plain_gptq(rows, hessian, grid, 0.01), atol=1e-4)
    assert torch.equal(grid.rounded(got), got)
    apart = gptq(rows, [hessian[:8, :8], hessian[8:, 8:]], grid, order=True, damping=0.01)
    for part, groups in ((slice(0, 8), slice(0, 2)), (slice(8, 12), slice(2, 3))):
        scale, zero = (t[:, groups] if group else t for t in (grid.scale, grid.zero))
        own = WeightGrid(grid.spec, scale, zero, part.stop - part.start)
        alone = gptq(rows[:, part], hessian[part, part], own, order=True, damping=0.01)
        assert torch.equal(apart[:, part], alone)
    ordered = gptq(rows, hessian, grid, order=True, damping=0.01)
    nearest = (x @ (grid.rounded(rows) - rows).T).square().sum()
    for rounded in (got, ordered):
        assert (x @ (rounded - rows).T).square().sum() < nearest


def test_gptq_with_inputs_that_are_always_zero() -> None:
    rows, hessian = torch.randn(3, 6), torch.zeros(6, 6)
    grid = WeightGrid.find(rows, W4)
    assert torch.equal(gptq(rows, hessian, grid, order=True, damping=0.01), grid.rounded(rows))


def test_what_a_weight_lacks_on_other_inputs_is_least_squares() -> None:
    """Against numpy, with the ridge as rows of their own; blocks are as if the others were not there."""
    torch.manual_seed(0)
    x, change, rows = torch.randn(64, 8).double(), torch.randn(64, 8).double() / 9, torch.randn(3, 8)
    hessian, damping = x.T @ x, 0.02
    found = correction_for_inputs(rows, Moments([hessian], [change.T @ x]), damping)
    ridge = (damping * hessian.diagonal().mean()).sqrt() * torch.eye(8, dtype=torch.float64)
    inputs = np.concatenate([x, ridge])
    target = np.concatenate([change @ rows.double().T, np.zeros((8, 3))])
    np.testing.assert_allclose(found, np.linalg.lstsq(inputs, target, rcond=None)[0].T, atol=1e-5)
    halves = Moments([hessian[:4, :4], hessian[4:, 4:]], [(change[:, half].T @ x[:, half]) for half in HALF])
    apart = correction_for_inputs(rows, halves, damping)
    for half in HALF:
        alone = Moments([x[:, half].T @ x[:, half]], [change[:, half].T @ x[:, half]])
        assert torch.equal(apart[:, half], correction_for_inputs(rows[:, half], alone, damping))


HALF = (slice(0, 4), slice(4, 8))


@torch.no_grad()
def test_changes_are_of_the_same_calls_of_a_layer_that_is_called_twice() -> None:
    torch.manual_seed(0)
    full = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    layer = frozen(full["layer"], torch.randn(8, 4))
    theirs, ours = ([torch.randn(5, 4) for _ in range(4)] for _ in range(2))

    def call() -> None:
        for batch in (slice(0, 2), slice(2, 4)):
            for x in theirs[batch]:
                full["layer"](x)
            for x in ours[batch]:
                layer(x)

    found = moments_of({"layer": layer}, call, full, times=2)["layer"]
    changes = sum((a - b).T @ layer.input(b) for a, b in zip(theirs, ours, strict=True))
    torch.testing.assert_close(found.changes[0], changes)
    torch.testing.assert_close(found.hessians[0], sum(layer.input(x).T @ layer.input(x) for x in ours))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)),
        (nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 9)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, bias=False), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(3, 4, 3, padding="same", bias=False), torch.randn(2, 3, 5, 5)),
        (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1), bias=False), torch.randn(2, 2, 3, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_its_rows_times_these_inputs(layer: Any, x: torch.Tensor) -> None:
    made = frozen(layer, x)
    product = hessian_inputs(made, x) @ layer.weight.flatten(1).T
    want = layer(x)
    want = want.movedim(1, -1) if made.kind == "conv" else want
    assert torch.allclose(product.view(want.shape), want, atol=1e-5)


def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid() -> None:
    layer = nn.Linear(16, 8)
    made = frozen(layer, torch.randn(4, 16), QuantSpec(4, group=8))
    soft = Soft(made, made.target_weight(layer.weight))
    inside = (soft.floor >= -8) & (soft.floor < 7)
    assert torch.allclose(soft.weight().flatten(1)[inside], layer.weight[inside], atol=1e-3)
    soft.harden()
    assert (made.weight - layer.weight).abs()[inside].max() <= soft.scale.max() * 0.51
    with torch.no_grad():
        soft.v.fill_(-9)
    soft.harden()
    assert torch.equal(made.weight, (soft.floor.clamp(-8, 7) * soft.scale).view(8, 16))
    assert soft.penalty(2.0).item() == 0
    assert [annealed(p) for p in (0.0, 0.1, 1.0)] == [20, 20, pytest.approx(2)]


@pytest.mark.parametrize("spec", [W4, QuantSpec(4, symmetric=False), QuantSpec(4, group=8)], ids=str)
def test_straight_rounding_starts_at_the_codes(spec: QuantSpec) -> None:
    layer = nn.Linear(16, 8)
    made = frozen(layer, torch.randn(4, 16), spec)
    with torch.no_grad():
        moved = made.integer_weight().flatten(1)
        moved[0, 0] = spec.grid.qmin if moved[0, 0] > 0 else spec.grid.qmax  # a code far from the weight
        made.write(made.grid(), moved)
    before = made.weight.clone()
    straight = Straight(made, made.target_weight(layer.weight))
    assert torch.allclose(straight.weight(), before, atol=1e-6)
    straight.harden()
    assert torch.allclose(made.weight, before, atol=1e-6)
    with torch.no_grad():  # one step of the optimiser does not round back what was chosen
        straight.w[0, 0] += 0.05 * straight.w[0, 0].sign().neg() * straight.found.expanded()[0][0, 0] / straight.size
    assert torch.allclose(straight.weight(), before, atol=1e-6)
    straight.weight().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in straight.parameters().values())


def test_a_learned_scale_rounds_as_the_quantizer_does_and_has_lsqs_gradient() -> None:
    made = frozen(nn.Linear(6, 4), 3 * torch.randn(20, 6))
    x = torch.randn(5, 6)
    scale = LearnedScale(made.input, drop=0.0)
    assert torch.allclose(scale(x), made.input(x), atol=1e-5)
    s, z, grid = float(made.input.scale[0]), float(made.input.zero_point[0]), made.input.grids[0]
    scale(x).sum().backward()
    steps = x / s
    inside = (steps >= grid.qmin - z) & (steps <= grid.qmax - z)
    by_hand = torch.where(inside, steps.round() - steps, steps.clamp(grid.qmin - z, grid.qmax - z))  # LSQ, eq. 3
    assert scale.log_scale.grad is not None
    assert scale.log_scale.grad.item() == pytest.approx(float((by_hand * s).sum()), rel=1e-3)
    dropped = LearnedScale(made.input, drop=0.5)
    dropped.generator = torch.Generator().manual_seed(0)
    assert 0.2 < (dropped(x) == x).float().mean() < 0.9


def test_smoothing_evens_outliers_and_changes_nothing_in_full_precision() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6), torch.randn(40, 8)
    x[:, 2] *= 60
    x[:, 5] = 0
    made = QuantLinear(layer, QuantSpec(8), QuantSpec(4, symmetric=False), (), LayerOptions(smooth=True))
    search_smoothing(made, layer.weight, x, None)
    made.use_float(layer.weight)
    made.observe()
    assert torch.allclose(made(x), layer(x), atol=1e-4)
    made.freeze()
    plain = QuantLinear(layer, QuantSpec(8), QuantSpec(4, symmetric=False))
    plain.observe()
    plain(x)
    plain.freeze()
    assert (made(x) - layer(x)).square().sum() < 0.9 * (plain(x) - layer(x)).square().sum()
    assert smoothing(torch.zeros(8), layer.weight, 0.5).tolist() == [1.0] * 8
    scale = smoothing(x.abs().amax(0), layer.weight, 1.0)
    assert scale[5] == 1
    assert (x / scale).abs().amax(0)[[0, 2]].diff().abs().item() < 1e-3


@pytest.mark.parametrize("layer", [nn.Linear(32, 24), nn.Conv2d(16, 24, 3, padding=1)], ids=["linear", "conv"])
def test_a_low_rank_branch_takes_outliers(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        layer.weight += (
            3 * torch.randn(24, 1).view(-1, *[1] * (layer.weight.ndim - 1)) * torch.randn(layer.weight.shape[1:])
        )
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    errors = []
    for rank in (0, 4):
        made = kind(layer, W4, A8, (), LayerOptions(rank=rank))
        split_low_rank(made, layer.weight, 0)
        made.use_float(layer.weight)
        made.observe()
        assert torch.allclose(made(x), layer(x), atol=2e-2)
        made.freeze()
        errors.append(float((made(x) - layer(x)).detach().square().sum()))
    assert errors[1] < errors[0] / 10
    assert made.low_rank_up.dtype == torch.int16  # two bytes a number on disk


@pytest.mark.parametrize("layer", [nn.Linear(32, 24), nn.Conv2d(16, 24, 3, padding=1)], ids=["linear", "conv"])
def test_a_branch_in_few_bits(layer: Any) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(8, 32) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 5, 5)
    rows = [-1] + [1] * (layer.weight.ndim - 1)
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn(24).view(rows) * torch.randn(layer.weight.shape[1:])
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    errors, sizes = {}, {}
    for rank, bits in ((4, 16), (4, 8), (4, 2), (1, 16)):
        made = kind(layer, W4, A4, (), LayerOptions(rank=rank, rank_bits=bits))
        split_low_rank(made, layer.weight, 0)
        down, up = made.low_rank_weights()
        whole = made.target_weight(layer.weight) + up @ down  # codes stand for what the rounded branch leaves
        torch.testing.assert_close(whole.view(layer.weight.shape), layer.weight.detach())
        made.use_float(layer.weight)
        made.observe()
        torch.testing.assert_close(made(x), layer(x), rtol=1e-3, atol=1e-3)  # in full precision
        made.freeze()
        errors[rank, bits] = float((made(x) - layer(x)).detach().square().sum())
        sizes[rank, bits] = made.low_rank_down.nbytes + made.low_rank_up.nbytes
        again = kind(layer, W4, A4, (), LayerOptions(rank=rank, rank_bits=bits))
        again.load_state_dict(made.state_dict())
        assert torch.equal(again(x), made(x))
    assert errors[4, 8] < 1.1 * errors[4, 16]
    assert errors[4, 16] < errors[1, 16]
    assert errors[4, 2] > 2 * errors[4, 8]
    assert sizes[4, 16] == 2 * sizes[4, 8] == 8 * sizes[4, 2]


def test_gradients_pass_a_branch_in_eight_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    made = QuantLinear(layer, W4, A8, (), LayerOptions(rank=4, rank_bits=8))
    split_low_rank(made, layer.weight, 0)
    x = torch.randn(2, 32, requires_grad=True)
    made.low_rank(x).sum().backward()
    down, up = made.low_rank_weights()
    torch.testing.assert_close(x.grad, (up @ down).sum(0).expand(2, -1))


@pytest.mark.parametrize("layer", [nn.Linear(32, 24), nn.Conv2d(32, 24, 3, padding=1)], ids=["linear", "conv"])
def test_a_rotation_is_taken_where_it_helps(layer: Any) -> None:
    """Of one channel that all samples have large and that weights need: no divisor helps both, a rotation does."""
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(64, 32) if isinstance(layer, nn.Linear) else torch.randn(8, 32, 5, 5)
    outlier, plain = x.clone(), x.clone()
    outlier[:, 3] *= 40
    with torch.no_grad():
        layer.weight[:, 3] *= 10
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    groups, errors = {}, {}
    for rotate in (0, 16):
        made = kind(layer, W4, A4, (), LayerOptions(smooth=True, rotate=rotate))
        search_smoothing(made, layer.weight, outlier, None)
        groups[rotate] = made.rotated
        made.use_float(layer.weight)
        made.observe()
        torch.testing.assert_close(made(outlier), layer(outlier), rtol=1e-3, atol=1e-2)
        made.freeze()
        errors[rotate] = float((made(outlier) - layer(outlier)).detach().square().sum())
        again = kind(layer, W4, A4, (), LayerOptions(smooth=True, rotate=rotate))
        again.load_state_dict(made.state_dict())
        assert torch.equal(again(plain), made(plain))
    assert groups == {0: 1, 16: 16}
    assert errors[16] < 0.8 * errors[0]


def test_a_finite_set_of_inputs_is_fitted_better_than_to_nearest() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(6, 32)
    made = frozen(layer, x, QuantSpec(3))
    want = layer(x)
    before = (made(x) - want).square().sum()
    fit_exactly(made, made.target_weight(layer.weight), x, made.input(x).float(), 0.01)
    assert (made(x) - want).square().sum() < before / 20


def quick(*methods: dict[str, Any], recipe: str = "w3a4", **changes: Any) -> Recipe:
    return quick_recipe(recipe, **{"calibration_samples": 8, "methods": list(methods), **changes})


SHORT = {"iterations": 40, "inputs": 64, "batch": 16}


SEARCHED = {"activations": Recipe.parse("w3a4").to_dict()["activations"]}


@pytest.fixture(scope="module")
def whole() -> Any:
    """A pipeline of more layers, each of which adds to the error."""
    return tiny_pipeline(attention=True)


def output_error(pipe: Any, quantized: Any, run: Sampling) -> float:
    with record(pipe) as trajectory:
        run_batch(pipe, run, range(8), "latent")
    with replay(quantized, trajectory) as answer:
        run_batch(quantized, run, range(8), "latent")
    pairs = zip(answer.outputs, trajectory.outputs, strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def test_an_asymmetric_layer_makes_up_for_the_layers_before(
    whole: Any, run: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where calls do not wait for each other, for lack of memory."""
    eight: dict[str, Any] = {"recipe": "w3a8", "activations": {**SEARCHED["activations"], "bits": 8}}
    plain, asymmetric = (
        quantize(whole, quick({"name": "gptq", "inputs": 64, "asymmetric": a}, **eight), run) for a in (0.0, 0.5)
    )
    assert output_error(whole, asymmetric, run) < 0.9 * output_error(whole, plain, run)
    monkeypatch.setattr("ptqd.quantization.rounding.gptq.rows_that_wait", lambda *_: 0)
    again = quantize(whole, quick({"name": "gptq", "inputs": 64, "asymmetric": 0.5}, **eight), run)
    assert output_error(whole, again, run) == pytest.approx(output_error(whole, asymmetric, run), rel=0.02)


class Expert(nn.Module):
    """Its layer is one of its own, not half of one that was split."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.hidden(x))


class Routed(nn.Module):
    """A layer is called twice, and experts are given other tokens than in full precision, where there are several."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.read, self.twice, self.write = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 6)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tokens = self.twice(torch.relu(self.twice(self.read(x) + t.view(-1, 1, 1) / 1000)))
        choice, result = tokens[..., : len(self.experts)].argmax(-1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            if (choice == number).any():
                result[choice == number] = expert(tokens[choice == number])
        output: torch.Tensor = self.write(result)
        return output


@pytest.mark.parametrize("experts", [1, 3])
def test_asymmetric_where_layers_are_called_twice_or_given_other_tokens(
    experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pipe = from_module(Routed(experts), DDIMScheduler(clip_sample=False), (5, 6))
    run = Sampling(3, samples=32, batch=32)
    plain, waiting = (quantize(pipe, quick({"name": "gptq", "asymmetric": a}, recipe="w3a8"), run) for a in (0.0, 0.5))
    monkeypatch.setattr("ptqd.quantization.rounding.gptq.rows_that_wait", lambda *_: 0)
    anew = quantize(pipe, quick({"name": "gptq", "asymmetric": 0.5}, recipe="w3a8"), run)
    codes = [dict(quantized_layers(denoiser_of(each))) for each in (plain, waiting, anew)]
    assert all(
        not torch.equal(codes[0][name].codes, codes[1][name].codes)
        for name in codes[0]
        if name.endswith(("twice", "experts.0.hidden"))
    )
    if experts == 1:  # both ways count both calls
        assert all(torch.equal(codes[1][name].codes, codes[2][name].codes) for name in codes[0])


@pytest.mark.parametrize(
    "methods",
    [
        [{"name": "gptq", "inputs": 64}],
        pytest.param([{"name": "adaround", **SHORT, "iterations": 80}], marks=pytest.mark.slow),
        [{"name": "brecq", **SHORT}],
        pytest.param([{"name": "distill", **SHORT}], marks=pytest.mark.slow),
        pytest.param(
            [{"name": "smooth"}, {"name": "svd", "rank": 4}, {"name": "gptq", "inputs": 64}], marks=pytest.mark.slow
        ),
    ],
    ids=lambda methods: "+".join(m["name"] for m in methods),
)
def test_methods_lower_the_error_and_are_saved(methods: Any, whole: Any, run: Sampling, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**SEARCHED, "split_shortcuts": True, "time_embedding": True}
    nearest = quantize(whole, quick(**changes), run)
    made = quantize(whole, quick(*methods, **changes), run)
    assert output_error(whole, made, run) < 0.95 * output_error(whole, nearest, run)
    made.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert fingerprint(again.unet) == fingerprint(made.unet)
    assert torch.equal(run_batch(again, run, range(2), "latent"), run_batch(made, run, range(2), "latent"))


@pytest.mark.slow
def test_distillation_at_eight_bits_does_not_lose_what_rounding_kept(whole: Any, run: Sampling) -> None:
    methods = {"name": "distill", **SHORT, "iterations": 80}
    eight: dict[str, Any] = {"recipe": "w8a8", "activations": {**SEARCHED["activations"], "bits": 8}}
    nearest, made = (quantize(whole, quick(*chosen, **eight), run) for chosen in ([], [methods]))
    assert output_error(whole, made, run) < output_error(whole, nearest, run)


@pytest.mark.parametrize("name", ["brecq", pytest.param("distill", marks=pytest.mark.slow)])
def test_a_kill_between_or_inside_units_changes_nothing(
    name: str, pipe: Any, run: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "CHECKPOINT", 4)
    recipe = quick({"name": name, "iterations": 10, "inputs": 32, "batch": 8})
    want = quantize(pipe, recipe, run)
    kept = learned._keep
    calls = 0

    def killed(*args: Any) -> None:
        nonlocal calls
        kept(*args)
        calls += 1
        if calls in (2, 5):  # inside a unit, and between two or inside the next
            raise KeyboardInterrupt

    monkeypatch.setattr(learned, "_keep", killed)
    kills = 0
    while True:
        try:
            got = quantize(pipe, recipe, run, scratch=tmp_path)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 1
    assert fingerprint(got.unet) == fingerprint(want.unet)
    assert not list(tmp_path.rglob("*.bin"))  # inputs are not left behind


@pytest.mark.parametrize(
    ("methods", "changes"),
    [
        (("wide", "smooth", "gptq"), {"time_embedding": True, "step_ranges": 2}),
        pytest.param(("svd", "gptq"), {"calibration_steps": "ptq4dm"}, marks=pytest.mark.slow),
    ],
)
def test_a_kill_between_writes_changes_nothing(
    methods: tuple[str, ...],
    changes: dict[str, Any],
    pipe: Any,
    run: Sampling,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calibration, wide, smoothing, observing again and GPTQ go on from where they were."""
    options: dict[str, dict[str, Any]] = {"wide": {"inputs": 4}, "gptq": {"inputs": 16}}
    recipe = quick(*({"name": name, **options.get(name, {})} for name in methods), **changes)
    run = run.replace(batch=1)
    want = quantize(pipe, recipe, run)
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    plain, written = Path.replace, Counter[str]()

    def killed(self: Path, target: Path) -> Path:
        result = plain(self, target)
        written[f"{Path(target).parent.name}/{Path(target).name}"] += 1
        if written.total() % 13 == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Path, "replace", killed)
    got = None
    while got is None:
        with contextlib.suppress(KeyboardInterrupt):
            got = quantize(pipe, recipe, run, scratch=tmp_path)
    assert fingerprint(got.unet) == fingerprint(want.unet)
    layers = [name for name in written if "/layers-" in name]
    assert {name.partition("/")[0] for name in layers} == set(methods) - {"wide"}
    assert len(layers) > 4
    assert {written[name] for name in layers} == {1}  # nothing was done twice
    assert {count for name, count in written.items() if "/rows-" in name} <= {1, 2}  # twice if killed before its state


def test_damaged_checkpoints_are_done_again(pipe: Any, run: Sampling, tmp_path: Path, monkeypatch: Any) -> None:
    """As a loss of power leaves them: nothing is taken for done that is not, and no file of others is in the way."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    recipe = quick({"name": "gptq", "inputs": 16})
    want = quantize(pipe, recipe, run, scratch=tmp_path / "kept")
    layers = sorted(tmp_path.rglob("layers-*"))
    assert len(layers) > 4
    layers[1].write_bytes(b"damaged")
    for state in tmp_path.rglob("state.pt"):
        state.write_bytes(b"damaged")
    got = quantize(pipe, recipe, run, scratch=tmp_path / "kept")
    assert fingerprint(got.unet) == fingerprint(want.unet)
    again = quantize(pipe, recipe, run, scratch=tmp_path / "kept")  # of the files that were made anew
    assert fingerprint(again.unet) == fingerprint(want.unet)
    assert sorted(tmp_path.rglob("layers-*")) == layers


def test_nothing_is_written_that_is_not_to_be_kept(
    pipe: Any, run: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    written: list[Path] = []
    monkeypatch.setattr(Path, "replace", lambda self, target: written.append(target))
    quantize(pipe, quick({"name": "smooth"}, {"name": "gptq", "inputs": 16}), run)
    assert not written


def test_rules_pass_layers_over(pipe: Any, run: Sampling) -> None:
    rules = [{"match": "*", "type": "linear", "without": ["gptq", "smooth"]}]
    made = quantize(pipe, quick({"name": "smooth"}, {"name": "gptq"}, rules=rules), run)
    nearest = quantize(pipe, quick(), run)
    linear, conv = "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "down_blocks.0.resnets.0.conv1"
    assert torch.equal(made.unet.get_submodule(linear).codes, nearest.unet.get_submodule(linear).codes)
    assert not torch.equal(made.unet.get_submodule(conv).codes, nearest.unet.get_submodule(conv).codes)
    assert made.unet.get_submodule(linear).smooth_scale is None


def test_too_few_inputs_are_named(pipe: Any, run: Sampling) -> None:
    recipe = quick({"name": "brecq", "inputs": 200, "batch": 100}, calibration_samples=1)
    with pytest.raises(InputError, match="the calibration has 8 inputs, fewer than a batch of 100"):
        quantize(pipe, recipe, run)


def test_groups_that_do_not_fit_are_named(pipe: Any) -> None:
    made = copy.deepcopy(pipe.unet)
    insert_quantizers(made, Recipe.parse("w4a8-g8"))  # the first layer's 36 inputs share a scale
    assert made.conv_in.scale.shape == (8,)
    assert made.down_blocks[1].resnets[0].conv1.scale.shape == (16, 9)
    with pytest.raises(InputError, match=r"groups of 32 do not divide its \d+ inputs; choose one of 2, "):
        insert_quantizers(copy.deepcopy(pipe.unet), Recipe.parse("w4a8-g32"))


def test_half_a_split_layer_cannot_be_skipped(pipe: Any) -> None:
    recipe = Recipe.from_dict(
        {**Recipe.parse("w4a8-split").to_dict(), "rules": [{"match": "*.conv_shortcut.skip", "skip": True}]}
    )
    with pytest.raises(InputError, match="a rule skips one half of"):
        insert_quantizers(copy.deepcopy(pipe.unet), recipe)


def test_an_activation_that_never_varies_and_a_weight_that_is_zero(run: Sampling) -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.down_blocks[0].resnets[0].conv1.weight.zero_()
        pipe.unet.down_blocks[0].resnets[0].norm2.weight.zero_()  # conv2 then always sees the same
    for methods in (
        [{"name": "brecq", **SHORT, "iterations": 5}],
        [{"name": "smooth"}, {"name": "svd"}, {"name": "gptq"}],
    ):
        made = quantize(pipe, quick(*methods), run)
        assert bool(torch.isfinite(run_batch(made, run, range(2), "latent")).all())


@pytest.mark.parametrize("recipe", ["we4m3ae4m3", "we5m2ae5m2", "wmxfp4amxfp4", "wnvfp4anvfp4", "w4a8-dynamic", "w2a8"])
def test_formats_quantize_save_and_load(recipe: str, pipe: Any, run: Sampling, tmp_path: Path) -> None:
    made = quantize(pipe, quick_recipe(recipe), run)
    made.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert fingerprint(again.unet) == fingerprint(made.unet)
    images = run_batch(made, run, range(3), "latent")
    assert torch.equal(images, run_batch(again, run, range(3), "latent"))
    assert bool(torch.isfinite(images).all())


def test_smoothing_is_fitted_on_full_precision_inputs(
    pipe: Any, run: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptqd.quantization.rounding import smoothquant as smooth

    seen: dict[int, torch.Tensor] = {}
    want: list[torch.Tensor] = []
    name = "up_blocks.1.resnets.0.conv1"
    weight = pipe.unet.get_submodule(name).weight

    def search(layer: Any, full: torch.Tensor, x: torch.Tensor, alpha: Any) -> None:
        if full.data_ptr() == weight.data_ptr():
            seen[0] = x

    def fit(model: Any, full: Any, pool: Any, *rest: Any) -> None:
        hook = full.get_submodule(name).register_forward_pre_hook(lambda m, args: want.append(args[0]))
        args, kwargs = pool.call(range(len(pool)))
        with torch.no_grad():
            full(*args, **kwargs)
        hook.remove()
        kept(model, full, pool, *rest)

    kept = smooth.fit_smoothing
    monkeypatch.setattr(smooth, "search_smoothing", search)
    monkeypatch.setattr(smooth, "fit_smoothing", fit)
    quantize(pipe, quick({"name": "smooth"}), run)
    assert torch.allclose(seen[0], want[0], atol=1e-5)


def test_smoothed_time_embeddings_are_fitted_to_the_inputs_they_get(pipe: Any, run: Sampling) -> None:
    recipe = dataclasses.replace(Recipe.parse("w4a8-smooth-time"), calibration_samples=4)
    quantized = quantize(pipe, recipe, run)
    assert quantized.unet.time_embedding.linear_2.smooth_scale.std() > 0
    made: list[list[torch.Tensor]] = []
    for sampled in (pipe, quantized):
        outputs: list[torch.Tensor] = []
        hook = sampled.unet.time_embedding.register_forward_hook(lambda m, args, out, kept=outputs: kept.append(out))
        run_batch(sampled, run, range(2), "latent")
        hook.remove()
        made.append(outputs)
    want, got = (torch.stack(outputs) for outputs in made)
    assert (got - want).norm() < 0.02 * want.norm()


def test_a_second_method_starts_where_the_first_ended() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(64, 32)
    made = frozen(layer, x)
    moved = made.integer_weight().flatten(1).clone()
    up = (layer.weight / made.scale[:, None]).floor() == moved  # rounded down: take the other side
    moved = torch.where(up, moved + 1, moved - 1).clamp(-8, 7).to(moved.dtype)
    made.write(made.grid(), moved)
    soft = Soft(made, made.target_weight(layer.weight))
    soft.harden()
    assert (made.integer_weight().flatten(1) == moved).float().mean() > 0.98


@pytest.mark.parametrize("recipe", ["w4a8-smooth-qdiffusion", "w4a8-time-steps2"])
def test_half_precision_pipelines(recipe: str, run: Sampling) -> None:
    pipe = tiny_pipeline().to(torch.bfloat16)
    methods = Recipe.parse(recipe).to_dict()["methods"]
    for method in methods:
        if method["name"] == "brecq":
            method |= {"iterations": 3, "inputs": 16, "batch": 8}
    made = quantize(pipe, quick_recipe(recipe, 4, methods=methods), run)
    assert bool(torch.isfinite(run_batch(made, run, range(2), "latent").float()).all())


def test_a_rule_without_a_method_that_is_not_there() -> None:
    with pytest.raises(InputError, match="is without 'gptq', which is not among the methods"):
        quick(rules=[{"match": "*", "without": ["gptq"]}])


@pytest.mark.parametrize("shape", [(), (5, 1), (1, 7)])
def test_the_straight_gradient_is_that_of_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) / 4 + 0.1
    upstream = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    gradients = []
    for function in (straight_round, by_formula):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        result = function(a, s, -4, 3)
        gradients.append((result.detach(), *torch.autograd.grad((result * upstream).sum(), (a, s))))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
    assert (x / scale > 3).any()


def by_formula(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inside = torch.clamp(x / scale, low, high)
    return scale * (inside + (inside.round() - inside).detach())
