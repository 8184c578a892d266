"""A quantized denoiser as one file that other programs load: ComfyUI's quantized safetensors, and GGUF.

What such a file holds of a layer is its codes and scales, as they were calibrated; what its format has no place for is
written in floating point, of weights that were rounded, and is named. ComfyUI finds the ranges of activations for each
token as it comes, in 8 bits or 4; of GGUF activations are in floating point. So a recipe loses the least that has such
ranges: ``w8a8-comfy-gptq`` or ``w4a4-comfy-convrot-gptq``, and for GGUF ``w4a16-g32-gptq`` or ``w8a16-g32``. Steps'
bits and corrections are a sampler's, which neither format is.
"""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import nn

from ptqd.diffusion.macs import on_meta
from ptqd.diffusion.pipeline_parts import denoiser_names
from ptqd.diffusion.plain_copy import as_plain
from ptqd.engines.module import EngineModule
from ptqd.engines.native_names import SWAPPED, native_leaf, native_names, own_names
from ptqd.engines.sessions import required
from ptqd.engines.torchao import rounded_weight
from ptqd.errors import InputError
from ptqd.files import opened_tensors, replacing, write_tensors
from ptqd.outputs import check_file
from ptqd.quantization.hf_quantizer import not_ours
from ptqd.quantization.modules.adapters import tuned_layers
from ptqd.quantization.modules.attention import AttentionProducts
from ptqd.quantization.modules.linear_conv import QuantLayer, SplitConv, find_layer
from ptqd.quantization.numerics.affine import MAX_BITS
from ptqd.quantization.plan_steps import plan_steps_of
from ptqd.quantization.sites import quantized_layers

