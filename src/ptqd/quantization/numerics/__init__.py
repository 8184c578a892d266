"""The arithmetic of quantizers: plain functions of tensors."""

from ptqd.quantization.numerics.affine import (
    Grid,
    affine_parameters,
    check_weight_bits,
    dequantize_affine,
    fake_quantize,
    pack,
    quantize_affine,
    unpack,
)
from ptqd.quantization.numerics.formats import (
    BLOCKS,
    Format,
    block_codes,
    block_scales,
    fake_blocks,
    float_codes,
    float_values,
    round_float,
)
from ptqd.quantization.numerics.observer import Observer
from ptqd.quantization.numerics.range_search import RangeMethod, find_range
from ptqd.quantization.numerics.weight_grid import WeightGrid, groups_of, rounded_weight

__all__ = [
    "BLOCKS",
    "Format",
    "Grid",
    "Observer",
    "RangeMethod",
    "WeightGrid",
    "affine_parameters",
    "block_codes",
    "block_scales",
    "check_weight_bits",
    "dequantize_affine",
    "fake_blocks",
    "fake_quantize",
    "find_range",
    "float_codes",
    "float_values",
    "groups_of",
    "pack",
    "quantize_affine",
    "round_float",
    "rounded_weight",
    "unpack",
]
