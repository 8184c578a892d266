"""Quantized pipelines with other bits than they were made with: by a plan, or one width at every step.

What stays the same, codes and ranges, is shared with the pipeline they are made from.
"""

from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.pipeline_parts import (
    copy_module,
    denoisers_of,
    plain_scheduler,
    scheduler_of,
    with_denoisers,
)
from ptqd.diffusion.plain_copy import as_it_computes, as_plain
from ptqd.errors import InputError
from ptqd.quantization.hf_quantizer import PtqdConfig, PtqdQuantizer, ptqd_quantizer, with_weights
from ptqd.quantization.modules.activation import BitWidth
from ptqd.quantization.modules.linear_conv import find_layer, full_weight
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.plan_steps import remove_plan, set_plan
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import layer_quantizers, quantized_layers
from ptqd.quantization.step_ranges import range_steps_of
from ptqd.quantization.swap import names_of, put_layer


def apply_plan(
    qpipe: DiffusionPipeline, plan: PrecisionPlan, pipe: DiffusionPipeline | None = None
) -> DiffusionPipeline:
    """A quantized pipeline whose bits follow a plan; codes and ranges that stay the same are shared, not copied.

    Its scheduler corrects nothing: a correction belongs to the bits it was measured at.

    Args:
        qpipe: quantized by ptqd with a recipe that has ranges for all the plan's widths, such as ``"w4a4+8"``.
        plan: for the schedule it will sample with.
        pipe: full precision; needed where layers are to have other weights than they have: those that the plan names,
            and those that an earlier plan named and this one leaves to the recipe.

    Raises:
        InputError: the plan does not fit the model; see ``set_plan``. Or it asks for other weights than the model
        has, and there is no full-precision layer to take them from.
    """
    full = {} if pipe is None else {name: as_plain(model) for name, model in denoisers_of(pipe).items()}
    parts: dict[str, Any] = {
        name: _planned(model, ptqd_quantizer(qpipe, name), plan, full.get(name))
        for name, model in denoisers_of(qpipe).items()
    }
    return with_denoisers(qpipe, **parts, scheduler=plain_scheduler(scheduler_of(qpipe)))


def _planned(denoiser: nn.Module, source: PtqdQuantizer, plan: PrecisionPlan, full: nn.Module | None) -> nn.Module:
    """One denoiser of :func:`apply_plan`."""
    model = copy_module(as_it_computes(denoiser), lambda tensor: tensor)
    recipe = Recipe.from_dict(source.quantization_config.recipe)
    layers = dict(quantized_layers(model))
    planned = with_weights(recipe, plan, {layer: module.kind for layer, module in layers.items()})
    for layer, old in layers.items():
        bits = planned.quantizers_for(planned.rule_for(names_of(layer), old.kind))[0].bits
        if old.weights.bits == bits:
            continue
        if full is None:
            raise InputError(
                f"the plan gives {layer!r} {bits}-bit weights, the model holds {old.weights.bits}-bit ones; "
                "give the full-precision pipeline as well: ptqd.apply_plan(qpipe, plan, pipe)"
            )
        _requantize(model, layer, bits, full)
    remove_plan(model)
    set_plan(model, plan)
    ranges = source.quantization_config.ranges
    PtqdQuantizer(PtqdConfig(recipe.to_dict(), plan.to_dict(), ranges)).adopt(model, source.coverage)
    return model  # type: ignore[no-any-return]


def plan_of(qpipe: DiffusionPipeline) -> PrecisionPlan:
    """The plan of a quantized pipeline.

    Raises:
        InputError: it has none, or ptqd did not quantize it.
    """
    plan = ptqd_quantizer(qpipe).quantization_config.plan
    if plan is None:
        raise InputError("the pipeline has no plan; make one with 'ptqd plan'")
    return PrecisionPlan.from_dict(plan)


def at_width(qpipe: DiffusionPipeline, bits: int) -> DiffusionPipeline:
    """A quantized pipeline with the same activation bits at every step; see :func:`apply_plan`.

    Raises:
        InputError: the model has no ranges for that width.
    """
    recipe = Recipe.from_dict(ptqd_quantizer(qpipe).quantization_config.recipe)
    if bits not in recipe.widths:
        known = " and ".join(map(str, recipe.widths))
        raise InputError(
            f"the model has activation ranges for {known} bits, not for {bits}; quantize with such a recipe"
        )
    others = tuple(width for width in recipe.widths if width != bits)
    recipe = replace(recipe, activations=replace(recipe.activations, bits=bits), step_bits=others)
    parts: dict[str, Any] = {
        name: _at_width(qpipe, model, ptqd_quantizer(qpipe, name), recipe, bits)
        for name, model in denoisers_of(qpipe).items()
    }
    return with_denoisers(qpipe, **parts, scheduler=plain_scheduler(scheduler_of(qpipe)))


def _at_width(
    qpipe: DiffusionPipeline, denoiser: nn.Module, source: PtqdQuantizer, recipe: Recipe, bits: int
) -> nn.Module:
    """One denoiser of :func:`at_width`."""
    model = copy_module(as_it_computes(denoiser), lambda tensor: tensor)
    if source.quantization_config.plan is not None:  # its weights stay
        kinds = {layer: module.kind for layer, module in quantized_layers(model)}
        recipe = with_weights(recipe, plan_of(qpipe), kinds)
    remove_plan(model)
    for _, quantizer in layer_quantizers(model):
        if len(quantizer.widths) > 1:
            quantizer.active = BitWidth(quantizer.widths.index(bits))
    config = PtqdConfig(recipe.to_dict(), ranges=source.quantization_config.ranges)
    PtqdQuantizer(config).adopt(model, source.coverage)
    return model  # type: ignore[no-any-return]


def _requantize(model: nn.Module, name: str, bits: int, full: nn.Module) -> None:
    """Give a layer codes of other bits, rounded to nearest; its ranges, smoothing, branch and bias stay."""
    old = find_layer(model, name)
    weight = full_weight(full, name, old)
    new = copy_module(old, lambda tensor: tensor)
    new.set_bits(bits)
    new.encode(weight)
    by_step = range_steps_of(model)
    if by_step is not None and name in by_step.ranges.temporal:  # its bias was fitted to its old codes
        new.bias = find_layer(full, name).bias
    put_layer(model, name, new)
