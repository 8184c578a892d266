"""What a recipe did, layer by layer: bits, methods, cost, range, and the error each layer makes on its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.macs import PRODUCTS, Macs, run_macs, steps_called
from ptqd.diffusion.offload import brought, weights_left_behind
from ptqd.diffusion.pipeline_parts import denoiser_names, denoiser_of, with_components
from ptqd.diffusion.plain_copy import as_it_computes
from ptqd.diffusion.sampling import Sampling
from ptqd.quantization.bops import by_halves
from ptqd.quantization.budget import Budget, device_of, rows_that_fit
from ptqd.quantization.calibration import as_calibrated, draw_inputs, step_weights
from ptqd.quantization.hf_quantizer import ptqd_quantizer
from ptqd.quantization.modules.attention import PRODUCTS as ATTENTION
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer, full_weight, plain_name
from ptqd.quantization.output_effect import EFFECT_ROWS, OutputEffects
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
        effect: of that error on the denoiser's output: its squared error over the output's energy, to first order (see
            :mod:`ptqd.quantization.output_effect`).
        stream: whether it is given a sum of layers' outputs without a norm since, whose range has no bound.
    """

    name: str
    weights: str
    activations: str
    methods: tuple[str, ...]
    macs: int
    range: tuple[float, float] | None
    ranges: int
    error: float
    effect: float = float("nan")
    stream: bool = False


def explain(pipe: DiffusionPipeline, qpipe: DiffusionPipeline, sampling: Sampling) -> list[LayerReport]:
    """Report on each layer that a recipe quantized, that first whose error the denoiser's output shows most.

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
        reports += _explain(plain, name, full, as_it_computes(denoiser_of(qpipe, name)), sampling, macs, calls[name])
    return sorted(reports, key=lambda report: (-report.effect if report.effect == report.effect else 1.0, report.name))


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
        own, effect = (found.get(layer, float("nan")) for found in (errors.own, errors.effects))
        whole = layer.rpartition(".")[0] if layer.endswith(HALVES) else layer
        reports.append(LayerReport(*report, quantizer.ranges, own, effect, whole in errors.streams))
    return reports


def _format(spec: QuantSpec) -> str:
    text = f"int{spec.bits}" if spec.format == "int" else spec.format
    text += f" by {spec.group}" if spec.group else ""
    return text + (" dynamic" if spec.dynamic else "")


Answers = Callable[[], dict[str, tuple[torch.Tensor, torch.Tensor]]]  # of each layer's, quantized and as it should be


@dataclass(frozen=True)
class _Errors:
    """What was found of each layer: of its own output, and of the denoiser's."""

    own: dict[str, float]
    effects: dict[str, float]
    streams: set[str]


def _errors(
    pipe: DiffusionPipeline, name: str, full: nn.Module, model: nn.Module, sampling: Sampling, steps: list[int]
) -> _Errors:
    """Relative squared error that each layer makes alone, in its output and in the denoiser's."""
    few = sampling.with_seed_for("explaining").replace(samples=16, batch=16)
    inputs = draw_inputs(pipe, few, ROWS, step_weights("uniform", len(steps)), name=name, steps=steps)
    twins, by_step = dict(model.named_modules()), range_steps_of(model)
    sums: dict[str, list[float]] = {}
    found = OutputEffects[str](few.seed)

    def compare(place: str, output: torch.Tensor, answers: Answers) -> None:
        for layer, (got, want) in answers().items():
            both = sums.setdefault(layer, [0.0, 0.0])
            both[0] += float((got - want).double().square().sum())
            both[1] += float(want.double().square().sum())

    def watch(place: str, output: torch.Tensor, answers: Answers) -> torch.Tensor:
        return found.watch(place, output, lambda: {layer: got - want for layer, (got, want) in answers().items()})

    def call(rows: list[int]) -> Any:
        if by_step is not None:
            by_step.set(inputs.steps[rows].tolist())
        args, kwargs = inputs.call(rows)
        return full(*args, **kwargs)

    row = inputs.call(inputs.kinds()[0][:1])
    at_once = rows_that_fit(full, row, Budget().spare(device_of(full)), len(inputs))
    with _shadowing(full, twins, compare), torch.no_grad():
        for rows in inputs.batches(at_once):
            call(rows)
    with _shadowing(full, twins, watch), hooked(*_stream_hooks(full, twins, found)), weights_left_behind(full):
        found.run(call, min(EFFECT_ROWS, len(inputs)))
    own = {layer: wrong / energy if energy > 0 else wrong for layer, (wrong, energy) in sums.items()}
    return _Errors(own, found.effects, found.streams)


def _stream_hooks(full: nn.Module, quantized: Mapping[str, nn.Module], found: OutputEffects[str]) -> list[Any]:
    """Hooks that note which layers are given a stream."""

    def note(name: str, layer: object, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor):
            found.note(plain_name(name), args[0])

    return [
        find_layer(full, name).register_forward_pre_hook(partial(note, name))
        for name, module in quantized.items()
        if isinstance(module, QuantLayer | SplitConv) and not name.endswith(HALVES)
    ]


@contextmanager
def _shadowing(
    full: nn.Module, quantized: Mapping[str, nn.Module], seen: Callable[[str, torch.Tensor, Answers], Any]
) -> Iterator[None]:
    """Show each layer's output, and what its quantized self makes of the same inputs; go on with what is returned."""

    def shadow(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        twin: Any = quantized[name]
        name = plain_name(name)

        def answers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            if not isinstance(twin, SplitConv):
                made = twin(*args, **kwargs)
                got = next(x for x in tree_leaves(made) if isinstance(x, torch.Tensor))
                return {name: (got, tensor.detach())}
            answered = {}
            parts = args[0].split([getattr(twin, half).in_channels for half in HALVES], dim=1)
            for half, x in zip(HALVES, parts, strict=True):
                layer: QuantLayer = getattr(twin, half)
                with brought(layer):
                    weight = full_weight(full, f"{name}.{half}", layer).to(x.device)
                    want = layer.matmul(x, weight, layer.bias)
                answered[f"{name}.{half}"] = (layer(x), want)
            return answered

        leaves, structure = tree_flatten(output)
        place, tensor = next((i, x) for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
        own = seen(name, tensor, answers)
        if own is None:
            return None
        return tree_unflatten([own if i == place else x for i, x in enumerate(leaves)], structure)

    def required(module: nn.Module) -> bool:
        own = isinstance(module, QuantLayer | SplitConv)
        return own or isinstance(getattr(module, ATTENTION, None), AttentionProducts)

    hooks = [
        find_layer(full, name).register_forward_hook(
            lambda m, args, kwargs, output, name=name: shadow(name, m, args, kwargs, output), with_kwargs=True
        )
        for name, module in quantized.items()
        if required(module) and not name.endswith(HALVES)
    ]
    with hooked(*hooks):
        yield
