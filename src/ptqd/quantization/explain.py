"""What a recipe did, layer by layer: bits, methods, cost, range, and the error each layer makes on its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.macs import PRODUCTS, Macs, run_macs, steps_called
from ptqd.diffusion.pipeline_parts import denoiser_names, denoiser_of, with_components
from ptqd.diffusion.plain_copy import as_plain
from ptqd.diffusion.sampling import Sampling
from ptqd.quantization.bops import by_halves
from ptqd.quantization.calibration import as_calibrated, draw_inputs, step_weights
from ptqd.quantization.hf_quantizer import ptqd_quantizer
from ptqd.quantization.modules.attention import PRODUCTS as ATTENTION
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, find_layer, full_weight, plain_name
from ptqd.quantization.recipe import QuantSpec, Recipe
from ptqd.quantization.sites import quantized_sites
from ptqd.quantization.step_ranges import range_of, range_steps_of
from ptqd.quantization.swap import HALVES, names_of

ROWS = 64


@dataclass(frozen=True)
class LayerReport:
    """One layer, or the products of one attention.

    Attributes:
        name: dotted; an attention's products by the attention's own name.
        weights: format and groups of the weights; empty for products.
        activations: format of the activations.
        methods: that chose its codes, in order.
        macs: multiply-accumulates of one sample's run.
        range: the least and the largest number its input can take; none where the range comes with the input.
        ranges: how many ranges it has, by step.
        error: squared error of its output, quantized alone, over the output's energy, on inputs of the full-precision
            model; of an attention that of all of it, its own layers quantized too.
    """

    name: str
    weights: str
    activations: str
    methods: tuple[str, ...]
    macs: int
    range: tuple[float, float] | None
    ranges: int
    error: float


def explain(pipe: DiffusionPipeline, qpipe: DiffusionPipeline, sampling: Sampling) -> list[LayerReport]:
    """Report on each layer that a recipe quantized, worst first.

    Args:
        pipe: full precision.
        qpipe: quantized by ptqd from it.
        sampling: how it samples.

    Raises:
        InputError: ptqd did not quantize ``qpipe``.
    """
    ptqd_quantizer(qpipe)
    calls = steps_called(pipe, sampling)
    macs = run_macs(pipe, sampling)
    reports = []
    for name in denoiser_names(pipe):
        full = as_calibrated(denoiser_of(pipe, name))
        plain = with_components(pipe, **{name: full})
        reports += _explain(plain, name, full, as_plain(denoiser_of(qpipe, name)), sampling, macs, calls[name])
    return sorted(reports, key=lambda report: (-report.error if report.error == report.error else 1.0, report.name))


def _explain(
    pipe: DiffusionPipeline,
    name: str,
    full: nn.Module,
    model: Any,
    sampling: Sampling,
    macs: Macs,
    steps: list[int],
) -> list[LayerReport]:
    """Reports on one denoiser."""
    recipe = Recipe.from_dict(model.hf_quantizer.quantization_config.recipe)
    macs = by_halves(Macs(macs.layers, macs.counts[steps]), model)
    counts = dict(zip(macs.layers, macs.counts.sum(0).tolist(), strict=True))
    errors = _errors(pipe, name, full, model, sampling, steps)
    temporal = getattr(getattr(range_steps_of(model), "ranges", None), "temporal", ())
    reports = []
    for site in quantized_sites(model):
        layer, quantizer = site.name, site.activations[0]
        if site.weight is not None:
            weights, count = _format(site.weight.weights), counts.get(layer, 0)
            rule = recipe.rule_for(names_of(layer), site.kind)
            without = () if rule is None else rule.without
            methods = tuple(m.name for m in recipe.methods if m.name not in without)
            if layer in temporal:
                methods = (*(m for m in methods if m in ("smooth", "svd")), "exact")
        else:
            weights, methods = "", ()
            count = sum(counts.get(layer + product, 0) for product in PRODUCTS)
        fixed = range_of(quantizer) if quantizer.is_static and quantizer.spec.format == "int" else None
        shown = layer if len(denoiser_names(pipe)) == 1 else f"{name}.{layer}"
        report = (shown, weights, _format(quantizer.spec), methods or ("nearest",) * bool(weights), int(count), fixed)
        reports.append(LayerReport(*report, quantizer.ranges, errors.get(layer, float("nan"))))
    return reports


def _format(spec: QuantSpec) -> str:
    text = f"int{spec.bits}" if spec.format == "int" else spec.format
    text += f" by {spec.group}" if spec.group else ""
    return text + (" dynamic" if spec.dynamic else "")


def _errors(
    pipe: DiffusionPipeline, name: str, full: nn.Module, model: nn.Module, sampling: Sampling, steps: list[int]
) -> dict[str, float]:
    """Relative squared error of each layer's output."""
    few = sampling.with_seed_for("explaining").replace(samples=16, batch=16)
    inputs = draw_inputs(pipe, few, ROWS, step_weights("uniform", len(steps)), name=name, steps=steps)
    sums: dict[str, list[float]] = {}
    with _shadowing(full, dict(model.named_modules()), sums), torch.no_grad():
        by_step = range_steps_of(model)
        for rows in inputs.batches(len(inputs)):
            args, kwargs = inputs.call(rows)
            if by_step is not None:
                by_step.set(inputs.steps[rows].tolist())
            full(*args, **kwargs)
    return {name: wrong / energy if energy > 0 else wrong for name, (wrong, energy) in sums.items()}


@contextmanager
def _shadowing(full: nn.Module, quantized: Mapping[str, nn.Module], sums: dict[str, list[float]]) -> Iterator[None]:
    """Let each quantized layer answer the inputs of its full-precision self."""

    def compare(name: str, got: Any, want: Any) -> None:
        both = sums.setdefault(name, [0.0, 0.0])
        both[0] += float((got - want).double().square().sum())
        both[1] += float(want.double().square().sum())

    def shadow(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        twin: Any = quantized[name]
        name = plain_name(name)
        if isinstance(twin, QuantLayer) or isinstance(getattr(twin, ATTENTION, None), AttentionProducts):
            compare(name, twin(*args, **kwargs), output)
        else:
            parts = args[0].split([getattr(twin, half).in_channels for half in HALVES], dim=1)
            for half, x in zip(HALVES, parts, strict=True):
                layer: QuantLayer = getattr(twin, half)
                want = layer.matmul(x, full_weight(full, f"{name}.{half}", layer), layer.bias)
                compare(f"{name}.{half}", layer(x), want)

    def required(module: nn.Module) -> bool:
        split = all(isinstance(getattr(module, half, None), QuantLayer) for half in HALVES)
        return (
            isinstance(module, QuantLayer) or split or isinstance(getattr(module, ATTENTION, None), AttentionProducts)
        )

    hooks = [
        find_layer(full, name).register_forward_hook(
            lambda m, args, kwargs, output, name=name: shadow(name, m, args, kwargs, output), with_kwargs=True
        )
        for name, module in quantized.items()
        if required(module) and not name.endswith(HALVES)
    ]
    with hooked(*hooks):
        yield
