"""Which operands get more bits: those whose rounding moves the denoiser's output most for what they cost.

Greedy, as for a knapsack: the weight or activation that takes away most of the predicted error for each bit operation
comes first, as long as the share of the error that it takes away is several times the share of bit operations that it
adds, and the budget holds. The error is predicted by :mod:`ptqd.quantization.output_effect`. It is the layers
that read a residual network's stream as it is which this finds: their range has no bound, and 8 bits of it are few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.macs import PRODUCTS
from ptqd.quantization.calibration import CalibrationInputs
from ptqd.quantization.methods import Widen
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.numerics.observer import Observer
from ptqd.quantization.numerics.weight_grid import WeightGrid
from ptqd.quantization.output_effect import OutputEffects
from ptqd.quantization.recipe import LayerType, QuantSpec, Recipe, Rule
from ptqd.quantization.sites import Site, quantized_sites
from ptqd.quantization.swap import names_of

RETURN = 4.0  # how many times the share of bit operations the share of error has to be
NEGLIGIBLE = 0.002  # share of the error that no rule is worth

Kind = Literal["activations", "weights"]
Effect = tuple[str, Kind, int]  # of an operand's rounding, by its layer, and the bits it is rounded to


@dataclass(frozen=True)
class Operand:
    """A layer's weight or activation that could be wider.

    Attributes:
        layer: its name.
        kind: which of the two.
        bits: that it has.
        gain: of the predicted error at the denoiser's output, what more bits take away.
    """

    layer: str
    kind: Kind
    bits: int
    gain: float


def choose_wider(
    operands: Sequence[Operand],
    wider: Mapping[Kind, int],
    macs: Mapping[str, float],
    others: float,
    error: float,
    budget: float,
    least: float = RETURN,
) -> list[Operand]:
    """The operands to widen, the most rewarding first.

    Args:
        operands: both of each layer.
        wider: bits that each kind gets.
        macs: multiply-accumulates by layer.
        others: bit operations of all that is not among the operands.
        error: predicted of all roundings together.
        budget: how many times as many bit operations there may be in the end.
        least: an operand's share of the error that is left must be so many times its share of bit operations.
    """
    bits = {(each.layer, each.kind): each.bits for each in operands}
    chosen: list[Operand] = []

    def cost(each: Operand) -> float:
        """Bit operations that it adds, beside what the layer's other operand has by now."""
        other: Kind = "weights" if each.kind == "activations" else "activations"
        return macs.get(each.layer, 0.0) * bits[each.layer, other] * (wider[each.kind] - each.bits)

    before = others + sum(
        macs.get(each.layer, 0.0) * each.bits * bits[each.layer, "weights"]
        for each in operands
        if each.kind == "activations"
    )
    remaining, room = [each for each in operands if each.gain > 0 and each.bits < wider[each.kind]], budget - 1
    while error > 0:
        costs = {each: max(cost(each) / before, 1e-12) for each in remaining}
        fitting = [each for each in remaining if costs[each] <= room and each.gain / error >= least * costs[each]]
        if not fitting:
            break
        best = max(fitting, key=lambda each: (each.gain / costs[each], each.layer))
        if best.gain / error < NEGLIGIBLE:
            remaining.remove(best)
            continue
        room -= costs[best]
        error -= best.gain
        bits[best.layer, best.kind] = wider[best.kind]
        remaining.remove(best)
        chosen.append(best)
    return chosen


def widened(
    recipe: Recipe,
    method: Widen,
    model: nn.Module,
    inputs: CalibrationInputs,
    macs: Mapping[str, float],
    exempt: frozenset[str],
    *,
    seed: int = 0,
    title: str | None = None,
) -> Recipe:
    """A recipe with a rule for each layer of which an operand gets more bits.

    Args:
        recipe: by which the model's quantizers were made.
        method: says how many bits, and for how many more bit operations.
        model: the denoiser, its quantizers bypassed; they keep what they observed.
        inputs: rows of its calls.
        macs: multiply-accumulates by layer, halves of split ones each.
        exempt: layers that stay as they are.
        seed: of the directions in which the output's change is taken.
        title: of a progress bar.
    """
    sites = list(quantized_sites(model))
    wider: dict[Kind, int] = {"activations": method.bits, "weights": method.weight_bits}
    effects = _effects(sites, model, inputs.first(method.inputs), wider, seed, title)
    operands, others = [], 0.0
    for site in sites:
        quantizer, layer = site.activations[0], site.weight
        if layer is None:
            others += sum(macs.get(f"{site.name}{product}", 0.0) * quantizer.bits**2 for product in PRODUCTS)
            continue
        specs: dict[Kind, QuantSpec] = {"activations": quantizer.spec, "weights": layer.weights}
        for kind, spec in specs.items():
            before, after = (effects.get((site.name, kind, bits), 0.0) for bits in (spec.bits, wider[kind]))
            free = spec.format == "int" and site.name not in exempt
            operands.append(Operand(site.name, kind, spec.bits, before - after if free else 0.0))
    error = sum(value for (name, kind, bits), value in effects.items() if (name, kind, bits) in _own(sites))
    chosen = choose_wider(operands, wider, macs, others, error, method.budget)
    kinds: dict[str, LayerType] = {site.name: site.kind for site in sites}
    rules: dict[str, Rule] = {}
    for each in chosen:
        rule = rules.get(each.layer) or recipe.rule_for(names_of(each.layer), kinds[each.layer]) or Rule(each.layer)
        pattern = each.layer.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
        rule = replace(rule, match=pattern, type=None, optional=False)
        if each.kind == "weights":
            rules[each.layer] = replace(rule, weight_bits=method.weight_bits)
        else:
            rules[each.layer] = replace(rule, activation_bits=method.bits)
    return replace(recipe, rules=(*recipe.rules, *rules.values()))


