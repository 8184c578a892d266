"""What a YAML of CompVis' latent diffusion says; anything in it that is not understood is an error."""

import dataclasses
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptqd.errors import InputError
from ptqd.files import read_text

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
VQ = "ldm.models.autoencoder.VQModelInterface"
KL = "ldm.models.autoencoder.AutoencoderKL"
CLASSES = "ldm.modules.encoders.modules.ClassEmbedder"
UNCONDITIONAL = "__is_unconditional__"
_SINGLE_FILE = {  # diffusers' pipelines for Stable Diffusion's classes
    "LatentDiffusion": "StableDiffusionPipeline",
    "LatentInpaintDiffusion": "StableDiffusionInpaintPipeline",
    "LatentUpscaleDiffusion": "StableDiffusionUpscalePipeline",
    "DiffusionEngine": "StableDiffusionXLPipeline",
}


@dataclass(frozen=True)
class Stage:
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
class Unet:
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
class Model:
    """What a YAML says."""

    timesteps: int
    linear_start: float
    linear_end: float
    ema: bool
    scaled: bool
    scale: float
    unet: Unet
    stage: Stage
    classes: int
    class_width: int


def read_config(path: Path) -> Model:
    """Read a YAML.

    Raises:
        InputError: it is no YAML, or has classes or options that are not known.
    """
    try:
        read = yaml.safe_load(read_text(path, " as YAML"))
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
        raise InputError(f"{path} describes no model; give the YAML that came with the checkpoint")
    _refuse_stable_diffusion(path, read["model"])
    model = _Node(path, "model", read["model"]).of(DIFFUSION)
    model.refuse_unless("parameterization", "eps", "the original predicts noise")
    model.refuse_unless("beta_schedule", "linear", "the original's")
    model.ignore("num_timesteps_cond", "log_every_t", "first_stage_key", "cond_stage_key", "monitor", "loss_type")
    model.ignore("cond_stage_trainable", "scheduler_config", "image_size", "channels", "ckpt_path")
    model.ignore("ignore_keys", "load_only_unet", "original_elbo_weight")
    model.ignore("v_posterior", "l_simple_weight", "learn_logvar", "logvar_init", "clip_denoised")
    condition = model.take("cond_stage_config", object, UNCONDITIONAL)
    _check_conditioning(model, condition != UNCONDITIONAL)
    unet = _read_unet(model.child("unet_config").of(UNET))
    stage = _read_stage(model.child("first_stage_config").of(VQ, KL))
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
    result = Model(
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
    return result


def _refuse_stable_diffusion(path: Path, model: dict[str, Any]) -> None:
    """Text goes through CLIP there, alone or as one of the embedders of a list; diffusers converts it."""
    params = model.get("params")
    conditions = [params.get("cond_stage_config"), params.get("conditioner_config")] if isinstance(params, dict) else []
    encoder = re.search(r"\w*Frozen(?:Open)?CLIP(?:Text)?Embedder\w*", str(conditions))
    pipeline = _SINGLE_FILE.get(str(model.get("target")).rpartition(".")[2])
    if encoder is None or pipeline is None:
        return
    raise InputError(
        f"{path} is of Stable Diffusion ({encoder[0]} reads its prompts), whose checkpoints diffusers converts itself: "
        f"in Python, diffusers.{pipeline}.from_single_file(CHECKPOINT, original_config={str(path)!r})"
        ".save_pretrained(FOLDER)"
    )


def _check_conditioning(model: "_Node", conditional: bool) -> None:
    """A class reaches the UNet through cross-attention, and nothing else does."""
    key, concat = model.values.pop("conditioning_key", None), model.values.pop("concat_mode", None)
    if conditional and key is None and concat:
        raise InputError(
            f"{model.path}: concat_mode: {concat!r} in model, without a conditioning_key, means that the condition is "
            "concatenated to the input; only conditioning_key: crossattn is supported"
        )
    supported = "crossattn (the class comes through the context)" if conditional else "null (no condition)"
    if key not in (None, "crossattn"):
        raise InputError(f"{model.path}: conditioning_key: {key!r} in model is not supported, only {supported}")


def _read_unet(node: "_Node") -> Unet:
    multipliers = tuple(node.take("channel_mult", list))
    required = set(node.take("attention_resolutions", list))
    transformer = node.take("use_spatial_transformer", bool, False)
    node.refuse_unless("dims", 2, "images")
    node.refuse_unless("conv_resample", True, "with convolutions")
    node.refuse_unless("num_classes", None, "classes come through the context")
    node.ignore("dropout", "use_checkpoint", "use_fp16", "legacy")
    node.refuse_unless("num_heads_upsample", -1, "as many as on the way down")
    result = Unet(
        image_size=node.take("image_size", int),
        inputs=node.take("in_channels", int),
        outputs=node.take("out_channels", int),
        channels=node.take("model_channels", int),
        multipliers=multipliers,
        blocks=node.take("num_res_blocks", int),
        attention=tuple(2**level in required for level in range(len(multipliers))),
        heads=node.take("num_heads", int, -1),
        head_width=node.take("num_head_channels", int, -1),
        context=node.take("context_dim", int, 0) if transformer else 0,
        depth=node.take("transformer_depth", int, 1),
        scale_shift=node.take("use_scale_shift_norm", bool, False),
        resnet_updown=node.take("resblock_updown", bool, False),
        new_order=node.take("use_new_attention_order", bool, False),
    )
    node.done()
    if (result.heads > 0) == (result.head_width > 0):
        raise InputError(f"{node.path}: {node.name} needs num_heads or num_head_channels, one of them")
    if result.context and (result.scale_shift or result.resnet_updown):
        raise InputError(f"{node.path}: cross-attention with use_scale_shift_norm or resblock_updown is not supported")
    return result


def _read_stage(node: "_Node") -> Stage:
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
    built.refuse_unless("use_linear_attn", False, "with full attention")
    built.refuse_unless("attn_type", "vanilla", "full attention")
    built.ignore("dropout")
    result = Stage(
        channels=built.take("ch", int),
        multipliers=tuple(built.take("ch_mult", list)),
        blocks=built.take("num_res_blocks", int),
        latents=built.take("z_channels", int),
        resolution=built.take("resolution", int),
        image_channels=built.take("in_channels", int),
        codes=codes,
        code_width=code_width,
    )
    built.refuse_unless("out_ch", result.image_channels, "as many as its input")
    built.done()
    if not quantized and code_width != result.latents:
        raise InputError(
            f"{node.path}: embed_dim {code_width} and z_channels {result.latents} differ, unsupported here"
        )
    return result


class _Node:
    """One ``target`` with its ``params``, or plain parameters; what is not asked for in the end is an error."""

    def __init__(self, path: Path, name: str, values: object) -> None:
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

    def take(self, name: str, kind: type, default: object = dataclasses.MISSING) -> Any:
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

    def refuse_unless(self, name: str, wanted: object, why: str) -> None:
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
