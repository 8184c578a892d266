"""An exported graph made ready for ONNX Runtime on a CPU: products of integers, channels last.

ONNX Runtime has integer convolutions only where their output is rounded to 8 bits too, which ptqd does not do. Here a
convolution is one gather of codes and a product of integers with a float output, the products that a linear layer and
attention are too. Activations go with channels last from product to product; a group normalization is a few
operators that need no other layout. What is not known here stays as it was. Nothing of this needs torch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ptqd.engines.cpu import Processor, overflows
from ptqd.engines.expansion import Shape, attributes_of, expanded, shapes_of

CONTRIB = "com.microsoft"
_MOST_CHANNELS = 512  # of which each is multiplied with all: one small product for two
_WIDE_IMAGE = 32  # places in a row, from which on numbers of channels are repeated for all of it
ELEMENTWISE = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Sigmoid",
    "Tanh",
    "Clip",
    "Sqrt",
    "Neg",
    "Exp",
    "Gelu",
    "Relu",
    "Cast",
    "Min",
    "Max",
    "Round",
}


@dataclass(frozen=True)
class Dequantized:
    """A float tensor that is codes of activations."""

    codes: str
    scale: str
    zero: str


@dataclass(frozen=True)
class Weight:
    """A float tensor that is codes of a weight."""

    codes: str
    scale: str
    zero: str
    axis: int


def lowered(model: onnx.ModelProto, processor: Processor) -> onnx.ModelProto:
    """A graph as ONNX Runtime's CPU kernels compute it fastest.

    Args:
        model: as :func:`ptqd.engines.onnx_graph.trace` makes it; its contents are taken over.
        processor: where it will run: weights become unsigned where signed ones could overflow.
    """
    return _Lowering(expanded(model, normalizations=False), processor).go()


# above 400 lines: one pass over a graph, with a method an operator; they share what is known of each tensor
class _Lowering:
    """One graph, node by node. A name can be there as it was, channels last, or not yet."""

    def __init__(self, model: onnx.ModelProto, processor: Processor) -> None:
        self.model, self.processor = model, processor
        graph = model.graph
        self.shapes: dict[str, Shape] = shapes_of(graph)
        self.constants: dict[str, np.ndarray] = {}
        for tensor in graph.initializer:
            self.constants[tensor.name] = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")  # not twice in memory
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(value.name for value in graph.output)
        self.users = {name: node for node in graph.node for name in node.input}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.made: list[onnx.NodeProto] = []
        self.as_was = {value.name for value in graph.input} | set(self.constants) | {""}
        self.last: dict[str, str] = {}  # channels last
        self.dequantized: dict[str, Dequantized] = {}
        self.weights: dict[str, Weight] = {}
        self.postponed: dict[str, onnx.NodeProto] = {}
        self.done: set[str] = set()  # outputs of nodes that went into another

    def go(self) -> onnx.ModelProto:
        graph = self.model.graph
        for node in graph.node:
            if set(node.output) & self.done:
                continue
            handler: Callable[[onnx.NodeProto], bool] | None = getattr(self, f"_{node.op_type.lower()}", None)
            if handler is None and node.op_type in ELEMENTWISE:
                handler = self._elementwise
            if handler is None or not handler(node):
                self._keep(node)
        for value in graph.output:
            self.here(value.name)
        nodes = self._used()
        names = {name for node in nodes for name in node.input}
        output = helper.make_graph(nodes, graph.name, graph.input, graph.output)
        del graph.initializer[:]
        for name in list(self.constants):
            value = self.constants.pop(name)
            if name in names:
                output.initializer.append(numpy_helper.from_array(value, name))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(output, opset_imports=opsets, ir_version=10)

    def _used(self) -> list[onnx.NodeProto]:
        """The nodes that an output needs."""
        needed, result = {value.name for value in self.model.graph.output}, []
        for node in reversed(self.made):
            if needed & set(node.output):
                needed |= set(node.input)
                result.append(node)
        return result[::-1]

    def _keep(self, node: onnx.NodeProto) -> None:
        inputs = [self.here(name) for name in node.input]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(inputs)
        self.made.append(copy)
        self.as_was |= set(node.output)

    def emit(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node."""
        domain = CONTRIB if kind == "MatMulIntegerToFloat" else ""
        self.made.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        return output

    def constant(self, value: Any, kind: Any = np.int64) -> str:
        """The name of an initializer of this value; equal ones share it."""
        array = np.ascontiguousarray(np.asarray(value, kind))
        name = f"ptqd/{array.dtype}{list(array.shape)}/{hash(array.tobytes()):x}"
        self.constants[name] = array
        self.as_was.add(name)
        return name

    def here(self, name: str) -> str:
        """A tensor in its own layout, made now where it is not there."""
        if name in self.as_was:
            return name
        if name in self.postponed:
            self._keep(self.postponed[name])
            return name
        rank = len(self.shapes[name])
        self.emit("Transpose", [self.last[name]], name, perm=[0, rank - 1, *range(1, rank - 1)])
        self.as_was.add(name)
        return name

    def channels_last(self, name: str) -> str:
        """A tensor (N, C, ...) as (N, ..., C)."""
        if name not in self.last:
            shape, rank = self.shapes[name], len(self.shapes[name])
            if shape[2:] == [1] * (rank - 2) and shape[1] is not None:
                thin = self.constant([0, *shape[2:], shape[1]])
                self.last[name] = self.emit("Reshape", [self.here(name), thin], f"{name}/last")
            else:
                turned = [0, *range(2, rank), 1]
                self.last[name] = self.emit("Transpose", [self.here(name)], f"{name}/last", perm=turned)
        return self.last[name]

    # what is known of operators, by their names

    def _dequantizelinear(self, node: onnx.NodeProto) -> bool:
        codes, scale, *zero = node.input
        facts = attributes_of(node)
        output = node.output[0]
        self.postponed[output] = node
        points = self.constants.get(zero[0]) if zero else None
        if facts.get("block_size") or (points is not None and points.itemsize > 1):  # kernels multiply bytes
            return True
        if codes in self.constants:
            self.weights[output] = Weight(codes, scale, zero[0] if zero else "", facts.get("axis", 1))
        else:
            self.dequantized[output] = Dequantized(codes, scale, zero[0] if zero else "")
        return True

    def _quantizelinear(self, node: onnx.NodeProto) -> bool:
        return self._rows_to_codes(node) or self._elementwise(node, 1)

    def _rows_to_codes(self, node: onnx.NodeProto) -> bool:
        """``x / scale - first``, rounded to 1 and 0, is ``x`` rounded row by row in one go."""
        shifted = self.makers.get(node.input[0])
        divided = self.makers.get(shifted.input[0]) if shifted is not None and shifted.op_type == "Sub" else None
        if divided is None or divided.op_type != "Div" or not self._is_plain(node):
            return False
        (x, scale), first, output = divided.input, shifted.input[1], node.output[0]  # type: ignore[union-attr]
        shape, rows = self.shapes.get(x, []), self.shapes.get(scale, [])
        last = x in self.last and len(shape) == 4
        order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
        if len(rows) != len(shape) or len(shape) < 3 or scale in self.constants or None in shape[1:]:
            return False  # of a single vector a sample the plain operators are fewer
        kept = [rows[i] != 1 or i == 0 for i in order]
        if kept != sorted(kept, reverse=True):  # a row is what lies together
            return False
        sizes = [int(shape[i] or 0) for i in order]
        columns = int(np.prod([size for size, of_row in zip(sizes, kept, strict=True) if not of_row]))
        flat = self.constant([-1])
        scales = self.emit("Reshape", [self._in_order(scale, last=last), flat], f"{output}/scales")
        points = self.emit("Neg", [self._in_order(first, last=last)], f"{output}/points")
        points = self.emit("Cast", [points], f"{output}/bytes", to=TensorProto.UINT8)
        points = self.emit("Reshape", [points, flat], f"{output}/flat")
        table = self.emit("Reshape", [self._in_order(x, last=last), self.constant([-1, columns])], f"{output}/rows")
        codes = self.emit("QuantizeLinear", [table, scales, points], f"{output}/codes", axis=0)
        whole = self.emit("Reshape", [codes, self.constant([-1, *sizes[1:]])], f"{output}/last" if last else output)
        if last:
            self.last[output] = whole
        else:
            self.as_was.add(output)
        return True

    def _is_plain(self, node: onnx.NodeProto) -> bool:
        """Whether a scale is 1 and a zero point 0."""
        scale, zero = (self.constants.get(name) for name in node.input[1:3])
        return scale is not None and zero is not None and scale.size == 1 and float(scale) == 1 and int(zero) == 0

    def _in_order(self, name: str, *, last: bool) -> str:
        """A tensor as it was, or with its channels last."""
        return self.channels_last(name) if last else self.here(name)

    def _div(self, node: onnx.NodeProto) -> bool:
        """By a constant: a product is quicker."""
        by = self.constants.get(node.input[1])
        if by is not None and by.dtype == np.float32 and by.ndim:
            rank = len(self.shapes.get(node.input[0], []))
            by = by.reshape(*[1] * (rank - by.ndim), *by.shape) if rank == 4 else by
            inverse = self.constant(1 / by.astype(np.float64), np.float32)
            self.shapes[inverse] = list(by.shape)
            node = helper.make_node("Mul", [node.input[0], inverse], node.output, node.name)
            if not self._elementwise(node):
                self._keep(node)
            return True
        return self._elementwise(node)

    def _elementwise(self, node: onnx.NodeProto, count: int | None = None) -> bool:
        """Operators that leave channels where they are; the first ``count`` inputs have them."""
        inputs = list(node.input)[:count]
        ranks = [len(self.shapes.get(name, [])) for name in inputs]
        rank = max(ranks)
        if rank not in (3, 4) or not any(name in self.last for name in inputs):
            return False
        if any(r not in (0, rank) and self.shapes[name] != [1] for name, r in zip(inputs, ranks, strict=True)):
            return False
        width = max(int(self.shapes[name][-1] or 0) for name, r in zip(inputs, ranks, strict=True) if r == rank)
        turned = [
            self._side_by_side(name, width) if r == rank else self.here(name)
            for name, r in zip(inputs, ranks, strict=True)
        ]
        rest = [self.here(name) for name in list(node.input)[len(inputs) :]]
        self._put(node, turned + rest)
        return True

    def _side_by_side(self, name: str, width: int) -> str:
        """A tensor with channels last; one of a number for each channel with as many of them as an image is wide.

        Kernels are a third quicker where what they repeat is longer than a few channels.
        """
        last, shape = self.channels_last(name), self.shapes[name]
        if len(shape) != 4 or shape[2:] != [1, 1] or not shape[1] or width < _WIDE_IMAGE:
            return last
        repeated = f"{last}/{width}"
        if repeated not in self.as_was:
            self.emit("Expand", [last, self.constant([1, 1, width, shape[1]])], repeated)
            self.as_was.add(repeated)
        return repeated

    def _put(self, node: onnx.NodeProto, inputs: Sequence[str], **attributes: object) -> None:
        """A node with other inputs, whose output has its channels last."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        for name, value in attributes.items():
            remaining = [a for a in copy.attribute if a.name != name]
            del copy.attribute[:]
            copy.attribute.extend([*remaining, helper.make_attribute(name, value)])
        copy.output.append(f"{node.output[0]}/last")
        self.made.append(copy)
        self.last[node.output[0]] = copy.output[0]

    def _concat(self, node: onnx.NodeProto) -> bool:
        rank = len(self.shapes.get(node.output[0], []))
        axis = helper.get_attribute_value(node.attribute[0])
        if rank != 4 or axis != 1 or not any(name in self.last for name in node.input):
            return False
        self._put(node, [self.channels_last(name) for name in node.input], axis=rank - 1)
        return True

    def _split(self, node: onnx.NodeProto) -> bool:
        """Of what was put together of the same parts."""
        joined, axis = self.makers.get(node.input[0]), attributes_of(node).get("axis", 0)
        if joined is None or joined.op_type != "Concat" or attributes_of(joined)["axis"] != axis:
            return False
        pairs = list(zip(joined.input, node.output, strict=False))
        sizes = [[self.shapes.get(name, [])[axis : axis + 1] for name in pair] for pair in pairs]
        if len(joined.input) != len(node.output) or any(a != b or not a or a == [None] for a, b in sizes):
            return False
        for part, output in pairs:
            self.postponed[output] = helper.make_node("Identity", [part], [output])
            if part in self.last:
                self.last[output] = self.last[part]
        return True

    def _transpose(self, node: onnx.NodeProto) -> bool:
        """One that only puts the channels last, or back, is a name."""
        source, output = node.input[0], node.output[0]
        perm = list(helper.get_attribute_value(node.attribute[0]))
        rank = len(perm)
        if perm == [0, *range(2, rank), 1]:
            if source not in self.last:
                return False
            self.emit("Identity", [self.last[source]], output)
            self.as_was.add(output)
            return True
        if perm == [0, rank - 1, *range(1, rank - 1)]:
            self.last[output] = self.here(source)
            return True
        return False

    def _reshape(self, node: onnx.NodeProto) -> bool:
        """Places joined or parted, the channels left alone: (N, C, H, W) and (N, C, HW)."""
        source, output = node.input[0], node.output[0]
        before, after = self.shapes.get(source, []), self.shapes.get(output, [])
        if source not in self.last or {len(before), len(after)} != {3, 4} or before[1] != after[1] or not before[1]:
            return False
        if before[0] is not None or after[0] is not None or None in (*before[1:], *after[1:]):
            return False
        shape = self.constant([0, *after[2:], after[1]])
        self.last[output] = self.emit("Reshape", [self.last[source], shape], f"{output}/last")
        return True

    def _pad(self, node: onnx.NodeProto) -> bool:
        """By a constant."""
        source, amounts = node.input[0], self.constants.get(node.input[1])
        mode = attributes_of(node).get("mode", b"constant")
        if source not in self.last or amounts is None or len(node.input) > 3 or mode != b"constant":
            return False
        rank = len(self.shapes[source])
        turned = [amounts[side + i] for side in (0, rank) for i in (0, *range(2, rank), 1)]
        self._put(node, [self.last[source], self.constant(turned), *node.input[2:]])
        return True

    def _resize(self, node: onnx.NodeProto) -> bool:
        """To repeat the nearest value is to gather."""
        facts = attributes_of(node)
        source, output = node.input[0], node.output[0]
        before, after = self.shapes.get(source, []), self.shapes.get(output, [])
        if facts.get("mode") != b"nearest" or len(before) != 4 or None in (*before[1:], *after[1:]):
            return False
        if facts.get("coordinate_transformation_mode") != b"asymmetric" or facts.get("nearest_mode") != b"floor":
            return False
        c, h, w, high, wide = (int(d or 0) for d in (*before[1:], *after[2:]))
        rows = np.arange(high) * h // high
        columns = np.arange(wide) * w // wide
        places = (rows[:, None] * w + columns).reshape(-1)
        flat = self.emit("Reshape", [self.channels_last(source), self.constant([0, h * w, c])], f"{output}/flat")
        taken = self.emit("Gather", [flat, self.constant(places)], f"{output}/taken", axis=1)
        self.last[output] = self.emit("Reshape", [taken, self.constant([0, high, wide, c])], f"{output}/last")
        return True

    def _groupnormalization(self, node: onnx.NodeProto) -> bool:
        """Two means over places, then one scale and one offset a channel: ``x a + (beta - m a)``, ``a = gamma / s``."""
        (x, gamma, beta), y, facts = node.input, node.output[0], attributes_of(node)
        shape = self.shapes.get(x, [])
        if len(shape) < 3 or None in shape[1:] or gamma not in self.constants or beta not in self.constants:
            return False
        channels, places = int(shape[1] or 0), int(np.prod([size or 0 for size in shape[2:]]))
        last, thin = self.channels_last(x), [1] * (len(shape) - 2)
        flat = self.emit("Reshape", [last, self.constant([0, *thin[1:], places, channels])], f"{y}/flat")  # N,1,P,C
        squared = self.emit("Mul", [flat, flat], f"{y}/squared")
        share = self.constant(np.full((1, places), 1 / places), np.float32)

        def of_group(tensor: str, what: str) -> str:
            """The mean over places and the channels of a group, for each channel: (N, 1, 1, C)."""
            mean = self.emit("MatMul", [share, tensor], f"{y}/{what}/places")
            return self._of_group(mean, channels, facts["num_groups"], f"{y}/{what}")

        mean = of_group(flat, "mean")
        squares = self.emit("Mul", [mean, mean], f"{y}/mean2")
        variance = self.emit("Sub", [of_group(squared, "square"), squares], f"{y}/difference")
        variance = self.emit("Max", [variance, self.constant(0.0, np.float32)], f"{y}/variance")
        epsilon = self.constant(facts.get("epsilon", 1e-5), np.float32)
        deviation = self.emit("Sqrt", [self.emit("Add", [variance, epsilon], f"{y}/positive")], f"{y}/deviation")
        scale = self.emit("Div", [self.constant(self.constants[gamma], np.float32), deviation], f"{y}/scale")
        moved = self.emit("Mul", [mean, scale], f"{y}/moved")
        offset = self.emit("Sub", [self.constant(self.constants[beta], np.float32), moved], f"{y}/offset")
        width = int(shape[-1] or 0)
        if len(shape) == 4 and width >= _WIDE_IMAGE:
            along = self.constant([1, 1, width, channels])
            scale, offset = (self.emit("Expand", [name, along], f"{name}/{width}") for name in (scale, offset))
        scaled = self.emit("Mul", [last, scale], f"{y}/scaled")
        self.last[y] = self.emit("Add", [scaled, offset], f"{y}/last")
        return True

    def _of_group(self, mean: str, channels: int, groups: int, name: str) -> str:
        """A number for each channel (..., C) as the mean over the channels of its group."""
        size = channels // groups
        if channels <= _MOST_CHANNELS:  # a product, of each channel with all
            both = np.kron(np.eye(groups), np.full((size, size), 1 / size))
            return self.emit("MatMul", [mean, self.constant(both, np.float32)], name)
        members = np.kron(np.eye(groups), np.ones((1, size)))  # G,C
        each = self.emit("MatMul", [mean, self.constant(members.T / size, np.float32)], f"{name}/groups")
        return self.emit("MatMul", [each, self.constant(members, np.float32)], name)

    def _reducemax(self, node: onnx.NodeProto) -> bool:
        """Over channels or places, or both, which stay as dimensions of 1."""
        source, axes = node.input[0], self.constants.get(node.input[1]) if len(node.input) > 1 else None
        rank = len(self.shapes.get(source, []))
        if source not in self.last or axes is None or not attributes_of(node).get("keepdims", 1):
            return False
        turned = {1: rank - 1, **{i: i - 1 for i in range(2, rank)}}
        self._put(node, [self.last[source], self.constant(sorted(turned.get(int(a) % rank, 0) for a in axes))])
        return True

    _reducemin = _reducemax

    def _conv(self, node: onnx.NodeProto) -> bool:
        x, weight = self.dequantized.get(node.input[0]), self.weights.get(node.input[1])
        facts = attributes_of(node)
        output = node.output[0]
        shape, after = self.shapes.get(node.input[0], []), self.shapes.get(output, [])
        if x is None or weight is None or len(shape) != 4 or facts.get("group", 1) != 1:
            return False
        if None in (*shape[1:], *after[1:]):
            return False
        codes = self.constants[weight.codes]
        rows = np.ascontiguousarray(codes.transpose(2, 3, 1, 0)).reshape(-1, codes.shape[0])  # kh*kw*I,O
        bias = node.input[2] if len(node.input) > 2 else ""
        left = self._columns(
            self.channels_last(x.codes), self.here(x.zero), shape, after, codes.shape[2:], facts, output
        )
        self.last[output] = self._product(left, x, weight, rows, bias, f"{output}/last")
        return True

    @staticmethod
    def _is_pointwise(kernel: Sequence[int], facts: dict[str, Any]) -> bool:
        strides, pads = facts.get("strides", [1, 1]), facts.get("pads", [0, 0, 0, 0])
        return tuple(kernel) == (1, 1) and list(strides) == [1, 1] and not any(pads)

    @staticmethod
    def _taps(shape: Shape, after: Shape, kernel: Sequence[int], facts: dict[str, Any]) -> np.ndarray:
        """Where, in the padded input, a kernel's taps are, place by place: (H'*W'*kh*kw,)."""
        strides, dilations = facts.get("strides", [1, 1]), facts.get("dilations", [1, 1])
        _, left, _, right = facts.get("pads", [0, 0, 0, 0])
        w, high, wide = (int(d or 0) for d in (shape[3], *after[2:]))
        rows = np.arange(high)[:, None, None, None] * strides[0] + np.arange(kernel[0])[:, None] * dilations[0]
        columns = np.arange(wide)[:, None, None] * strides[1] + np.arange(kernel[1]) * dilations[1]
        places: np.ndarray = rows * (w + left + right) + columns
        return places.reshape(-1)

    def _columns(
        self,
        source: str,
        beyond: str,
        shape: Shape,
        after: Shape,
        kernel: Sequence[int],
        facts: dict[str, Any],
        output: str,
    ) -> str:
        """The codes under a kernel, side by side: (N, H', W', kh*kw*C); ``beyond`` the edge is one code."""
        if self._is_pointwise(kernel, facts):
            return source
        pads = facts.get("pads", [0, 0, 0, 0])
        _, c, h, w = (int(d or 0) for d in shape)
        high, wide = int(after[2] or 0), int(after[3] or 0)
        if any(pads):
            amounts = self.constant([0, pads[0], pads[1], 0, 0, pads[2], pads[3], 0])
            source = self.emit("Pad", [source, amounts, beyond], f"{output}/padded")
        places = self._taps(shape, after, kernel, facts)
        flat = self.constant([0, (h + pads[0] + pads[2]) * (w + pads[1] + pads[3]), c])
        flat = self.emit("Reshape", [source, flat], f"{output}/flat")
        taken = self.emit("Gather", [flat, self.constant(places)], f"{output}/taken", axis=1)
        side_by_side = self.constant([0, high, wide, kernel[0] * kernel[1] * c])
        return self.emit("Reshape", [taken, side_by_side], f"{output}/columns")

    def _product(self, left: str, x: Dequantized, weight: Weight, rows: np.ndarray, bias: str, output: str) -> str:
        """Codes (..., K) times codes of a weight (K, O), plus a bias: float32."""
        name, zero = self._codes_of(weight, rows)
        inputs = [left, name, self.here(x.scale), weight.scale, self.here(x.zero), zero, bias]
        return self.emit("MatMulIntegerToFloat", inputs, output)

    def _codes_of(self, weight: Weight, rows: np.ndarray) -> tuple[str, str]:
        """The names of a weight's codes (K, O) and of their zero points, unsigned where signed ones saturate."""
        zero = weight.zero
        if rows.dtype == np.int8 and not self.processor.vnni and overflows(rows):
            points = np.zeros(rows.shape[1], np.int16) if not zero else self.constants[zero].astype(np.int16)
            rows = (rows.astype(np.int16) + 128).astype(np.uint8)
            zero = self.constant(np.broadcast_to(points + 128, rows.shape[1:]), np.uint8)
        name = f"{weight.codes}/rows"
        self.constants[name] = rows
        self.as_was.add(name)
        return name, zero

    def _signed(self, other: Dequantized) -> tuple[str, str]:
        """Codes and zero point of a second operand, signed where that can be: kernels are four times as quick then."""
        maker, zero = self.makers.get(other.codes), self.constants.get(other.zero)
        is_one_byte = zero is not None and zero.dtype == np.uint8 and zero.size == 1
        if maker is None or maker.op_type != "QuantizeLinear" or not is_one_byte or not self.processor.vnni:
            return other.codes, other.zero
        assert zero is not None
        name = f"{other.codes}/signed"
        point = self.constant(zero.astype(np.int16) - 128, np.int8)
        if name not in self.as_was:
            self.emit("QuantizeLinear", [self.here(maker.input[0]), self.here(other.scale), point], name)
            self.as_was.add(name)
        return name, point

    def _matmul(self, node: onnx.NodeProto) -> bool:
        x = self.dequantized.get(node.input[0])
        if x is None:
            return False
        output, weight, other = node.output[0], self.weights.get(node.input[1]), self.dequantized.get(node.input[1])
        if weight is not None and weight.axis == 1:
            user, bias = self.users.get(output), ""
            if self.uses[output] == 1 and user is not None and user.op_type == "Add":
                added = next((name for name in user.input if name != output), "")
                if added in self.constants and self.constants[added].ndim == 1:
                    output, bias = user.output[0], added
                    self.done.add(output)
            rows = self.constants[weight.codes]
            self._product(self.here(x.codes), x, weight, rows, bias, output)
        elif other is not None:
            codes, zero = self._signed(other)
            inputs = [self.here(n) for n in (x.codes, codes, x.scale, other.scale, x.zero, zero)]
            self.emit("MatMulIntegerToFloat", inputs, output)
        else:
            return False
        self.as_was.add(output)
        return True