FileFormat = Literal["comfy", "gguf"]
FILE_FORMATS: tuple[FileFormat, ...] = ("comfy", "gguf")
_BY = "quantized_by"  # in a file's metadata
FOUR, BLOCK = 4, 32  # bits; weights of a block of GGUF's, which share a scale
_INT4_COLUMNS = 64  # that the inputs of ComfyUI's 4-bit layers are a multiple of
_REGULAR_GROUPS = (4, 16, 64, 256)
_UNPACKED = (  # whose widths ComfyUI tells a model by, which packing would halve
    *("label_emb.0.0", "attn2.to_k", "img_in", "txt_in", "vector_in.in_layer", "context_embedder", "y_embedder.mlp.0"),
)
_INT8, _INT4 = "int8_tensorwise", "convrot_w4a4"
_FLUX_WIDTH = 3072  # that diffusers' conversion of Flux's names knows


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What a file holds.

    Attributes:
        quantized: names of the layers whose codes it holds, as the denoiser has them, and in which format.
        floating: names of quantized layers and attention products that are in floating point there, and why.
        lost: what else of the pipeline it has no place for.
    """

    quantized: tuple[tuple[str, str], ...]
    floating: tuple[tuple[str, str], ...]
    lost: tuple[str, ...]


def export_checkpoint(pipe: DiffusionPipeline, kind: FileFormat, path: str | Path) -> WrittenCheckpoint:
    """Write a quantized pipeline's denoiser as a file that ComfyUI, or what reads GGUF, loads.

    Args:
        pipe: quantized by ptqd; of one denoiser.
        kind: ``"comfy"``: safetensors with the markers of ComfyUI's own quantized layers, of ``int8_tensorwise`` (a
            scale a row) and ``convrot_w4a4``; or ``"gguf"``: ``Q8_0`` and ``Q4_0``.
        path: of the file; one that ptqd wrote is replaced.

    Raises:
        InputError: another kind; a pipeline that ptqd did not quantize, with two denoisers or a LoRA; for ComfyUI, a
            denoiser whose names in its authors' checkpoints are not known, for GGUF one that diffusers does not read
            from a file; a denoiser that was changed since it was made; or a file that is not ptqd's to write, or cannot
            be written.
    """
    path = Path(path)
    check_file_format(kind, path)
    name, *others = denoiser_names(pipe)
    if others:
        raise InputError(f"{type(pipe).__name__} has two denoisers, of which such a file holds one")
    model = getattr(pipe, name)
    if isinstance(model, EngineModule):
        raise InputError("the pipeline was exported already; export the quantized pipeline that it was made from")
    model = as_plain(model)
    if not any(True for _ in quantized_layers(model)):
        raise InputError(not_ours(model, name))
    if any(True for _ in tuned_layers(model)):
        raise InputError(f"the {name} has a LoRA, which such a file has no place for; unload it, or fuse it")
    writer = _Comfy() if kind == "comfy" else _Gguf()
    floating: list[tuple[str, str]] = []
    quantized: list[tuple[str, str]] = []
    half = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.float32
    plain = on_meta(model)
    left = set(plain.state_dict())
    _check_own(model, left)
    for theirs, ours in writer.names(plain).items():
        parts = [find_layer(model, each) for each in ours]
        if any(part is None for part in parts):
            continue
        left -= {f"{each}.weight" for each in ours}
        reasons = [writer.why_not(part, theirs) for part in parts]
        layers = [part for part in parts if isinstance(part, QuantLayer)]
        if len(layers) == len(parts) and not any(reasons) and len({writer.form(x, theirs) for x in layers}) == 1:
            form = writer.form(layers[0], theirs)
            writer.add_codes(theirs, layers, form)
            quantized += [(each, form.title) for each in ours]
        else:
            weights = [_float_weight(part) for part in parts]
            joined = torch.cat(weights) if len(weights) > 1 else weights[0]
            writer.add_float(theirs, native_leaf(theirs, "weight"), joined, half)
            why = next((reason for reason in reasons if reason), "layers beside it are of other bits")
            floating += [
                (each, reason or why)
                for each, part, reason in zip(ours, parts, reasons, strict=True)
                if isinstance(part, QuantLayer | SplitConv)
            ]
        for leaf, values in _others(parts):
            writer.add_float(theirs, native_leaf(theirs, leaf), values, half)
            left -= {f"{each}.{leaf}" for each in ours}
    state = model.state_dict()
    for key in sorted(left):  # of blocks, not of layers
        writer.add_other(key, state[key], half)
    products = [key for key, module in model.named_modules() if isinstance(module, AttentionProducts)]
    floating += [(key, "attention products") for key in products]
    writer.write(path, model)
    return WrittenCheckpoint(tuple(quantized), tuple(floating), tuple(_lost(pipe, model, kind, quantized)))


def check_file_format(kind: str, path: Path) -> None:
    """Refuse a format that is not known or whose library is not installed, or a name that says something else.

    Raises:
        InputError: so it is, or a file of that name is none that ptqd wrote.
    """
    if kind not in FILE_FORMATS:
        raise InputError(f"unknown format {kind!r}; known are {', '.join(FILE_FORMATS)}")
    if kind == "gguf":
        required("gguf")
    ending = ".safetensors" if kind == "comfy" else ".gguf"
    if path.suffix != ending:
        raise InputError(f"{path}: a file of this format ends in {ending}; name it so")
    check_file(path, _is_ours, f"{ending} file")


def _is_ours(path: Path) -> bool:
    """Whether ptqd wrote a file."""
    if path.suffix == ".gguf":
        with path.open("rb") as file:
            start = file.read(1024)
        return start.startswith(b"GGUF") and _BY.encode() in start and b"ptqd" in start
    with opened_tensors(path) as tensors:
        return bool((tensors.metadata() or {}).get(_BY) == "ptqd")


def _float_weight(module: Any) -> torch.Tensor:
    """A module's weight in floating point, of codes that were rounded where it is quantized."""
    if isinstance(module, QuantLayer | SplitConv):
        return rounded_weight(module)
    weight: torch.Tensor = module.weight.detach()
    return weight


