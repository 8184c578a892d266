"""Networks of EDM (Karras et al., arXiv 2206.00364) as diffusers pipelines.

The original pickles its networks with their code, which is not loaded; its state dict and the arguments that the
network was made with say the same (``EDMPrecond``, ``SongUNet`` and ``DhariwalUNet`` of ``training/networks.py``).
Preconditioning is the scheduler's. Every parameter is placed by name; one that is left over, missing or of another
shape is an error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler

from ptqd.diffusion.compvis.pipeline import filled
from ptqd.diffusion.converters.flags import Flags
from ptqd.diffusion.converters.tensors import Tensors
from ptqd.errors import InputError
from ptqd.files import check_readable
from ptqd.pipelines.edm_unet import EDMUNet2DModel
from ptqd.pipelines.pixel import PixelPipeline

OWN = ("img_resolution", "img_channels", "label_dim", "model_type", "class_name", "model_channels", "num_blocks")
_RESNET = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_PERSISTENT = b"_reconstruct_persistent_obj"
_FILTERS = ((1, 1), (1, 3, 3, 1))


@dataclass(frozen=True)
class Network:
    """What arguments say of a network.

    Attributes:
        arguments: of :class:`ptqd.pipelines.edm_unet.EDMUNet2DModel`.
        sigma_data: deviation of the data.
    """

    arguments: dict[str, Any]
    sigma_data: float


def pipeline_from(
    state: Mapping[str, torch.Tensor],
    arguments: Mapping[str, object],
    *,
    where: str = "the state dict",
    described: str = "the arguments",
) -> DiffusionPipeline:
    """A state dict of ``EDMPrecond``, and the arguments that it was made with, as a pipeline of diffusers.

    Args:
        state: by the original's names (``model.enc.64x64_conv.weight``, ...).
        arguments: ``class_name`` and the network's own, with the original's defaults where they are absent.
        where: the tensors come from, for messages.
        described: where the arguments come from, for messages.

    Returns:
        A :class:`ptqd.PixelPipeline` with EDM's Euler scheduler.

    Raises:
        InputError: an argument that is not known, or a parameter that is left over, missing or of another shape.
    """
    network = read_network(arguments, described)
    tensors = Tensors(state, where, described)
    try:
        with torch.device("meta"):
            empty = EDMUNet2DModel(**network.arguments)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(
            f"{described} describes a network that cannot be built: {' '.join(str(error).split())}"
        ) from error
    placed = _placed(tensors, network)
    tensors.check_empty()
    unet = filled(empty, placed, where, described)
    return PixelPipeline(unet, EDMEulerScheduler(sigma_data=network.sigma_data), network.arguments["out_channels"])


def refuse_pickle(path: Path) -> None:
    """Refuse one of EDM's own pickles, which hold the code of their network, and say how its tensors are had.

    It is known by the name of the function that would run that code (``torch_utils/persistence.py`` of the original);
    nothing of the file is unpickled.

    Raises:
        InputError: it is one.
    """
    check_readable(path)
    with path.open("rb") as file:
        beginning = file.read(1 << 16)
    if beginning[:1] != b"\x80" or _PERSISTENT not in beginning:
        return
    program = (
        "import json, pickle, torch; from pathlib import Path; "
        f"net = pickle.loads(Path({str(path)!r}).read_bytes())['ema'].cpu(); "
        f"torch.save(net.state_dict(), {str(path.with_suffix('.pt'))!r}); "
        f"Path({str(path.with_suffix('.json'))!r}).write_text("
        "json.dumps({'class_name': type(net).__name__, **net.init_kwargs}))"
    )
    raise InputError(
        f"{path} holds code beside tensors ({_PERSISTENT.decode()} of EDM's repository); it is not loaded, as that "
        "could run anything. If you trust it, make a state dict and its arguments of it in that repository: "
        f'python -c "{program}"'
    )


def read_network(arguments: Mapping[str, object], where: str) -> Network:
    """What arguments say, with the original's defaults.

    Raises:
        InputError: an argument that is not known, or a value that is not supported.
    """
    flags = Flags(arguments, where)
    name = flags.left.pop("class_name", None)
    if name is None:
        raise InputError(
            f"{where} lacks class_name, which says how the network is preconditioned; add class_name 'EDMPrecond' if "
            "it is one of EDM's own training, the only kind that is supported"
        )
    if str(name).rpartition(".")[2] != "EDMPrecond":
        raise InputError(f"{where}: class_name {name!r} is not supported, only EDMPrecond: schedulers know no other")
    kind = flags.text("model_type", "DhariwalUNet", ("SongUNet", "DhariwalUNet"))
    song = kind == "SongUNet"
    flags.ignore("dropout", "label_dropout", "use_fp16", "sigma_min", "sigma_max")
    channels, classes = flags.whole("img_channels", 3), flags.whole("label_dim", 0, 0)
    found: dict[str, Any] = {
        "model_type": kind,
        "sample_size": flags.whole("img_resolution", None),
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": classes or None,
        "model_channels": flags.whole("model_channels", 128 if song else 192),
        "channel_mult": tuple(int(m) for m in flags.numbers("channel_mult", (1, 2, 2, 2) if song else (1, 2, 3, 4))),
        "channel_mult_emb": flags.whole("channel_mult_emb", 4),
        "num_blocks": flags.whole("num_blocks", 4 if song else 3),
        "attn_resolutions": _pixels(flags, (16,) if song else (32, 16, 8)),
        "augment_dim": flags.whole("augment_dim", 0, 0),
    }
    if song:
        filters = tuple(int(t) for t in flags.numbers("resample_filter", (1, 1)))
        if filters not in _FILTERS:
            raise flags.wrong("resample_filter", "[1, 1] or [1, 3, 3, 1]", list(filters))
        flags.refuse_unless("decoder_type", "standard", "no published network has another")
        found |= {
            "channel_mult_noise": flags.whole("channel_mult_noise", 1),
            "embedding_type": flags.text("embedding_type", "positional", ("positional", "fourier")),
            "encoder_type": flags.text("encoder_type", "standard", ("standard", "residual")),
            "resample_filter": filters,
        }
    else:
        found["channels_per_head"] = flags.whole("channels_per_head", 64)
    result = Network(found, flags.number("sigma_data", 0.5))
    flags.done(f"EDM's {kind}")
    if found["sample_size"] % 2 ** (len(found["channel_mult"]) - 1):
        raise InputError(
            f"{where}: {found['sample_size']} pixels cannot be halved {len(found['channel_mult']) - 1} times, once "
            "between levels"
        )
    return result


def _pixels(flags: Flags, default: tuple[int, ...]) -> tuple[int, ...]:
    """The resolutions that attend; none is said by an empty list."""
    if flags.left.get("attn_resolutions", default) == []:
        flags.ignore("attn_resolutions")
        return ()
    return tuple(int(p) for p in flags.numbers("attn_resolutions", default))


def _places(network: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Names in the original, here, and of the attention that may follow there."""
    song, blocks, levels = network["model_type"] == "SongUNet", network["num_blocks"], len(network["channel_mult"])
    sizes = [f"{network['sample_size'] >> level}x{network['sample_size'] >> level}" for level in range(levels)]
    yield "map_layer0", "time_embedding.linear_1", ""
    yield "map_layer1", "time_embedding.linear_2", ""
    yield f"enc.{sizes[0]}_conv", "conv_in", ""
    for level, size in enumerate(sizes):
        for j in range(blocks):
            place = f"down_blocks.{level}"
            yield f"enc.{size}_block{j}", f"{place}.resnets.{j}", f"{place}.attentions.{j}"
        if level + 1 < levels:
            yield f"enc.{sizes[level + 1]}_down", f"down_blocks.{level}.downsamplers.0", ""
            yield f"enc.{sizes[level + 1]}_aux_residual", f"down_blocks.{level}.residuals.0.conv", ""
    yield f"dec.{sizes[-1]}_in0", "mid_block.resnets.0", "mid_block.attentions.0"
    yield f"dec.{sizes[-1]}_in1", "mid_block.resnets.1", ""
    for up, level in enumerate(reversed(range(levels))):
        for j in range(blocks + 1):
            place = f"up_blocks.{up}"
            yield f"dec.{sizes[level]}_block{j}", f"{place}.resnets.{j}", f"{place}.attentions.{j}"
        if level > 0:
            yield f"dec.{sizes[level - 1]}_up", f"up_blocks.{up}.upsamplers.0", ""
    yield (f"dec.{sizes[0]}_aux_norm" if song else "out_norm"), "conv_norm_out", ""
    yield (f"dec.{sizes[0]}_aux_conv" if song else "out_conv"), "conv_out", ""


