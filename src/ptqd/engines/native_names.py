"""The names that a denoiser's tensors have in its authors' own checkpoints, which ComfyUI and others go by.

Diffusers gave its models other names, and took some tensors apart. Each of the authors' is one of diffusers', or
several of them one below the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ptqd.errors import InputError

UNET_PREFIX = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
SWAPPED = "final_layer.adaLN_modulation.1"  # whose shift comes first, where diffusers has the scale first

SAME_NAMES = ("QwenImageTransformer2DModel",)  # whose authors' names diffusers has kept


def native_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Which of a denoiser's modules and parameters the authors' are, by their names.

    Args:
        model: of diffusers, in full precision; may be on the meta device.

    Returns:
        By the authors' name of a module, the names of diffusers' modules that it is made of, one below the other.

    Raises:
        InputError: the names of this class are not known here.
    """
    kind = type(model).__name__
    known = _KINDS.get(kind)
    if known is not None:
        return known(model)
    if kind in SAME_NAMES:
        return own_names(model)
    raise InputError(
        f"ptqd does not know the names of {kind} in its authors' checkpoints; known are "
        f"{', '.join(sorted((*_KINDS, *SAME_NAMES)))}"
    )


def own_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The same, where the names are diffusers' own."""
    return {name: (name,) for name in _leaves(model)}


def _leaves(model: nn.Module) -> list[str]:
    """Modules with a weight or a bias."""
    parameters = {name: {leaf for leaf, _ in m.named_parameters(recurse=False)} for name, m in model.named_modules()}
    return [name for name, leaves in parameters.items() if leaves & {"weight", "bias"}]


def _flux(model: Any) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = {theirs: (ours,) for ours, theirs in _FLUX.items()}
    parts: tuple[tuple[str, str, int, Mapping[str, tuple[str, ...]], Mapping[str, str]], ...] = (
        ("transformer_blocks", "double_blocks", len(model.transformer_blocks), _DOUBLE, _DOUBLE_NORMS),
        ("single_transformer_blocks", "single_blocks", len(model.single_transformer_blocks), _SINGLE, _SINGLE_NORMS),
    )
    for ours, theirs, count, layers, norms in parts:
        for i in range(count):
            result |= {f"{theirs}.{i}.{name}": tuple(f"{ours}.{i}.{x}" for x in own) for name, own in layers.items()}
            result |= {f"{theirs}.{i}.{name}": (f"{ours}.{i}.{own}",) for name, own in norms.items()}
    return result


def _unet(model: Any) -> dict[str, tuple[str, ...]]:
    places = dict(_UNET)
    width = model.config.layers_per_block
    if not isinstance(width, int):
        raise InputError(
            "a UNet whose blocks have different numbers of layers has no names in its authors' checkpoints"
        )
    for i in range(len(model.down_blocks)):
        for j in range(width):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + i * (width + 1) + j}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + i * (width + 1) + j}.1"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (width + 1)}.0.op"
    for n, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        places[f"mid_block.{part}"] = f"middle_block.{n}"
    for i, block in enumerate(model.up_blocks):
        for j in range(width + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * (width + 1) + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * (width + 1) + j}.1"
        place = 2 if getattr(block, "attentions", None) else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (width + 1) + width}.{place}.conv"
    result: dict[str, tuple[str, ...]] = {}
    for name in _leaves(model):
        ours = next((each for each in places if f"{name}.".startswith(f"{each}.")), "")
        if not ours:
            raise InputError(f"{name} of {type(model).__name__} has no name in its authors' checkpoints")
        rest = name.removeprefix(ours).removeprefix(".")
        if ".resnets." in ours:
            rest = _RESNET.get(rest, rest)
        result[f"{UNET_PREFIX}{places[ours]}.{rest}".removesuffix(".")] = (name,)
    return result


_KINDS: dict[str, Callable[[Any], dict[str, tuple[str, ...]]]] = {
    "FluxTransformer2DModel": _flux,
    "UNet2DConditionModel": _unet,
}


def native_leaf(name: str, leaf: str) -> str:
    """The name of one of a module's parameters: of Flux's norms it is ``scale``."""
    return "scale" if name.endswith(("query_norm", "key_norm")) and leaf == "weight" else leaf