def _others(parts: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """What modules have beside their weights, one below the other."""
    names = [name for name, _ in parts[0].named_parameters(recurse=False) if name != "weight"]
    if isinstance(parts[0], SplitConv):
        names = ["bias"] if parts[0].bias is not None else []
    for name in names:
        values = [getattr(part, name).detach() for part in parts]
        yield name, torch.cat(values) if len(values) > 1 else values[0]


def _check_own(model: nn.Module, expected: set[str]) -> None:
    """Refuse a denoiser that has, or lacks, what its configuration does not say.

    Raises:
        InputError: so it is.
    """
    inside = [
        f"{path}." for path, m in model.named_modules() if isinstance(m, QuantLayer | SplitConv | AttentionProducts)
    ]
    names = set(model.state_dict())
    own = {name for name in names if not name.startswith(tuple(inside))}
    layers = {name for name in expected if name.startswith(tuple(inside))}
    different = sorted((own ^ expected) - layers)
    if different:
        raise InputError(
            f"{type(model).__name__} was changed since it was made: its {different[0]!r} is not what its configuration "
            "makes; undo the change (unload an IP-Adapter) to export it"
        )


def _lost(
    pipe: DiffusionPipeline, model: nn.Module, kind: FileFormat, quantized: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """What a file has no place for, beside layers."""
    if kind == "gguf":
        yield "the bits of activations: they are in floating point"
    else:
        layers = dict(quantized_layers(model))
        found = {title: [layers[name] for name, own in quantized if own == title] for title in (_INT8, _INT4)}
        other = sum(not _as_comfy(layer, title) for title, own in found.items() for layer in own)
        if other:
            yield f"how {other} layers round activations: ComfyUI has symmetric ranges of each token, in 8 bits or 4"
    if (steps := plan_steps_of(model)) is not None:
        yield f"the plan's bits by step ({steps.plan.steps} steps)"
    correction = getattr(pipe.scheduler, "correction", None)
    if correction is not None and correction.methods:
        yield "the correction, which is the scheduler's"


def _as_comfy(layer: QuantLayer, title: str) -> bool:
    """Whether ComfyUI rounds a layer's input as the simulation does."""
    spec, bits = layer.input.spec, layer.input.bits
    narrow = title == _INT4 and bits <= FOUR
    return spec.format == "int" and spec.dynamic and spec.symmetric and bits == (FOUR if narrow else MAX_BITS)


@dataclass(frozen=True)
class _Form:
    """How a layer's codes are written.

    Attributes:
        title: for messages.
        bits: of a stored code: 8, or 4.
        marker: what ComfyUI is told.
    """

    title: str
    bits: int
    marker: tuple[tuple[str, object], ...] = ()


def _obstacles(layer: Any) -> str | None:
    """Why no such format has a layer's codes; None where it may."""
    if not isinstance(layer, QuantLayer):
        return "a convolution" if isinstance(layer, SplitConv) else "no quantized layer"
    if layer.kind != "linear":
        return "a convolution"
    weights = layer.weights
    found = {
        f"{weights.format} weights": weights.format != "int",
        f"weights of {weights.bits} bits": weights.bits > MAX_BITS,
        "weights with zero points": layer.zero_point is not None,
        "smoothing": layer.smooth_scale is not None and not bool((layer.smooth_scale == 1).all()),
        "a branch beside it": layer.rank > 0,
        "a fused LoRA": layer.adapter_rank > 0,
    }
    return next((what for what, there in found.items() if there), None)


class _Comfy:
    """ComfyUI's quantized safetensors: a marker of JSON beside each quantized layer's weight.

    The layouts are those of ComfyUI's ``comfy-kitchen``: ``int8_tensorwise`` with a scale a row (N, 1), and
    ``convrot_w4a4`` with two codes in a byte, the even column's low, and scales (N,).
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def names(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        return native_names(model)

    def why_not(self, layer: Any, name: str) -> str | None:
        why = _obstacles(layer)
        if why is not None or not isinstance(layer, QuantLayer):
            return why
        if layer.scale.ndim != 1:
            return "weights with groups"
        if layer.rotated > 1 and (int(layer.rotation) > 0 or layer.rotated not in _REGULAR_GROUPS):  # type: ignore[arg-type]
            return "a rotation by Sylvester's matrix"
        return None

    def form(self, layer: QuantLayer, name: str) -> _Form:
        narrow = layer.weights.bits <= FOUR and layer.rotated > 1 and layer.columns % _INT4_COLUMNS == 0
        if narrow and not name.endswith(_UNPACKED):
            marker: dict[str, object] = {"format": _INT4, "convrot_groupsize": layer.rotated}
            if layer.input.bits > FOUR:
                marker["linear_dtype"] = "int8"
            return _Form(_INT4, FOUR, tuple(marker.items()))
        marker = {"format": _INT8}
        if layer.rotated > 1:
            marker |= {"convrot": True, "convrot_groupsize": layer.rotated}
        return _Form(_INT8, MAX_BITS, tuple(marker.items()))

    def add_codes(self, name: str, layers: list[QuantLayer], form: _Form) -> None:
        codes = torch.cat([layer.integer_weight() for layer in layers]).to(torch.int8)
        scale = torch.cat([layer.scale.float() for layer in layers])
        if name == SWAPPED:
            codes, scale = (torch.cat(list(reversed(x.chunk(2)))) for x in (codes, scale))
        if form.bits == FOUR:
            codes = (codes[:, ::2] & 0xF) | (codes[:, 1::2] << FOUR)
        marker = json.dumps(dict(form.marker)).encode()
        self.tensors[f"{name}.weight"] = codes.cpu()
        self.tensors[f"{name}.weight_scale"] = scale.cpu() if form.bits == FOUR else scale.cpu().view(-1, 1)
        self.tensors[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)

    def add_float(self, name: str, leaf: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        if name == SWAPPED:
            values = torch.cat(list(reversed(values.chunk(2))))
        self.tensors[f"{name}.{leaf}"] = values.detach().cpu().to(dtype)

    def add_other(self, key: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        raise InputError(f"ptqd does not know what {key!r} is called in its authors' checkpoints; export to gguf")

    def write(self, path: Path, model: nn.Module) -> None:
        write_tensors(path, self.tensors, {"format": "pt", _BY: "ptqd"})


class _Gguf:
    """GGUF's ``Q8_0`` and ``Q4_0``: blocks of 32 weights with a scale in float16, without zero points."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[np.ndarray[Any, Any], Any]] = {}
        self._swaps = False

    def names(self, model: Any) -> dict[str, tuple[str, ...]]:
        """The authors' names where diffusers reads these, else its own, which it reads with a ``config``."""
        kind = type(model).__name__
        if kind not in SINGLE_FILE_LOADABLE_CLASSES:
            raise InputError(
                f"diffusers reads no {kind} from a file, GGUF or other; export to an engine, or save the pipeline"
            )
        width = getattr(model, "inner_dim", _FLUX_WIDTH)
        if kind == "FluxTransformer2DModel" and width == _FLUX_WIDTH:
            self._swaps = True
            return native_names(model)
        if kind == "UNet2DConditionModel" and model.config.get("time_cond_proj_dim") is None:  # which it does not name
            with suppress(InputError):
                return native_names(model)
        return own_names(model)

    def why_not(self, layer: Any, name: str) -> str | None:
        why = _obstacles(layer)
        if why is not None or not isinstance(layer, QuantLayer):
            return why
        groups = 1 if layer.scale.ndim == 1 else layer.scale.shape[1]
        scale = layer.scale.float()
        rounded = scale.half().float()
        found = {
            "a rotation of its input": layer.rotated > 1,
            f"inputs that are no multiple of {BLOCK}": layer.columns % BLOCK != 0,
            f"groups that are no multiple of {BLOCK}": layer.columns // groups % BLOCK != 0,
            "scales that float16 has no room for": not bool(((rounded / scale - 1).abs() < 2**-10).all()),
        }
        return next((what for what, there in found.items() if there), None)

    def form(self, layer: QuantLayer, name: str) -> _Form:
        return _Form("Q4_0", FOUR) if layer.weights.bits <= FOUR else _Form("Q8_0", MAX_BITS)

    def add_codes(self, name: str, layers: list[QuantLayer], form: _Form) -> None:
        from gguf import GGMLQuantizationType as Kind

        codes = torch.cat([layer.integer_weight() for layer in layers]).cpu()
        scales = torch.cat([_by_block(layer) for layer in layers]).cpu()
        if name == SWAPPED and self._swaps:
            codes, scales = (torch.cat(list(reversed(x.chunk(2)))) for x in (codes, scales))
        blocks = codes.view(len(codes), -1, BLOCK).numpy()
        heads = scales.half().numpy()[..., None].view(np.uint8)
        if form.bits == FOUR:
            above = (blocks + 8).astype(np.uint8)
            body = above[..., : BLOCK // 2] | (above[..., BLOCK // 2 :] << FOUR)
        else:
            body = blocks.astype(np.int8).view(np.uint8)
        packed = np.concatenate([heads, body], -1).reshape(len(codes), -1)
        self.tensors[f"{name}.weight"] = (packed, Kind.Q4_0 if form.bits == FOUR else Kind.Q8_0)

    def add_float(self, name: str, leaf: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        from gguf import GGMLQuantizationType as Kind

        if name == SWAPPED and self._swaps:
            values = torch.cat(list(reversed(values.chunk(2))))
        narrow = dtype != torch.float32 and values.ndim > 1 and float(values.abs().max()) < torch.finfo(torch.half).max
        array = values.detach().cpu().to(torch.float16 if narrow else torch.float32).numpy()
        self.tensors[f"{name}.{leaf}".lstrip(".")] = (array, Kind.F16 if narrow else Kind.F32)

    def add_other(self, key: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        self.add_float("", key, values, dtype)

    def write(self, path: Path, model: nn.Module) -> None:
        import gguf

        kind = type(model).__name__
        with replacing(path) as temporary:
            sdxl = getattr(model, "config", {}).get("addition_embed_type") == "text_time"
            writer = gguf.GGUFWriter(temporary, "sdxl" if sdxl else _ARCHITECTURES.get(kind, kind))
            writer.add_string(_BY, "ptqd")
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for name, (array, form) in self.tensors.items():
                writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=form)
            try:
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            except OSError as error:
                if error.errno is not None:
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error  # numpy's has no number
            finally:
                writer.close()


_ARCHITECTURES = {"FluxTransformer2DModel": "flux", "UNet2DConditionModel": "sd1", "SD3Transformer2DModel": "sd3"}


def _by_block(layer: QuantLayer) -> torch.Tensor:
    """A layer's scales, one for each block of 32 inputs (O, I / 32)."""
    scale = layer.scale.float().view(layer.shape[0], -1)
    return scale.repeat_interleave(layer.columns // BLOCK // scale.shape[1], 1)
