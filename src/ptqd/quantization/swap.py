"""A denoiser's layers and attention products replaced by quantized ones, as a recipe says."""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from ptqd.diffusion.plain_copy import is_plain
from ptqd.errors import ArtifactError, InputError
from ptqd.quantization.blocks import concatenations
from ptqd.quantization.methods import ConvRot, LowRank, Smooth
from ptqd.quantization.modules.attention import (
    PRODUCTS,
    AttentionProducts,
    attention_modules,
    has_products,
    quantize_attention,
)
from ptqd.quantization.modules.linear_conv import (
    BASE,
    Convolution,
    LayerOptions,
    QuantConv,
    QuantLayer,
    QuantLinear,
    SplitConv,
    find_layer,
    plain_name,
)
from ptqd.quantization.numerics.affine import WIDE
from ptqd.quantization.numerics.formats import BLOCKS
from ptqd.quantization.recipe import LayerType, QuantSpec, Recipe, Rule
from ptqd.quantization.step_ranges import StepRanges

HALVES = ("hidden", "skip")


@dataclass(frozen=True)
class Coverage:
    """What a recipe did to a model.

    Attributes:
        quantized: dotted names of the quantized layers and attention products.
        skipped: name and reason of those left in full precision.
    """

    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def layer_types(model: nn.Module, recipe: Recipe) -> dict[str, LayerType]:
    """The layers of a full-precision denoiser that can be quantized, halves of split ones by names of their own."""
    return {part: _type_of(layer) for name, layer in _layers(model) for part in _parts(name, _splits(model, recipe))}


def insert_quantizers(
    model: nn.Module, recipe: Recipe, ranges: StepRanges | None = None, saved: Collection[str] | None = None
) -> Coverage:
    """Replace a denoiser's layers, in place, by quantized ones that still have to observe and freeze, or to be loaded.

    Args:
        model: holds convolutions, ``nn.Linear`` and attentions of diffusers; may be on the meta device.
        recipe: which bits where.
        ranges: by step; none where all steps share one.
        saved: what a saved model has quantized, by its coverage's names; without it all that the recipe's rules say.

    Returns:
        What matched and what did not.

    Raises:
        InputError: a rule of the recipe matches no layer, its groups do not fit one, or nothing at all was quantized.
        ArtifactError: the model has not what was saved.
    """
    layers, splits = dict(_layers(model)), _splits(model, recipe)
    if saved is None:
        _check_rules(model, recipe, {part: _type_of(m) for n, m in layers.items() for part in (n, *_parts(n, splits))})
    quantized: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name, layer in layers.items():
        output: dict[str, Any] = {}
        for part, piece in zip(_parts(name, splits), _pieces(layer, splits.get(name)), strict=True):
            rule = recipe.rule_for(names_of(part), _type_of(layer))
            if saved is not None and part not in saved:
                skipped.append((part, "saved in full precision"))
            elif saved is None and rule is not None and rule.skip:
                skipped.append((part, f"rule {rule.match!r}"))
            elif getattr(layer, "padding_mode", "zeros") != "zeros":
                skipped.append((part, f"padding_mode {layer.padding_mode!r}"))
            else:
                output[part] = _quantized(part, piece, recipe, rule, ranges)
        if len(output) == len(_pieces(layer, splits.get(name))):
            put_layer(model, name, SplitConv(*output.values()) if name in splits else output[name])
            quantized.extend(output)
        elif output:
            raise InputError(f"a rule skips one half of {name!r}; skip both, or set split_shortcuts to false")
    _insert_products(model, recipe, ranges, saved, quantized, skipped)
    left = getattr(model, "config", {}).get("left") if hasattr(model, "config") else None
    skipped.extend((name, why) for name, why in left or ())  # of a network that is none of diffusers'
    if saved is not None and set(saved) - set(quantized):
        missing = min(set(saved) - set(quantized))
        raise ArtifactError(f"{type(model).__name__} has no {missing!r}, which the saved model had; save it again")
    if not quantized:
        raise InputError(f"{type(model).__name__} holds no convolution, linear layer or attention to quantize")
    return Coverage(tuple(quantized), tuple(skipped))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its convolutions and linear layers, by name; those of an adapter stay as they are, the layer under it is one."""
    ip_adapter = has_ip_adapter(model)
    for path, module in model.named_modules():
        if isinstance(module, Convolution | nn.Linear) and not _of_adapter(path, ip_adapter):
            yield plain_name(path), module


def has_ip_adapter(model: nn.Module) -> bool:
    """Whether diffusers has put an IP-Adapter into a denoiser, which its configuration as saved does not know."""
    config: Any = getattr(model, "config", {})
    return (
        hasattr(model, "encoder_hid_proj")
        and config.get("encoder_hid_dim_type") is None
        and (model.encoder_hid_proj is not None)
    )


def _of_adapter(path: str, ip_adapter: bool) -> bool:
    """Whether a module belongs to a LoRA or an IP-Adapter, not to the network that it changes."""
    own = ("processor", "encoder_hid_proj") if ip_adapter else ("processor",)
    return any(part.startswith("lora_") or part in own for part in path.split("."))


def _type_of(layer: nn.Module) -> LayerType:
    return "linear" if isinstance(layer, nn.Linear) else "conv"


def quantized_by_earlier_versions(model: nn.Module, recipe: Recipe) -> list[str]:
    """What a recipe quantized before it was saved by name: products of diffusers' first class of attention alone."""
    names = []
    for name, layer in _layers(model):
        for part in _parts(name, _splits(model, recipe)):
            rule = recipe.rule_for(names_of(part), _type_of(layer))
            if not (rule is not None and rule.skip) and getattr(layer, "padding_mode", "zeros") == "zeros":
                names.append(part)
    for name, module in attention_modules(model) if recipe.attention else ():
        rule = recipe.rule_for(name, "attention")
        plain = isinstance(module, Attention) and type(module.processor) in (AttnProcessor, AttnProcessor2_0)
        if plain and not (rule is not None and rule.skip):
            names.append(f"{name}.{PRODUCTS}")
    return names


