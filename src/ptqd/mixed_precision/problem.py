"""All that a plan can choose, with its errors and costs: measured, probed and counted, put into tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray

from ptqd.diffusion.deep_part import OwnDeepPart, deep_modules, is_deep
from ptqd.diffusion.macs import FULL_BITS, PRODUCTS, Macs, run_macs
from ptqd.diffusion.pipeline_parts import denoiser_of, denoisers_of
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.mixed_precision.contributions import contributions
from ptqd.mixed_precision.holding import HeldErrors
from ptqd.mixed_precision.paper_rule import model_timesteps
from ptqd.mixed_precision.seconds import StepSeconds
from ptqd.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
from ptqd.mixed_precision.shallow import ShallowErrors, measure_shallow
from ptqd.noise.measure import measure
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.bops import by_halves
from ptqd.quantization.hf_quantizer import ptqd_quantizer
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import quantized_sites
from ptqd.quantization.swap import names_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GROUPS = 8
TINY = 1e-300


@dataclass(frozen=True)
class Problem:
    """Errors and costs of all that can be chosen.

    Attributes:
        timesteps: as the denoiser is told (T,).
        groups: names of the layers in each group (G,).
        widths: activation bits (W,).
        errors: of the activations of each step and group at each width (T, G, W).
        weighted: layers whose weights' bits can be chosen (L,).
        weight_bits: of the weights (B,); empty where they are the recipe's.
        weight_errors: of each layer's weights at each width, all steps together (L, B).
        fixed_error: what cannot be chosen.
        group_of: group of each weighted layer's activations (L,); -1 for one that is not for a plan to change.
        layer_costs: bit operations of one bit of weight and one bit of activation of each weighted layer (T, L).
        costs: bit operations of each step and group at each width without the weighted layers' (T, G, W).
        weight_costs: bit operations of one bit of the weights of each layer with activations of fixed bits (T, L).
        fixed_costs: bit operations of all else (T,).
        full_cost: bit operations of the run in FP32.
        variance: of the final sample, for errors in dB.
        held_errors: of steps that hold their output, where a plan may have such.
        held: the steps that do (T,); empty where none does.
        shallow_errors: of steps that compute the outer blocks only, where a plan may have such.
        deep_costs: ``layer_costs``, ``costs``, ``weight_costs`` and ``fixed_costs`` of the deep part alone.
        shallow: the steps that do not compute it (T,); empty where all do.
        always: cost of the run whatever is chosen, steps that hold included.
        unit: of costs: bit operations, or seconds of a batch; ``full_cost`` is then the widest bits' at all steps.
    """

    timesteps: tuple[float, ...]
    groups: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    errors: Floats
    weighted: tuple[str, ...]
    weight_bits: tuple[int, ...]
    weight_errors: Floats
    fixed_error: float
    group_of: Ints
    layer_costs: Floats
    costs: Floats
    weight_costs: Floats
    fixed_costs: Floats
    full_cost: float
    variance: float
    held_errors: HeldErrors | None = None
    held: tuple[bool, ...] = ()
    shallow_errors: ShallowErrors | None = None
    deep_costs: tuple[Floats, Floats, Floats, Floats] | None = None
    shallow: tuple[bool, ...] = ()
    always: float = 0.0
    unit: Literal["operations", "seconds"] = "operations"

    def activation_costs(self, weights: Ints) -> Floats:
        """Bit operations of each step and group at each width (T, G, W), for the weights' bits (L,)."""
        total = self.costs.copy()
        for g in range(len(self.groups)):
            of_bit = self.layer_costs[:, self.group_of == g] @ weights[self.group_of == g]  # T
            total[:, g] += of_bit[:, None] * np.array(self.widths)
        return total

    def cost(self, choice: Ints, weights: Ints) -> float:
        """Bit operations of a choice of widths (T, G), as indices, and of weights' bits (L,)."""
        mine = float(np.take_along_axis(self.activation_costs(weights), choice[..., None], 2).sum())
        return mine + float((self.weight_costs @ weights).sum() + self.fixed_costs.sum()) + self.always

    def error(self, choice: Ints, weights: Ints) -> float:
        """Expected squared error of the final sample, mean over its elements."""
        total = float(np.take_along_axis(self.errors, choice[..., None], 2).sum()) + self.fixed_error
        for n, bits in enumerate(weights.tolist()):
            total += float(self.weight_errors[n, self.weight_bits.index(bits)])
        return total

    def in_seconds(self, seconds: StepSeconds) -> "Problem":
        """The same with costs in seconds: a group's share of a step's is its share of the operations.

        Raises:
            InputError: shallow steps can be chosen, and were not timed.
        """
        steps, widths = len(self.timesteps), self.widths
        operations = self.activation_costs(np.full(len(self.weighted), min(self.weight_bits, default=0)))[:, :, -1]
        total = operations.sum(1, keepdims=True)  # none where the layers are an engine's
        shares = np.where(total > 0, operations / np.maximum(total, TINY), 1 / max(1, len(self.groups)))  # T,G
        above = np.array([max(0.0, seconds.computed[bits] - seconds.held) for bits in widths])
        above = np.minimum.accumulate(above[::-1])[::-1]  # fewer bits that take longer are no cheaper than more
        costs, nothing = shares[:, :, None] * above, np.zeros_like(self.layer_costs)
        deep_costs = None
        if self.shallow_errors is not None:
            if seconds.shallow is None:
                raise InputError("what a shallow step takes was not timed; time the pipeline with deep=True")
            outer = min(1.0, max(0.0, seconds.shallow - seconds.held) / max(float(above[-1]), TINY))  # of a step
            deep_costs = nothing, costs * (1 - outer), np.zeros_like(self.weight_costs), np.zeros(steps)
        return replace(
            self,
            layer_costs=nothing,
            costs=costs,
            weight_costs=np.zeros_like(self.weight_costs),
            fixed_costs=np.zeros(steps),
            deep_costs=deep_costs,
            full_cost=steps * seconds.computed[widths[-1]],
            always=steps * seconds.held,
            unit="seconds",
        )

    def holding(self, held: Sequence[bool]) -> "Problem":
        """What is left to choose where some steps (T,) hold: these cost nothing, and the others' noise is held on.

        Raises:
            InputError: some do, and the problem is of plans that hold none.
        """
        if not any(held):
            return self
        if self.held_errors is None:
            raise InputError("what it does to hold steps was not asked for; make the problem with hold")
        computed = ~np.array(held)
        grown = self.held_errors.amplification(held).numpy() * computed
        most = self.errors[:, :, -1].sum(1)  # T
        rest = self.held_errors.error([False] * len(held)) - float(most.sum())  # the weights'
        changes = self.held_errors.error(held) - float(grown @ most) - rest
        return replace(
            self,
            errors=self.errors * grown[:, None, None],
            fixed_error=self.fixed_error + max(0.0, changes),
            layer_costs=self.layer_costs * computed[:, None],
            costs=self.costs * computed[:, None, None],
            weight_costs=self.weight_costs * computed[:, None],
            fixed_costs=self.fixed_costs * computed,
            held=tuple(map(bool, held)),
        )

    def without_deep(self, shallow: Sequence[bool]) -> "Problem":
        """What is left to choose where some steps (T,) are shallow: they cost what the outer blocks do.

        Raises:
            InputError: some are, and the problem is of plans that have none.
        """
        if not any(shallow):
            return self
        if self.shallow_errors is None or self.deep_costs is None:
            raise InputError("what shallow steps do was not asked for; make the problem with hold_deep")
        present = np.array(shallow, dtype=np.float64)
        own = (self.layer_costs, self.costs, self.weight_costs, self.fixed_costs)
        outer = [
            whole - deep * present.reshape(-1, *[1] * (deep.ndim - 1))
            for whole, deep in zip(own, self.deep_costs, strict=True)
        ]
        return replace(
            self,
            fixed_error=self.fixed_error + self.shallow_errors.error(shallow, self.held),
            layer_costs=outer[0],
            costs=outer[1],
            weight_costs=outer[2],
            fixed_costs=outer[3],
            shallow=tuple(map(bool, shallow)),
        )

    def decibels(self, error: float) -> float:
        """Signal-to-noise ratio of the final sample."""
        return 10 * math.log10(self.variance / max(error, 1e-300))


