"""A component of a pipeline as an ONNX graph of standard operators: what every engine reads.

Of a denoiser that ptqd quantized it carries exactly its codes, scales and zero points: a product reads
``DequantizeLinear(QuantizeLinear(x))`` and ``DequantizeLinear(codes)``, which engines turn into integer arithmetic.
Weights of 4 bits and less are stored as INT4. Where activation ranges follow the steps, scales, zero points,
least and largest values are inputs of the graph, one vector each; else they are constants.
"""

import ast
import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ptqd.diffusion.deep_part import Features, follow_deep_part, using
from ptqd.diffusion.held_outputs import stop_holding
from ptqd.diffusion.pipeline_parts import copy_module
from ptqd.engines.calls import CODES, Call
from ptqd.engines.onnx_cleanup import _drop_squeezes, _pack_four_bits
from ptqd.engines.sessions import RANGES
from ptqd.errors import InputError, UnsupportedError, raised_by
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.attention import PRODUCTS as ATTENTION
from ptqd.quantization.modules.attention import AttentionProducts, attention_modules
from ptqd.quantization.modules.linear_conv import QuantConv, QuantLayer
from ptqd.quantization.numerics.affine import MAX_BITS, WIDE
from ptqd.quantization.sites import activation_quantizers, quantized_sites
from ptqd.quantization.swap import put_layer

OPSET = 21  # the first with 4-bit integers, blocks and 16-bit activations
_BYTE = 256
_MORE_BITS = "activations of more than 8 bits"
_TINY = torch.finfo(torch.float32).smallest_normal  # the least scale
OUT = "out."  # before the names of outputs, which an input may have too
DEEP = "deep."  # before the numbers of what the outer blocks get of the deep part


@dataclass(frozen=True)
class Products:
    """What the graph of a quantized denoiser computes how.

    Attributes:
        integer: names of layers and attention products whose operands are both integers.
        floating: those whose are not, with the reason.
        quantizers: names of the activation quantizers whose ranges are inputs, in the inputs' order.
    """

    integer: tuple[str, ...]
    floating: tuple[tuple[str, str], ...]
    quantizers: tuple[str, ...]


@dataclass
class _Table:
    """The ranges of the step at hand, while the graph is traced: one of each quantizer (Q,)."""

    scale: torch.Tensor
    zero: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True)
class Graph:
    """A component that was traced.

    Attributes:
        model: the graph (``onnx.ModelProto``).
        call: how it is called.
        method: what of it is called.
        outputs: names of the outputs, by what the component calls them.
        kind: the class of what the component returns, ``"MODULE.NAME"``; ``"tuple"`` where it is a tuple.
        products: what is computed how, of a quantized denoiser.
        features: what the outer blocks get of the deep part, by name: outputs of the graph after its own.
        shallow: the graph of the outer blocks alone, which has the features as inputs; None where it was not asked for.
    """

    model: Any
    call: Call
    method: str
    outputs: tuple[str, ...]
    kind: str
    products: Products
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shallow: Any = None


def trace(
    model: nn.Module, call: Call, method: str = "forward", *, signed: bool = False, hold_deep: bool = False
) -> Graph:
    """Trace a component, quantized by ptqd or not.

    Args:
        model: the component, on the CPU, in float32.
        call: how it is called; see :func:`captured`.
        method: what of it is called.
        signed: codes of symmetric activations are signed and 4-bit codes lie in 8 bits, as TensorRT wants them.
        hold_deep: whether the outer blocks get a graph of their own, for steps that hold the deep part.

    Raises:
        InputError: it cannot be traced, holds a number format that no ONNX engine multiplies, or its deep part is not
            known, or is of frames and not of samples.
    """
    twin, products, table = _traceable(model, signed)
    tensors = [_as_traced(value) for value in call.tensors.values()]
    ranges = [table.scale, table.zero, table.low, table.high] if products.quantizers else []
    if not hold_deep:
        wrapper = _Called(twin, call, method, table)
        return Graph(
            _exported(wrapper, tensors, {}, ranges, signed), call, method, wrapper.outputs, wrapper.kind, products
        )
    follow_deep_part(twin)
    features = Features(None)
    with torch.no_grad(), using(features):
        _Called(twin, call, method, table)(*tensors, *ranges)
    leaves, structure = tree_flatten(features.outputs)
    deep = {f"{DEEP}{i}": value for i, value in enumerate(leaves) if isinstance(value, torch.Tensor)}
    if any(name not in call.with_rows(deep) for name in deep):
        raise UnsupportedError(
            f"what the deep part of {type(model).__name__} gives has no row for each sample, such as a video's frames, "
            "so that no graph of the outer blocks alone can be made; let steps hold their output (--hold)"
        )
    outer = _Called(twin, call, method, table, _DeepPart(leaves, structure, tuple(deep), known=True))
    shallow = _exported(outer, tensors, deep, ranges, signed)
    used = {name for node in shallow.graph.node for name in node.input}
    for value in [value for value in shallow.graph.input if value.name in deep.keys() - used]:
        shallow.graph.input.remove(value)
    deep = {name: value for name, value in deep.items() if name in used}
    wrapper = _Called(twin, call, method, table, _DeepPart(leaves, structure, tuple(deep), known=False))
    full = _exported(wrapper, tensors, deep, ranges, signed)
    return Graph(full, call, method, wrapper.outputs, wrapper.kind, products, deep, shallow)


