"""Which of the published formats a checkpoint is in, as the file that was given with it says; and its conversion."""

from pathlib import Path

from diffusers import DiffusionPipeline

from ptqd.diffusion import compvis, edm, guided_diffusion
from ptqd.diffusion.compvis.checkpoint import read_checkpoint
from ptqd.diffusion.converters.flags import read_flags
from ptqd.diffusion.edm.pipeline import OWN, refuse_pickle
from ptqd.errors import InputError

_OF_GUIDED = (  # and of consistency_models
    *("image_size", "large_size", "num_channels", "num_res_blocks", "num_heads", "num_head_channels", "class_cond"),
    *("attention_resolutions", "noise_schedule", "training_mode", "learn_sigma"),
)


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
    if checkpoint.is_file():
        refuse_pickle(checkpoint)  # which says how what has to come with it is had
    if config.suffix.lower() not in (".json", ".toml"):
        return compvis.convert(checkpoint, config)
    values = read_flags(config)
    of_edm, of_guided = ([name for name in names if name in values] for names in (OWN, _OF_GUIDED))
    if of_edm and of_guided:
        raise InputError(
            f"{config}: {of_edm[0]!r} is of EDM's networks and {of_guided[0]!r} of guided-diffusion; leave "
            "those of the other project out"
        )
    if not of_edm and not of_guided:
        raise InputError(
            f"{config} may be of any project; add class_name and img_resolution for a network of EDM, image_size and "
            "num_channels for a model of guided-diffusion or consistency_models"
        )
    family = edm if of_edm else guided_diffusion
    state = read_checkpoint(checkpoint)
    return family.pipeline_from(state, values, where=str(checkpoint), described=str(config))
