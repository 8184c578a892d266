"""What is put right in a graph after torch has traced it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ptqd.engines.calls import FOUR_BITS
from ptqd.quantization.numerics.affine import MAX_BITS


def _pack_four_bits(proto: Any, bits: Mapping[str, int]) -> None:
    """Store codes of 4 bits and less, and their zero points, as 4-bit integers."""
    import onnx

    for tensor in proto.graph.initializer:
        layer, _, what = tensor.name.rpartition(".")
        if what not in ("codes", "zero") or bits.get(layer, MAX_BITS) > FOUR_BITS:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        kind = onnx.TensorProto.INT4 if values.dtype == "int8" else onnx.TensorProto.UINT4
        pairs = np.append(values.flatten(), np.zeros(values.size % 2, values.dtype)).astype(np.uint8).reshape(-1, 2)
        packed = (pairs[:, 0] & 0xF) | (pairs[:, 1] << FOUR_BITS)  # the first is low
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, values.shape, packed.tobytes(), raw=True))


def _drop_squeezes(proto: Any) -> None:
    """Squeezing a size that is not 1 does nothing in torch, and is an error in ONNX."""
    import onnx

    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    axes = {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT64}
    for node in proto.graph.node:
        if node.op_type == "Squeeze" and len(node.input) == 2 and node.input[1] in axes and node.input[0] in sizes:
            squeezed = onnx.numpy_helper.to_array(axes[node.input[1]]).reshape(-1)
            if any(sizes[node.input[0]][axis] not in (0, 1) for axis in squeezed):
                node.op_type = "Identity"
                del node.input[1]
