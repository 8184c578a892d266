"""Which of the published formats a checkpoint is in, as the file that was given with it says; and its conversion."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ptqd.diffusion import compvis, edm, guided_diffusion
from ptqd.diffusion.compvis.checkpoint import read_checkpoint
from ptqd.diffusion.converters.flags import read_flags
from ptqd.diffusion.edm.pipeline import OWN, how_to_unpickle
from ptqd.errors import InputError

_OF_GUIDED = ("image_size", "large_size", "num_channels", "num_res_blocks", "attention_resolutions", "class_cond")


def convert(checkpoint: Path, config: Path) -> DiffusionPipeline:
    """A published checkpoint as a pipeline of diffusers.

    Args:
        checkpoint: a state dict, as ``torch.save`` or safetensors wrote it; of CompVis the ``.ckpt`` around it.
        config: what came with it: CompVis' YAML; the flags of guided-diffusion or consistency_models, or the arguments
            of EDM's network, as JSON or TOML.

    Raises:
        InputError: a file that is missing, truncated or holds code; options that are not known, or that do not say of
            which project they are; or a parameter that is left over, missing or of another shape.
    """
    if checkpoint.suffix == ".pkl" and not config.exists():
        _read(checkpoint, of_edm=True)  # which says how its arguments are had
    if config.suffix.lower() not in (".json", ".toml"):
        return compvis.convert(checkpoint, config)
    values = read_flags(config)
    of_edm, of_guided = ([name for name in names if name in values] for names in (OWN, _OF_GUIDED))
    if of_edm and of_guided:
        raise InputError(
            f"{config}: {of_edm[0]!r} is of EDM's networks and {of_guided[0]!r} of guided-diffusion; leave those of the "
            "other project out"
        )
    if not of_edm and not of_guided:
        raise InputError(
            f"{config} may be of any project; add class_name and img_resolution for a network of EDM, image_size and "
            "num_channels for a model of guided-diffusion or consistency_models"
        )
    family = edm if of_edm else guided_diffusion
    state = _read(checkpoint, of_edm=bool(of_edm))
    return family.pipeline_from(state, values, where=str(checkpoint), described=str(config))


def _read(checkpoint: Path, *, of_edm: bool) -> dict[str, torch.Tensor]:
    """A checkpoint's state dict.

    Raises:
        InputError: as :func:`ptqd.diffusion.compvis.checkpoint.read_checkpoint`; of EDM's pickles with the remedy.
    """
    try:
        return read_checkpoint(checkpoint)
    except InputError as error:
        named = re.search(r" holds (\S+) beside tensors and plain containers", str(error))
        if named is None or not (of_edm or named[1].startswith(("torch_utils.", "dnnlib."))):
            raise
        raise InputError(f"{error}; {how_to_unpickle(checkpoint)}") from error