def _own(sites: list[Site]) -> set[Effect]:
    """The names of the roundings that the sites have."""
    own: set[Effect] = set()
    for site in sites:
        own |= {(_operand(site, i), "activations", q.bits) for i, q in enumerate(site.activations)}
        if site.weight is not None:
            own.add((site.name, "weights", site.weight.weights.bits))
    return own


def _operand(site: Site, i: int) -> str:
    return site.name if site.weight is not None else f"{site.name} {i}"


def _effects(
    sites: list[Site],
    model: nn.Module,
    inputs: CalibrationInputs,
    wider: Mapping[Kind, int],
    seed: int,
    title: str | None,
) -> dict[Effect, float]:
    """What each rounding does to the denoiser's output, at the bits that it has and at the wider ones."""
    found = OutputEffects[Effect](seed)
    hooks = []
    for site in sites:
        for i, quantizer in enumerate(site.activations):
            name, widths = _operand(site, i), {quantizer.bits}
            if site.weight is not None and quantizer.spec.format == "int":
                widths.add(max(quantizer.bits, wider["activations"]))
            roundings: dict[Effect, ActivationQuantizer] = {
                (name, "activations", bits): _frozen(quantizer, bits) for bits in widths
            }
            hooks.append(quantizer.register_forward_hook(partial(_watch_operand, found, name, roundings)))
        if site.weight is not None:
            widths = {site.weight.weights.bits, max(site.weight.weights.bits, wider["weights"])}
            hooks.append(site.weight.register_forward_hook(partial(_watch_output, found, site.name, widths)))
    with hooked(*hooks):
        found.run(lambda rows: _called(model, inputs, rows), len(inputs), title)
    return found.effects


def _called(model: nn.Module, inputs: CalibrationInputs, rows: list[int]) -> Any:
    args, kwargs = inputs.call(rows)
    return model(*args, **kwargs)


def _frozen(quantizer: ActivationQuantizer, bits: int) -> ActivationQuantizer:
    """A quantizer like another that rounds now, to some bits, its range of what the other observed."""
    spec = quantizer.spec if quantizer.spec.bits == bits else quantizer.spec.of(bits)
    copied = ActivationQuantizer(spec, axis=quantizer.axis, rowwise=quantizer.rowwise)
    copied.observe([Observer.merged(quantizer.observers)] if copied.is_static else [])
    copied.freeze()
    return copied.to(quantizer.scale.device)


def _watch_operand(
    found: "OutputEffects[Effect]",
    place: str,
    roundings: Mapping[Effect, ActivationQuantizer],
    module: object,
    args: object,
    x: torch.Tensor,
) -> torch.Tensor:
    def moves() -> dict[Effect, torch.Tensor]:
        return {name: rounding(x.detach()) - x.detach() for name, rounding in roundings.items()}

    return found.watch(place, x, moves)


def _watch_output(
    found: "OutputEffects[Effect]", place: str, widths: set[int], layer: Any, args: Any, y: torch.Tensor
) -> torch.Tensor:
    def moves() -> dict[Effect, torch.Tensor]:
        rows = layer.weight.detach().flatten(1).float().cpu()
        moved: dict[Effect, torch.Tensor] = {}
        for bits in widths:
            spec = layer.weights if layer.weights.bits == bits else layer.weights.of(bits)
            change = WeightGrid.find(rows, replace(spec, range="minmax")).rounded(rows) - rows
            moved[place, "weights", bits] = layer.matmul(args[0].detach(), change.view(layer.shape).to(layer.weight))
        return moved

    return found.watch(place, y, moves)
