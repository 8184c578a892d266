"""The places of a denoiser where something is rounded: the one scan for them."""

from collections.abc import Iterator

from torch import nn

from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import QuantLayer


def layer_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Its activation quantizers with the name of the layer, or of the attention, whose operands they round."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield name.rsplit(".processor." if ".processor." in name else ".", 1)[0], module


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Its quantized convolutions and linear layers, halves of split ones each, by their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module
