"""Quantized attention products."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.recipe import QuantSpec


class QuantAttnProcessor(nn.Module):
    """Attention whose products q.k and p.v have quantized operands; replaces diffusers' AttnProcessor(2_0)."""

    def __init__(self, activations: QuantSpec, softmax_bits: int, widths: Sequence[int] = (), ranges: int = 1) -> None:
        super().__init__()
        self.query, self.key = (ActivationQuantizer(activations, widths, ranges=ranges) for _ in range(2))
        self.value = ActivationQuantizer(activations, widths, axis=-2, ranges=ranges, rowwise=True)
        self.probabilities = ActivationQuantizer(QuantSpec(softmax_bits, symmetric=False, range="minmax"))

    @property
    def quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """Of q, k, softmax and v."""
        return self.query, self.key, self.probabilities, self.value

    def observe(self) -> None:
        """Show the operands of the following forward passes to the observers."""
        for quantizer in self.quantizers:
            quantizer.observe()

    def bypass(self) -> None:
        """Compute in full precision, and collect nothing."""
        for quantizer in self.quantizers:
            quantizer.bypass()

    def freeze(self) -> None:
        """Fix the operands' ranges."""
        for quantizer in self.quantizers:
            quantizer.freeze()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`forward`; diffusers reads here which arguments it may pass."""
        output: torch.Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
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
        scores = self.scores(attn, query, key, attention_mask)  # N*heads,L,K
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

    def scores(
        self, attn: Attention, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Probabilities (N*heads, L, K) of queries (N*heads, L, D) and keys (N*heads, K, D)."""
        probabilities: torch.Tensor = attn.get_attention_scores(self.query(query), self.key(key), mask)
        return probabilities
