"""What the command lines of guided-diffusion and consistency_models say about a model; defaults as there.

``guided_diffusion/script_util.py`` and ``cm/script_util.py`` of the originals: ``model_and_diffusion_defaults``,
``sr_model_and_diffusion_defaults``, ``create_model``, ``sr_create_model`` and ``create_gaussian_diffusion``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ptqd.diffusion.converters.flags import Flags
from ptqd.errors import InputError

_MULTIPLIERS = {  # by pixels
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
_UPSAMPLER = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}
_OF_GUIDED = (
    *("noise_schedule", "diffusion_steps", "timestep_respacing", "use_ddim", "use_kl", "predict_xstart"),
    *("rescale_timesteps", "rescale_learned_sigmas", "large_size", "small_size"),
)
_OF_CONSISTENCY = (
    *("training_mode", "weight_schedule", "sigma_min", "sigma_max", "sampler", "ts", "steps", "loss_norm"),
    *("target_ema_mode", "scale_mode", "generator", "s_churn", "s_tmin", "s_tmax", "s_noise"),
)
_IGNORED = (  # of training, of one run, or without a meaning for the outputs
    *("dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "batch_size", "num_samples"),
    *("model_path", "base_samples", "data_dir", "schedule_sampler", "lr", "weight_decay", "lr_anneal_steps"),
    *("microbatch", "ema_rate", "log_interval", "save_interval", "resume_checkpoint", "fp16_scale_growth", "seed"),
    *("global_batch_size", "out_dir"),
)
_IGNORED_OF_CONSISTENCY = (
    *("weight_schedule", "loss_norm", "target_ema_mode", "scale_mode", "start_ema", "start_scales", "end_scales"),
    *("total_training_steps", "distill_steps_per_iter", "teacher_model_path", "teacher_dropout"),
    *("sampler", "ts", "generator", "s_churn", "s_tmin", "s_tmax", "s_noise"),
)
CONSISTENCY_MODES = ("consistency_distillation", "consistency_training")


@dataclass(frozen=True)
class Gaussian:
    """A diffusion process of guided-diffusion.

    Attributes:
        steps: that were trained.
        schedule: of the betas.
        predict_start: the network tells the clean image, not the noise.
        learned_variance: it tells the variance too, in channels of their own.
        clip: the clean image is clipped to [-1, 1] at each step.
        ddim: sampled by DDIM, not by DDPM.
        every: the grid of steps begins at 0 and has one stride ("ddim25"); else it goes from the first step to the last
            ("25").
    """

    steps: int
    schedule: Literal["linear", "cosine"]
    predict_start: bool
    learned_variance: bool
    clip: bool
    ddim: bool
    every: bool


@dataclass(frozen=True)
class Karras:
    """A process of consistency_models.

    Attributes:
        consistent: the model is a consistency model; else it is the teacher of one, a denoiser of EDM.
        steps: of the grid that a consistency model's timesteps count.
        sigma_min: the least noise.
        sigma_max: the most.
        sigma_data: deviation of the data.
        clip: the clean image is clipped to [-1, 1] at each step.
    """

    consistent: bool
    steps: int
    sigma_min: float
    sigma_max: float
    sigma_data: float
    clip: bool


@dataclass(frozen=True)
class Options:
    """What is said of a network and its process.

    Attributes:
        image_size: pixels of what it makes.
        small_size: pixels of the image that it enlarges; 0: it enlarges none.
        channels: width that the levels' are multiples of.
        multipliers: each level's.
        blocks: residual blocks of a level.
        attention: whether each level attends.
        heads: of every attention layer, where ``head_width`` is 0.
        head_width: of a head; 0: as wide as ``heads`` make it.
        scale_shift: the time embedding scales and shifts, instead of being added.
        resnet_updown: resampling is part of a residual block.
        new_order: rows of queries, keys and values are all queries first, not head by head.
        classes: the network is told a class.
        process: that it was trained on.
    """

    image_size: int
    small_size: int
    channels: int
    multipliers: tuple[float, ...]
    blocks: int
    attention: tuple[bool, ...]
    heads: int
    head_width: int
    scale_shift: bool
    resnet_updown: bool
    new_order: bool
    classes: bool
    process: Gaussian | Karras

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(int(m * self.channels) for m in self.multipliers)


def is_consistency(values: Mapping[str, object], where: str) -> bool:
    """Whether options are of consistency_models, not of guided-diffusion, whose names they share for the most part.

    Raises:
        InputError: they may be of either, or are of both.
    """
    guided, consistent = ([name for name in names if name in values] for names in (_OF_GUIDED, _OF_CONSISTENCY))
    if guided and consistent:
        raise InputError(
            f"{where}: {guided[0]!r} is an option of guided-diffusion and {consistent[0]!r} one of consistency_models; "
            "leave those of the other project out"
        )
    if not guided and not consistent:
        raise InputError(
            f"{where} may be of guided-diffusion or of consistency_models; add noise_schedule (linear or cosine) for a "
            "model of the first, training_mode (consistency_distillation, consistency_training or edm) for one of the "
            "second"
        )
    return bool(consistent)


def read_options(values: Mapping[str, object], where: str) -> Options:
    """What flags say, with the defaults of their project.

    Raises:
        InputError: a flag that is not known, a value that is not supported, or flags of neither project or of both.
    """
    consistent = is_consistency(values, where)
    flags = Flags(values, where)
    _refuse_classifier(flags)
    flags.ignore(*_IGNORED, *(_IGNORED_OF_CONSISTENCY if consistent else ()))
    upsampler = "large_size" in flags or "small_size" in flags
    if upsampler:
        size, small = flags.whole("large_size", 256), flags.whole("small_size", 64)
        flags.refuse_unless("image_size", size, "an upsampler's is large_size")
        if small > size:
            raise InputError(f"{where}: small_size {small} is larger than large_size {size}")
    else:
        size, small = flags.whole("image_size", 64), 0
    multipliers = _multipliers(flags, size, _UPSAMPLER if upsampler else _MULTIPLIERS)
    if size % 2 ** (len(multipliers) - 1):
        raise InputError(f"{where}: {size} pixels cannot be halved {len(multipliers) - 1} times, once between levels")
    pixels = flags.numbers("attention_resolutions", (32, 16, 8) if consistent else (16, 8))
    factors = {size // int(p) for p in pixels}  # of downsampling, as the original counts
    learned = flags.yes("learn_sigma", False)
    process = _karras(flags, learned) if consistent else _gaussian(flags, learned)
    heads, head_width = flags.whole("num_heads", 4), flags.whole("num_head_channels", -1, -1)
    on_the_way_up = flags.whole("num_heads_upsample", -1, -1)
    if head_width < 1 and on_the_way_up not in (-1, heads):
        raise InputError(
            f"{where}: num_heads_upsample {on_the_way_up} is not supported, only num_heads ({heads}) or -1"
        )
    result = Options(
        image_size=size,
        small_size=small,
        channels=flags.whole("num_channels", 128),
        multipliers=multipliers,
        blocks=flags.whole("num_res_blocks", 2),
        attention=tuple(2**level in factors for level in range(len(multipliers))),
        heads=heads,
        head_width=max(head_width, 0),
        scale_shift=flags.yes("use_scale_shift_norm", True),
        resnet_updown=flags.yes("resblock_updown", False),
        new_order=flags.yes("use_new_attention_order", False),
        classes=flags.yes("class_cond", False),
        process=process,
    )
    flags.done("consistency_models" if consistent else "guided-diffusion")
    _check_widths(result, where)
    return result


def _refuse_classifier(flags: Flags) -> None:
    named = next((name for name in flags.left if name.startswith("classifier_")), None)
    if named is not None:
        raise InputError(
            f"{flags.where}: {named!r} is of a classifier that guides sampling, which is no part of the pipeline; "
            "leave the classifier_ options out to convert the diffusion model alone"
        )


def _multipliers(flags: Flags, size: int, known: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
    if flags.left.get("channel_mult", "") != "":
        return flags.numbers("channel_mult", None, whole=False)
    flags.ignore("channel_mult")
    if size not in known:
        sizes = ", ".join(map(str, sorted(known)))
        raise InputError(
            f"{flags.where}: the originals know {sizes} pixels, not {size}; say channel_mult, such as '1,2,4'"
        )
    return known[size]


def _gaussian(flags: Flags, learned: bool) -> Gaussian:
    steps = flags.whole("diffusion_steps", 1000)
    if steps != 1000:
        flags.refuse_unless("rescale_timesteps", False, "with 1000 steps alone timesteps stay what they are")
    flags.ignore("rescale_timesteps")
    ddim = flags.yes("use_ddim", False)
    respacing = flags.left.pop("timestep_respacing", "")
    respacing = str(respacing) if type(respacing) is int else respacing
    if not isinstance(respacing, str) or not re.fullmatch(r"(ddim)?[1-9][0-9]*|", respacing):
        wanted = "a number of steps such as '250', 'ddim25' or '' (sections are not supported)"
        raise flags.wrong("timestep_respacing", wanted, respacing)
    schedule: Literal["linear", "cosine"] = "linear"
    if flags.text("noise_schedule", "linear", ("linear", "cosine")) == "cosine":
        schedule = "cosine"
    return Gaussian(
        steps=steps,
        schedule=schedule,
        predict_start=flags.yes("predict_xstart", False),
        learned_variance=learned,
        clip=flags.yes("clip_denoised", True),
        ddim=ddim,
        every=respacing.startswith("ddim") or (ddim and not respacing),
    )


def _karras(flags: Flags, learned: bool) -> Karras:
    if learned:
        raise InputError(f"{flags.where}: learn_sigma is not supported for consistency_models, which has no use for it")
    mode = flags.text("training_mode", CONSISTENCY_MODES[0], (*CONSISTENCY_MODES, "edm"))
    result = Karras(
        consistent=mode != "edm",
        steps=flags.whole("steps", 40, 2),
        sigma_min=flags.number("sigma_min", 0.002),
        sigma_max=flags.number("sigma_max", 80.0),
        sigma_data=flags.number("sigma_data", 0.5),
        clip=flags.yes("clip_denoised", True),
    )
    if result.sigma_min >= result.sigma_max:
        raise InputError(f"{flags.where}: sigma_min {result.sigma_min:g} is not below sigma_max {result.sigma_max:g}")
    return result


def _check_widths(options: Options, where: str) -> None:
    """Norms have 32 groups, and heads divide the width of what they attend over."""
    for level, width in enumerate(options.widths):
        if width % 32:
            raise InputError(
                f"{where}: level {level} has {width} channels (num_channels {options.channels} times "
                f"{options.multipliers[level]:g}), which 32 groups of a norm do not divide"
            )
        attends = options.attention[level] or level == len(options.widths) - 1
        if attends and width % (options.head_width or options.heads):
            named = f"num_head_channels {options.head_width}" if options.head_width else f"num_heads {options.heads}"
            raise InputError(f"{where}: {named} does not divide the {width} channels of level {level}")