@dataclass(frozen=True)
class LayerBits:
    """What a layer's bits are before a plan; of an attention those of its products' operands.

    Attributes:
        weights: bits of the weights; 0 for an attention, which has none.
        activations: bits of the activations where a plan cannot change them, else None.
        fixed: the recipe has a rule for the weights, which a plan leaves alone.
    """

    weights: int
    activations: int | None
    fixed: bool = False


def make_problem(
    stats: Mapping[int, NoiseStats],
    macs: Macs,
    sensitivity: Sensitivity,
    layers: Mapping[str, LayerBits],
    *,
    softmax_bits: int = 8,
    weight_bits: Sequence[int] = (),
    fewest: NoiseStats | None = None,
    groups: int = GROUPS,
    hold: bool = False,
    shallow: ShallowErrors | None = None,
    deep: Mapping[str, str] | None = None,
) -> Problem:
    """All that a plan can choose, with its errors and costs.

    Args:
        stats: by width.
        macs: of the run.
        sensitivity: of the layers.
        layers: every quantized layer and attention by dotted name.
        softmax_bits: of the attention probabilities.
        weight_bits: that weights may get; none leaves them as they are.
        fewest: statistics with all weights that may change at the fewest of these bits and the widest activations.
        groups: how many groups of layers have bits of their own, at the most.
        hold: whether steps may hold the output of the step before.
        shallow: what steps do that compute the outer blocks only, where there may be such.
        deep: the denoiser's deep part then.
    """
    widths, choices = tuple(sorted(stats)), tuple(sorted(weight_bits))
    weighted = tuple(n for n in sensitivity.weighted if not layers[n].fixed) if choices else ()
    whole = np.stack([contributions(stats[b]).numpy() for b in widths], axis=1)  # T,W
    now = {name: layers[name].weights for name in sensitivity.weighted}
    of_weights, weight_errors = _weight_errors(whole, sensitivity, now, weighted, choices, fewest)

    free = tuple(name for name, own in layers.items() if own.activations is None)
    named = _grouped(sensitivity, macs, groups) if sensitivity.layers else (free,)
    index = {name: g for g, group in enumerate(named) for name in group}
    shares = np.zeros((len(whole), len(named), len(widths))) if sensitivity.layers else np.ones((len(whole), 1, 1))
    for q, name in enumerate(sensitivity.layers):
        shares[:, index[name]] += sensitivity.activations.numpy()[:, q]
    shares /= np.maximum(shares.sum(1, keepdims=True), TINY)
    of_activations = np.maximum(whole - of_weights[:, None], 0.01 * whole)  # T,W

    costs, layer_costs, weight_costs, fixed_costs = _costs(macs, layers, index, weighted, widths, softmax_bits)
    finals = stats[widths[-1]].finals
    deep_costs = None
    if shallow is not None:
        inner = torch.tensor([float(is_deep(name, deep or {})) for name in macs.layers], dtype=torch.float64)
        part = replace(macs, counts=macs.counts * inner)
        own = _costs(part, layers, index, weighted, widths, softmax_bits)
        deep_costs = own[1], own[0], own[2], own[3]
    return Problem(
        timesteps=model_timesteps(stats),
        groups=named,
        widths=widths,
        errors=of_activations[:, None, :] * shares,
        weighted=weighted,
        weight_bits=choices,
        weight_errors=weight_errors,
        fixed_error=0.0 if weighted else float(of_weights.sum()),
        group_of=np.array([index.get(name, -1) for name in weighted], dtype=np.int64),
        layer_costs=layer_costs,
        costs=costs,
        weight_costs=weight_costs,
        fixed_costs=fixed_costs,
        full_cost=float(macs.total * FULL_BITS**2),
        variance=float(finals.double().var()) if len(finals) else 1.0,
        held_errors=HeldErrors(stats[widths[-1]]) if hold else None,
        shallow_errors=shallow,
        deep_costs=deep_costs,
    )


