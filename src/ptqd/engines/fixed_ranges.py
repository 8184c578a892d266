"""A graph whose activation ranges are inputs, with those of one step as constants: what engines fuse into a kernel.

Nothing of this needs torch.
"""

from collections.abc import Container, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ptqd.engines.expansion import attributes_of

_LARGEST = 255  # of a byte's codes
_ROUNDING = ("Clip", "QuantizeLinear", "DequantizeLinear")


def with_fixed_ranges(
    model: onnx.ModelProto, ranges: Mapping[str, np.ndarray], given: Container[int] = ()
) -> onnx.ModelProto:
    """The graph with the ranges that are inputs of it as constants, in place.

    What it takes of them becomes a constant, equal ones share it, and what is rounded twice in the same way is rounded
    once. A clip that rounding to a byte makes anyway is left out.

    Args:
        model: as :func:`ptqd.engines.onnx_graph.trace` makes it, with its weights or without.
        ranges: the constants, by the names of the inputs, each a vector (Q,).
        given: places in these vectors that inputs give as before.
    """
    graph = model.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    values: dict[str, np.ndarray] = {}
    same: dict[str, str] = {}  # names by those that stand for them
    names: dict[tuple[str, bytes], str] = {}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in ranges:
            index = numpy_helper.to_array(known[node.input[1]])
            if int(index) in given:
                continue
            value = np.asarray(np.take(ranges[node.input[0]], index, attributes_of(node).get("axis", 0)))
            values[node.output[0]] = value
            same[node.output[0]] = names.setdefault((f"{value.dtype}{value.shape}", value.tobytes()), node.output[0])
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    made: dict[bytes, str] = {}
    nodes = []
    for node in graph.node:
        output = node.output[0]
        if output in values:
            continue
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Clip" and _is_needless(node, users.get(output, []), values):
            same[output] = node.input[0]
            continue
        if node.op_type in _ROUNDING and output not in outputs:
            like = onnx.NodeProto(op_type=node.op_type, input=node.input, attribute=node.attribute)
            same[output] = made.setdefault(like.SerializeToString(deterministic=True), output)
            if same[output] != output:
                continue
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        nodes.append(copied)
    needed = {name for node in nodes for name in node.input}
    inputs = [value for value in graph.input if value.name not in ranges or value.name in needed]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in values.items() if name in needed)
    return model


def rounding_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what is rounded to ranges that are inputs as floats, in place: OpenVINO is quicker at it so.

    What is rounded was clipped to its range before.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type in _ROUNDING[1:] and node.input[1] not in constants:
            x, scale, output = node.input[0], node.input[1], node.output[0]
            if node.op_type == "QuantizeLinear":
                nodes.append(helper.make_node("Div", [x, scale], [f"{output}/steps"]))
                nodes.append(helper.make_node("Round", [f"{output}/steps"], [output]))
            else:
                nodes.append(helper.make_node("Mul", [x, scale], [output]))
            continue
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        nodes.append(copied)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _is_needless(clip: onnx.NodeProto, users: list[onnx.NodeProto], values: Mapping[str, np.ndarray]) -> bool:
    """Whether all that reads a clip rounds to codes whose range is the clip's."""
    low, high = (values.get(name) for name in [*clip.input, "", ""][1:3])
    if low is None or high is None or not users:
        return False
    for node in users:
        scale, zero = (values.get(name) for name in [*node.input, "", ""][1:3])
        if node.op_type != "QuantizeLinear" or scale is None or zero is None:
            return False
        edges = [(code - zero.astype(np.float32)) * scale for code in (0, _LARGEST)]
        if not np.allclose((low, high), edges, rtol=1e-5, atol=0):
            return False
    return True
