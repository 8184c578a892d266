"""Which tensor of the original is which of diffusers."""

import logging
from collections.abc import Iterator

import torch

from ptqd.diffusion.compvis.checkpoint import State
from ptqd.diffusion.compvis.config import Model, Stage, Unet
from ptqd.errors import InputError

logger = logging.getLogger(__name__)

_RAW, _EMA = "model.diffusion_model.", "model_ema.diffusion_model"
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_STAGE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_BLOCK = (  # of a transformer
    *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)


def choose_weights(state: State, model: Model) -> None:
    """Leave the UNet's weights that count, under the raw ones' names: the EMA's where the YAML keeps them.

    Where the checkpoint has but one kind of them, that one is taken, and the log says so if the YAML says otherwise.
    """
    raw, ema = state.suffixes(_RAW), state.suffixes(_EMA)
    if raw and not ema and model.ema:
        logger.warning(
            "%s has no EMA weights beside those of model.diffusion_model; these are taken, and are the EMA's only if "
            "it was pruned to them",
            state.where,
        )
    if ema and not raw and not model.ema:
        logger.warning("%s has EMA weights alone; they are taken, though the YAML says use_ema: false", state.where)
    if raw and not model.ema:
        state.drop("model_ema.")
    elif ema:
        for name in _unet_names(model.unet):
            copy = _EMA + name.replace(".", "")
            if _RAW + name in state.left or (not raw and copy in state.left):
                state.left[_RAW + name] = state.take(copy)


def _unet_names(unet: Unet) -> Iterator[str]:
    """The original's name of every parameter that a UNet may have."""
    block = (f"transformer_blocks.{n}.{name}" for n in range(unet.depth) for name in _BLOCK)
    parts = {
        "layer": ("",),
        "resnet": tuple(RESNET),
        "attention": ("norm", "qkv", "proj_out"),
        "transformer": ("norm", "proj_in", "proj_out", *block),
    }
    for place, _, kind in unet_places(unet):
        for part in parts[kind]:
            for leaf in ("weight", "bias"):
                yield ".".join(filter(None, (place, part, leaf)))


def unet_places(unet: Unet) -> Iterator[tuple[str, str, str]]:
    """Names in the original and in diffusers, and what is there."""
    attention = "transformer" if unet.context else "attention"
    levels = range(len(unet.multipliers))
    yield "time_embed.0", "time_embedding.linear_1", "layer"
    yield "time_embed.2", "time_embedding.linear_2", "layer"
    yield "input_blocks.0.0", "conv_in", "layer"
    n = 1
    for level in levels:
        for j in range(unet.blocks):
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{j}", "resnet"
            if unet.attention[level]:
                yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{j}", attention
            n += 1
        if level != levels[-1]:
            place = f"down_blocks.{level}.downsamplers.0"
            if unet.resnet_updown:
                yield f"input_blocks.{n}.0", place, "resnet"
            else:
                yield f"input_blocks.{n}.0.op", f"{place}.conv", "layer"
            n += 1
    yield "middle_block.0", "mid_block.resnets.0", "resnet"
    yield "middle_block.1", "mid_block.attentions.0", attention
    yield "middle_block.2", "mid_block.resnets.1", "resnet"
    n = 0
    for up, level in enumerate(reversed(levels)):
        for j in range(unet.blocks + 1):
            yield f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{j}", "resnet"
            if unet.attention[level]:
                yield f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{j}", attention
            if level > 0 and j == unet.blocks:
                last = f"output_blocks.{n}.{2 if unet.attention[level] else 1}"
                place = f"up_blocks.{up}.upsamplers.0"
                if unet.resnet_updown:
                    yield last, place, "resnet"
                else:
                    yield f"{last}.conv", f"{place}.conv", "layer"
            n += 1
    yield "out.0", "conv_norm_out", "layer"
    yield "out.2", "conv_out", "layer"


def unet_tensors(state: State, model: Model) -> dict[str, torch.Tensor]:
    """The UNet's, by their names in diffusers."""
    result: dict[str, torch.Tensor] = {}
    for theirs, ours, kind in unet_places(model.unet):
        for suffix in state.suffixes(f"{_RAW}{theirs}."):
            value = state.take(f"{_RAW}{theirs}.{suffix}")
            part, _, leaf = suffix.rpartition(".")
            if kind == "resnet":
                result[f"{ours}.{RESNET.get(part, part)}.{leaf}"] = value
            elif kind == "attention":
                result |= _attention(model.unet, ours, part, leaf, value)
            else:
                result[f"{ours}.{suffix}"] = value
    return result


def _attention(unet: Unet, ours: str, part: str, leaf: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of an AttentionBlock: one convolution for queries, keys and values, head by head or (new order) all by all."""
    if part != "qkv":
        name = {"norm": "group_norm", "proj_out": "to_out.0"}.get(part, part)
        return {f"{ours}.{name}.{leaf}": value.squeeze(-1) if value.ndim == 3 else value}
    value = value.squeeze(-1) if value.ndim == 3 else value
    width = value.shape[0] // 3
    if value.shape[0] % 3 or width % unet.heads_of(width) or (unet.heads <= 0 and width % unet.head_width):
        raise InputError(
            f"{ours}: {value.shape[0]} rows are no queries, keys and values of {unet.heads_of(width)} heads"
        )
    heads = 1 if unet.new_order else unet.heads_of(width)
    parts = value.view(heads, 3, width // heads, *value.shape[1:]).unbind(1)
    return {f"{ours}.{n}.{leaf}": p.flatten(0, 1) for n, p in zip(("to_q", "to_k", "to_v"), parts, strict=True)}


def _first_stage_places(stage: Stage) -> Iterator[tuple[str, str, str]]:
    for side, sign in (("encoder", "down"), ("decoder", "up")):
        levels = len(stage.multipliers)
        yield f"{side}.conv_in", f"{side}.conv_in", "layer"
        for level in range(levels):
            block = level if side == "encoder" else levels - 1 - level
            for j in range(stage.blocks + (side == "decoder")):
                yield f"{side}.{sign}.{level}.block.{j}", f"{side}.{sign}_blocks.{block}.resnets.{j}", "resnet"
            theirs, ours = f"{side}.{sign}.{level}.{sign}sample", f"{side}.{sign}_blocks.{block}.{sign}samplers.0"
            yield f"{theirs}.conv", f"{ours}.conv", "layer"
        yield f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", "resnet"
        yield f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", "attention"
        yield f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", "resnet"
        yield f"{side}.norm_out", f"{side}.conv_norm_out", "layer"
        yield f"{side}.conv_out", f"{side}.conv_out", "layer"
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name, "layer"
    if stage.codes:
        yield "quantize.embedding", "quantize.embedding", "layer"


def first_stage_tensors(state: State, model: Model) -> dict[str, torch.Tensor]:
    """The first stage's, by their names in diffusers."""
    result: dict[str, torch.Tensor] = {}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for theirs, ours, kind in _first_stage_places(model.stage):
        for suffix in state.suffixes(f"first_stage_model.{theirs}."):
            value = state.take(f"first_stage_model.{theirs}.{suffix}")
            part, _, leaf = suffix.rpartition(".")
            if kind == "layer":
                result[f"{ours}.{suffix}"] = value
            elif kind == "resnet":
                result[f"{ours}.{_STAGE_RESNET.get(part, part)}.{leaf}"] = value
            else:  # 1 x 1 convolutions, there
                result[f"{ours}.{attention.get(part, part)}.{leaf}"] = value.flatten(1) if value.ndim == 4 else value
    return result