def _weight_errors(
    whole: Floats,
    sensitivity: Sensitivity,
    now: Mapping[str, int],
    weighted: Sequence[str],
    choices: Sequence[int],
    fewest: NoiseStats | None,
) -> tuple[Floats, Floats]:
    """The weights' part of each step's error as they are (T,), and of the run's for each layer and choice (L, B).

    Without a choice the part is the first-order share. With one it is measured, on what the fewest bits add to the
    error: weights are off in the same way at every step, and add up more than activations do.
    """
    energy = sensitivity.weights.numpy()  # T,all,B
    columns = {bits: i for i, bits in enumerate(sensitivity.weight_bits)}
    present = energy[:, np.arange(len(now)), [columns[bits] for bits in now.values()]]  # T,all
    if not weighted or fewest is None:
        top = sensitivity.activations.numpy()[:, :, -1].sum(1)
        share = present.sum(1) / np.maximum(present.sum(1) + top, TINY)
        return whole[:, -1] * share, np.zeros((len(weighted), len(choices)))
    rows = [sensitivity.weighted.index(name) for name in weighted]
    chosen = energy[:, rows][:, :, [columns[bits] for bits in choices]]  # T,L,B
    lowest = np.maximum(chosen[:, :, 0].sum(1), TINY)
    remaining = np.clip(present[:, rows].sum(1) / lowest, 0, 0.99)
    added = np.maximum(contributions(fewest).numpy() - whole[:, -1], 0) / (1 - remaining)  # of all at the fewest bits
    errors: Floats = (chosen * (added / lowest)[:, None, None]).sum(0)
    return np.minimum(added * remaining, whole[:, -1]), errors