def _splits(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    return concatenations(model) if recipe.split_shortcuts else {}


def _parts(name: str, splits: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{name}.{half}" for half in HALVES) if name in splits else (name,)


def names_of(part: str) -> tuple[str, ...]:
    """The names that rules may know a quantized layer by: of half a split one, the whole's and its own."""
    whole, _, half = part.rpartition(".")
    return (whole, part) if half in HALVES else (part,)


def _pieces(layer: Any, hidden: int | None) -> tuple[Any, ...]:
    """A convolution of a concatenation as two, the bias with the first; any other layer as it is."""
    if hidden is None:
        return (layer,)
    pieces = []
    for part, bias in ((layer.weight[:, :hidden], layer.bias), (layer.weight[:, hidden:], None)):
        piece = copy.copy(layer)
        piece._parameters = {"weight": nn.Parameter(part.detach().clone(), layer.weight.requires_grad), "bias": bias}
        piece.in_channels = part.shape[1]
        pieces.append(piece)
    return tuple(pieces)


def _quantized(name: str, layer: Any, recipe: Recipe, rule: Rule | None, ranges: StepRanges | None) -> QuantLayer:
    weights, activations, widths = recipe.quantizers_for(rule)
    without = () if rule is None else rule.without
    required = {method.name: method for method in recipe.methods if method.name not in without}
    low_rank = required.get(LowRank.name)
    rank, rank_bits = (low_rank.rank, low_rank.bits) if isinstance(low_rank, LowRank) else (0, WIDE)
    if rank and rule is not None and rule.rank is not None:
        rank = rule.rank
    smooth, convrot = required.get(Smooth.name), required.get(ConvRot.name)
    rotate = smooth.rotate if isinstance(smooth, Smooth) else 0
    rotate = convrot.group if isinstance(convrot, ConvRot) else rotate
    count, changes = _count(name, activations, ranges), smooth is not None or convrot is not None
    extras = LayerOptions(changes, rotate, convrot is not None, rank, rank_bits, count)
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    try:
        output: QuantLayer = kind(layer, weights, activations, widths, extras)
        output.input.to(layer.weight.device)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return output


def _count(name: str, activations: QuantSpec, ranges: StepRanges | None) -> int:
    if ranges is None or activations.dynamic or activations.format in BLOCKS:
        return 1
    return ranges.of_layer(name)


def _insert_products(
    model: nn.Module,
    recipe: Recipe,
    ranges: StepRanges | None,
    saved: Collection[str] | None,
    quantized: list[str],
    skipped: list[tuple[str, str]],
) -> None:
    """The attention products' part of :func:`insert_quantizers`; every attention knows that it is quantized."""
    for name, module in list(attention_modules(model)):
        rule, products = recipe.rule_for(name, "attention"), None
        part = f"{name}.{PRODUCTS}"
        if saved is not None and part not in saved:
            skipped.append((part, "saved in full precision"))
        elif saved is None and not recipe.attention:
            pass  # said by the recipe
        elif saved is None and rule is not None and rule.skip:
            skipped.append((part, f"rule {rule.match!r}"))
        elif saved is None and not has_products(module):
            skipped.append((part, f"attention products of {type(module.processor).__name__}"))
        else:
            _, activations, widths = recipe.quantizers_for(rule)
            count = _count(name, activations, ranges)
            device = next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))
            plain = not hasattr(module, "processor")  # where its channels are is not known
            products = AttentionProducts(activations, recipe.softmax_bits, widths, count, rowwise=plain).to(device)
            quantized.append(part)
        quantize_attention(module, products)


