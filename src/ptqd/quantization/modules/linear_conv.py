"""Quantized convolutions and linear layers.

A layer is in one of two states, entered by explicit calls: *observing* (full-precision output, every activation
shown to an observer) and *simulating* (activations rounded to their grid, weights dequantized from their packed
codes). :meth:`freeze` goes from the first to the second; a layer loaded from a file simulates from the start.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ptqd.errors import InputError
from ptqd.quantization.modules.activation import ActivationQuantizer, KeptInFloat32, Mode
from ptqd.quantization.numerics.affine import WIDE, pack, packed_size, unpack, unpack_unsigned
from ptqd.quantization.numerics.formats import BLOCKS, block_scales
from ptqd.quantization.numerics.rotation import largest_group, rotate, rotation_of
from ptqd.quantization.numerics.weight_grid import WeightGrid, groups_of
from ptqd.quantization.recipe import LayerType, QuantSpec

BASE = "base_layer"  # what PEFT calls the layer that an adapter changes


@dataclass(frozen=True)
class LayerOptions:
    """What a layer holds beside codes and one range.

    Attributes:
        smooth: a divisor for each input channel (SmoothQuant).
        rotate: room for a Hadamard rotation of groups of at most so many input channels; none where it is 0.
        regular: the rotation is by a regular Hadamard matrix, of a power of 4 channels.
        rank: of a branch beside the codes (SVDQuant); none where it is 0.
        rank_bits: of the branch's weights and inputs: 16, or integers of 8 and fewer.
        ranges: of its input, by step.
    """

    smooth: bool = False
    rotate: int = 0
    regular: bool = False
    rank: int = 0
    rank_bits: int = WIDE
    ranges: int = 1


class QuantLayer(KeptInFloat32, ABC):
    """What quantized convolutions and linear layers share.

    It computes ``product(round(y), weight) + up(down(y)) + bias`` with ``y = x / s``, rotated; ``s``, the rotation and
    the branch are there where a recipe's methods put them, and a second branch, of ``x`` itself, where a LoRA was
    fused. The packed ``codes`` with one ``scale`` (and, on an affine grid, ``zero_point``) an output channel, or one
    for each of its groups, are the weight; ``weight`` is a float tensor derived from them, kept in memory and never
    saved.
    """

    kept = ("scale", "smooth_scale", "global_scale", "low_rank_scale", "rotation_matrix")
    padding_mode = "zeros"
    kind: ClassVar[LayerType]
    axis: ClassVar[int]  # of the input's channels

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    global_scale: torch.Tensor | None
    smooth_scale: torch.Tensor | None
    rotation: torch.Tensor | None
    rotation_matrix: torch.Tensor | None
    low_rank_down: torch.Tensor | None
    low_rank_up: torch.Tensor | None
    low_rank_scale: torch.Tensor | None
    adapter_down: torch.Tensor | None
    adapter_up: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weights: QuantSpec,
        activations: QuantSpec,
        widths: Sequence[int] = (),
        extras: LayerOptions | None = None,
    ) -> None:
        super().__init__()
        extras = extras or LayerOptions()
        full: Any = layer.weight
        self.weights = weights
        self.shape = tuple(full.shape)
        mixes = math.prod(self.shape[2:]) > 1  # places; a convolution of 1 x 1 is a linear layer on each
        self.input = ActivationQuantizer(activations, widths, axis=self.axis, ranges=extras.ranges, rowwise=mixes)
        self.columns = math.prod(self.shape[1:])
        device = full.device
        self._make_codes(device)
        smooth = extras.smooth and getattr(layer, "groups", 1) == 1
        rank = min(extras.rank, min(self.shape[0], self.columns) // 4) if getattr(layer, "groups", 1) == 1 else 0
        self.register_buffer("smooth_scale", torch.ones(self.shape[1], device=device) if smooth else None)
        self.largest_rotation = largest_group(self.shape[1], extras.rotate) if smooth and extras.rotate else 1
        if extras.regular and self.largest_rotation.bit_length() % 2 == 0:
            self.largest_rotation //= 2  # to a power of 4
        room = torch.ones((), dtype=torch.int32, device=device) if self.largest_rotation > 1 else None
        self.register_buffer("rotation", room)  # channels of a group; 1 where there is none
        self.register_buffer("rotation_matrix", None, persistent=False)
        self.make_low_rank(rank, extras.rank_bits, device)
        self.make_adapter(0)
        self.holds_codes = False  # alone; its float weight is then made of them at every call, and empty here
        self._is_target = True  # whether ``weight`` is as it is smoothed and split, where it is in full precision
        self.register_buffer("weight", full.detach(), persistent=False)
        self.bias = layer.bias  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast it; a weight of another type is made anew of the codes."""
        before = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != before and not self.input.mode.is_calibrating:
            self.refresh()
        return self

    def _make_codes(self, device: torch.device) -> None:
        """Room for codes and scales of the weight's format."""
        spec = self.weights
        groups, blocks = groups_of(self.columns, spec)[0], spec.format in BLOCKS
        rows = (self.shape[0],) if groups == 1 and not blocks else (self.shape[0], groups)
        size = packed_size(math.prod(self.shape), spec.bits)
        self.register_buffer("codes", torch.zeros(size, dtype=torch.uint8, device=device))
        scale = torch.zeros(rows, dtype=torch.uint8, device=device) if blocks else torch.ones(rows, device=device)
        self.register_buffer("scale", scale)
        affine = spec.format == "int" and not spec.symmetric
        self.register_buffer("zero_point", torch.zeros(rows, dtype=torch.uint8, device=device) if affine else None)
        self.register_buffer("global_scale", torch.ones((), device=device) if spec.format == "nvfp4" else None)

    def make_low_rank(self, rank: int, bits: int, device: torch.device) -> None:
        """Room for a branch: bit patterns of float16, which a pipeline of another precision leaves alone, or codes."""
        self.rank, self.rank_bits = rank, bits
        for name, size in (("low_rank_down", (rank, self.columns)), ("low_rank_up", (self.shape[0], rank))):
            room = torch.zeros(size, dtype=torch.int16, device=device)
            if bits < WIDE:
                room = pack(room, QuantSpec(bits).grid)
            self.register_buffer(name, room if rank else None)
        scales = torch.ones(rank + self.shape[0], device=device) if rank and bits < WIDE else None  # of down, and of up
        self.register_buffer("low_rank_scale", scales)
        spec = QuantSpec(bits, symmetric=False, dynamic=True)
        inputs = [ActivationQuantizer(spec, axis=self.axis, rowwise=rowwise) for rowwise in (self.input.rowwise, False)]
        self.low_rank_inputs = tuple(inputs) if scales is not None else ()  # no modules: their ranges are of each input

    def set_bits(self, bits: int) -> None:
        """Make room for codes of other bits, which are then to be written."""
        self.weights = self.weights.of(bits)
        self._make_codes(self.codes.device)

    @abstractmethod
    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer makes of an input and a weight."""

    @abstractmethod
    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x`` through a weight (O, r) that mixes channels, at each place."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`forward`; hooks find the input among the arguments, also where it was given by torch's keyword."""
        return super().__call__(kwargs.pop("input"), **kwargs) if not args else super().__call__(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The layer's output, of a full-precision input."""
        if self.rotation is not None and self.rotation_matrix is None and not self.weight.numel():
            self.set_rotation(int(self.rotation))  # of codes that are offloaded
        given, x = x, self.smoothed(x)
        weight = self.float_weight() if self.weight.numel() else self._passing_weight().to(x.dtype)
        y = self.matmul(self.input(x), weight, self.bias)
        if self.low_rank_up is not None:
            y = y + self.low_rank(x)
        if self.adapter_down is not None and self.adapter_up is not None:
            down = self.adapter_down.view(-1, *self.shape[1:]).to(given)
            y = y + self.project(self.matmul(given, down), self.adapter_up.to(given))
        return y

    @property
    def adapter_rank(self) -> int:
        """Of the LoRAs that were fused; 0 where none was."""
        return 0 if self.adapter_down is None else len(self.adapter_down)

    def make_adapter(self, rank: int) -> None:
        """Room for a fused LoRA of a rank; none of 0."""
        device = self.codes.device
        for name, size in (("adapter_down", (rank, self.columns)), ("adapter_up", (self.shape[0], rank))):
            self.register_buffer(name, torch.zeros(size, device=device) if rank else None)

    def push_adapter(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Fuse a LoRA ``up @ down``, (O, r) and (r, I, ...), beside those it has; codes and ranges stay.

        Raises:
            InputError: the layer has groups, of which each would need a branch.
        """
        if getattr(self, "groups", 1) != 1:
            raise InputError("a LoRA of a convolution with groups cannot be fused; leave it loaded instead")
        down, up = (x.detach().float().flatten(1).clone() for x in (down, up))
        if self.adapter_down is not None and self.adapter_up is not None:
            down, up = torch.cat([self.adapter_down, down]), torch.cat([self.adapter_up, up], 1)
        self.adapter_down, self.adapter_up = down.to(self.codes.device), up.to(self.codes.device)

    def pop_adapter(self, rank: int) -> None:
        """Take the LoRA that was fused last, of a rank, out again."""
        assert self.adapter_down is not None
        assert self.adapter_up is not None
        whole = len(self.adapter_down) == rank
        self.adapter_down = None if whole else self.adapter_down[:-rank].clone()
        self.adapter_up = None if whole else self.adapter_up[:, :-rank].clone()

    def smoothed(self, x: torch.Tensor) -> torch.Tensor:
        """An input divided by what smooths it, and rotated."""
        return smoothed(x, self.smooth_scale, self.rotation_matrix, self.axis)

    @property
    def rotated(self) -> int:
        """Channels of a group that is rotated; 1 where none is."""
        return 1 if self.rotation_matrix is None else len(self.rotation_matrix)

    def set_rotation(self, group: int) -> None:
        """Rotate groups of so many input channels, by a regular Hadamard matrix where negative; none of 1."""
        assert self.rotation is not None
        self.rotation.fill_(group)
        matrix = rotation_of(group)
        self.rotation_matrix = None if matrix is None else matrix.to(self.rotation.device)

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """What the low-rank branch makes of a smoothed input."""
        down, up = (weight.to(x) for weight in self.low_rank_weights())
        if not self.low_rank_inputs or self.input.mode is not Mode.ROUND:
            return self.project(self.matmul(x, down.view(-1, *self.shape[1:])), up)
        first, second = self.low_rank_inputs
        hidden = self.matmul(_straight_through(first, x), down.view(-1, *self.shape[1:]))
        return self.project(_straight_through(second, hidden), up)

    def observe(self) -> None:
        """Show the inputs of the following forward passes to the observers."""
        self.input.observe()

    def bypass(self) -> None:
        """Compute in full precision, and collect nothing."""
        self.input.bypass()

    def freeze(self) -> None:
        """Fix the activation's ranges and turn the full-precision weight into codes (round to nearest)."""
        self.input.freeze()
        self._encode(self.float_weight().detach().cpu().float().flatten(1))

    def encode(self, weight: torch.Tensor) -> None:
        """Turn a full-precision weight into codes (round to nearest)."""
        self._encode(self.target_weight(weight))

    def _encode(self, rows: torch.Tensor) -> None:
        grid = WeightGrid.find(rows, self.weights)
        self.write(grid, grid.codes(rows))

    def target_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """What the codes should stand for, rows (O, I), float32, on the CPU: smoothed, rotated, less the branch."""
        rows = weight.detach().cpu().float()
        if self.smooth_scale is not None:
            rows = rows * self.smooth_scale.cpu().view(1, -1, *[1] * (rows.ndim - 2))
            rows = rows if self.rotation_matrix is None else rotate(rows, self.rotation_matrix.cpu(), 1)
        rows = rows.flatten(1)
        if self.low_rank_up is not None:
            down, up = (t.cpu() for t in self.low_rank_weights())
            rows = rows - up @ down
        return rows

    def use_float(self, weight: torch.Tensor) -> None:
        """While observing: compute with a full-precision weight, as it is smoothed and split.

        A layer that will hold codes alone keeps the weight as it is given, and smooths and splits it at each call.
        """
        self.weight, self._is_target = weight.detach(), False
        if not self.holds_codes:
            self.weight, self._is_target = self.float_weight(), True

    def float_weight(self) -> torch.Tensor:
        """The float weight that it computes with; while it observes, in full precision, as it is smoothed and split."""
        return self.weight if self._is_target else self.target_weight(self.weight).view(self.shape).to(self.weight)

    def set_low_rank(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Give it a branch ``up @ down``, (O, r) and (r, I), rounded to its bits."""
        assert self.low_rank_down is not None
        assert self.low_rank_up is not None
        if self.low_rank_scale is None:
            self.low_rank_down.copy_(down.half().view(torch.int16))
            self.low_rank_up.copy_(up.half().view(torch.int16))
            return
        spec, scales = QuantSpec(self.rank_bits), []
        for room, weight in ((self.low_rank_down, down), (self.low_rank_up, up)):
            grid = WeightGrid.find(weight.float().cpu(), spec)
            room.copy_(pack(grid.codes(weight.float().cpu()), spec.grid))
            scales.append(grid.scale.flatten())
        self.low_rank_scale.copy_(torch.cat(scales))

    def low_rank_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Down (r, I) and up (O, r) of its branch, float32, as they are rounded."""
        assert self.low_rank_down is not None
        assert self.low_rank_up is not None
        if self.low_rank_scale is None:
            return self.low_rank_down.view(torch.float16).float(), self.low_rank_up.view(torch.float16).float()
        grid, rows = QuantSpec(self.rank_bits).grid, (self.rank, self.shape[0])
        codes = [
            unpack(room, grid, count * columns).view(count, columns).float()
            for room, count, columns in zip(
                (self.low_rank_down, self.low_rank_up), rows, (self.columns, self.rank), strict=True
            )
        ]
        down, up = self.low_rank_scale.split(rows)
        return codes[0] * down[:, None], codes[1] * up[:, None]

    def grid(self) -> WeightGrid:
        """The numbers its rows are rounded to."""
        rows = (self.shape[0], -1)
        stored = None
        scale = self.scale
        if self.weights.format in BLOCKS:
            shared = self.global_scale if self.global_scale is not None else torch.ones((), device=scale.device)
            stored = (scale, shared)
            scale = block_scales(scale, shared, self.weights.format)
        scale = scale.float().view(rows)
        zero = (
            torch.zeros_like(scale, dtype=torch.int32) if self.zero_point is None else self.zero_point.int().view(rows)
        )
        return WeightGrid(self.weights, scale, zero, self.columns, stored)

    def write(self, grid: WeightGrid, codes: torch.Tensor) -> None:
        """Take a grid and codes (O, I) as the weight."""
        self.codes.copy_(pack(codes, self.weights.grid))
        if grid.stored is None:
            self.scale.copy_(grid.scale.view(self.scale.shape))
        else:
            self.scale.copy_(grid.stored[0])
            if self.global_scale is not None:
                self.global_scale.copy_(grid.stored[1])
        if self.zero_point is not None:
            self.zero_point.copy_(grid.zero.view(self.zero_point.shape))
        self.refresh()

    def integer_weight(self) -> torch.Tensor:
        """The weight's codes, unpacked: int16, of the weight's shape."""
        return unpack(self.codes, self.weights.grid, math.prod(self.shape)).view(self.shape)

    def refresh(self, dtype: torch.dtype | None = None) -> None:
        """Derive the float weight from the codes, after they changed, in another dtype if one is given.

        A layer that holds codes alone forgets it.
        """
        if self.rotation is not None and not self.rotation.is_meta:
            self.set_rotation(int(self.rotation))
        dtype = dtype or self.weight.dtype
        self._is_target = True
        if self.holds_codes:
            self.weight = torch.empty(0, dtype=dtype, device=self.codes.device)
        elif not self.codes.is_meta:
            self.weight = self.dequantized().to(dtype)

    def _passing_weight(self) -> torch.Tensor:
        """:meth:`dequantized`, for one call: on a CPU in memory that all layers use in turn."""
        codes = self.codes
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or codes.device.type != "cpu":
            return self.dequantized()
        return self.dequantized(_room(math.prod(self.shape)))

    def dequantized(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that the codes stand for, float32; of integers in memory that is given, or new one."""
        if self.weights.format != "int":
            return self.grid().values(self.integer_weight().flatten(1)).view(self.shape)
        grid = self.grid()
        scale, zero = (grid.scale, grid.zero) if grid.scale.shape[1] == 1 else grid.expanded()
        zero, bits, (count, columns) = zero - self.weights.grid.qmin, self.weights.bits, (self.shape[0], self.columns)
        weight = torch.empty(count, columns, device=self.codes.device) if out is None else out.view(count, columns)
        whole = columns * bits % 8 == 0  # a row ends with a byte
        some = max(1, _AT_ONCE // columns) if whole and out is not None else count
        for start in range(0, count, some):
            rows = slice(start, min(start + some, count))
            codes = self.codes[start * columns * bits // 8 : rows.stop * columns * bits // 8] if whole else self.codes
            above = unpack_unsigned(codes, bits, (rows.stop - start) * columns)
            weight[rows].copy_(above.view(-1, columns)).sub_(zero[rows]).mul_(scale[rows])
        return weight.view(self.shape)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()


def smoothed(
    x: torch.Tensor, smooth_scale: torch.Tensor | None, rotation_matrix: torch.Tensor | None, axis: int
) -> torch.Tensor:
    """An input whose channels along an axis are divided by ``smooth_scale`` (I,), and rotated; itself without these."""
    if smooth_scale is None:
        return x
    x = x / smooth_scale.to(x.dtype).view(-1, *[1] * (x.ndim - 2) if axis == 1 else ())
    return x if rotation_matrix is None else rotate(x, rotation_matrix, axis)


_AT_ONCE = 1 << 18  # codes that are unpacked together, where memory is short
_KEPT = 1 << 22  # numbers whose memory is kept for the next weight; larger ones' is given back


class _Room(threading.local):
    """Memory of a thread's own: new memory for every small weight would take longer than to unpack it."""

    def __init__(self) -> None:
        self.numbers = torch.empty(0)


_rooms = _Room()


def _room(count: int) -> torch.Tensor:
    if count > _KEPT:
        return torch.empty(count, dtype=torch.float32, device="cpu")
    if _rooms.numbers.numel() < count:
        with torch.inference_mode(False):
            _rooms.numbers = torch.empty(count, dtype=torch.float32, device="cpu")
    return _rooms.numbers[:count]


def _multiplied(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    """A product, in float32 and rounded once where the processor has no instructions for the type.

    Without them a product in bfloat16 takes 6 times as long as in float32, and a convolution 100 times.
    """
    if x.device.type != "cpu" or x.dtype not in _SLOW:
        return function(x, weight, bias, *rest)
    return function(x.float(), weight.float(), None if bias is None else bias.float(), *rest).to(x.dtype)


def _without_instructions() -> frozenset[torch.dtype]:
    """Types that this machine's processor cannot multiply itself, as far as torch says."""
    kinds = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = {dtype: getattr(torch.ops.mkldnn, name, None) for dtype, name in kinds.items()}
    return frozenset(dtype for dtype, is_supported in known.items() if is_supported is not None and not is_supported())


_SLOW = _without_instructions()


class QuantLinear(QuantLayer):
    """A linear layer with quantized weight and input."""

    kind = "linear"
    axis = -1

    def __init__(self, layer: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Linear map of ``x`` (..., in_features)."""
        return _multiplied(F.linear, x, weight, bias)

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Linear map of ``x`` (..., r)."""
        return F.linear(x, weight)


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class QuantConv(QuantLayer):
    """A 1-, 2- or 3-d convolution with quantized weight and input."""

    kind = "conv"
    axis = 1

    def __init__(self, layer: Convolution, *args: Any, **kwargs: Any) -> None:
        if layer.padding_mode != "zeros":
            raise InputError(f"a convolution with padding_mode={layer.padding_mode!r} has no quantized form; skip it")
        super().__init__(layer, *args, **kwargs)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups, self.in_channels, self.out_channels = layer.groups, layer.in_channels, layer.out_channels
        self.kernel_size = layer.kernel_size

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Convolution of ``x`` (N, in_channels, ...)."""
        return self._convolved(x, weight, bias, self.padding)

    def valid(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Convolution of ``x`` (N, in_channels, ...) that is padded already."""
        return self._convolved(x, weight, bias, 0)

    def _convolved(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: Any
    ) -> torch.Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return _multiplied(convolve, x, weight, bias, self.stride, padding, self.dilation, self.groups)

    @property
    def keeps_places(self) -> bool:
        """Whether each place of its output is of one place of its input, the same."""
        return math.prod(self.kernel_size) == 1 and set(self.stride) == {1} and not any(self.edges)

    @property
    def edges(self) -> tuple[int, ...]:
        """How much of 0 it puts before and after each dimension, the last first, as ``torch.nn.functional.pad``."""
        each: list[tuple[int, int]] = []
        for i, (size, dilation) in enumerate(zip(self.kernel_size, self.dilation, strict=True)):
            whole = dilation * (size - 1) if self.padding == "same" else 0
            before = whole // 2 if isinstance(self.padding, str) else self.padding[i]
            each.append((before, whole - before if isinstance(self.padding, str) else before))
        return tuple(amount for pair in reversed(each) for amount in pair)

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Convolution of ``x`` (N, r, ...) by a kernel of one place."""
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
        result: torch.Tensor = convolve(x, weight.view(*weight.shape, *[1] * (x.ndim - 2)))
        return result


class SplitConv(nn.Module):
    """A convolution of a concatenation: what comes from below and what is skipped have quantizers of their own.

    Q-Diffusion (arXiv 2302.04304, section 4.2): ``W [a, b] = W_a a + W_b b``.
    """

    def __init__(self, hidden: QuantConv, skip: QuantConv) -> None:
        super().__init__()
        self.hidden, self.skip = hidden, skip
        self.halves = (hidden.in_channels, skip.in_channels)  # an exporter puts other modules in their place
        self.in_channels, self.out_channels = hidden.in_channels + skip.in_channels, hidden.out_channels
        self.stride, self.padding, self.dilation = hidden.stride, hidden.padding, hidden.dilation
        self.kernel_size, self.groups = hidden.kernel_size, hidden.groups
        self.padding_mode = "zeros"

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the whole, which the first half holds."""
        return self.hidden.bias

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight, as :attr:`QuantLayer.weight` is a half's; empty where they hold codes alone."""
        halves = (self.hidden.weight, self.skip.weight)
        return torch.cat(halves, 1) if all(half.numel() for half in halves) else self.hidden.weight

    def push_adapter(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """See :meth:`QuantLayer.push_adapter`."""
        own, skipped = down.split((self.hidden.in_channels, self.skip.in_channels), dim=1)
        self.hidden.push_adapter(own, up)
        self.skip.push_adapter(skipped, up)

    def pop_adapter(self, rank: int) -> None:
        """See :meth:`QuantLayer.pop_adapter`."""
        self.hidden.pop_adapter(rank)
        self.skip.pop_adapter(rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of ``x`` (N, hidden + skip, ...)."""
        own, skipped = x.split(self.halves, dim=1)
        result: torch.Tensor = self.hidden(own) + self.skip(skipped)
        return result


def _straight_through(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """What a quantizer rounds; its gradient is that of ``x``."""
    rounded = quantizer.rounded(x.detach(), 0)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def plain_name(path: str) -> str:
    """A layer's name without the adapters around it, which come and go."""
    return ".".join(part for part in path.split(".") if part != BASE)


def find_layer(model: nn.Module, name: str) -> Any:
    """The layer of a name, under the adapters that it may have; None where there is none."""
    layer: Any = model
    for part in plain_name(name).split(".") if name else ():
        layer = getattr(layer, part, None)
        while isinstance(getattr(layer, BASE, None), nn.Module):
            layer = getattr(layer, BASE)
    return layer if isinstance(layer, nn.Module) else None


def full_weight(full: nn.Module, name: str, layer: QuantLayer) -> torch.Tensor:
    """The weight that a quantized layer was made from, in the full-precision model.

    Raises:
        InputError: that model has no such layer.
    """
    parent, _, half = name.rpartition(".")
    own, above = find_layer(full, name), find_layer(full, parent)
    weight: Any
    if isinstance(own, Convolution | nn.Linear):
        weight = own.weight
    elif half in ("hidden", "skip") and isinstance(above, Convolution):
        whole: Any = above.weight
        weight = whole[:, : layer.shape[1]] if half == "hidden" else whole[:, -layer.shape[1] :]
    else:
        weight = None
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != layer.shape:
        raise InputError(f"{name!r} is no full-precision layer of the pipeline that the weights are to be taken from")
    return weight.detach()