def _costs(
    macs: Macs,
    layers: Mapping[str, LayerBits],
    index: Mapping[str, int],
    weighted: Sequence[str],
    widths: Sequence[int],
    softmax_bits: int,
) -> tuple[Floats, Floats, Floats, Floats]:
    """``costs``, ``layer_costs``, ``weight_costs`` and ``fixed_costs`` of a :class:`Problem`."""
    bits = np.array(widths, dtype=np.float64)
    costs = np.zeros((len(macs.counts), max(index.values(), default=-1) + 1, len(bits)))
    layer_costs, weight_costs = (np.zeros((len(macs.counts), len(weighted))) for _ in range(2))
    fixed = np.zeros(len(macs.counts))
    for counts, name in zip(macs.counts.numpy().T, macs.layers, strict=True):
        product = next((p for p in PRODUCTS if name.endswith(p)), "")
        layer = name.removesuffix(product)
        if layer not in layers:
            fixed += counts * FULL_BITS**2
            continue
        own, group = layers[layer], index.get(layer)
        right = bits if own.activations is None else np.full(1, float(own.activations))
        left = right if product == PRODUCTS[0] else softmax_bits if product else own.weights
        if layer in weighted and group is not None:
            layer_costs[:, weighted.index(layer)] = counts
        elif layer in weighted:
            weight_costs[:, weighted.index(layer)] = counts * right[0]
        elif group is not None:
            costs[:, group] += counts[:, None] * left * right
        else:
            fixed += counts * (left * right)[0]
    return costs, layer_costs, weight_costs, fixed


def _grouped(sensitivity: Sensitivity, macs: Macs, groups: int) -> tuple[tuple[str, ...], ...]:
    """Layers by noise for each bit operation, the most sensitive first; within a factor of 4, which is one bit."""
    count = dict(zip(macs.layers, macs.counts.sum(0).tolist(), strict=True))
    energy = sensitivity.activations[:, :, 0].sum(0).tolist()
    rating = {
        name: math.log(max(e, 1e-30) / max(count.get(name, sum(count.get(name + p, 0.0) for p in PRODUCTS)), 1.0), 4)
        for name, e in zip(sensitivity.layers, energy, strict=True)
    }
    high = max(rating.values())
    result: dict[int, list[str]] = {}
    for name, value in rating.items():
        result.setdefault(min(int(high - value), groups - 1), []).append(name)
    return tuple(tuple(result[g]) for g in sorted(result))


def check_countable(qpipe: DiffusionPipeline, *, timed: bool) -> None:
    """Refuse an exported pipeline whose plan is to be counted in operations.

    Raises:
        InputError: it is one, and costs will not be in seconds.
    """
    if not timed and next(quantized_sites(denoiser_of(qpipe)), None) is None:
        raise InputError(
            "the operations of an exported pipeline are not counted; give a budget of seconds, such as 2x-seconds, or "
            "plan the quantized pipeline that it was exported from"
        )


def check_can_hold(qpipe: DiffusionPipeline, timesteps: Sequence[float] = (), *, deep: bool = False) -> None:
    """Refuse to choose steps that hold where it is not known what that does.

    Args:
        qpipe: quantized.
        timesteps: that the denoiser is told, where they are known yet.
        deep: whether the deep part of the network is to be held.

    Raises:
        InputError: the pipeline has several denoisers, or the schedule takes some timestep twice; or the deep part is
            not known, or the pipeline was exported without it.
    """
    if len(denoisers_of(qpipe)) > 1:
        raise InputError(
            f"{type(qpipe).__name__} has several denoisers, of which none holds what another gave; let no steps hold"
        )
    model = denoiser_of(qpipe)
    if deep and isinstance(model, OwnDeepPart):
        model.open_deep_part()
    elif deep:
        deep_modules(model)
    if len(set(timesteps)) < len(timesteps):
        raise InputError(
            "the schedule takes some timestep twice, so that its calls cannot be told apart; let no steps hold, or "
            "sample with a scheduler of one call a step"
        )


