"""Which roundings the denoiser's output shows, and who gets more bits for it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import tiny_pipeline
from ptqd import InputError, QuantSpec, Recipe, Rule, Sampling, load, quantize
from ptqd.diffusion import run_batch
from ptqd.quantization.bops import run_cost
from ptqd.quantization.hf_quantizer import coverage_of
from ptqd.quantization.methods import Smooth, Widen
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.output_effect import OutputEffects
from ptqd.quantization.widen import Form, Operand, choose_forms


class Network(nn.Module):
    """Two layers and something that bends between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

    def after(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(hidden))
        return result


def test_the_effect_is_the_jacobians() -> None:
    torch.manual_seed(0)
    network, x = Network(), torch.randn(1, 2, 5, 5)
    hidden = network.first(x).detach()
    moves = {"all": 0.01 * torch.randn_like(hidden), "one": torch.zeros_like(hidden)}
    moves["one"][0, 3, 2, 2] = 0.1
    found = OutputEffects[str]()

    def call(rows: list[int]) -> torch.Tensor:
        own = found.watch("hidden", network.first(x), lambda: moves)
        return network.after(own)

    found.run(call, 600)
    output, energy = network.after(hidden), float(network.after(hidden).detach().square().sum())
    for name, move in moves.items():
        _, change = torch.autograd.functional.jvp(network.after, hidden, move)
        assert found.effects[name] == pytest.approx(float(change.detach().square().sum()) / energy, rel=0.25)
    assert output.shape == x.shape


