"""An exported graph without what CPU engines are slow at: the same numbers, in operators that they fuse.

A group normalization becomes two means over places, a small product that shares them among a group's channels, and
one scale and one offset a channel, which engines fuse with what follows. A linear layer whose output is split becomes
several. 4-bit codes are put in 8 bits, and those of weights are signed, which is what kernels of integers read.
Nothing of this needs torch.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = list[int | None]
_MIDDLE = 128  # of a byte's codes


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes, by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def shapes_of(graph: onnx.GraphProto) -> dict[str, Shape]:
    """What is known of the shapes of a graph's tensors; None where a size is not fixed."""
    shapes: dict[str, Shape] = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return shapes | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def expanded(model: onnx.ModelProto, *, normalizations: bool = True) -> onnx.ModelProto:
    """The same graph in operators that engines of a CPU fuse, in place; group normalizations too, or not."""
    return _Expansion(_signed(_widened(model)), normalizations=normalizations).go()


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """4-bit integers in 8-bit containers."""
    wider = {TensorProto.INT4: np.int8, TensorProto.UINT4: np.uint8}
    for tensor in model.graph.initializer:
        if tensor.data_type in wider:
            values = numpy_helper.to_array(tensor).astype(wider[tensor.data_type])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def _signed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights with zero points as signed ones: without zero points where a byte holds that, as of 7 bits and less."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        names = [*node.input, "", ""]
        codes, zero = constants.get(names[0]), constants.get(names[2])
        if node.op_type != "DequantizeLinear" or codes is None or zero is None or attributes_of(node).get("block_size"):
            continue
        if codes.data_type != TensorProto.UINT8 or uses[codes.name] != 1 or uses[zero.name] != 1:
            continue
        values, points = (numpy_helper.to_array(tensor).astype(np.int16) for tensor in (codes, zero))
        axis = attributes_of(node).get("axis", 1)
        centred = values - points.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        if np.abs(centred).max(initial=0) <= np.iinfo(np.int8).max:
            del node.input[2]
        else:
            centred = values - _MIDDLE
            zero.CopyFrom(numpy_helper.from_array((points - _MIDDLE).astype(np.int8), zero.name))
        codes.CopyFrom(numpy_helper.from_array(centred.astype(np.int8), codes.name))
    return model


