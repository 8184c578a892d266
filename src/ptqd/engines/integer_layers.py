"""A quantized denoiser whose layers multiply integers in torch: for GPUs, compiled.

Convolutions are integer matrix products on the columns under their kernel (im2col), by ``torch._int_mm``, or Triton
kernels of our own that need no columns and have linear layers of 4-bit weights too. Codes and scales are the
simulation's; sums of products are exact, where a simulation rounds them.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.offload import bring_like
from ptqd.diffusion.pipeline_parts import denoiser_names, denoisers_of, with_twins
from ptqd.diffusion.plain_copy import plain_copy
from ptqd.engines.onnx_graph import Products
from ptqd.engines.sessions import required
from ptqd.errors import InputError
from ptqd.quantization.hf_quantizer import not_ours
from ptqd.quantization.modules.activation import KeptInFloat32
from ptqd.quantization.modules.adapters import tuned_layers
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantConv, QuantLayer, smoothed
from ptqd.quantization.numerics.affine import MAX_BITS
from ptqd.quantization.sites import quantized_layers
from ptqd.quantization.swap import put_layer

Kernel = Literal["int_mm", "triton"]
KERNELS: tuple[Kernel, ...] = ("int_mm", "triton")
MULTIPLE, FEWEST_ROWS = 8, 17  # what torch._int_mm asks of columns and outputs, and of rows, on CUDA
_HALF = 1 << (MAX_BITS - 1)  # codes of activations are unsigned; less this they fit a signed byte


def with_integer_layers(pipe: DiffusionPipeline, kernel: Kernel = "int_mm") -> tuple[DiffusionPipeline, Products]:
    """A pipeline whose denoisers' layers multiply integers, where their formats allow it.

    Args:
        pipe: quantized by ptqd; it is left untouched.
        kernel: ``"int_mm"``: torch's integer matrix product; ``"triton"``: our own kernels.

    Returns:
        The pipeline, which runs and compiles like any other but is not saved, and what is computed how.

    Raises:
        InputError: another kernel; a pipeline that ptqd did not quantize, or that has LoRAs.
        MissingDependencyError: Triton is not installed.
    """
    if kernel not in KERNELS:
        raise InputError(f"unknown kernel {kernel!r}; known are {', '.join(KERNELS)}")
    if kernel == "triton":
        required("triton")
    parts: dict[str, Any] = {}
    integer: list[str] = []
    floating: list[tuple[str, str]] = []
    names = denoiser_names(pipe)
    for name, given in denoisers_of(pipe).items():
        prefix = "" if len(names) == 1 else f"{name}."
        if any(True for _ in tuned_layers(given)):
            raise InputError(f"the {name} has a LoRA, which integers do not multiply; unload it, or fuse it")
        model = plain_copy(given)
        layers = list(quantized_layers(model))
        if not layers:
            raise InputError(not_ours(model, name))
        for path, layer in layers:
            why = _why_not(layer)
            if why is None:
                put_layer(model, path, IntegerLayer(layer, kernel))
                integer.append(prefix + path)
            else:
                floating.append((prefix + path, why))
        products = [path for path, module in model.named_modules() if isinstance(module, AttentionProducts)]
        floating += [(prefix + path, "attention products") for path in products]
        bring_like(model, given)
        parts[name] = model
    return with_twins(pipe, **parts), Products(tuple(integer), tuple(floating), ())


def _why_not(layer: QuantLayer) -> str | None:
    """Why a layer's codes are not multiplied as integers; None where they are."""
    weights, quantizer = layer.weights, layer.input
    conv = layer if isinstance(layer, QuantConv) else None
    found = {
        f"{weights.format} weights": weights.format != "int",
        "weights with groups": layer.scale.ndim != 1,
        "8-bit weights with zero points": layer.zero_point is not None and weights.bits == MAX_BITS,
        f"{quantizer.spec.format} activations": quantizer.spec.format != "int",
        f"activations of {quantizer.bits} bits": quantizer.bits > MAX_BITS,
        "ranges that change": len(quantizer.widths) > 1 or quantizer.ranges > 1,
        "a branch beside it": layer.rank > 0 or layer.adapter_rank > 0,
        "ranges of each sample as they come": quantizer.spec.dynamic
        and (quantizer.rowwise or (conv is not None and not conv.keeps_places)),
        "a convolution of other than two dimensions": conv is not None and len(conv.kernel_size) != 2,
        "a convolution with groups": conv is not None and conv.groups != 1,
        "padding by words": conv is not None and isinstance(conv.padding, str),
    }
    return next((what for what, there in found.items() if there), None)


