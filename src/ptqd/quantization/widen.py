"""Which operands get more bits or a range as it comes: those whose rounding the denoiser's output shows most.

Greedy, as for a knapsack: the weight or activation that takes away most of the predicted error for each bit operation
comes first, as long as the share of the error that it takes away is several times the share of bit operations that it
adds, and the budget holds. The error is predicted by :mod:`ptqd.quantization.output_effect`. It is the layers
that read a residual network's stream as it is which this finds: their range has no bound, and 8 bits of it are few. A
convolution whose range differs much from sample to sample can have that of each sample instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.macs import PRODUCTS
from ptqd.diffusion.offload import weights_left_behind
from ptqd.quantization.calibration import CalibrationInputs
from ptqd.quantization.methods import Widen
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.numerics.observer import Observer
from ptqd.quantization.numerics.weight_grid import WeightGrid
from ptqd.quantization.output_effect import OutputEffects
from ptqd.quantization.recipe import LayerType, Recipe, Rule
from ptqd.quantization.sites import Site, quantized_sites
from ptqd.quantization.swap import names_of

RETURN = 4.0  # how many times the share of bit operations the share of error has to be
NEGLIGIBLE = 0.002  # share of the error that no rule is worth
AS_IT_COMES = 0.5  # of a layer's bit operations at 8 bits, as which a convolution's range of each sample counts

Kind = Literal["activations", "weights"]


@dataclass(frozen=True)
class Form:
    """How an operand is rounded.

    Attributes:
        bits: to so many.
        dynamic: by a range that is found as it comes; of activations.
    """

    bits: int
    dynamic: bool = False


Effect = tuple[str, Kind, Form]  # of an operand's rounding, by its layer


@dataclass(frozen=True)
class Operand:
    """A layer's weight or activation.

    Attributes:
        layer: its name.
        kind: which of the two.
        forms: that it can have, with what each does to the denoiser's output; the one that it has first.
    """

    layer: str
    kind: Kind
    forms: tuple[tuple[Form, float], ...]


@dataclass(frozen=True)
class Choice:
    """An operand that is to be rounded otherwise."""

    layer: str
    kind: Kind
    form: Form


def choose_forms(
    operands: Sequence[Operand],
    macs: Mapping[str, float],
    others: float,
    error: float,
    budget: float,
    least: float = RETURN,
) -> list[Choice]:
    """Which operands are rounded otherwise, the most rewarding first.

    Args:
        operands: both of each layer.
        macs: multiply-accumulates by layer.
        others: bit operations of all that is not among the operands.
        error: predicted of all roundings together.
        budget: how many times as many bit operations there may be in the end.
        least: an operand's share of the error that is left must be so many times its share of what it costs: bit
            operations, and :data:`AS_IT_COMES` for a range that is found as it comes, which few engines have.
    """
    now = {(each.layer, each.kind): each.forms[0] for each in operands}
    started_dynamic = {each.layer for each in operands if each.forms[0][0].dynamic}

    def operations(layer: str, weights: Form, activations: Form) -> float:
        return macs.get(layer, 0.0) * weights.bits * activations.bits

    def cost(layer: str, weights: Form, activations: Form) -> float:
        extra = AS_IT_COMES * 8 if activations.dynamic and layer not in started_dynamic else 0.0
        return macs.get(layer, 0.0) * weights.bits * (activations.bits + extra)

    def both(each: Operand, form: Form) -> tuple[Form, Form]:
        other: Kind = "weights" if each.kind == "activations" else "activations"
        kept = now[each.layer, other][0]
        return (form, kept) if each.kind == "weights" else (kept, form)

    before = others + sum(
        operations(each.layer, *both(each, each.forms[0][0])) for each in operands if each.kind == "activations"
    )
    chosen: dict[tuple[str, Kind], Choice] = {}
    room = budget - 1
    while error > 0:
        best: tuple[float, Operand, Form, float, float] | None = None
        for each in operands:
            held, effect = now[each.layer, each.kind]
            for form, less in each.forms[1:]:
                gain = effect - less
                if gain / error < NEGLIGIBLE or form == held:
                    continue
                costs = (cost(each.layer, *both(each, form)) - cost(each.layer, *both(each, held))) / before
                added = (operations(each.layer, *both(each, form)) - operations(each.layer, *both(each, held))) / before
                if added > room or gain / error < least * costs:
                    continue
                worth = gain / max(costs, 1e-12)
                if best is None or (worth, each.layer) > (best[0], best[1].layer):
                    best = (worth, each, form, gain, added)
        if best is None:
            break
        _, each, form, gain, added = best
        now[each.layer, each.kind] = (form, dict(each.forms)[form])
        room, error = room - added, error - gain
        chosen[each.layer, each.kind] = Choice(each.layer, each.kind, form)
    return list(chosen.values())


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
    """A recipe with a rule for each layer of which an operand gets more bits, or a range as it comes.

    Args:
        recipe: by which the model's quantizers were made.
        method: says how many bits, and for how many more bit operations.
        model: the denoiser, its quantizers bypassed; they keep what they observed.
        inputs: rows of its calls, of samples that the quantizers did not observe: what clips new samples counts.
        macs: multiply-accumulates by layer, halves of split ones each.
        exempt: layers that stay as they are.
        seed: of the directions in which the output's change is taken.
        title: of a progress bar.
    """
    sites = list(quantized_sites(model))
    forms = {site.name: _forms(site, method, free=site.name not in exempt) for site in sites}
    effects = _effects(sites, forms, model, inputs.first(method.inputs), seed, title)
    operands, others = [], 0.0
    for site in sites:
        if site.weight is None:
            others += sum(macs.get(f"{site.name}{p}", 0.0) * site.activations[0].bits ** 2 for p in PRODUCTS)
            continue
        for kind, own in forms[site.name].items():
            known = tuple((form, effects.get((site.name, kind, form), 0.0)) for form in own)
            operands.append(Operand(site.name, kind, known))
    own_effects = {(name, kind, of[0]) for name, kinds in forms.items() for kind, of in kinds.items()}
    error = sum(value for name, value in effects.items() if name in own_effects or name[0] not in forms)
    kinds: dict[str, LayerType] = {site.name: site.kind for site in sites}
    rules: dict[str, Rule] = {}
    for each in choose_forms(operands, macs, others, error, method.budget):
        rule = rules.get(each.layer) or recipe.rule_of(names_of(each.layer), kinds[each.layer])
        if each.kind == "weights":
            rules[each.layer] = replace(rule, weight_bits=each.form.bits)
        else:
            had = forms[each.layer]["activations"][0]
            if each.form.bits != had.bits:
                rule = replace(rule, activation_bits=each.form.bits)
            rules[each.layer] = replace(rule, dynamic=True) if each.form.dynamic and not had.dynamic else rule
    return replace(recipe, rules=(*recipe.rules, *rules.values()))


def _forms(site: Site, method: Widen, *, free: bool) -> dict[Kind, tuple[Form, ...]]:
    """How a layer's operands can be rounded, by kind; none of an attention, the form that each has first."""
    if site.weight is None:
        return {}
    quantizer, weights = site.activations[0], site.weight.weights
    had, weight = Form(quantizer.bits, quantizer.spec.dynamic), Form(weights.bits)
    wide = Form(method.bits, had.dynamic)
    activations, codes = [had], [weight]
    if free and quantizer.spec.format == "int":
        activations += [wide] * (wide.bits > had.bits)
        single = len(quantizer.widths) == 1 and quantizer.ranges == 1 and site.kind == "conv"
        activations += [Form(had.bits, dynamic=True)] * (single and not had.dynamic)
    if free and weights.format == "int" and weight.bits < method.weight_bits:
        codes.append(Form(method.weight_bits))
    return {"activations": tuple(activations), "weights": tuple(codes)}