def _as_traced(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def _exported(
    wrapper: "_Called",
    tensors: Sequence[torch.Tensor],
    features: Mapping[str, torch.Tensor],
    ranges: Sequence[torch.Tensor],
    signed: bool,
) -> Any:
    """The graph of a call: its inputs are the call's tensors, the features that it is given, and ranges.

    Raises:
        UnsupportedError: it cannot be traced.
    """
    call, names = wrapper.call, list(wrapper.call.tensors)
    by_sample = {*call.by_sample, *call.with_rows(features)}
    given = wrapper.deep is not None and wrapper.deep.known
    inputs = [*tensors, *(features.values() if given else ()), *ranges]
    names += [*(features if given else ()), *(RANGES if ranges else ())]
    with torch.no_grad():
        wrapper(*inputs)
    dims = [{0: torch.export.Dim.DYNAMIC} if name in by_sample else {} for name in names]
    with warnings.catch_warnings(), _silent(), _traced(type(wrapper.model).__name__):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            wrapper.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[*(f"{OUT}{name}" for name in wrapper.outputs), *(() if given else features)],
            dynamic_shapes=(tuple(dims),),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if not signed:
        _pack_four_bits(
            proto, {name: layer.bits for name, layer in wrapper.named_modules() if isinstance(layer, _Product)}
        )
    _name_codes(proto)
    _drop_squeezes(proto)
    return proto


@dataclass(frozen=True)
class _DeepPart:
    """What is traced of a denoiser's deep part.

    Attributes:
        leaves: what it gave, of all its modules; those that are no tensors are the same in each call.
        structure: of these.
        names: of the tensors among them that the graph gives, or gets where they are known.
        known: whether they are given, not computed.
    """

    leaves: Sequence[Any]
    structure: TreeSpec
    names: tuple[str, ...]
    known: bool

    def features(self, tensors: Sequence[torch.Tensor]) -> Features:
        """What the deep part keeps, or holds, in a call that is given some features."""
        if not self.known:
            return Features(None)
        given = dict(zip(self.names, tensors, strict=True))
        leaves = [given.get(f"{DEEP}{i}", leaf) for i, leaf in enumerate(self.leaves)]
        return Features(None, tree_unflatten(leaves, self.structure), known=True)

    def given(self, features: Features) -> list[torch.Tensor]:
        """The features that a graph gives beside its outputs."""
        if self.known:
            return []
        leaves = tree_flatten(features.outputs)[0]
        return [leaves[int(name.removeprefix(DEEP))] for name in self.names]


class _Called(nn.Module):
    """A component as a function of tensors alone: those of the call, features of the deep part, and ranges."""

    outputs: tuple[str, ...]
    kind: str

    def __init__(self, model: nn.Module, call: Call, method: str, table: _Table, deep: _DeepPart | None = None) -> None:
        super().__init__()
        self.model, self.call, self.method, self.table, self.deep = model, call, method, table, deep

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known = self.deep.names if self.deep is not None and self.deep.known else ()
        count = len(self.call.tensors)
        own, features, ranges = tensors[:count], tensors[count : count + len(known)], tensors[count + len(known) :]
        if ranges:
            self.table.scale, self.table.zero, self.table.low, self.table.high = ranges
        method = getattr(self.model, self.method)
        named = inspect.signature(method).parameters.items()
        required = [name for name, p in named if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        nothing = dict.fromkeys(name for name in required if name in self.call.parameters)
        arguments = {**nothing, **self.call.arguments(own)}
        if self.deep is None:
            output, given = method(**arguments), []
        else:
            with using(self.deep.features(features)) as deep:
                output = method(**arguments)
            given = self.deep.given(deep)
        result = (
            dict(output.items()) if isinstance(output, Mapping) else {str(i): value for i, value in enumerate(output)}
        )
        result = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
        self.outputs = tuple(result)
        self.kind = f"{type(output).__module__}.{type(output).__qualname__}" if isinstance(output, Mapping) else "tuple"
        return (*result.values(), *given)


@contextlib.contextmanager
def _traced(kind: str) -> Iterator[None]:
    """Say of what torch's exporter and the network's own code cannot do that the network cannot be traced.

    Raises:
        UnsupportedError: so it is.
    """
    try:
        yield
    except Exception as error:
        by_exporter = isinstance(error, torch.onnx.errors.OnnxExporterError)
        if not by_exporter and not raised_by(error, "torch", "diffusers", "onnx_ir", "onnxscript"):
            raise
        lines = str(error.__cause__ or error).strip().splitlines()
        raise UnsupportedError(f"{kind} cannot be traced to an ONNX graph: {' '.join(lines[:2])[:300]}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter logs about operators of libraries that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _traceable(model: nn.Module, signed: bool) -> tuple[nn.Module, Products, _Table]:
    """A quantized denoiser as one that can be traced: standard operators instead of the simulation; weights are shared.

    Raises:
        InputError: a number format that no ONNX engine multiplies.
    """
    twin = copy_module(model, lambda tensor: tensor)
    for hook in list(twin._forward_pre_hooks):  # its step state: the ranges come from outside
        del twin._forward_pre_hooks[hook]
        twin._forward_pre_hooks_with_kwargs.pop(hook, None)
    stop_holding(twin)
    for _, attention in attention_modules(twin):
        if (
            type(getattr(attention, "processor", None)) is AttnProcessor2_0
        ):  # which mixes the numbers of rows of image and text
            attention.set_processor(AttnProcessor())
    changing = changing_quantizers(twin)
    count = len(changing)
    table = _Table(
        torch.ones(count), torch.zeros(count, dtype=torch.uint8), torch.zeros(count), torch.full((count,), 255.0)
    )
    places = {id(q): i for i, q in enumerate(changing.values())}
    integer, floating = [], []
    for site in list(quantized_sites(twin)):
        path = site.name if site.weight is not None else f"{site.name}.{ATTENTION}".lstrip(".")
        reason = _why_not(path, site.module, signed=signed)
        if reason is None:
            integer.append(path)
        else:
            floating.append((path, reason))
        quantizers = [
            (_RoundingByRow if q.spec.dynamic else _Rounding)(q, places.get(id(q)), table, signed)
            for q in site.activations
        ]
        if isinstance(site.module, QuantLayer):
            put_layer(twin, path, _Product(site.module, *quantizers, integer=reason is None))
        else:
            put_layer(twin, path, _Attention(*quantizers))
    return twin, Products(tuple(integer), tuple(floating), tuple(changing)), table


def changing_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """By name, the activation quantizers whose range depends on the step."""
    return {name: q for name, q in activation_quantizers(model) if len(q.widths) > 1 or q.ranges > 1}


def _why_not(name: str, module: QuantLayer | AttentionProducts, *, signed: bool) -> str | None:
    """Why a product is none of integers; None where it is one."""
    if isinstance(module, AttentionProducts):
        if module.probabilities.bits > MAX_BITS:
            return f"{module.probabilities.bits}-bit probabilities"
        if max(module.query.widths) > MAX_BITS:
            return _MORE_BITS
        return "ranges of queries and keys as they come" if module.query.spec.dynamic else None
    for what, spec in (("weights", module.weights), ("activations", module.input.spec)):
        if spec.format != "int":
            raise InputError(f"{name}: no engine multiplies {spec.format} {what}; quantize to integers, or simulate")
    if module.scale.ndim == 2:
        return "groups of weights"
    return _why_not_its_input(module, signed=signed)


def _why_not_its_input(module: QuantLayer, *, signed: bool) -> str | None:
    """Why a layer's input is not multiplied as integers; None where it is."""
    quantizer = module.input
    changes = len(quantizer.widths) > 1 or quantizer.ranges > 1
    if max(quantizer.widths) > MAX_BITS and (signed or changes or quantizer.spec.dynamic):
        return _MORE_BITS
    by_place = quantizer.spec.dynamic and not quantizer.rowwise
    if by_place and isinstance(module, QuantConv) and not module.keeps_places:
        return "a range as it comes of each place of the input, which are not those of the output"
    return None


def symbolic(
    name: str, inputs: Sequence[Any], like: torch.Tensor, dtype: torch.dtype, **attributes: Any
) -> torch.Tensor:
    """An ONNX operator in a traced graph, whose output has a tensor's shape."""
    output: Any = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return output  # type: ignore[no-any-return]


class _Rounding(nn.Module):
    """An activation quantizer as QuantizeLinear and DequantizeLinear. Codes are unsigned if not told else."""

    scale: torch.Tensor
    zero: torch.Tensor
    most: torch.Tensor
    coarse: torch.Tensor
    high_zero: torch.Tensor
    low_zero: torch.Tensor

    def __init__(self, quantizer: ActivationQuantizer, place: int | None, table: _Table, signed: bool) -> None:
        super().__init__()
        self.spec, self.axis, self.rowwise, self.place = quantizer.spec, quantizer.axis, quantizer.rowwise, place
        self.grid = quantizer.grids[quantizer.active.index]
        self.table = table
        self.dtype = torch.uint16 if self.grid.bits > MAX_BITS else torch.uint8
        self.is_wide = max(quantizer.widths) > MAX_BITS
        first = self.grid.qmin
        if signed and self.grid.symmetric:
            self.dtype, first = torch.int8, 0
        index = quantizer.active.index
        scale, zero = (t.view(quantizer.ranges, -1)[0, index] for t in (quantizer.scale, quantizer.zero_point))
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero", (zero - first).to(self.dtype))
        self.register_buffer("most", torch.tensor(self.grid.qmax - first, dtype=self.dtype))
        self.low, self.high = (float((edge - zero) * scale) for edge in (self.grid.qmin, self.grid.qmax))
        high, low = divmod(int(zero - first), _BYTE)
        self.register_buffer("coarse", scale.detach() * _BYTE)
        self.register_buffer("high_zero", torch.tensor(high % _BYTE, dtype=torch.uint8))
        self.register_buffer("low_zero", torch.tensor(low, dtype=torch.uint8))
        self.shift = float(scale) * (low - (_BYTE - 1) / 2)  # so that to round is to cut off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place is not None:
            table, i = self.table, self.place
            x = symbolic("Clip", (x, table.low[i], table.high[i]), x, x.dtype)
            if self.is_wide:  # whose codes are more than the zero points' type has
                return (x / table.scale[i]).round() * table.scale[i]
            codes = symbolic("QuantizeLinear", (x, table.scale[i], table.zero[i]), x, self.dtype)
            return symbolic("DequantizeLinear", (codes, table.scale[i], table.zero[i]), x, torch.float32)
        if self.grid.bits not in (MAX_BITS, WIDE):
            x = x.clamp(self.low, self.high)
        codes = symbolic("QuantizeLinear", (x, self.scale, self.zero), x, self.dtype)
        return symbolic("DequantizeLinear", (codes, self.scale, self.zero), x, torch.float32)

    def bytes_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What it rounds to, of 9 to 16 bits, as a sum of two numbers of 8 bits each: the codes' high and low bytes."""
        if self.grid.bits != WIDE:
            x = x.clamp(self.low, self.high)
        codes = symbolic("QuantizeLinear", (x + self.shift, self.coarse, self.high_zero), x, torch.uint8)
        high = symbolic("DequantizeLinear", (codes, self.coarse, self.high_zero), x, torch.float32)
        codes = symbolic("QuantizeLinear", (x - high, self.scale, self.low_zero), x, torch.uint8)
        return high, symbolic("DequantizeLinear", (codes, self.scale, self.low_zero), x, torch.float32)


class _RoundingByRow(_Rounding):
    """An activation quantizer whose range is found as it comes, of each token, or of each sample."""

    one: torch.Tensor
    nothing: torch.Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("nothing", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, first, most = self.grid_of(x)
        return torch.minimum((x / scale).round(), first + most) * scale

    def codes_of(self, x: torch.Tensor, *, ones: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes as floats, scales, and what is to be added to codes for values in steps.

        Engines round to one scale and zero point alone, so what they round here is ``x / scale - first``, to 1 and 0.
        With ``ones`` a column of them comes after the codes.
        """
        scale, first, most = self.grid_of(x)
        x = x / scale - first
        if self.place is not None or self.grid.bits < MAX_BITS:
            x = torch.minimum(x, most)
        if ones:
            x = F.pad(x, (0, 1), value=1.0)
        codes = symbolic("QuantizeLinear", (x, self.one, self.nothing), x, torch.uint8)
        return symbolic("DequantizeLinear", (codes, self.one, self.nothing), x, torch.float32), scale, first

    def grid_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales, the first number of each grid in steps, and the largest code; the shape is 1 where a row goes."""
        dims = tuple(range(1, x.ndim)) if self.rowwise else (self.axis,)
        low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
        most = self.most.float() if self.place is None else self.table.high[self.place]
        if self.grid.symmetric:
            scale = (torch.maximum(-low, high) / ((most - 1) / 2)).clamp(min=_TINY)
            return scale, (-(most + 1) / 2).expand(scale.shape), most
        scale = ((high - low) / most).clamp(min=_TINY)
        return scale, (low / scale).round(), most


class _Product(nn.Module):
    """A quantized layer with its codes as they are."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    down: torch.Tensor
    up: torch.Tensor
    adapter_down: torch.Tensor
    adapter_up: torch.Tensor
    sums: torch.Tensor
    offset: torch.Tensor

    def __init__(self, layer: QuantLayer, rounding: _Rounding, *, integer: bool) -> None:
        super().__init__()
        self.layer = [layer]
        self.rounding = rounding
        self.bias = layer.bias
        spec, codes = layer.weights, layer.integer_weight()
        self.linear = layer.kind == "linear"
        unsigned = layer.zero_point is not None
        dtype = torch.uint8 if unsigned else torch.int8
        rows = codes.to(dtype)  # O,I,...
        self.blocks = layer.scale.ndim == 2
        scale, zero = layer.scale.detach(), layer.zero_point
        if self.blocks:
            rows = rows.flatten(1)  # O,K
            self.size = rows.shape[1] // scale.shape[1]
        elif self.linear:
            rows = rows.t().contiguous()  # I,O as a product reads it
        self.register_buffer("codes", rows)
        self.register_buffer("scale", scale.float().clone())
        self.register_buffer("zero", None if zero is None else zero.to(dtype))
        self.bits = spec.bits
        self.in_bytes = integer and rounding.is_wide
        self.by_row = integer and isinstance(rounding, _RoundingByRow)
        if self.by_row:
            sums = layer.dequantized().double().flatten(1).sum(1).float()
            offset = torch.zeros_like(sums) if layer.bias is None else layer.bias.detach().float()
            like = (-1,) if layer.kind == "linear" else (1, -1, *[1] * (len(layer.shape) - 2))
            self.register_buffer("sums", sums.view(like))  # O, or 1,O,1,1
            self.register_buffer("offset", offset.view(like))
        if layer.rank:
            down, up = layer.low_rank_weights()
            self.register_buffer("down", down.half() if layer.low_rank_scale is None else down)
            self.register_buffer("up", up.half() if layer.low_rank_scale is None else up)
        of_branch = [_RoundingByRow(q, None, rounding.table, False) for q in layer.low_rank_inputs]
        self.of_branch = nn.ModuleList(of_branch or [nn.Identity()] * 2)  # what rounds the inputs of its two products
        if layer.adapter_down is not None and layer.adapter_up is not None:
            self.register_buffer("adapter_down", layer.adapter_down.view(-1, *layer.shape[1:]))
            self.register_buffer("adapter_up", layer.adapter_up)

    @property
    def weight(self) -> torch.Tensor:
        """Of its type; some networks look at that of their layers."""
        return self.scale[:0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(kwargs.pop("input"), **kwargs) if not args else super().__call__(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        layer, given = self.layer[0], x
        x = layer.smoothed(x)
        output = self._product(x)
        if layer.rank:
            down, up = self.down.float(), self.up.float()
            first, second = self.of_branch
            hidden = layer.matmul(first(x), down.view(-1, *layer.shape[1:]))
            output = output + layer.project(second(hidden), up)
        if layer.adapter_rank:
            output = output + layer.project(layer.matmul(given, self.adapter_down), self.adapter_up)
        return output

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        layer, rounding = self.layer[0], self.rounding
        if self.in_bytes:
            high, low = rounding.bytes_of(x)
            return self._times_codes(high, layer.matmul, self.bias) + self._times_codes(low, layer.matmul)
        if not self.by_row or not isinstance(rounding, _RoundingByRow):
            return self._times_codes(rounding(x), layer.matmul, self.bias)
        if isinstance(layer, QuantConv) and any(
            layer.edges
        ):  # beyond the edge is 0, of which the code is the zero point
            x = F.pad(x, layer.edges)
        codes, scale, first = rounding.codes_of(x)  # sum(w (q + f) s) = (sum(w q) + f sum(w)) s
        product = self._times_codes(codes, layer.valid if isinstance(layer, QuantConv) else layer.matmul)
        output: torch.Tensor = product * scale + (first * scale * self.sums + self.offset)
        return output

    def _times_codes(
        self, x: torch.Tensor, multiply: Callable[..., torch.Tensor], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = (self.codes, self.scale, *(() if self.zero is None else (self.zero,)))
        if self.blocks:
            weight = symbolic("DequantizeLinear", inputs, self.codes, torch.float32, axis=1, block_size=self.size)
            return multiply(x, weight.view(self.layer[0].shape), bias)
        weight = symbolic("DequantizeLinear", inputs, self.codes, torch.float32, axis=1 if self.linear else 0)
        if not self.linear:
            return multiply(x, weight, bias)
        output: torch.Tensor = x @ weight
        return output if bias is None else output + bias


class _Attention(AttentionProducts):
    """Attention whose operands are rounded in the graph."""

    OPERANDS = tuple(f".{ATTENTION}.{name}" for name in ("query", "key", "probabilities", "value"))

    def __init__(self, *quantizers: _Rounding) -> None:
        nn.Module.__init__(self)
        self.query, self.key, self.probabilities, self.value = quantizers  # type: ignore[assignment]

    def scores(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Scores (N*heads, L, K); the key turned before it is rounded, for engines that fuse."""
        turned = self.key(key.transpose(1, 2)) if not self.key.spec.dynamic else self.key(key).transpose(1, 2)
        scores: torch.Tensor = (self.query(query) @ turned) * scale
        return scores

    def weighted(self, probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Values weighted by probabilities; where their range comes with each sample, by integers all the same."""
        rounding: Any = self.value
        if not isinstance(rounding, _RoundingByRow) or rounding.is_wide:
            return super().weighted(probabilities, value)
        codes, scale, first = rounding.codes_of(value, ones=True)  # whose product is the sum of the probabilities
        product = self.probabilities(probabilities) @ codes
        output: torch.Tensor = (product[..., :-1] + first * product[..., -1:]) * scale
        return output


def _name_codes(proto: Any) -> None:
    """Call the codes of activations ``"codes.QUANTIZER"``, and drop what else the exporter tells of nodes."""
    result: dict[str, str] = {}
    for node in proto.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        inside = ast.literal_eval(scopes)[-2:-1]
        name = str(*inside).removeprefix("model.")
        if node.op_type == "DequantizeLinear" and name.endswith((".rounding", *_Attention.OPERANDS)):
            name = f"{CODES}{name.removesuffix('.rounding') + '.input' if name.endswith('.rounding') else name}"
            if name not in result.values():
                result[node.input[0]] = name
        del node.metadata_props[:]
        node.doc_string = ""
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [result.get(name, name) for name in names]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.name = result.get(value.name, value.name)
        del value.metadata_props[:]
    for tensor in proto.graph.initializer:
        del tensor.metadata_props[:]
