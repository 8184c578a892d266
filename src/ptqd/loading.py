"""Load a pipeline: embedded, from a folder, or from the hub; quantized and corrected ones included."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

import ptqd.quantization  # noqa: F401  (registers what saved pipelines refer to)
from ptqd import zoo
from ptqd.components import activation_bits, denoiser_name
from ptqd.correction.scheduler import CorrectedStep, corrected_class
from ptqd.errors import InputError, PtqdError
from ptqd.pipelines.latent_class import LatentClassPipeline


def load(model: str | Path, *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a pipeline that samples.

    Args:
        model: the name of an embedded model (``"fashion-ldm"``), a diffusers folder (also one that ptqd saved),
            or a hub id.
        dtype: of the floating-point weights.

    Raises:
        InputError: there is no such folder, it is no pipeline, or a file in it is damaged.
    """
    if str(model) in zoo.MODELS:
        model = zoo.MODELS[str(model)]
    folder = Path(model)
    local = folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith(".")
    pipeline_class = DiffusionPipeline
    if local:
        index = folder / "model_index.json"
        if not folder.is_dir():
            known = ", ".join(zoo.MODELS)
            raise InputError(f"{model} is no folder; give a diffusers pipeline's folder, a hub id, or one of: {known}")
        if not index.is_file():
            raise InputError(
                f"{folder} is no diffusers pipeline: it has no model_index.json; save one with save_pretrained"
            )
        try:
            name = json.loads(index.read_text("utf-8"))["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index} is damaged ({error}); save the pipeline again") from error
        if name == LatentClassPipeline.__name__:
            pipeline_class = LatentClassPipeline
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = pipeline_class.from_pretrained(folder if local else str(model), dtype=dtype)
    except PtqdError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        raise InputError(f"{model} cannot be loaded as a pipeline: {' '.join(str(error).split())}") from error
    finally:
        diffusers.utils.logging.enable_progress_bar()
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            missing = [key for key, value in component.state_dict().items() if value.is_meta]
            if missing:
                raise InputError(f"{model}: the file of {name} lacks {missing[0]!r}; it is damaged or of another model")
    _keep_correction(pipe, model)
    return pipe


def _keep_correction(pipe: DiffusionPipeline, model: str | Path) -> None:
    """Some pipelines, DDIM's for one, make a plain scheduler from the one they are given; here it corrects again."""
    scheduler = getattr(pipe, "scheduler", None)
    if isinstance(scheduler, CorrectedStep):
        _check_bits(pipe, scheduler.correction.source, model)
        scheduler.belongs_to(pipe)
    if scheduler is None or isinstance(scheduler, CorrectedStep) or "correction" not in scheduler.config:
        return
    corrected = corrected_class(type(scheduler))  # type: ignore[arg-type]  # classes are hashable
    if DiffusionPipeline.load_config(model)["scheduler"][1] == corrected.__name__:
        pipe.register_modules(scheduler=corrected.from_config(scheduler.config))
        _check_bits(pipe, pipe.scheduler.correction.source, model)
        pipe.scheduler.belongs_to(pipe)


def _check_bits(pipe: DiffusionPipeline, source: Mapping[str, Any], model: str | Path) -> None:
    """A correction is of the bits it was measured at; a plan can have been edited since."""
    bits = activation_bits(getattr(pipe, denoiser_name(pipe)))
    if source.get("activation_bits", bits) != bits:
        raise InputError(
            f"{model}: the plan was changed after the correction was measured; apply it to the uncorrected pipeline "
            "(ptqd plan --plan FILE), measure that, and correct it"
        )


def best_device() -> str:
    """``"cuda"``, ``"mps"`` or ``"cpu"``, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