def _operand(site: Site, i: int) -> str:
    return site.name if site.weight is not None else f"{site.name} {i}"


def _effects(
    sites: list[Site],
    forms: Mapping[str, Mapping[Kind, tuple[Form, ...]]],
    model: nn.Module,
    inputs: CalibrationInputs,
    seed: int,
    title: str | None,
) -> dict[Effect, float]:
    """What each rounding does to the denoiser's output, in every form that an operand can have."""
    found = OutputEffects[Effect](seed)
    hooks = []
    for site in sites:
        for i, quantizer in enumerate(site.activations):
            if quantizer.is_static and not any(seen.low <= seen.high for seen in quantizer.observers):
                continue  # it gets the exact range of every step
            name = _operand(site, i)
            own = forms[site.name].get("activations", (Form(quantizer.bits, quantizer.spec.dynamic),))
            roundings: dict[Effect, ActivationQuantizer] = {}
            for form in own:
                roundings[name, "activations", form] = _frozen(quantizer, form)
            hooks.append(quantizer.register_forward_hook(partial(_watch_operand, found, name, roundings)))
        if site.weight is not None:
            kept = forms[site.name]["weights"]
            hooks.append(site.weight.register_forward_hook(partial(_watch_output, found, site.name, kept)))
    with hooked(*hooks), weights_left_behind(model):
        found.run(partial(inputs.run, model), len(inputs), title)
    return found.effects


def _frozen(quantizer: ActivationQuantizer, form: Form) -> ActivationQuantizer:
    """A quantizer like another that rounds now, in some form, its range of what the other observed."""
    spec = quantizer.spec if quantizer.spec.bits == form.bits else quantizer.spec.of(form.bits)
    spec = spec if spec.dynamic == form.dynamic else replace(spec, dynamic=form.dynamic)
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
        return {name: rounding.to(x.device)(x.detach()) - x.detach() for name, rounding in roundings.items()}

    return found.watch(place, x, moves)


def _watch_output(
    found: "OutputEffects[Effect]", place: str, forms: tuple[Form, ...], layer: Any, args: Any, y: torch.Tensor
) -> torch.Tensor:
    def moves() -> dict[Effect, torch.Tensor]:
        rows = layer.float_weight().detach().flatten(1).float().cpu()
        moved: dict[Effect, torch.Tensor] = {}
        for form in forms:
            spec = layer.weights if layer.weights.bits == form.bits else layer.weights.of(form.bits)
            change = WeightGrid.find(rows, replace(spec, range="minmax")).rounded(rows) - rows
            moved[place, "weights", form] = layer.matmul(
                args[0].detach(), change.view(layer.shape).to(y.device, layer.weight.dtype)
            )
        return moved

    return found.watch(place, y, moves)