def _placed(tensors: Tensors, network: Network) -> dict[str, torch.Tensor]:
    """The tensors by our names."""
    arguments = network.arguments
    result: dict[str, torch.Tensor] = {}
    for theirs, ours, attention in _places(arguments):
        for suffix, value in tensors.take_all(f"model.{theirs}.").items():
            part, _, leaf = suffix.rpartition(".")
            if leaf == "resample_filter":
                _check_filter(tensors.where, f"model.{theirs}.{suffix}", value, arguments)
            elif part in _RESNET:
                result[f"{ours}.{_RESNET[part]}.{leaf}"] = value
            elif part == "qkv":
                names = zip(("to_q", "to_k", "to_v"), _interleaved(value), strict=True)
                result |= {f"{attention}.{name}.{leaf}": rows for name, rows in names}
            elif part in ("norm2", "proj"):
                name = {"norm2": "group_norm", "proj": "to_out.0"}[part]
                result[f"{attention}.{name}.{leaf}"] = value.flatten(1) if value.ndim > 2 else value
            else:
                result[f"{ours}.{suffix}"] = value
    if arguments.get("embedding_type") == "fourier":
        result["time_proj.freqs"] = tensors.take("model.map_noise.freqs")
    if arguments["num_class_embeds"] is not None:
        result["class_embedding.weight"] = tensors.take("model.map_label.weight").T  # a matrix for one-hot labels
        if arguments["model_type"] == "SongUNet":
            result["class_bias"] = tensors.take("model.map_label.bias")
    if arguments["augment_dim"]:
        result["augment_weight"] = tensors.take("model.map_augment.weight")
    return result


def _interleaved(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, which take turns in the rows of one layer (``UNetBlock.forward``)."""
    return tuple((value.flatten(1) if value.ndim > 2 else value)[k::3] for k in range(3))


def _check_filter(where: str, name: str, value: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """The constants that resampling was trained with are those that are asked for.

    Raises:
        InputError: they are others.
    """
    taps = torch.tensor(arguments.get("resample_filter", (1, 1)), dtype=torch.float32)
    wanted = torch.outer(taps, taps) / taps.sum() ** 2
    fits = value.shape[-2:] == wanted.shape and value.numel() == wanted.numel()
    if not fits or (not value.is_meta and not torch.allclose(value.float().reshape(wanted.shape), wanted, rtol=1e-2)):
        raise InputError(f"{where}: {name} is no filter of resample_filter {taps.int().tolist()}; say the one it has")