def planning_problem(
    pipe: DiffusionPipeline,
    qpipe: DiffusionPipeline,
    sampling: Sampling,
    stats: Mapping[int, NoiseStats],
    *,
    weight_bits: Sequence[int] = (),
    groups: int = GROUPS,
    hold: bool = False,
    hold_deep: bool = False,
    timed: bool = False,
    progress: bool = False,
) -> Problem:
    """What :func:`ptqd.search_plan` chooses from: measured errors and counted costs.

    Args:
        pipe: full precision.
        qpipe: quantized by ptqd with a recipe of several widths.
        sampling: how it samples.
        stats: by width, of this schedule itself.
        weight_bits: as for :func:`ptqd.search_plan`.
        groups: as for :func:`ptqd.search_plan`.
        hold: as for :func:`ptqd.search_plan`.
        hold_deep: likewise.
        timed: costs will be in seconds (:meth:`Problem.in_seconds`): operations need not be known.
        progress: show bars.

    Raises:
        InputError: the statistics were carried over from another schedule, there is one width and nothing is held, a
            rule fixes every layer's activations, or the denoiser cannot be differentiated.
    """
    recipe = Recipe.from_dict(ptqd_quantizer(qpipe).quantization_config.recipe)
    widest = max(stats)
    may_hold = hold or hold_deep
    if len(recipe.widths) < 2 and not may_hold:
        raise InputError(
            f"the model has ranges for {recipe.widths[0]}-bit activations only; quantize with, say, w4a4+8, or let "
            "steps hold their output (hold)"
        )
    if may_hold:
        check_can_hold(qpipe, model_timesteps(stats), deep=hold_deep)
    deep = deep_modules(denoiser_of(pipe)) if hold_deep else None
    layers: dict[str, LayerBits] = {}
    model = denoiser_of(qpipe)
    for site in quantized_sites(model):
        quantizer = site.activations[0]
        is_free = len(quantizer.widths) > 1 or (may_hold and (quantizer.bits,) == recipe.widths)
        bits = None if is_free else quantizer.bits
        rule = recipe.rule_for(names_of(site.name), site.kind)
        fixed = site.weight is not None and rule is not None and rule.weight_bits is not None
        layers[site.name] = LayerBits(0 if site.weight is None else site.weight.weights.bits, bits, fixed)
    check_countable(qpipe, timed=timed)
    if not layers:  # an engine's
        if weight_bits:
            raise InputError("the weights of an exported pipeline stay as they are; plan without bits for weights")
        layers["*"] = LayerBits(0, None)
    if all(own.activations is not None for own in layers.values()):
        raise InputError("the recipe fixes the activations' bits of every layer by a rule; there is nothing to plan")
    free_weights = [name for name, own in layers.items() if own.weights and not own.fixed]
    fewest = None
    if weight_bits and free_weights:
        fewer = dict.fromkeys(free_weights, min(weight_bits))
        plan = PrecisionPlan.uniform(model_timesteps(stats), recipe.widths[-1]).replace(weights=fewer)
        half = sampling.replace(samples=max(sampling.samples // 2, 16))
        title = "measuring weights" if progress else False
        fewest = measure(pipe, apply_plan(qpipe, plan, pipe), half, progress=title)
    known = sorted({*(own.weights for own in layers.values() if own.weights), *weight_bits})
    macs = by_halves(run_macs(pipe, sampling), model)
    if len(recipe.widths) > 1 or weight_bits:
        sensitivity = measure_sensitivity(pipe, qpipe, sampling, weight_bits=known, progress=progress)
    else:  # steps that hold, or hold the deep part, are all there is to choose
        nothing = torch.zeros(len(macs.counts), 0, 1, dtype=torch.float64)
        sensitivity = Sensitivity((), recipe.widths, nothing, (), (), nothing)
    shallow = None
    if deep is not None:
        shallow = measure_shallow(pipe, qpipe, sampling, stats[widest], widest, progress=progress)
    return make_problem(
        stats,
        macs,
        sensitivity,
        layers,
        softmax_bits=recipe.softmax_bits,
        weight_bits=weight_bits,
        fewest=fewest,
        groups=groups,
        hold=hold,
        shallow=shallow,
        deep=deep,
    )