def _check_rules(model: nn.Module, recipe: Recipe, layers: dict[str, LayerType]) -> None:
    known: list[tuple[str, LayerType]] = [*layers.items()]
    known += [(name, "attention") for name, _ in attention_modules(model)]
    for rule in recipe.rules:
        if not rule.optional and not any(rule.matches(name, kind) for name, kind in known):
            kind = "layer" if rule.type is None else f"{rule.type} layer"
            raise InputError(
                f"the rule match={rule.match!r} matches no {kind} of {type(model).__name__}; "
                f"its layers are named like {', '.join(sorted(layers)[:3])}"
            )


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with a dotted name, under the adapters that it may have."""
    parent, _, leaf = name.rpartition(".")
    above = find_layer(model, parent)
    while hasattr(getattr(above, leaf, None), BASE):
        above, leaf = getattr(above, leaf), BASE
    setattr(above, leaf, layer)


LIBRARIES = ("optimum", "bitsandbytes", "sdnq", "torchao", "nunchaku")  # whose modules a quantized model may have


def check_full_precision(model: nn.Module, name: str) -> None:
    """Refuse a model that is quantized already, by whatever library.

    Raises:
        InputError: it is; the message says by what.
    """
    by = getattr(model, "quantization_method", None)
    config = getattr(model, "config", {}).get("quantization_config") if hasattr(model, "config") else None
    if by is None and config is not None:
        by = config.get("quant_method", "?") if isinstance(config, dict) else getattr(config, "quant_method", "?")
    modules = {type(module).__module__.split(".")[0]: module for module in model.modules()}
    if by is None:
        by = next((library for library in LIBRARIES if library in modules), None)
    for key, value in model.named_parameters():
        plain = type(value) in (nn.Parameter, torch.Tensor) and type(value.data) is torch.Tensor
        if by is None and not plain:
            by = f"{type(value.data if type(value) is nn.Parameter else value).__name__} weights"
        narrow = value.is_floating_point() and value.element_size() == 1 and is_plain(model)  # not cast for each call
        if by is None and (narrow or not value.is_floating_point()):
            by = f"{key} in {str(value.dtype).removeprefix('torch.')}"
    if by is not None:
        by = str(getattr(by, "value", by)).replace("optimum", "quanto")
        raise InputError(f"{name} is already quantized ({by}); give the full-precision pipeline")


def check_weights(model: nn.Module, name: str) -> None:
    """Raise InputError, naming the first, if parameters are NaN or infinite."""
    for key, value in model.named_parameters():
        whole = value.detach().float() if value.element_size() == 1 else value.detach()
        if not value.is_meta and not bool(torch.isfinite(whole).all()):
            raise InputError(f"{name}.{key} holds NaN or infinite weights; the checkpoint is damaged, get it again")
