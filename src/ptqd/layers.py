"""Quantized convolutions, linear layers and attention products.

A layer is in one of two states, entered by explicit calls: *observing* (full-precision output, every activation
shown to an observer) and *simulating* (activations rounded to their grid, weights dequantized from their packed
codes). :meth:`freeze` goes from the first to the second; a layer loaded from a file simulates from the start.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from ptqd.affine import (
    Grid,
    affine_parameters,
    dequantize_affine,
    fake_quantize,
    pack,
    packed_size,
    quantize_affine,
    unpack,
)
from ptqd.errors import InputError
from ptqd.observers import Observer, find_range
from ptqd.recipe import Quantizer


class ActiveWidth:
    """Which of its widths a quantizer rounds to now; those of one group of layers share one."""

    def __init__(self, index: int) -> None:
        self.index = index


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to one grid, per tensor; the range comes from what it observed.

    Args:
        spec: the grid, and how its range is found.
        widths: all bits that it can round to, ascending, each with a range of its own; ``spec.bits`` is one of them,
            and the one it starts at.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, spec: Quantizer, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.widths = tuple(widths) or (spec.bits,)
        self.active = ActiveWidth(self.widths.index(spec.bits))
        self.register_buffer("scale", torch.ones(len(self.widths)))
        self.register_buffer("zero_point", torch.zeros(len(self.widths), dtype=torch.int32))
        self.observer: Observer | None = None
        self._numbers: list[tuple[float, float, Grid]] = []

    @property
    def bits(self) -> int:
        """What it rounds to now."""
        return self.widths[self.active.index]

    @property
    def grids(self) -> list[Grid]:
        """Of each width."""
        return [Grid(bits, self.spec.symmetric) for bits in self.widths]

    def observe(self) -> None:
        """Start to collect the range; outputs are the inputs, untouched."""
        self.observer = Observer()

    def freeze(self) -> None:
        """Fix scale and zero point of every width from what was observed, and start to round.

        Raises:
            InputError: nothing was observed.
        """
        if self.observer is None:
            raise InputError("freeze() needs observe() and at least one forward pass before it")
        spec = self.spec
        for i, grid in enumerate(self.grids):
            low, high = self.observer.range(grid, spec.range, spec.percentile, spec.p)
            self.scale[i], self.zero_point[i] = affine_parameters(low, high, grid)
        self.observer = None
        self.refresh()

    def refresh(self) -> None:
        """Forget what was derived from the buffers, after they changed."""
        self._numbers = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself while observing, else ``x`` rounded to the active width's grid; any shape."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        return self.rounded(x, self.active.index)

    def rounded(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """``x`` rounded to the grid of one of the widths."""
        if not self._numbers:
            numbers = zip(self.scale.tolist(), map(float, self.zero_point.tolist()), self.grids, strict=True)
            self._numbers = list(numbers)
        return fake_quantize(x, *self._numbers[index])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


def weight_parameters(weight: torch.Tensor, spec: Quantizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight's rows (O, I), one an output channel, on the CPU, with the scale and zero point (O,) of each."""
    rows = weight.detach().cpu().float().flatten(1)  # not every device has float64
    low, high = find_range(rows, spec.grid, spec.range, percentile=spec.percentile, p=spec.p)
    return rows, *affine_parameters(low, high, spec.grid)


def rounded_weight(weight: torch.Tensor, spec: Quantizer) -> torch.Tensor:
    """A weight as its codes would give it back."""
    rows, scale, zero = weight_parameters(weight, spec)
    return fake_quantize(rows, scale[:, None], zero[:, None], spec.grid).view(weight.shape).to(weight)