class IntegerLayer(KeptInFloat32):
    """A quantized layer that multiplies codes.

    Args:
        layer: a linear layer, or a convolution of two dimensions, that simulates.
        kernel: see :func:`with_integer_layers`.
    """

    kept = ("scale",)

    codes: torch.Tensor
    sums: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: QuantLayer, kernel: Kernel) -> None:
        super().__init__()
        self.layer = _Inputs(layer)
        conv = layer if isinstance(layer, QuantConv) else None
        self.geometry: Any = None if conv is None else (conv.stride, conv.padding, conv.dilation)
        self.kernel_size: tuple[int, ...] = (1, 1) if conv is None else tuple(conv.kernel_size)
        self.kernel: Kernel = kernel
        self.outputs, self.columns = layer.shape[0], layer.columns
        for name in ("in_features", "out_features", "in_channels", "out_channels"):  # which networks look at
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        codes = layer.integer_weight()
        if layer.zero_point is not None:  # of 7 bits and less: a byte holds what is left
            codes = codes - layer.zero_point.to(codes).view(-1, *[1] * (codes.ndim - 1))
        self.packed = kernel == "triton" and conv is None and layer.weights.bits <= 4 and self.columns % 2 == 0
        self.packed = self.packed and layer.zero_point is None
        if conv is not None:
            codes = codes.movedim(1, -1)  # O,KH,KW,C
        self.register_buffer("sums", codes.flatten(1).sum(1).to(torch.int32))
        bias = torch.zeros(self.outputs, device=codes.device) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("scale", layer.scale.detach().float().clone())
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("codes", self._stored(codes.to(torch.int8)).contiguous())

    def _stored(self, codes: torch.Tensor) -> torch.Tensor:
        """The codes as the kernel wants them: packed, as they are, or (K, O) with zeros up to its multiples."""
        if self.packed:
            return (codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4)
        if self.kernel == "triton":
            return codes if self.geometry is not None else codes.view(len(codes), 1, 1, -1)
        flat = codes.flatten(1)
        return F.pad(flat, (0, -flat.shape[1] % MULTIPLE, 0, -len(flat) % MULTIPLE)).T

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`forward`; the input may be given by torch's keyword."""
        return super().__call__(kwargs.pop("input"), **kwargs) if not args else super().__call__(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """What the simulated layer gives, of an input in floating point."""
        given = x.dtype
        x, scale, zero = self.layer(x)
        if self.geometry is not None:
            x = x.movedim(1, -1)  # N,H,W,C
        if isinstance(zero, int) and isinstance(scale, float):
            y = self._static(x.contiguous(), scale, zero, given)
        else:
            if self.geometry is not None:
                scale, zero = scale.movedim(1, -1), zero.movedim(1, -1)
            products = self.products(x.contiguous(), 0)
            scaled = (products - zero * self.sums) * (scale.float() * self.scale) + self.bias.float()
            y = scaled.to(given)
        return y if self.geometry is None else y.movedim(-1, 1)

    def _static(self, x: torch.Tensor, scale: float, zero: int, dtype: torch.dtype) -> torch.Tensor:
        if self.kernel == "triton":
            return self._by_triton(x, zero, (scale, self.scale, self.bias.float()), dtype)
        return (self.products(x, zero) * (scale * self.scale) + self.bias.float()).to(dtype)

    def products(self, x: torch.Tensor, zero: int) -> torch.Tensor:
        """Sums of products of codes, int32: of codes less the code that stands for 0, channels last in both."""
        if self.kernel == "triton":
            return self._by_triton(x, zero, None, torch.int32)
        columns, places = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        if self.geometry is not None:
            (sh, sw), (ph, pw), (dh, dw) = self.geometry
            padded = F.pad(x, (0, 0, pw, pw, ph, ph), value=zero)
            (kh, kw), width = self.kernel_size, x.shape[-1]
            taken = padded.unfold(1, dh * (kh - 1) + 1, sh).unfold(2, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
            places = taken.shape[:3]
            columns = taken.permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * width)
        rows = len(columns)
        missing = max(0, FEWEST_ROWS - rows)
        columns = F.pad(columns, (0, len(self.codes) - columns.shape[1], 0, missing))
        result = torch._int_mm(columns.contiguous(), self.codes)[:rows, : self.outputs]
        return (result - zero * self.sums).view(*places, self.outputs)

    def _by_triton(
        self, x: torch.Tensor, zero: int, floats: tuple[float, torch.Tensor, torch.Tensor] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        from ptqd.engines.triton_kernels import conv2d, linear4

        if self.packed:
            flat = linear4(x.reshape(-1, x.shape[-1]), self.codes, self.sums, zero, floats, dtype)
            return flat.view(*x.shape[:-1], self.outputs)
        if self.geometry is None:
            rows = x.reshape(1, 1, -1, x.shape[-1])
            flat = conv2d(rows, self.codes, self.sums, zero, ((1, 1), (0, 0), (1, 1)), floats, dtype)
            return flat.view(*x.shape[:-1], self.outputs)
        stride, padding, dilation = self.geometry
        return conv2d(x, self.codes, self.sums, zero, (stride, padding, dilation), floats, dtype)


class _Inputs(KeptInFloat32):
    """What a quantized layer does to its input before it multiplies: smoothing, rotation, rounding."""

    kept = ("smooth_scale", "rotation_matrix")

    smooth_scale: torch.Tensor | None
    rotation_matrix: torch.Tensor | None

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.axis = layer.axis
        for name in self.kept:
            self.register_buffer(name, getattr(layer, name), persistent=False)
        self.quantizer = layer.input

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """Codes (int8), and their scale and the code that stands for 0: numbers, or one of each token."""
        x = smoothed(x, self.smooth_scale, self.rotation_matrix, self.axis)
        grid = self.quantizer.grids[0]
        half = 0 if grid.symmetric else _HALF
        scale, zero = self.quantizer.parameters_for(x)
        codes = (x.float() / scale).round_().clamp_(grid.qmin - zero, grid.qmax - zero).add_(zero).sub_(half)
        if isinstance(zero, float):
            return codes.to(torch.int8), scale, int(zero) - half
        return codes.to(torch.int8), scale, (zero - half).to(torch.int32)
