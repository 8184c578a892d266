"""The places of a denoiser where something is rounded: the one scan for them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.attention import PRODUCTS, AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, plain_name
from ptqd.quantization.recipe import LayerType


@dataclass(frozen=True)
class Site:
    """One place where something is rounded.

    Attributes:
        name: dotted name of the layer, halves of split ones each, or of the attention; without the adapters around it.
        kind: of layer, as rules of a recipe name it.
        module: what stands there.
        weight: the layer, of one that has a quantized weight; None of attention products.
        activations: quantizers of its operands.
    """

    name: str
    kind: LayerType
    module: QuantLayer | AttentionProducts
    weight: QuantLayer | None
    activations: tuple[ActivationQuantizer, ...]


def quantized_sites(model: nn.Module) -> Iterator[Site]:
    """Its quantized layers and attention products, in the order of its modules."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield Site(plain_name(name), module.kind, module, module, (module.input,))
        elif isinstance(module, AttentionProducts):
            yield Site(name.rpartition(".")[0], "attention", module, None, module.quantizers)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Its quantized convolutions and linear layers by name."""
    for site in quantized_sites(model):
        if site.weight is not None:
            yield site.name, site.weight


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Its activation quantizers by their own dotted names, those that stand without a layer included."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield plain_name(name), module


def layer_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Its activation quantizers with the name of the layer, or of the attention, whose operands they round."""
    for name, quantizer in activation_quantizers(model):
        whole = name.rpartition(".")[0]
        yield whole.removesuffix(f".{PRODUCTS}").removesuffix(".processor"), quantizer  # as earlier exports say
