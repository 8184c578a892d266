"""Bit operations, parameters and bytes of a denoiser, layer by layer and step by step.

BOPs = sum over layers of MACs x b_w x b_a;  FP32 counts as 32 x 32 = 1024 for each MAC.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.deep_part import deep_modules, is_deep
from ptqd.diffusion.macs import FULL_BITS, PRODUCTS, Macs, on_meta, run_macs
from ptqd.diffusion.pipeline_parts import denoisers_of
from ptqd.diffusion.sampling import Sampling
from ptqd.errors import InputError
from ptqd.quantization.memory import Memory, memory_bytes
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.attention import PRODUCTS as ATTENTION
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer
from ptqd.quantization.plan_steps import PlanSteps, plan_steps_of


@dataclass(frozen=True)
class Bits:
    """The bits that each layer's two operands have at each step.

    Attributes:
        left: of the weight, or of a product's first operand (T, L).
        right: of the activation (T, L).
        beside: bit operations of branches and rotations, for each multiply-accumulate of the layer itself (L,).
        computed: 1 where a step computes a layer, 0 where a plan holds the output or the deep part (T, L).
    """

    left: torch.Tensor
    right: torch.Tensor
    beside: torch.Tensor
    computed: torch.Tensor


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        macs: of one sample.
        bits: of the layers.
        parameters: of the denoiser.
        memory: that the denoiser takes, or both where there are two.
    """

    macs: Macs
    bits: Bits
    parameters: int
    memory: Memory

    @property
    def disk(self) -> int:
        """Bytes of its saved tensors."""
        return self.memory.disk

    @property
    def bops(self) -> torch.Tensor:
        """Bit operations of each layer at each step (T, L), float64."""
        of_each = self.bits.left * self.bits.right + self.bits.beside
        return self.macs.counts * self.bits.computed * of_each

    @property
    def total(self) -> int:
        """Bit operations of the whole run."""
        return int(self.bops.sum())

    @property
    def ratio(self) -> float:
        """How many times fewer bit operations than FP32."""
        return self.macs.total * FULL_BITS**2 / self.total


def run_cost(pipe: DiffusionPipeline, sampling: Sampling) -> Cost:
    """The cost of one sample of a pipeline, as it is quantized and planned; see the module's docstring.

    Raises:
        InputError: the pipeline cannot run without numbers, because it looks at its denoiser's numbers.
    """
    return cost_of(pipe, run_macs(pipe, sampling))


def cost_of(quantized: DiffusionPipeline | nn.Module | Sequence[nn.Module], macs: Macs) -> Cost:
    """The cost of a run, of which the multiply-accumulates are known, of a pipeline or of its denoisers alone.

    Two denoisers that share the steps have layers of the same names, and are taken to be quantized alike.
    """
    models = [quantized] if isinstance(quantized, nn.Module) else quantized
    models = list(denoisers_of(models).values()) if isinstance(models, DiffusionPipeline) else models
    parameters = sum(p.numel() for model in models for p in on_meta(model).parameters())
    macs = by_halves(macs, models[0])
    memory = Memory(sum(map(disk_bytes, models)), sum(map(memory_bytes, models)))
    return Cost(macs, layer_bits(models[0], macs), parameters, memory)


def by_halves(macs: Macs, model: nn.Module) -> Macs:
    """The same multiply-accumulates, those of split convolutions given to their halves."""
    layers: list[str] = []
    columns: list[torch.Tensor] = []
    for name, counts in zip(macs.layers, macs.counts.T, strict=True):
        result = find_layer(model, name)
        parts = {"": 1}
        if isinstance(result, SplitConv):
            parts = {".hidden": result.hidden.in_channels, ".skip": result.skip.in_channels}
        for half, channels in parts.items():
            layers.append(name + half)
            columns.append(counts * channels / sum(parts.values()))
    return Macs(tuple(layers), torch.stack(columns, 1))


def layer_bits(model: nn.Module, macs: Macs) -> Bits:
    """The bits of a denoiser's layers at each step; 32 for all that is not quantized.

    Raises:
        InputError: its plan is for another number of steps.
    """
    planned, steps = plan_steps_of(model), len(macs.counts)
    if planned is not None and planned.plan.steps != steps:
        raise InputError(f"the plan is for {planned.plan.steps} steps, the run takes {steps}; make a plan for these")
    left, right = torch.full_like(macs.counts, FULL_BITS), torch.full_like(macs.counts, FULL_BITS)
    beside = torch.zeros(len(macs.layers), dtype=torch.float64)
    for n, name in enumerate(macs.layers):
        layer, _, product = name.rpartition(".")
        result, attention = find_layer(model, name), find_layer(model, layer)
        products = getattr(attention, ATTENTION, None)
        if isinstance(result, QuantLayer):
            left[:, n] = result.weights.bits
            right[:, n] = _by_step(result.input, planned, steps)
            share = result.rank * (1 / result.shape[0] + 1 / result.columns)  # r (I + O) of I O multiply-accumulates
            beside[n] = share * result.rank_bits**2
            products = result.shape[0] * math.prod(result.shape[2:]) / math.prod(getattr(result, "stride", ()))
            beside[n] += math.log2(result.rotated) / products * FULL_BITS  # additions of an input, for its products
            fused = result.adapter_rank * (1 / result.shape[0] + 1 / result.columns)
            beside[n] += fused * FULL_BITS**2
        elif f".{product}" in PRODUCTS and isinstance(products, AttentionProducts):
            first, second = (0, 1) if product == "qk" else (2, 3)
            left[:, n] = _by_step(products.quantizers[first], planned, steps)
            right[:, n] = _by_step(products.quantizers[second], planned, steps)
    computed = torch.ones_like(macs.counts)
    if planned is not None:
        computed[list(planned.plan.held)] = 0
        if planned.plan.shallow:
            computed[list(planned.plan.shallow)] *= 1 - deep_layers(model, macs.layers)
    return Bits(left, right, beside, computed)


def deep_layers(model: nn.Module, layers: Sequence[str]) -> torch.Tensor:
    """1 for layers of a denoiser's deep part, else 0 (L,).

    Raises:
        InputError: its deep part is not known.
    """
    deep = deep_modules(model)
    return torch.tensor([float(is_deep(layer, deep)) for layer in layers], dtype=torch.float64)


def _by_step(quantizer: ActivationQuantizer, planned: PlanSteps | None, steps: int) -> torch.Tensor:
    """A quantizer's bits at each step (T,)."""
    if planned is None or quantizer.active not in planned.groups:
        return torch.full((steps,), float(quantizer.bits), dtype=torch.float64)
    group = planned.groups.index(quantizer.active)
    return torch.tensor([float(row[group]) for row in planned.plan.holding(()).bits], dtype=torch.float64)


def disk_bytes(quantized: DiffusionPipeline | nn.Module) -> int:
    """Bytes of a model's saved tensors, or of a pipeline's denoisers': codes, scales and what is in full precision."""
    models = [quantized] if isinstance(quantized, nn.Module) else denoisers_of(quantized).values()
    return sum(_bytes(model.state_dict().values()) for model in models)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
