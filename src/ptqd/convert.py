"""Checkpoints of CompVis' latent diffusion (Rombach et al., arXiv 2112.10752) as diffusers pipelines.

The original keeps one state dict for the UNet, its moving average (EMA), the first stage and the class embedder, and
builds them as its YAML says. Here every parameter is placed by name; one that is left over, missing or of another shape
is an error, and so is anything in the YAML that is not understood.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel

from ptqd.errors import InputError
from ptqd.files import read_pickle, write_large_tensors
from ptqd.pipelines.latent import LatentPipeline, MultiHeadUNet2DModel
from ptqd.pipelines.latent_class import ClassEmbedder, LatentClassPipeline

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
VQ = "ldm.models.autoencoder.VQModelInterface"
KL = "ldm.models.autoencoder.AutoencoderKL"
CLASSES = "ldm.modules.encoders.modules.ClassEmbedder"
UNCONDITIONAL = "__is_unconditional__"

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_STAGE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_SCHEDULE = (  # what the original keeps beside the weights and makes from its YAML
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
    "cond_ids",
)  # fmt: skip
_BOOKKEEPING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # a key of Lightning's own notes


def convert(checkpoint: Path, config: Path) -> DiffusionPipeline:
    """A checkpoint and its YAML as a pipeline of diffusers.

    Weights are mapped from the checkpoint's file. Where the configuration keeps an EMA copy, as the original does by
    default, its weights are taken.

    Args:
        checkpoint: ``model.ckpt``, or its state dict as ``.safetensors``.
        config: the YAML.

    Returns:
        A :class:`ptqd.LatentClassPipeline` for class-conditional models, else a :class:`ptqd.LatentPipeline`.

    Raises:
        InputError: a file that is missing, truncated or holds code; classes or options that are not known; or a
            parameter that is left over, missing or of another shape.
    """
    model = _read_config(config)
    state = _State(_read_checkpoint(checkpoint), str(checkpoint))
    state.check_schedule(model)
    names = _ema_names(state, model) if model.ema else {}
    empty, stage = _built(config, lambda: (_unet(model.unet), _first_stage(model, state)))
    unet = _filled(empty, _unet_tensors(state, model, names), checkpoint, config)
    vae = _filled(stage, _first_stage_tensors(state, model), checkpoint, config)
    embedder = None
    if model.classes:
        rows = {"embedding.weight": state.take("cond_stage_model.embedding.weight")}
        embedder = _filled(_embedder(model), rows, checkpoint, config)
    state.check_empty(model)
    if embedder is None:
        return LatentPipeline(vae, unet, _scheduler(model))
    return LatentClassPipeline(vae, unet, embedder, _scheduler(model))


def blank(config: Path) -> DiffusionPipeline:
    """The pipeline that a YAML describes, on the meta device.

    Raises:
        InputError: a YAML that is not understood.
    """
    model = _read_config(config)
    factor = {"scale_factor": torch.ones(())} if model.scaled else {}
    unet, vae = _built(config, lambda: (_unet(model.unet), _first_stage(model, _State(factor, str(config)))))
    if not model.classes:
        return LatentPipeline(vae, unet, _scheduler(model))
    return LatentClassPipeline(vae, unet, _embedder(model), _scheduler(model))


def _built(config: Path, build: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Networks that diffusers builds, if it takes what the YAML says."""
    try:
        return build()
    except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{config} describes networks that cannot be built: {' '.join(str(error).split())}") from error


def save_converted(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a converted pipeline as ``save_pretrained`` does, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.save_config(folder / name)  # type: ignore[operator]
            weights = folder / name / "diffusion_pytorch_model.safetensors"
            write_large_tensors(weights, part.state_dict(), {"format": "pt"})
        else:
            part.save_pretrained(folder / name)


@dataclass(frozen=True)
class _Stage:
    """A first stage's networks."""

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    latents: int
    resolution: int
    image_channels: int
    codes: int  # of its codebook; 0 for a KL one
    code_width: int


@dataclass(frozen=True)
class _Unet:
    """A denoiser's network."""

    image_size: int
    inputs: int
    outputs: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]  # at each level
    heads: int
    head_width: int
    context: int  # width; 0: attention to itself alone
    depth: int
    scale_shift: bool
    resnet_updown: bool
    new_order: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.channels * m for m in self.multipliers)

    def heads_of(self, width: int) -> int:
        """How many heads an attention layer has."""
        return self.heads if self.heads > 0 else width // self.head_width