class Residual(nn.Module):
    """A residual network; the names say what each layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Conv2d(2, 4, 1)
        self.normed, self.shifted, self.activated = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.sum, self.pooled_sum, self.joined_sum = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)
        self.norm, self.embed = nn.GroupNorm(2, 4), nn.Linear(3, 8)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.leaf(x)
        h = h + self.normed(F.silu(self.norm(h)))
        scale, shift = self.embed(emb)[..., None, None].chunk(2, dim=1)
        h = h + self.shifted(F.silu(self.norm(h) * (1 + scale) + shift))
        h = self.sum(h) + self.activated(F.silu(self.normed(self.norm(h))))
        low = self.pooled_sum(F.avg_pool2d(h, 2))
        result: torch.Tensor = self.joined_sum(torch.cat([F.interpolate(low, scale_factor=2.0) + h, h], dim=1))
        return result


def test_streams_are_sums_without_a_norm_since() -> None:
    network = Residual()
    found = OutputEffects[str]()
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: found.note(name, args[0]))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    found.run(lambda rows: network(torch.randn(1, 2, 4, 4), torch.randn(1, 3)), 1)
    assert len(hooks) == 8
    assert found.streams == {"sum", "pooled_sum", "joined_sum"}


effects = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))


@given(st.lists(effects, min_size=1, max_size=6), st.floats(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_budget_holds_and_each_pays(layers: list[tuple[float, float, float, float, int]], budget: float) -> None:
    macs = {f"l{i}": float(layer[4]) for i, layer in enumerate(layers)}
    operands = []
    for i, (a, comes, w, floor, _) in enumerate(layers):
        forms = ((Form(8), a + floor), (Form(16), floor), (Form(8, dynamic=True), comes * (a + floor)))
        operands += [Operand(f"l{i}", "activations", forms)]
        operands += [Operand(f"l{i}", "weights", ((Form(4), w), (Form(8), w / 256)))]
    error, others = sum(each.forms[0][1] for each in operands) + 0.1, 50.0
    chosen = choose_forms(operands, macs, others, error, budget)
    forms_now = {(each.layer, each.kind): each.forms[0][0] for each in operands}
    before = others + sum(n * 4 * 8 for n in macs.values())
    for each in chosen:
        forms_now[each.layer, each.kind] = each.form
    kinds: tuple[Any, Any] = ("weights", "activations")
    after = others + sum(
        n * forms_now[name, kinds[0]].bits * forms_now[name, kinds[1]].bits for name, n in macs.items()
    )
    assert after <= budget * before * (1 + 1e-9)
    known = {(each.layer, each.kind): dict(each.forms) for each in operands}
    for each in chosen:
        own = known[each.layer, each.kind]
        assert own[each.form] < next(iter(own.values()))
    assert len({(each.layer, each.kind) for each in chosen}) == len(chosen)


def test_the_most_rewarding_come_first() -> None:
    def activations(name: str, *errors: float) -> Operand:
        forms = (Form(8), Form(16), Form(8, dynamic=True))
        return Operand(name, "activations", tuple(zip(forms, errors, strict=True)))

    weights = [Operand(name, "weights", ((Form(8), 0.0),)) for name in ("small", "large", "clipped", "none")]
    operands = [activations("small", 5, 0, 5), activations("large", 3, 0, 3), activations("clipped", 1, 0.6, 0.01)]
    operands += [activations("none", 0.5, 0.4, 0.5), *weights]
    macs = {"small": 1.0, "large": 10.0, "clipped": 5.0, "none": 84.0}
    chosen = choose_forms(operands, macs, 0.0, 9.5, 1.25)
    assert [(each.layer, each.form) for each in chosen] == [
        ("small", Form(16)),
        ("clipped", Form(8, dynamic=True)),
        ("large", Form(16)),
    ]


def heavy_tailed() -> Any:
    """A pipeline whose stream has one channel far larger than the others, which norms hide and shortcuts read."""
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.weight[3] *= 300
        pipe.unet.conv_in.bias[3] *= 300
    return pipe


@pytest.fixture(scope="module")
def wide() -> tuple[Any, Sampling, Any, Any]:
    pipe = heavy_tailed()
    run = Sampling(steps=3, samples=4, batch=4, call={"class_labels": [0, 1, 2], "guidance_scale": 2.0})
    recipe = dataclasses.replace(Recipe.parse("w8a8-split"), calibration_samples=4, rules=())
    recipe = dataclasses.replace(recipe, weights=QuantSpec(8, range="minmax"))
    recipe = dataclasses.replace(recipe, activations=QuantSpec(8, symmetric=False, range="minmax"))
    plain = quantize(pipe, recipe, run)
    return pipe, run, plain, quantize(pipe, dataclasses.replace(recipe, methods=(Widen(),)), run)


def test_layers_that_read_the_stream_get_more_bits_or_ranges_of_their_own(wide: tuple[Any, Sampling, Any, Any]) -> None:
    pipe, run, plain, quantized = wide
    rules = Recipe.from_dict(quantized.unet.hf_quantizer.quantization_config.recipe).rules
    chosen = {rule.match for rule in rules if rule.activation_bits == 16 or rule.dynamic}
    assert any("conv_shortcut" in name for name in chosen)
    assert chosen <= set(coverage_of(quantized).quantized)
    full, before, after = (run_batch(each, run, range(4), "latent") for each in (pipe, plain, quantized))
    assert (after - full).square().mean() < 0.3 * (before - full).square().mean()
    assert run_cost(plain, run).total <= run_cost(quantized, run).total <= 1.25 * run_cost(plain, run).total


def test_what_wide_chose_is_saved(wide: tuple[Any, Sampling, Any, Any], tmp_path: Path) -> None:
    *_, run, _, quantized = wide
    quantized.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(run_batch(again, run, range(2), "latent"), run_batch(quantized, run, range(2), "latent"))
    widths = {q.bits for m in again.unet.modules() if isinstance(q := m, ActivationQuantizer)}
    assert widths <= {8, 16}
    dynamic = {q.spec.dynamic for m in again.unet.modules() if isinstance(q := m, ActivationQuantizer)}
    assert len(widths) + len(dynamic) > 2


@pytest.mark.parametrize("bits", [2, 9, 12, 16])
def test_every_width_halves_the_step(bits: int) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    quantizer = ActivationQuantizer(QuantSpec(bits, symmetric=False, range="minmax"))
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert float((quantizer(x) - x).abs().max()) <= step * 0.51 + 1e-6
    assert len(quantizer(x).unique()) > min(2**bits, 1000) * 0.6


def test_wide_comes_first_and_says_what_it_cannot() -> None:
    with pytest.raises(InputError, match="'wide' decides what the other methods work on; name it first"):
        dataclasses.replace(Recipe.parse("w8a8"), methods=(Smooth(), Widen()))
    with pytest.raises(InputError, match="budget must be at least 1"):
        Widen(budget=0.5)
    with pytest.raises(InputError, match="bits must be 2 to 16; got 17"):
        Widen(bits=17)
    with pytest.raises(InputError, match="weights' bits must be 2 to 8; got 9"):
        Rule("x", weight_bits=9)
    assert Recipe.parse("w4a8-best").methods[0] == Widen()
