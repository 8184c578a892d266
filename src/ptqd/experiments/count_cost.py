"""The cost of a model, counted from its configuration alone wherever that suffices."""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map_only

from ptqd.diffusion.call_rows import first_rows, join_rows
from ptqd.diffusion.macs import Macs, on_meta, run_macs
from ptqd.diffusion.pipeline_parts import denoisers_of
from ptqd.diffusion.sampling import Sampling, with_some_prompt
from ptqd.errors import InputError, PtqdError
from ptqd.experiments.meta_pipeline import (
    bare_denoiser,
    call_of,
    denoiser_config,
    meta_pipeline,
    one_call,
    run_of_calls,
    saved_configuration,
)
from ptqd.loading import load, stored_dtype, with_scheduler
from ptqd.quantization.bops import Cost, cost_of
from ptqd.quantization.hf_quantizer import with_weights
from ptqd.quantization.memory import Memory, calling_bytes, memory_of
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.plan_steps import set_plan
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.swap import insert_quantizers, layer_types

logger = logging.getLogger(__name__)
_HOW = "quantization_config"


def count_cost(
    model: str,
    recipe: str | None = None,
    plan: str | Path | None = None,
    sampling: Sampling | Callable[[DiffusionPipeline | None], Sampling] | None = None,
    *,
    scheduler: str | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """The cost of one sample of a model, quantized by a recipe and with a plan, if there are any.

    Args:
        model: a pipeline (embedded, a folder or a hub id), or a denoiser: a published architecture's name, a folder or
            a ``config.json``. Of a denoiser one call a step is counted, or two with guidance. One that ptqd quantized
            is counted as it is, where no recipe is given.
        recipe: shorthand or TOML file.
        plan: TOML file.
        sampling: how it is run, or what says so of a pipeline, or of None where a denoiser stands on its own.
        scheduler: a diffusers scheduler class to use instead of the pipeline's.
        dtype: that the weights are loaded in; where it is not said, what :func:`ptqd.load` takes.

    Raises:
        InputError: it is neither; a plan without a recipe; or a plan for other steps, widths or layers.
    """
    denoisers, configs, macs, calls = _described(
        model, _sampler(sampling), lambda pipe: with_scheduler(pipe, scheduler)
    )
    dtype = dtype or stored_dtype(Path(model)) or torch.float32
    if recipe is None and any(config.get(_HOW) != configs[0].get(_HOW) for config in configs):
        logger.warning("the denoisers are quantized in different ways; bit operations are counted by the first's bits")
    memory = []
    for denoiser, config, call in zip(denoisers, configs, calls, strict=True):
        required, chosen = _bits(model, config, recipe, plan)
        if required is not None and chosen is not None:
            required = with_weights(required, chosen, layer_types(denoiser, required))
        nn.Module.to(denoiser, dtype)
        full = nn.Module.to(on_meta(denoiser), dtype)
        if required is not None:
            with torch.device("meta"):
                insert_quantizers(denoiser, required)
            if chosen is not None:
                set_plan(denoiser, chosen)
        memory.append(memory_of(full, denoiser, required, 0 if call is None else _calling(denoiser, call, dtype)))
    together = {field.name: sum(getattr(each, field.name) for each in memory) for field in dataclasses.fields(Memory)}
    known = all(each.calling for each in memory)  # one of two denoisers is called at a time
    whole = Memory(**{**together, "calling": max(each.calling for each in memory) if known else 0})
    return dataclasses.replace(cost_of(denoisers, macs), memory=whole)


def _calling(denoiser: nn.Module, call: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Bytes that a call takes at most; 0 where that cannot be counted without numbers."""
    moved = tree_map_only(torch.Tensor, lambda x: x.to("meta", dtype if x.is_floating_point() else x.dtype), dict(call))
    try:
        return calling_bytes(denoiser, moved)
    except (RuntimeError, NotImplementedError) as error:  # torch's, for a look at numbers that are not there
        logger.info("what a call takes is not counted: %s", error)
        return 0


def _described(
    model: str, sampling: Any, scheduled: Any
) -> tuple[list[Any], list[Mapping[str, Any]], Macs, list[Mapping[str, Any] | None]]:
    """A pipeline's denoisers in full precision on the meta device, their configurations, and what a run takes.

    And the arguments of a call of each, with one sample; None where they are not known.
    """
    config = denoiser_config(model)
    if config is None:
        pipe = scheduled(meta_pipeline(model))
        run = with_some_prompt(pipe, sampling(pipe))
        try:
            macs = run_macs(pipe, run)
        except InputError as error:  # some look at their text encoder's numbers, or encode a picture
            logger.warning("%s; it is loaded", error)
            pipe = scheduled(load(model))
            macs = run_macs(pipe, run)
        names = denoisers_of(pipe)
        every = [on_meta(denoiser) for denoiser in names.values()]
        calls = [_first_call(pipe, run, name, denoiser) for name, denoiser in names.items()]
        return every, [saved_configuration(model, *part) for part in names.items()], macs, calls
    denoiser, run = bare_denoiser(config), sampling(None)
    guided = run.call.get("guidance_scale", 1.0) != 1.0
    whole = run_of_calls(one_call(config, denoiser), run.steps, 2 if guided else 1)
    return [denoiser], [config], whole, [call_of(config, denoiser)]


def _first_call(
    pipe: DiffusionPipeline, sampling: Sampling, name: str, denoiser: nn.Module
) -> Mapping[str, Any] | None:
    """The arguments that a pipeline calls a denoiser with first, by name; None where it does not call it."""
    try:
        args, kwargs = join_rows(first_rows(pipe, sampling, name))
    except (PtqdError, RuntimeError):
        return None
    names = inspect.signature(denoiser.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _bits(
    model: str, config: Mapping[str, Any], recipe: str | None, plan: str | Path | None
) -> tuple[Recipe | None, PrecisionPlan | None]:
    """The recipe and the plan: those that are given, else those that the configuration holds."""
    chosen = None if plan is None else PrecisionPlan.load(plan)
    if recipe is not None:
        return Recipe.parse(recipe), chosen
    saved = config.get(_HOW)
    if saved is not None and not isinstance(saved, Mapping):
        raise InputError(f"{model} says {str(saved)[:60]!r} of how it is quantized; quantize it again")
    if saved is None:
        if chosen is not None:
            raise InputError("a plan chooses among a recipe's widths; give --recipe too, such as w4a4+8")
        return None, None
    if saved.get("quant_method") != "ptqd":
        method = saved.get("quant_method")
        raise InputError(f"{model} is quantized by {method}, whose bits ptqd does not know; give a --recipe instead")
    if chosen is None and saved.get("plan") is not None:
        chosen = PrecisionPlan.from_dict(saved["plan"], "the saved plan")
    return Recipe.from_dict(saved.get("recipe"), "the saved recipe"), chosen


def _sampler(sampling: Sampling | Callable[[DiffusionPipeline | None], Sampling] | None) -> Any:
    """What says how a pipeline is run."""
    if callable(sampling):
        return sampling
    return lambda pipe: (sampling or Sampling(samples=1, batch=1)).replace(samples=1, batch=1)
