"""A reader of ComfyUI's quantized safetensors in numpy alone, which computes what ComfyUI does with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray[Any, Any]


def unpack(codes: Array) -> Array:
    """Codes of 4 bits, signed, two in a byte (O, I / 2): the even column's in the low bits; (O, I)."""
    both = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(len(codes), -1)
    return np.where(both > 7, both.astype(np.int16) - 16, both).astype(np.int8)


def hadamard(group: int) -> Array:
    """ConvRot's, as the paper has it: the Kronecker power of one of four rows with equal sums."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
    matrix = four
    while len(matrix) < group:
        matrix = np.kron(matrix, four)
    return np.asarray(matrix / np.sqrt(np.float32(group)))


def read_comfy(path: Path) -> dict[str, tuple[Array, Array, dict[str, Any]]]:
    """Codes (O, I), scales (O,) and marker of each quantized layer."""
    tensors, layers = load_file(path), {}
    for key, value in tensors.items():
        if key.endswith(".comfy_quant"):
            name, marker = key.removesuffix(".comfy_quant"), json.loads(value.tobytes())
            codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            assert codes.dtype == np.int8
            assert scale.dtype == np.float32
            if marker["format"] == "convrot_w4a4":
                assert scale.shape == (len(codes),)
                codes = unpack(codes)
            else:
                assert scale.shape == (len(codes), 1)
            layers[name] = (codes, scale.ravel(), marker)
    return layers


def computed(x: Array, codes: Array, scale: Array, marker: dict[str, Any]) -> Array:
    """What ComfyUI makes of an input: ranges of each token as it comes, products of integers."""
    if "convrot_groupsize" in marker:
        group = marker["convrot_groupsize"]
        x = (x.reshape(len(x), -1, group) @ hadamard(group)).reshape(len(x), -1)
    most = 7 if marker["format"] == "convrot_w4a4" and marker.get("linear_dtype") != "int8" else 127
    own = np.abs(x).max(-1, keepdims=True) / np.float32(most)
    whole = np.rint(x / own).astype(np.int32)
    return np.asarray((whole @ codes.astype(np.int32).T).astype(np.float32) * own * scale)
