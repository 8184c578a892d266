"""The modules that take the place of a denoiser's layers."""

from ptqd.quantization.modules.activation import ActivationQuantizer, BitWidth
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import LayerOptions, QuantConv, QuantLayer, QuantLinear

__all__ = [
    "ActivationQuantizer",
    "AttentionProducts",
    "BitWidth",
    "LayerOptions",
    "QuantConv",
    "QuantLayer",
    "QuantLinear",
]