@dataclass(frozen=True)
class _Model:
    """What a YAML says."""

    timesteps: int
    linear_start: float
    linear_end: float
    ema: bool
    scaled: bool
    scale: float
    unet: _Unet
    stage: _Stage
    classes: int
    class_width: int


def _read_config(path: Path) -> _Model:
    try:
        read = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
        raise InputError(f"{path} describes no model; give the YAML that came with the checkpoint")
    model = _Node(path, "model", read["model"]).of(DIFFUSION)
    model.refuse_unless("parameterization", "eps", "the original predicts noise")
    model.refuse_unless("beta_schedule", "linear", "the original's")
    model.ignore("num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "monitor", "loss_type")
    model.ignore("cond_stage_trainable", "concat_mode", "scheduler_config", "image_size", "channels", "ckpt_path")
    model.ignore("ignore_keys", "conditioning_key", "load_only_unet", "original_elbo_weight")
    model.ignore("v_posterior", "l_simple_weight", "learn_logvar", "logvar_init", "clip_denoised")
    unet = _read_unet(model.child("unet_config").of(UNET))
    stage = _read_stage(model.child("first_stage_config").of(VQ, KL))
    condition = model.take("cond_stage_config", object, UNCONDITIONAL)
    classes = class_width = 0
    if condition != UNCONDITIONAL:
        embedder = _Node(path, "cond_stage_config", condition).of(CLASSES)
        classes, class_width = embedder.take("n_classes", int, 1000), embedder.take("embed_dim", int)
        embedder.ignore("key")
        embedder.done()
    if classes == 1000:
        raise InputError(f"{path}: n_classes 1000 has no class for guidance; the last of 1001 is the null class")
    if unet.context != class_width:
        raise InputError(f"{path}: context_dim {unet.context} is not the width of the class embedder, {class_width}")
    start, end = model.take("linear_start", float, 1e-4), model.take("linear_end", float, 2e-2)
    if not 0 < start < end < 1:
        raise InputError(f"{path}: betas from linear_start {start} to linear_end {end} are not between 0 and 1")
    found = _Model(
        timesteps=model.take("timesteps", int, 1000),
        linear_start=start,
        linear_end=end,
        ema=model.take("use_ema", bool, True),
        scaled=model.take("scale_by_std", bool, False),
        scale=model.take("scale_factor", float, 1.0),
        unet=unet,
        stage=stage,
        classes=classes,
        class_width=class_width,
    )
    model.done()
    return found


def _read_unet(node: "_Node") -> _Unet:
    multipliers = tuple(node.take("channel_mult", list))
    wanted = set(node.take("attention_resolutions", list))
    transformer = node.take("use_spatial_transformer", bool, False)
    node.refuse_unless("dims", 2, "images")
    node.refuse_unless("conv_resample", True, "with convolutions")
    node.refuse_unless("num_classes", None, "classes come through the context")
    node.ignore("dropout", "use_checkpoint", "use_fp16", "legacy")
    node.refuse_unless("num_heads_upsample", -1, "as many as on the way down")
    found = _Unet(
        image_size=node.take("image_size", int),
        inputs=node.take("in_channels", int),
        outputs=node.take("out_channels", int),
        channels=node.take("model_channels", int),
        multipliers=multipliers,
        blocks=node.take("num_res_blocks", int),
        attention=tuple(2**level in wanted for level in range(len(multipliers))),
        heads=node.take("num_heads", int, -1),
        head_width=node.take("num_head_channels", int, -1),
        context=node.take("context_dim", int, 0) if transformer else 0,
        depth=node.take("transformer_depth", int, 1),
        scale_shift=node.take("use_scale_shift_norm", bool, False),
        resnet_updown=node.take("resblock_updown", bool, False),
        new_order=node.take("use_new_attention_order", bool, False),
    )
    node.done()
    if (found.heads > 0) == (found.head_width > 0):
        raise InputError(f"{node.path}: {node.name} needs num_heads or num_head_channels, one of them")
    if found.context and (found.scale_shift or found.resnet_updown):
        raise InputError(f"{node.path}: cross-attention with use_scale_shift_norm or resblock_updown is not supported")
    return found


def _read_stage(node: "_Node") -> _Stage:
    quantized = node.target == VQ
    codes, code_width = node.take("n_embed", int) if quantized else 0, node.take("embed_dim", int)
    node.ignore("ckpt_path", "monitor", "lossconfig", "image_key", "colorize_nlabels", "remap", "sane_index_shape")
    node.ignore("batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema", "ignore_keys")
    built = node.child("ddconfig")
    node.done()
    built.refuse_unless("double_z", not quantized, "as its class has it")
    built.refuse_unless("attn_resolutions", [], "only the middle attends")
    built.refuse_unless("resamp_with_conv", True, "with convolutions")
    built.refuse_unless("tanh_out", False, "no tanh")
    built.ignore("dropout", "use_linear_attn", "attn_type")
    found = _Stage(
        channels=built.take("ch", int),
        multipliers=tuple(built.take("ch_mult", list)),
        blocks=built.take("num_res_blocks", int),
        latents=built.take("z_channels", int),
        resolution=built.take("resolution", int),
        image_channels=built.take("in_channels", int),
        codes=codes,
        code_width=code_width,
    )
    built.refuse_unless("out_ch", found.image_channels, "as many as its input")
    built.done()
    if not quantized and code_width != found.latents:
        raise InputError(f"{node.path}: embed_dim {code_width} and z_channels {found.latents} differ, unsupported here")
    return found


class _Node:
    """One ``target`` with its ``params``, or plain parameters; what is not asked for in the end is an error."""

    def __init__(self, path: Path, name: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{path}: {name} is no mapping")
        self.path, self.name, self.values, self.target = path, name, dict(values), ""

    def of(self, *targets: str) -> "_Node":
        """Its parameters, if it is of one of these classes."""
        target = self.values.get("target")
        if target not in targets:
            raise InputError(f"{self.path}: {self.name} is of the class {target}; known is {' or '.join(targets)}")
        node = _Node(self.path, self.name, self.values.get("params") or {})
        node.target = str(target)
        return node

    def child(self, name: str) -> "_Node":
        """A part."""
        return _Node(self.path, name, self.take(name, dict))

    def take(self, name: str, kind: type, default: Any = dataclasses.MISSING) -> Any:
        """One value."""
        value = self.values.pop(name, default)
        if value is dataclasses.MISSING:
            raise InputError(f"{self.path}: {self.name} lacks {name}")
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            with suppress(ValueError):
                value = float(value)  # 1e-4 is text to a YAML reader
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{self.path}: {name} in {self.name} should be {kind.__name__}; it is {value!r}")
        if isinstance(value, list) and not all(type(item) is int and item > 0 for item in value):
            raise InputError(f"{self.path}: {name} in {self.name} should be whole numbers above 0; it is {value!r}")
        return value

    def refuse_unless(self, name: str, wanted: Any, why: str) -> None:
        """A value that only one is supported of."""
        value = self.values.pop(name, wanted)
        if value != wanted:
            raise InputError(f"{self.path}: {name}: {value!r} in {self.name} is not supported, only {wanted!r} ({why})")

    def ignore(self, *names: str) -> None:
        """Values that training alone used, or that are said elsewhere too."""
        for name in names:
            self.values.pop(name, None)

    def done(self) -> None:
        """Nothing is left."""
        if self.values:
            raise InputError(f"{self.path}: {self.name} has {next(iter(self.values))!r}, which is not known")


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    with torch.serialization.safe_globals([(_Inert, _BOOKKEEPING)]):
        read = read_pickle(path)
    state = read.get("state_dict", read) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state_dict of tensors")
    return state


class _Inert:
    """Stands for a class that is named in a checkpoint and never called."""


class _State:
    """A checkpoint's tensors, of which each is taken once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        self.left, self.where = dict(tensors), where

    def take(self, name: str) -> torch.Tensor:
        """One of them."""
        if name not in self.left:
            raise InputError(f"{self.where} lacks {name!r}; it is of another architecture than the YAML says")
        return self.left.pop(name)

    def suffixes(self, prefix: str) -> list[str]:
        """What follows a prefix, of those that are left."""
        return [name.removeprefix(prefix) for name in self.left if name.startswith(prefix)]

    def check_schedule(self, model: _Model) -> None:
        """The noise schedule that was trained is the YAML's."""
        if "betas" not in self.left:
            return
        ends = (model.linear_start**0.5, model.linear_end**0.5)
        wanted = torch.linspace(*ends, model.timesteps, dtype=torch.float64) ** 2
        betas = self.left["betas"].double()
        if betas.shape != wanted.shape or not torch.allclose(betas, wanted, rtol=1e-4):
            raise InputError(
                f"{self.where} was trained with other betas than linear_start and linear_end in the YAML say"
            )

    def check_empty(self, model: _Model) -> None:
        """Nothing is left over but what is no part of the model."""
        unused = ("first_stage_model.loss.",) if model.ema else ("first_stage_model.loss.", "model_ema.")
        known = (*_SCHEDULE, "scale_factor", "model_ema.decay", "model_ema.num_updates")
        left = [name for name in self.left if name not in known and not name.startswith(unused)]
        if left:
            raise InputError(
                f"{self.where} holds {len(left)} tensors more than the YAML has a place for ({left[0]}, ...); it is of "
                "another architecture"
            )


def _ema_names(state: _State, model: _Model) -> dict[str, str]:
    """The name of each of the UNet's parameters in the EMA copy, which leaves the dots out."""
    if not state.suffixes("model_ema."):
        raise InputError(
            f"{state.where} has no EMA weights, which the YAML asks for; add 'use_ema: false' to its model's params to "
            "take the raw ones"
        )
    names = state.suffixes("model.diffusion_model.")
    return {name: f"model_ema.diffusion_model{name.replace('.', '')}" for name in names}


def _scheduler(model: _Model) -> DDIMScheduler:
    """The original's DDIM: its betas, and its grid of steps, which begins at 1."""
    return DDIMScheduler(
        num_train_timesteps=model.timesteps,
        beta_start=model.linear_start,
        beta_end=model.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def _embedder(model: _Model) -> ClassEmbedder:
    """Its last class is the null class."""
    with _on_meta():
        made: ClassEmbedder = ClassEmbedder(model.classes - 1, model.class_width)
    return made


def _unet(unet: _Unet) -> Any:
    levels = range(len(unet.multipliers))
    last = levels[-1]
    common: dict[str, Any] = {
        "sample_size": unet.image_size,
        "in_channels": unet.inputs,
        "out_channels": unet.outputs,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }
    with _on_meta():
        if unet.context:
            heads = [unet.heads_of(width) for width in unet.widths]
            down = ["CrossAttnDownBlock2D" if unet.attention[i] else "DownBlock2D" for i in levels]
            up = ["CrossAttnUpBlock2D" if unet.attention[i] else "UpBlock2D" for i in reversed(levels)]
            return UNet2DConditionModel(
                **common,
                down_block_types=tuple(down),
                up_block_types=tuple(up),
                attention_head_dim=heads[0] if len(set(heads)) == 1 else tuple(heads),  # heads, despite its name
                cross_attention_dim=unet.context,
                transformer_layers_per_block=unet.depth,
            )
        plain_down = ["ResnetDownsampleBlock2D" if unet.resnet_updown and i < last else "DownBlock2D" for i in levels]
        plain_up = ["ResnetUpsampleBlock2D" if unet.resnet_updown and i > 0 else "UpBlock2D" for i in levels]
        common |= {
            "down_block_types": tuple("AttnDownBlock2D" if unet.attention[i] else plain_down[i] for i in levels),
            "up_block_types": tuple("AttnUpBlock2D" if unet.attention[i] else plain_up[i] for i in reversed(levels)),
            "downsample_type": "resnet" if unet.resnet_updown else "conv",
            "upsample_type": "resnet" if unet.resnet_updown else "conv",
            "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
            "attn_norm_num_groups": 32 if unet.scale_shift else None,
        }
        if unet.heads > 0:
            return MultiHeadUNet2DModel(num_heads=unet.heads, **common)
        return UNet2DModel(attention_head_dim=unet.head_width, **common)


def _unet_places(unet: _Unet) -> Iterator[tuple[str, str, str]]:
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


def _unet_tensors(state: _State, model: _Model, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    raw = "model.diffusion_model."
    for theirs, ours, kind in _unet_places(model.unet):
        for suffix in state.suffixes(f"{raw}{theirs}."):
            name = f"{theirs}.{suffix}"
            value = state.take(f"{raw}{name}")
            if model.ema:
                value = state.take(names[name])
            part, _, leaf = suffix.rpartition(".")
            if kind == "resnet":
                found[f"{ours}.{_RESNET.get(part, part)}.{leaf}"] = value
            elif kind == "attention":
                found |= _attention(model.unet, ours, part, leaf, value)
            else:
                found[f"{ours}.{suffix}"] = value
    return found


def _attention(unet: _Unet, ours: str, part: str, leaf: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
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


def _first_stage(model: _Model, state: _State) -> Any:
    stage, levels = model.stage, len(model.stage.multipliers)
    scale = model.scale
    if "scale_factor" in state.left:
        scale = float(state.left["scale_factor"].reshape(-1)[0])
    elif model.scaled:
        raise InputError(f"{state.where} lacks 'scale_factor', which the YAML says was found in training")
    common: dict[str, Any] = {
        "in_channels": stage.image_channels,
        "out_channels": stage.image_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(stage.channels * m for m in stage.multipliers),
        "layers_per_block": stage.blocks,
        "latent_channels": stage.latents,
        "sample_size": stage.resolution,
        "norm_num_groups": 32,
        "scaling_factor": scale,
    }
    with _on_meta():
        if stage.codes:
            return VQModel(**common, num_vq_embeddings=stage.codes, vq_embed_dim=stage.code_width)
        return AutoencoderKL(**common)


def _first_stage_places(stage: _Stage) -> Iterator[tuple[str, str, str]]:
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


def _first_stage_tensors(state: _State, model: _Model) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for theirs, ours, kind in _first_stage_places(model.stage):
        for suffix in state.suffixes(f"first_stage_model.{theirs}."):
            value = state.take(f"first_stage_model.{theirs}.{suffix}")
            part, _, leaf = suffix.rpartition(".")
            if kind == "layer":
                found[f"{ours}.{suffix}"] = value
            elif kind == "resnet":
                found[f"{ours}.{_STAGE_RESNET.get(part, part)}.{leaf}"] = value
            else:  # 1 x 1 convolutions, there
                found[f"{ours}.{attention.get(part, part)}.{leaf}"] = value.flatten(1) if value.ndim == 4 else value
    return found


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def _filled(network: Any, tensors: Mapping[str, torch.Tensor], checkpoint: Path, config: Path) -> Any:
    """A network that was built without weights, with these."""
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in wanted.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            has = f"it has {tuple(tensors[name].shape)} there" if name in tensors else "it has none"
            raise InputError(
                f"{checkpoint} is of another architecture than {config} says: {name} should be {shape}, and {has}"
            )
    left = sorted(set(tensors) - set(wanted))
    if left:
        raise InputError(f"{checkpoint} is of another architecture than {config} says: there is no place for {left[0]}")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)