class _Expansion:
    def __init__(self, model: onnx.ModelProto, *, normalizations: bool) -> None:
        self.model, self.graph, self.normalizations = model, model.graph, normalizations
        self.shapes = shapes_of(model.graph)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        self.uses.update(value.name for value in model.graph.output)
        self.made: list[onnx.NodeProto] = []

    def go(self) -> onnx.ModelProto:
        for node in list(self.graph.node):
            if node.op_type == "GroupNormalization" and self.normalizations and self._normalization(node):
                continue
            if node.op_type == "Split" and self._split(node):
                continue
            self.made.append(node)
        needed, remaining = {value.name for value in self.graph.output}, []
        for node in reversed(self.made):
            if needed & set(node.output):
                needed |= set(node.input)
                copied = onnx.NodeProto()
                copied.CopyFrom(node)
                remaining.append(copied)
        del self.graph.node[:]
        self.graph.node.extend(reversed(remaining))
        for i in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[i].name not in needed:
                del self.graph.initializer[i]
        return self.model

    def _emit(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.made.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _constant(self, name: str, value: Any, kind: Any = np.float32) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def _value(self, name: str, kind: int, shape: Shape) -> None:
        """Tell the shape of a tensor."""
        self.graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))

    def _normalization(self, node: onnx.NodeProto) -> bool:
        x, gamma, beta = node.input
        shape, y = self.shapes.get(x, []), node.output[0]
        if gamma not in self.initializers or len(shape) < 3 or None in shape[1:]:
            return False
        facts = attributes_of(node)
        groups, channels = facts["num_groups"], int(shape[1] or 0)
        size, thin = channels // groups, [None, channels, *[1] * (len(shape) - 2)]
        members = np.kron(np.eye(groups), np.ones((1, size)))  # G,C
        gather = self._constant(f"{y}/gather", members.T / size)
        weights = numpy_helper.to_array(self.initializers[gamma])
        spread_out = self._constant(f"{y}/members", members * weights)

        def make(kind: str, inputs: Sequence[str], what: str, width: int = groups, **attributes: object) -> str:
            name = self._emit(kind, inputs, f"{y}/{what}", **attributes)
            self._value(name, TensorProto.FLOAT, [None, width])
            return name

        def mean_of(tensor: str, what: str) -> str:
            """Over the places, by pooling, which engines share among cores, and the channels of a group: (N, G)."""
            pooled = self._emit("AveragePool", [tensor], f"{y}/{what}/pooled", kernel_shape=shape[2:])
            self._value(pooled, TensorProto.FLOAT, thin)
            flat = self._constant(f"{y}/{what}/shape", [0, channels], np.int64)
            return make("MatMul", [make("Reshape", [pooled, flat], f"{what}/flat", channels), gather], what)

        squared = self._emit("Mul", [x, x], f"{y}/squared")
        self._value(squared, TensorProto.FLOAT, shape)
        mean = mean_of(x, "mean")
        variance = make("Sub", [mean_of(squared, "square"), make("Mul", [mean, mean], "mean2")], "difference")
        variance = make("Max", [variance, self._constant(f"{y}/zero", 0.0)], "variance")
        variance = make("Add", [variance, self._constant(f"{y}/epsilon", facts.get("epsilon", 1e-5))], "positive")
        inverse = make("Reciprocal", [make("Sqrt", [variance], "deviation")], "inverse")
        scale = make("MatMul", [inverse, spread_out], "scale", channels)
        shift = make("MatMul", [make("Mul", [mean, inverse], "scaled_mean"), spread_out], "shift", channels)
        offset = make("Sub", [beta, shift], "offset", channels)
        spread = self._constant(f"{y}/spread", [0, channels, *thin[2:]], np.int64)
        for name in (scale, offset):
            self._value(self._emit("Reshape", [name, spread], f"{name}/spread"), TensorProto.FLOAT, thin)
        scaled = self._emit("Mul", [x, f"{scale}/spread"], f"{y}/scaled")
        self._value(scaled, TensorProto.FLOAT, shape)
        self._emit("Add", [scaled, f"{offset}/spread"], y)
        return True

    def _split(self, node: onnx.NodeProto) -> bool:
        """``split(x W + b)`` is ``x W_1 + b_1``, ``x W_2 + b_2`` ..."""
        source, facts = node.input[0], attributes_of(node)
        shape = self.shapes.get(source, [])
        if not shape or facts.get("axis", 0) not in (-1, len(shape) - 1) or self.uses[source] != 1:
            return False
        sum_, bias = self.makers.get(source), ""
        product = sum_
        if sum_ is not None and sum_.op_type == "Add":
            bias = next((name for name in sum_.input if name in self.initializers), "")
            product = next((self.makers[n] for n in sum_.input if n in self.makers and n != bias), None)
        if product is None or product.op_type != "MatMul" or self.uses[product.output[0]] != 1:
            return False
        weight = self.makers.get(product.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or attributes_of(weight).get("block_size"):
            return False
        if self.uses[weight.output[0]] != 1 or any(name not in self.initializers for name in weight.input):
            return False
        if attributes_of(weight).get("axis", 1) != 1 or (sum_ is not product and not bias):
            return False
        start = 0
        for i, part in enumerate(node.output):
            width = int(self.shapes[part][-1] or 0)
            names = [self._part(name, start, start + width, i) for name in weight.input]
            columns = self._emit("DequantizeLinear", names, f"{part}/weight", axis=1)
            self._value(columns, TensorProto.FLOAT, [self.shapes[weight.input[0]][0], width])
            output = self._emit("MatMul", [product.input[0], columns], f"{part}/product" if bias else part)
            if bias:
                self._value(output, TensorProto.FLOAT, self.shapes[part])
                self._emit("Add", [output, self._part(bias, start, start + width, i)], part)
            start += width
        return True

    def _part(self, name: str, start: int, end: int, number: int) -> str:
        """Some columns of a constant."""
        values = numpy_helper.to_array(self.initializers[name])
        output = f"{name}/{number}"
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values[..., start:end]), output))
        return output