class QuantLayer(nn.Module, ABC):
    """What a quantized convolution and a quantized linear layer share.

    The packed ``codes`` with one ``scale`` (and, on an affine grid, ``zero_point``) an output channel are
    the weight; ``weight`` is a float tensor derived from them, kept in memory and never saved.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, weights: Quantizer, activations: Quantizer, widths: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.weights = weights
        self.input = ActivationQuantizer(activations, widths)
        self.shape = tuple(layer.weight.shape)
        device, size = layer.weight.device, packed_size(layer.weight.numel(), weights.bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.ones(self.shape[0], device=device))
        zero = None if weights.symmetric else torch.zeros(self.shape[0], dtype=torch.uint8, device=device)
        self.register_buffer("zero_point", zero)
        self.register_buffer("weight", layer.weight.detach(), persistent=False)
        self.bias = layer.bias

    @abstractmethod
    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer makes of an input and a weight."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output, of a full-precision input."""
        return self.product(self.input(x), self.weight, self.bias)

    def observe(self) -> None:
        """Show the inputs of the following forward passes to the observer."""
        self.input.observe()

    def freeze(self) -> None:
        """Fix the activation's range and turn the full-precision weight into codes (round to nearest)."""
        self.input.freeze()
        self.encode(self.weight)

    def encode(self, weight: torch.Tensor) -> None:
        """Turn a full-precision weight into codes (round to nearest)."""
        grid = self.weights.grid
        rows, scale, zero = weight_parameters(weight, self.weights)
        self.codes.copy_(pack(quantize_affine(rows, scale[:, None], zero[:, None], grid), grid))
        self.scale.copy_(scale)
        if self.zero_point is not None:
            self.zero_point.copy_(zero)
        self.refresh()

    def integer_weight(self) -> torch.Tensor:
        """The weight's codes, unpacked: int16, of the weight's shape."""
        return unpack(self.codes, self.weights.grid, math.prod(self.shape)).view(self.shape)

    def refresh(self, dtype: torch.dtype | None = None) -> None:
        """Derive the float weight from the codes, after they changed, in another dtype if one is given."""
        column = (-1, *[1] * (len(self.shape) - 1))
        zero = torch.zeros_like(self.scale, dtype=torch.int16) if self.zero_point is None else self.zero_point
        weight = dequantize_affine(self.integer_weight(), self.scale.view(column), zero.to(torch.int16).view(column))
        self.weight = weight.to(dtype or self.weight.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


class QuantLinear(QuantLayer):
    """A linear layer with quantized weight and input."""

    def __init__(
        self, layer: nn.Linear, weights: Quantizer, activations: Quantizer, widths: Sequence[int] = ()
    ) -> None:
        super().__init__(layer, weights, activations, widths)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Linear map of ``x`` (..., in_features)."""
        return F.linear(x, weight, bias)


class QuantConv2d(QuantLayer):
    """A 2-d convolution with quantized weight and input."""

    def __init__(
        self, layer: nn.Conv2d, weights: Quantizer, activations: Quantizer, widths: Sequence[int] = ()
    ) -> None:
        if layer.padding_mode != "zeros":
            raise InputError(f"a convolution with padding_mode={layer.padding_mode!r} has no quantized form; skip it")
        super().__init__(layer, weights, activations, widths)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Convolution of ``x`` (N, in_channels, H, W)."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class QuantAttnProcessor(nn.Module):
    """Attention whose products q.k and p.v have quantized operands; replaces diffusers' AttnProcessor(2_0)."""

    def __init__(self, activations: Quantizer, softmax_bits: int, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.query, self.key, self.value = (ActivationQuantizer(activations, widths) for _ in range(3))
        self.probabilities = ActivationQuantizer(Quantizer(softmax_bits, symmetric=False, range="minmax"))

    @property
    def quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """Of q, k, softmax and v."""
        return self.query, self.key, self.probabilities, self.value

    def observe(self) -> None:
        """Show the operands of the following forward passes to the observers."""
        for quantizer in self.quantizers:
            quantizer.observe()

    def freeze(self) -> None:
        """Fix the operands' ranges."""
        for quantizer in self.quantizers:
            quantizer.freeze()

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What diffusers' AttnProcessor computes, of hidden states (N, L, C) or (N, C, H, W)."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # N,L,C
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])

        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))  # N*heads,L,D
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        scores = attn.get_attention_scores(self.query(query), self.key(key), attention_mask)  # N*heads,L,K
        hidden_states = torch.bmm(self.probabilities(scores), self.value(value))
        hidden_states = attn.batch_to_head_dim(hidden_states)  # N,L,C
        for module in attn.to_out:
            hidden_states = module(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        output: torch.Tensor = hidden_states / attn.rescale_output_factor
        return output
