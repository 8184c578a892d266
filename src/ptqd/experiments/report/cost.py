"""What a model costs, as a table: counted from its configuration alone, wherever that suffices."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.table import Table

from ptqd.diffusion.macs import FULL_BITS, PRODUCTS, Macs, on_meta, run_macs
from ptqd.diffusion.pipeline_parts import denoiser_name
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.experiments.meta_pipeline import (
    bare_denoiser,
    denoiser_config,
    one_call,
    run_of_calls,
    saved_configuration,
    skeleton,
)
from ptqd.loading import load
from ptqd.quantization.bops import Cost, cost_of
from ptqd.quantization.hf_quantizer import with_weights
from ptqd.quantization.plan import StepPlan
from ptqd.quantization.plan_steps import set_plan
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.swap import insert_quantizers, layer_types

logger = logging.getLogger(__name__)


def counted(
    model: str,
    recipe: str | None,
    plan: Path | None,
    sampling: Callable[[DiffusionPipeline | None], Sampling],
    scheduled: Callable[[DiffusionPipeline], DiffusionPipeline] = lambda pipe: pipe,
) -> Cost:
    """The cost of one sample of a model, quantized by a recipe and with a plan, if there are any.

    Args:
        model: a pipeline (embedded, a folder or a hub id), or a denoiser: a published architecture's name, a folder or
            a ``config.json``. Of a denoiser one call a step is counted, or two with guidance. One that ptqd quantized
            is counted as it is, where no recipe is given.
        recipe: shorthand or TOML file.
        plan: TOML file.
        sampling: says how a pipeline, or a denoiser on its own, is run.
        scheduled: gives a pipeline another scheduler.

    Raises:
        InputError: it is neither; a plan without a recipe; or a plan for other steps, widths or layers.
    """
    denoiser, config, macs = _described(model, sampling, scheduled)
    wanted, chosen = _bits(model, config, recipe, plan)
    if wanted is None:
        return cost_of(denoiser, macs)
    if chosen is not None:
        wanted = with_weights(wanted, chosen, layer_types(denoiser, wanted))
    with torch.device("meta"):
        insert_quantizers(denoiser, wanted)
    if chosen is not None:
        set_plan(denoiser, chosen)
    return cost_of(denoiser, macs)


def _described(model: str, sampling: Any, scheduled: Any) -> tuple[Any, Mapping[str, Any], Macs]:
    """A denoiser in full precision on the meta device, its configuration, and what its run takes."""
    config = denoiser_config(model)
    if config is None:
        pipe = scheduled(skeleton(model))
        try:
            macs = run_macs(pipe, sampling(pipe))
        except InputError as error:  # some look at their text encoder's numbers, or encode a picture
            logger.warning("%s; it is loaded", error)
            pipe = scheduled(load(model))
            macs = run_macs(pipe, sampling(pipe))
        denoiser = getattr(pipe, denoiser_name(pipe))
        return on_meta(denoiser), saved_configuration(model, denoiser_name(pipe), denoiser), macs
    denoiser, run = bare_denoiser(config), sampling(None)
    guided = run.call.get("guidance_scale", 1.0) != 1.0
    return denoiser, config, run_of_calls(one_call(config, denoiser), run.steps, 2 if guided else 1)


def _bits(
    model: str, config: Mapping[str, Any], recipe: str | None, plan: Path | None
) -> tuple[Recipe | None, StepPlan | None]:
    """The recipe and the plan: those that are given, else those that the configuration holds."""
    chosen = None if plan is None else StepPlan.load(plan)
    if recipe is not None:
        return Recipe.parse(recipe), chosen
    saved = config.get("quantization_config")
    if saved is None:
        if chosen is not None:
            raise InputError("a plan chooses among a recipe's widths; give --recipe too, such as w4a4+8")
        return None, None
    if saved.get("quant_method") != "ptqd":
        method = saved.get("quant_method")
        raise InputError(f"{model} is quantized by {method}, whose bits ptqd does not know; give a --recipe instead")
    if chosen is None and saved.get("plan") is not None:
        chosen = StepPlan.from_dict(saved["plan"], "the saved plan")
    return Recipe.from_dict(saved["recipe"], "the saved recipe"), chosen


def block_of(layer: str) -> str:
    """The part of a network that a layer is in: its name up to the first number.

    >>> block_of("down_blocks.1.resnets.0.conv1"), block_of("conv_in")
    ('down_blocks.1', 'conv_in')
    """
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def cost_json(cost: Cost) -> dict[str, Any]:
    """A cost as plain values, by layer and by step."""
    by_layer = zip(cost.macs.layers, cost.macs.counts.sum(0).tolist(), cost.bops.sum(0).tolist(), strict=True)
    return {
        "macs": cost.macs.total,
        "bit_operations": cost.total,
        "fewer_than_fp32": cost.ratio,
        "parameters": cost.parameters,
        "disk_bytes": cost.disk,
        "memory_bytes": cost.memory,
        "steps": [
            {"macs": int(m), "bit_operations": int(b)}
            for m, b in zip(cost.macs.counts.sum(1).tolist(), cost.bops.sum(1).tolist(), strict=True)
        ],
        "layers": {name: {"macs": int(m), "bit_operations": int(b)} for name, m, b in by_layer},
    }


def cost_table(name: str, cost: Cost, *, layers: bool = False) -> Iterator[Any]:
    """Totals, then a table by block, or by layer, of a run's costs."""
    steps = len(cost.macs.counts)
    products = [i for i, layer in enumerate(cost.macs.layers) if layer.endswith((*PRODUCTS, ".matmul"))]
    share = float(cost.macs.counts[:, products].sum()) / cost.macs.total
    macs, bops, full = cost.macs.total, cost.total, cost.macs.total * FULL_BITS**2
    yield f"{name}: {cost.parameters / 1e6:,.1f} M parameters, {steps} steps"
    yield f"  {_si(macs / steps)}MACs a step, {_si(macs)}MACs an image; {share:.1%} of them in attention products"
    yield f"  {_si(bops / steps)}BOPs a step, {_si(bops)}BOPs an image"
    yield f"  {cost.ratio:.2f}x fewer than FP32: {_si(full / steps)}BOPs a step, {_si(full)}BOPs an image"
    yield f"  {cost.disk / 1e6:,.1f} MB on disk, {cost.memory / 1e6:,.1f} MB in memory while simulated"
    table = Table("layer" if layers else "block")
    for title in ("MACs a step", "share", "bits", "BOPs a step", "share"):
        table.add_column(title, justify="right")
    rows: dict[str, list[int]] = {}
    for i, layer in enumerate(cost.macs.layers):
        rows.setdefault(layer if layers else block_of(layer), []).append(i)
    for title, own in rows.items():
        mine, taken = float(cost.macs.counts[:, own].sum()), float(cost.bops[:, own].sum())
        bits = [_span(side[:, own]) for side in (cost.bits.left, cost.bits.right)]
        cells = (_si(mine / steps), f"{mine / macs:.1%}", " x ".join(bits))
        table.add_row(title, *cells, _si(taken / steps), f"{taken / bops:.1%}")
    yield table


def _span(bits: torch.Tensor) -> str:
    low, high = int(bits.min()), int(bits.max())
    return str(low) if low == high else f"{low}-{high}"


def _si(value: float) -> str:
    """A number with its unit's prefix.

    >>> _si(102.2e12), _si(5.0)
    ('102.20 T', '5.00 ')
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.2f} "
