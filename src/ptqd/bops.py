"""Cost: multiply-accumulates, bit operations and bytes of one denoiser call, layer by layer.

    BOPs = sum over layers of MACs x b_w x b_a;  FP32 counts as 32 x 32 = 1024 for each MAC.

Convolutions, linear layers and the attention products q.k and p.v are counted, on a real call of the pipeline: guidance
is counted as the two samples it is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from ptqd.components import denoiser_name
from ptqd.layers import QuantAttnProcessor, QuantConv2d, QuantLayer, QuantLinear
from ptqd.sampling import Sampling, run_batch

FULL_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of a denoiser call.

    Attributes:
        name: dotted; the products of an attention block end in ``.qk`` and ``.pv``.
        macs: multiply-accumulates.
        left_bits: of the weight, or of the first operand of a product.
        right_bits: of the activation.
    """

    name: str
    macs: int
    left_bits: int = FULL_BITS
    right_bits: int = FULL_BITS

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * self.left_bits * self.right_bits


@contextmanager
def counting(model: nn.Module) -> Iterator[list[LayerCost]]:
    """Count every forward pass of ``model`` inside the block, layer by layer, batch included."""
    costs: list[LayerCost] = []
    handles = []

    def layer_hook(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if isinstance(layer, nn.Conv2d | QuantConv2d):
                kernel = tuple(layer.weight.shape[1:])
                macs = output.numel() * math.prod(kernel)
            else:
                macs = output.numel() * layer.in_features
            bits = (layer.weights.bits, layer.input.spec.bits) if isinstance(layer, QuantLayer) else ()
            costs.append(LayerCost(name, macs, *bits))

        return hook

    def attention_hook(name: str) -> Any:
        def hook(attn: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            context = kwargs.get("encoder_hidden_states")
            batch, length = (x.shape[0], x.shape[1]) if x.ndim == 3 else (x.shape[0], x[0, 0].numel())
            macs = batch * length * (length if context is None else context.shape[1]) * attn.inner_dim
            qk = pv = (FULL_BITS, FULL_BITS)
            if isinstance(attn.processor, QuantAttnProcessor):
                q, k, p, v = (quantizer.spec.bits for quantizer in attn.processor.quantizers)
                qk, pv = (q, k), (p, v)
            costs.extend((LayerCost(f"{name}.qk", macs, *qk), LayerCost(f"{name}.pv", macs, *pv)))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | QuantConv2d | QuantLinear):
            handles.append(module.register_forward_hook(layer_hook(name)))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_pre_hook(attention_hook(name), with_kwargs=True))
    try:
        yield costs
    finally:
        for handle in handles:
            handle.remove()


def image_cost(pipe: DiffusionPipeline, run: Sampling) -> list[LayerCost]:
    """Cost of all denoiser calls for one image, guidance included, counted while one is sampled."""
    with counting(getattr(pipe, denoiser_name(pipe))) as costs:
        run_batch(pipe, run, range(1), "latent")
    return costs


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's saved tensors: packed codes, scales and whatever stays in full precision."""
    return sum(v.numel() * v.element_size() for v in model.state_dict().values())
