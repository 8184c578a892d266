"""A quantized denoiser in torchao's layouts, for ``torch.compile`` on a GPU: codes and scales as they are.

torchao multiplies linear layers only: convolutions and attention products are in floating point, of weights that were
rounded. int8 keeps the ranges of activations too; int4 rounds weights alone, as its kernels do.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.intercept import hooked
from ptqd.diffusion.pipeline_parts import denoiser_names, with_twins
from ptqd.diffusion.sampling import Sampling
from ptqd.engines.calls import FOUR_BITS, Call, captured
from ptqd.engines.onnx_graph import Products
from ptqd.engines.sessions import required
from ptqd.errors import InputError
from ptqd.quantization.modules.adapters import tuned_layers
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv
from ptqd.quantization.numerics.affine import MAX_BITS
from ptqd.quantization.numerics.rotation import rotate
from ptqd.quantization.plan_steps import plan_steps_of
from ptqd.quantization.sites import quantized_layers

Layout = Literal["int8", "int4"]
GROUP = 128  # of inputs that share a scale in int4's kernels; here all groups of a row have the row's


def to_torchao(pipe: DiffusionPipeline, sampling: Sampling, layout: Layout) -> tuple[DiffusionPipeline, Products]:
    """A pipeline whose denoiser is diffusers' own, with torchao's tensors as the weights of its linear layers.

    Args:
        pipe: quantized by ptqd.
        sampling: how it samples: its calls show of how many dimensions each layer's input is.
        layout: ``"int8"`` (``Int8Tensor``, float32) or ``"int4"`` (``Int4Tensor``, bfloat16, needs ``mslk`` to run).

    Returns:
        The pipeline, which saves and loads as diffusers' torchao pipelines do, and what is computed how.
    """
    required("torchao")
    name, *others = denoiser_names(pipe)
    if others:
        kind = type(pipe).__name__
        raise InputError(f"{kind} has two denoisers, of which torchao's layouts have one; export to onnxruntime")
    model = getattr(pipe, name)
    if any(True for _ in tuned_layers(model)):
        raise InputError(f"the {name} has a LoRA, which torchao's layouts have no place for; unload it, or fuse it")
    steps = plan_steps_of(model)
    if steps is not None and (any(steps.plan.held) or steps.plan.shallow):
        raise InputError(
            f"the plan of the {name} holds steps, which torchao's pipelines cannot; export to "
            "onnxruntime or openvino, or take a plan that holds none"
        )
    ranks = _ranks(model, captured(pipe, sampling, model))
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    plain = type(model).from_config(config).eval().to(torch.bfloat16 if layout == "int4" else torch.float32)
    integer, floating = [], []
    own = dict(model.named_modules())
    for path, module in plain.named_modules():
        layer = own.get(path)
        if isinstance(layer, QuantLayer | SplitConv):
            reason = _why_not(layer, layout)
            if reason is None:
                assert isinstance(layer, QuantLayer)
                weight = (_int8 if layout == "int8" else _int4)(layer, ranks.get(path, 2))
                integer.append(path)
            else:
                weight = rounded_weight(layer)
                floating.append((path, reason))
            _set(module, weight, layer)
        elif layer is not None:
            for key, value in module.named_parameters(recurse=False):
                value.data.copy_(layer.get_parameter(key))
            for key, buffer in module.named_buffers(recurse=False):
                buffer.copy_(layer.get_buffer(key))
    products = [key for key, module in own.items() if isinstance(module, AttentionProducts)]
    floating += [(key, "attention products") for key in products]
    _adopt(plain, layout, [key for key, module in plain.named_modules() if _is_plain(module)])
    return with_twins(pipe, **{name: plain}), Products(tuple(integer), tuple(floating), ())


def _ranks(model: nn.Module, call: Call) -> dict[str, int]:
    """Of how many dimensions each linear layer's input is."""
    ranks: dict[str, int] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            ranks[path] = args[0].ndim

        return hook

    layers = [(path, layer) for path, layer in quantized_layers(model) if layer.kind == "linear"]
    hooks = [module.register_forward_pre_hook(keep(path)) for path, module in layers]
    with hooked(*hooks), torch.no_grad():
        model(**call.arguments(list(call.tensors.values())))
    return ranks


