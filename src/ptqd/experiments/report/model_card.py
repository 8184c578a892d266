"""The page of a quantized pipeline on a hub: what was quantized and how, what it weighs, and how far it is off."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from diffusers import DiffusionPipeline

from ptqd.diffusion.macs import on_meta
from ptqd.diffusion.pipeline_parts import denoiser_name, denoiser_of, denoisers_of
from ptqd.errors import InputError
from ptqd.experiments.report.rendering import markdown_cell
from ptqd.experiments.report.table import markdown_table
from ptqd.experiments.results import Report, Row
from ptqd.quantization.bops import disk_bytes
from ptqd.quantization.hf_quantizer import PtqdQuantizer, not_ours, ptqd_quantizer
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import quantized_layers, quantized_sites

LEFT = 20  # layers in full precision that are named


def model_card(
    pipe: DiffusionPipeline,
    repo_id: str,
    *,
    base_model: str | None = None,
    report: Report | None = None,
    row: Row | None = None,
) -> str:
    """A quantized pipeline's model card, in Markdown with the hub's header.

    Args:
        pipe: quantized by ptqd, corrected or not.
        repo_id: where it will be.
        base_model: hub id of the model that it was made from, where it has one.
        report: of the run that it is from.
        row: of the report, that is this pipeline.

    Raises:
        InputError: ptqd did not quantize it.
    """
    return "\n".join([*_header(base_model), *_body(pipe, repo_id, base_model, report, row)]) + "\n"


def _header(base_model: str | None) -> Iterator[str]:
    yield "---"
    yield "library_name: diffusers"
    if base_model is not None:
        yield f"base_model: {base_model}"
        yield "base_model_relation: quantized"
    yield "tags:"
    yield from ("- ptqd", "- quantized", "- post-training-quantization")
    yield "---"


def _body(
    pipe: DiffusionPipeline, repo_id: str, base_model: str | None, report: Report | None, row: Row | None
) -> Iterator[str]:
    kind = type(pipe).__name__
    named = "a diffusion pipeline" if base_model is None else f"[{base_model}](https://huggingface.co/{base_model})"
    yield f"# {repo_id.rpartition('/')[2]}"
    yield ""
    yield (
        f"{named[0].upper()}{named[1:]} (`{kind}`), quantized after training by "
        f"[ptqd](https://pypi.org/project/ptqd) {version('ptqd')}."
    )
    yield ""
    yield "## How to load it"
    yield ""
    yield "```python"
    yield "import ptqd  # pip install ptqd"
    yield ""
    yield f'pipe = ptqd.load("{repo_id}")'
    if row is not None and row.sampling.get("steps"):
        yield f"# sampled here with {row.settings.heading}"
    yield "```"
    yield ""
    yield "Codes are stored; products are computed in floating point on rounded numbers, so that any device runs it."
    yield "`ptqd export` writes it for engines that multiply integers, and for ComfyUI."
    yield ""
    yield "## What was quantized"
    yield ""
    yield from _quantized(pipe)
    correction = getattr(getattr(pipe, "scheduler", None), "correction", None)
    if correction is not None and correction.methods:
        yield ""
        methods = "+".join(row.key.methods) if row is not None else ""
        yield f"The sampler is corrected{f' ({methods})' if methods else ''}: what quantization does to each step is"
        yield "estimated, and taken back by the scheduler, which is saved with the pipeline."
    if report is not None and row is not None:
        yield from _figures(report, row)


def _quantized(pipe: DiffusionPipeline) -> Iterator[str]:
    skipped: list[str] = []
    denoisers = denoisers_of(pipe)
    ours = [
        name for name, model in denoisers.items() if isinstance(getattr(model, "hf_quantizer", None), PtqdQuantizer)
    ]
    if not ours:
        raise InputError(not_ours(denoiser_of(pipe), denoiser_name(pipe)))
    for name, model in denoisers.items():
        if name not in ours:
            yield f"`{name}` is in full precision."
            yield ""
            continue
        config = ptqd_quantizer(pipe, name).quantization_config
        recipe = Recipe.from_dict(config.recipe, "the recipe")
        bits = Counter(
            (
                f"{site.weight.weights.bits}-bit {_format(site.weight.weights.format)}" if site.weight else "-",
                " or ".join(f"{width}" for width in site.activations[0].widths)
                + f"-bit {_format(site.activations[0].spec.format)}",
                site.kind,
            )
            for site in quantized_sites(model)
        )
        full = sum(p.numel() for p in on_meta(model).parameters())
        size = disk_bytes(model)
        yield f"`{name}` (`{type(model).__name__}`, {full / 1e6:,.1f} M parameters): {size / 1e6:,.1f} MB, "
        yield f"{4 * full / size:.1f} times less than in float32."
        yield ""
        yield "| weights | activations | layers |"
        yield "| --- | --- | --- |"
        for (weights, activations, where), count in sorted(bits.items(), key=lambda item: -item[1]):
            what = {"conv": "convolutions", "linear": "linear layers", "attention": "attention products"}[where]
            yield f"| {weights} | {activations} | {count} {what} |"
        yield ""
        methods = ", ".join(method.name for method in recipe.methods) or "rounding to nearest"
        calibrated = recipe.methods or any(layer.input.is_static for _, layer in quantized_layers(model))
        on = f"; calibrated on {recipe.calibration_samples} samples' trajectories" if calibrated else ""
        yield f"Method: {methods}{on}."
        if config.plan is not None:
            plan = PrecisionPlan.from_dict(config.plan, "the saved plan")
            yield f"The activations' bits follow the step: a plan for {plan.steps} steps, and no other number of them."
        prefix = f"{name}." if len(denoisers) > 1 else ""
        skipped += [prefix + layer for layer, _ in ptqd_quantizer(pipe, name).coverage.skipped]
    if skipped:
        yield ""
        names = [f"`{name}`" for name in skipped]  # in code nothing is escaped
        more = f" and {len(names) - LEFT} more" if len(names) > LEFT else ""
        yield f"In full precision: {', '.join(names[:LEFT])}{more}."


def _format(name: str) -> str:
    return "integers" if name == "int" else name


def _figures(report: Report, row: Row) -> Iterator[str]:
    """The row's figures, beside full precision and the same without correction."""
    rows: Sequence[Row] = [
        other
        for other in report.rows
        if other.settings == row.settings
        and (other.key.is_full_precision or other.key == row.key or _is_uncorrected(other, row))
    ]
    yield ""
    yield "## How far it is from full precision"
    yield ""
    yield markdown_table(rows)
    yield ""
    count = f"{row.samples:,} samples of the same seeds in each row, {row.settings.heading}; ± is half of the 95 %"
    judged = "" if report.judge is None else f" Images were judged by {markdown_cell(report.judge)}."
    yield f"{count} interval.{judged}"
    if math.isfinite(row.bops_ratio):
        yield f"Bit operations are {row.bops_ratio:.1f} times fewer than of float32."


def _is_uncorrected(other: Row, row: Row) -> bool:
    return (other.key.recipe, other.key.plan) == (row.key.recipe, row.key.plan) and not other.key.methods