def _why_not(layer: nn.Module, layout: Layout) -> str | None:
    """Why torchao does not multiply a layer's codes; None where it does."""
    if not isinstance(layer, QuantLayer) or layer.kind != "linear":
        return "a convolution"
    weights, quantizer = layer.weights, layer.input
    obstacles = {
        f"{weights.format} weights": weights.format != "int",
        "a rotation of its input": layer.rotated > 1,
        "a branch beside it": layer.rank > 0,
        "a fused LoRA": layer.adapter_rank > 0,
        "weights with groups": layer.scale.ndim != 1,
    }
    if layout == "int4":
        obstacles["weights with zero points"] = layer.zero_point is not None
        obstacles[f"weights of {weights.bits} bits"] = weights.bits > FOUR_BITS
    else:
        obstacles["8-bit weights with zero points"] = layer.zero_point is not None and weights.bits == MAX_BITS
        obstacles["ranges that change"] = len(quantizer.widths) > 1 or quantizer.ranges > 1
        obstacles[f"{quantizer.spec.format} activations of {quantizer.bits} bits"] = (
            quantizer.spec.format != "int" or quantizer.bits != MAX_BITS
        )
    return next((what for what, there in obstacles.items() if there), None)


def _int8(layer: QuantLayer, rank: int) -> torch.Tensor:
    """8-bit codes, with the range of the layer's input."""
    from torchao.quantization import Int8Tensor, MappingType, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    quantizer = layer.input
    symmetric = quantizer.grids[0].symmetric
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    scale = zero = None
    if not quantizer.spec.dynamic:
        scale = quantizer.scale.float().view([1] * rank).clone()
        signed = quantizer.zero_point - (0 if symmetric else 1 << (MAX_BITS - 1))  # torchao's codes are signed
        zero = signed.to(torch.int8).view([1] * rank)
    granularity = PerRow() if quantizer.spec.dynamic else PerTensor()
    codes = layer.integer_weight()
    if layer.zero_point is not None:  # of 7 bits and less: a byte holds what is left
        codes = codes.to(torch.int16) - layer.zero_point.view(-1, *[1] * (codes.ndim - 1))
    output: torch.Tensor = Int8Tensor(
        codes.to(torch.int8),
        layer.scale.float().view(-1, 1).clone(),
        [1, layer.columns],
        torch.float32,
        act_quant_scale=scale,
        act_quant_zero_point=zero,
        act_pre_scale=None if layer.smooth_scale is None else 1 / layer.smooth_scale,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity, mapping),
    )
    return output


def _int4(layer: QuantLayer, rank: int) -> torch.Tensor:
    """4-bit codes, two in a byte, the even ones low; a scale for each group of inputs and each output."""
    from torchao.quantization import Int4Tensor

    codes = layer.integer_weight().to(torch.int8)
    packed = (codes[:, ::2] & 0xF) | (codes[:, 1::2] << FOUR_BITS)
    group = GROUP if layer.columns % GROUP == 0 else layer.columns
    scale = layer.scale.to(torch.bfloat16).expand(layer.columns // group, -1).contiguous()
    smooth = None if layer.smooth_scale is None else (1 / layer.smooth_scale).to(torch.bfloat16)
    output: torch.Tensor = Int4Tensor(
        packed, scale, torch.zeros_like(scale), [1, group], torch.Size(layer.shape), act_pre_scale=smooth
    )
    return output


def rounded_weight(layer: nn.Module) -> torch.Tensor:
    """A quantized layer's weight as one in floating point, its smoothing and its branch included, float32."""
    if isinstance(layer, SplitConv):
        return torch.cat([rounded_weight(layer.hidden), rounded_weight(layer.skip)], 1)
    assert isinstance(layer, QuantLayer)
    weight = layer.grid().values(layer.integer_weight().flatten(1)).view(layer.shape).float()
    if layer.rank:
        down, up = layer.low_rank_weights()
        weight = weight + (up @ down).view(layer.shape)
    if layer.smooth_scale is not None:
        weight = weight if layer.rotation_matrix is None else rotate(weight, layer.rotation_matrix, 1)
        weight = weight / layer.smooth_scale.view(1, -1, *[1] * (weight.ndim - 2))
    if layer.adapter_down is not None and layer.adapter_up is not None:
        weight = weight + (layer.adapter_up @ layer.adapter_down).view(layer.shape)
    return weight


def _set(module: nn.Module, weight: torch.Tensor, layer: nn.Module) -> None:
    parameter: Any = module.weight
    if type(weight) is torch.Tensor:
        weight = weight.to(parameter.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.hidden.bias if isinstance(layer, SplitConv) else layer.bias
    if isinstance(bias, torch.Tensor):
        module.bias = nn.Parameter(bias.detach().to(parameter.dtype).clone(), requires_grad=False)


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight.data) is torch.Tensor


def _adopt(model: Any, layout: Layout, plain: list[str]) -> None:
    """Let diffusers save and load a model as one of torchao's."""
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig

    kind = Int8DynamicActivationInt8WeightConfig() if layout == "int8" else Int4WeightOnlyConfig()
    config = TorchAoConfig(kind, modules_to_not_convert=plain)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer.validate_environment()
    model.is_quantized = True
    model.quantization_method = config.quant_method
