"""Load a pipeline: embedded, from a folder, or from the hub; quantized and corrected ones included."""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import CONFIG_NAME
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn

from ptqd import zoo
from ptqd.correction.scheduler import CorrectedStep, connect, corrected_class
from ptqd.diffusion.fingerprints import activation_bits_of
from ptqd.diffusion.pipeline_parts import DENOISERS, with_components
from ptqd.engines.module import EngineModule
from ptqd.errors import ArtifactError, InputError, PtqdError, lack_of, raised_by
from ptqd.files import DTYPES, read_json
from ptqd.outputs import finish
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline
from ptqd.pipelines.module import ModulePipeline, network_for_loading
from ptqd.pipelines.pixel import PixelPipeline
from ptqd.quantization.apply_plan import plan_of
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.weights_in_memory import Weights, check_weights_kind, loading_weights_as

_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".pkl", ".bin", ".safetensors")
_FLOATS = (".weight", ".bias")
_OURS = {kind.__name__: kind for kind in (LatentPipeline, LatentClassPipeline, ModulePipeline, PixelPipeline)}


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    network: nn.Module | None = None,
    weights: Weights = "auto",
) -> DiffusionPipeline:
    """Load a pipeline that samples.

    Args:
        model: the name of an embedded model (``"fashion-ldm"``), a diffusers folder (also one that ptqd saved),
            or a hub id.
        dtype: of the floating-point weights; where it is not said, the one that a pipeline which ptqd quantized is
            stored in, and float32 of any other.
        variant: of the weights' files, such as ``"fp16"``; where a folder has one only, it need not be said.
        network: of a pipeline that :func:`ptqd.from_module` made, whose folder does not have the network's code; a copy
            of it gets the folder's weights.
        weights: what a quantized denoiser holds: ``"codes"`` alone, ``"floats"`` beside them, or ``"auto"``, codes
            where the floats would take 256 MiB or more; see :func:`ptqd.keep_weights`.

    Raises:
        InputError: there is no such folder, it is no pipeline, or a file in it is damaged; or another kind of weights.
    """
    check_weights_kind(weights)
    if not str(model):
        raise InputError("the name of the model is empty; is a variable unset?")
    if str(model) in zoo.MODELS:
        model = zoo.MODELS[str(model)]
    folder = Path(model)
    local = folder.exists() or folder.is_absolute() or str(model).count("/") != 1 or str(model).startswith(".")
    pipeline_class: Any = DiffusionPipeline
    index = folder / "model_index.json"
    if local:
        if not folder.is_dir():
            known = ", ".join(zoo.MODELS)
            remedy = conversion(folder) or f"give a diffusers pipeline's folder, a hub id, or one of: {known}"
            raise InputError(f"{model} is no folder; {remedy}")
        if not index.is_file():
            remedy = conversion(folder) or "save one with save_pretrained"
            raise InputError(f"{folder} is no diffusers pipeline: it has no model_index.json; {remedy}")
        finish(folder)
        pipeline_class = _class_in(index)
    elif (fetched := _fetched_index(str(model))) is not None:
        index = fetched
        pipeline_class = _class_in(index)
        if _has_own_parts(index) or _is_quantized(str(model), index):  # which diffusers would not fetch, or not whole
            folder, local = _fetched(str(model)), True
    dtype = dtype or (stored_dtype(folder) if local else None) or torch.float32
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger(pipeline_utils.__name__).addFilter(_expected)
    try:
        named = variant or (_only_variant(folder) if local else None)
        with network_for_loading(network), loading_weights_as(weights):
            pipe = _from_pretrained(pipeline_class, folder if local else str(model), dtype, named)
    except PtqdError:
        raise
    except Exception as error:  # a file that is damaged, or edited by hand, fails in any way
        if raised_by(error, "ptqd") or lack_of(error) is not None:
            raise
        reason = " ".join(str(error).split())
        if not local:
            raise InputError(f"{model} is no folder, and the hub gives no pipeline of that name: {reason}") from error
        raise ArtifactError(f"{model} cannot be loaded as a pipeline: {reason}") from error
    finally:
        logging.getLogger(pipeline_utils.__name__).removeFilter(_expected)
        diffusers.utils.logging.enable_progress_bar()
    _check_complete(pipe, model)
    _keep_labels(pipe, index)
    _check_plan_file(pipe, folder / "plan.toml")
    return _keep_correction(pipe, model)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The type that the weights of a pipeline, or a denoiser, which ptqd quantized are stored in; None of any other.

    It is the commonest among weights and biases that are no codes; ranges are float32 whatever the others are.
    """
    kinds = Counter[torch.dtype]()
    for config in (folder / CONFIG_NAME, *folder.glob(f"*/{CONFIG_NAME}")):
        if _is_ptqds(config):
            for path in config.parent.glob("*.safetensors"):
                kinds.update(_float_types(path))
    return kinds.most_common(1)[0][0] if kinds else None


def _is_ptqds(config: Path) -> bool:
    """Whether a network's configuration says that ptqd quantized it; a damaged one is for who loads it to name."""
    try:
        facts = read_json(config).get("quantization_config")
    except (InputError, AttributeError):
        return False
    return isinstance(facts, dict) and facts.get("quant_method") == "ptqd"


def _float_types(path: Path) -> list[torch.dtype]:
    """The types of a file's weights and biases that are floats; none of a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            kinds = [file.get_slice(name).get_dtype() for name in file.offset_keys() if name.endswith(_FLOATS)]
    except (OSError, SafetensorError):
        return []
    return [DTYPES[kind] for kind in kinds if kind in DTYPES and DTYPES[kind].is_floating_point]


def conversion(path: Path) -> str | None:
    """How a checkpoint becomes a pipeline, of its file or of a folder with one; None of anything else."""
    of_diffusers = any((path / name).is_file() for name in ("model_index.json", "config.json"))
    inside = sorted(path.iterdir()) if path.is_dir() and not of_diffusers else [path]
    checkpoint = next((file for file in inside if file.suffix in _CHECKPOINTS and file.is_file()), None)
    if checkpoint is None:
        return None
    return (
        f"{checkpoint} is a checkpoint; make a pipeline of it: of latent diffusion's with 'ptqd convert {checkpoint} "
        "CONFIG.yaml FOLDER', of guided-diffusion's, consistency_models' or EDM's with OPTIONS.json "
        "instead, of Stable Diffusion's in Python with diffusers.StableDiffusionPipeline.from_single_file"
        f"({str(checkpoint)!r}).save_pretrained(FOLDER)"
    )


def _from_pretrained(kind: Any, model: str | Path, dtype: torch.dtype, variant: str | None) -> DiffusionPipeline:
    """A pipeline; of a hub id that has weights in half precision alone, these."""
    try:
        pipe: DiffusionPipeline = kind.from_pretrained(model, dtype=dtype, variant=variant)
    except (OSError, ValueError) as error:
        if isinstance(model, Path) or variant is not None or "fp16" not in str(error):
            raise
        pipe = kind.from_pretrained(model, dtype=dtype, variant="fp16")
    return pipe


def _only_variant(folder: Path) -> str | None:
    """The variant that all the weights in a folder's parts are of; None where some are of none, or of several."""
    files = [path for kind in ("safetensors", "bin") for path in folder.glob(f"*/*.{kind}")]
    middles = {re.sub(r"-[0-9]+-of-[0-9]+", "", path.name).split(".")[1] for path in files}  # or the ending, of none
    only = middles.pop() if len(middles) == 1 else "bin"
    return None if only in ("safetensors", "bin") else only


def _class_in(index: Path) -> type[DiffusionPipeline]:
    """The class that loads a pipeline: ours, or diffusers' own, which finds the others.

    Raises:
        InputError: the file is damaged.
    """
    try:
        name = read_json(index)["_class_name"]
    except (InputError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index} is damaged ({error}); save the pipeline again") from error
    name = name[-1] if isinstance(name, list) and name else name  # of a pipeline with code of its own
    kind: Any = _OURS.get(name, DiffusionPipeline) if isinstance(name, str) else DiffusionPipeline
    return kind  # type: ignore[no-any-return]


def _fetched_index(model: str) -> Path | None:
    """A hub id's ``model_index.json``, fetched or from the cache; None where diffusers has to say what is wrong."""
    try:
        return Path(hf_hub_download(model, "model_index.json"))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def _is_quantized(model: str, index: Path) -> bool:
    """Whether a denoiser of a hub id was quantized by ptqd."""
    values = read_json(index)
    names = [name for first in DENOISERS for name in (first, f"{first}_2")]
    for name in names if isinstance(values, dict) else ():
        if values.get(name):
            try:
                if _is_ptqds(Path(hf_hub_download(model, f"{name}/{CONFIG_NAME}"))):
                    return True
            except (OSError, ValueError, HfHubHTTPError):  # for diffusers to say
                continue
    return False


def _has_own_parts(index: Path) -> bool:
    """Whether components are of ptqd's classes: engines, schedulers that correct, embedders."""
    values = read_json(index)
    parts = values.values() if isinstance(values, dict) else ()
    return any(isinstance(part, list) and str(part[0]).split(".")[0] == "ptqd" for part in parts if part)


def _fetched(model: str) -> Path:
    """All files of a hub id, fetched or from the cache.

    Raises:
        InputError: they cannot be had.
    """
    try:
        return Path(snapshot_download(model))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{model} cannot be fetched: {' '.join(str(error).split())}") from error


def _keep_labels(pipe: DiffusionPipeline, index: Path) -> None:
    """DiT's pipeline knows its classes' names only if ``model_index.json`` has them, and does not write them again."""
    if isinstance(pipe, DiTPipeline) and index.is_file() and "id2label" not in pipe.config:
        names = read_json(index).get("id2label")
        if names:
            pipe.register_to_config(id2label={int(number): name for number, name in names.items()})


def _expected(record: logging.LogRecord) -> bool:
    """Not what diffusers says of a network that an engine runs: that it is no network of its own."""
    return EngineModule.__name__ not in record.getMessage()


def _check_complete(pipe: DiffusionPipeline, model: str | Path) -> None:
    """Refuse a file that lacked some of a network's tensors."""
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            missing = [key for key, value in component.state_dict().items() if value.is_meta]
            if missing:
                raise ArtifactError(
                    f"{model}: the file of {name} lacks {missing[0]!r}; it is damaged or of another model"
                )


def _keep_correction(pipe: DiffusionPipeline, model: str | Path) -> DiffusionPipeline:
    """Some pipelines, DDIM's for one, make a plain scheduler from the one they are given; here it corrects again."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or "correction" not in scheduler.config:
        return pipe
    if not isinstance(scheduler, CorrectedStep):
        corrected = corrected_class(type(scheduler))  # type: ignore[arg-type]  # classes are hashable
        if DiffusionPipeline.load_config(model)["scheduler"][1] != corrected.__name__:
            return pipe
        pipe.register_modules(scheduler=corrected.from_config(scheduler.config))
    measured, bits = pipe.scheduler.correction.measured_on, activation_bits_of(pipe)
    if measured.quantized is not None and measured.activation_bits != bits:  # a plan can have been edited since
        raise InputError(
            f"{model}: the plan was changed after the correction was measured; apply it to the uncorrected pipeline "
            "(ptqd plan --plan FILE), measure that, and correct it"
        )
    return connect(pipe)


def _check_plan_file(pipe: DiffusionPipeline, path: Path) -> None:
    """A plan.toml beside a pipeline says what its configuration says; one that was edited has to be applied."""
    if path.is_file() and PrecisionPlan.load(path) != plan_of(pipe):
        raise InputError(
            f"{path} is not the plan of the pipeline; apply it with 'ptqd plan --plan FILE', or edit the plan in the "
            "denoiser's config.json"
        )


def with_scheduler(pipe: DiffusionPipeline, name: str | None) -> DiffusionPipeline:
    """A pipeline with another scheduler of diffusers, of its own's configuration; the same where there is no name.

    Raises:
        InputError: diffusers has none of that name.
    """
    scheduler: Any = scheduler_class(name)
    if scheduler is None:
        return pipe
    make: Any = scheduler.from_config
    return with_components(pipe, scheduler=make(pipe.scheduler.config))


def scheduler_class(name: str | None) -> type | None:
    """A scheduler of diffusers by its name; None of None.

    Raises:
        InputError: diffusers has none of that name.
    """
    if name is None:
        return None
    scheduler: Any = getattr(diffusers, name, None)
    if not isinstance(scheduler, type) or diffusers.SchedulerMixin not in scheduler.__mro__:
        raise InputError(f"diffusers has no scheduler {name!r}; name one such as DDIMScheduler or DDPMScheduler")
    return scheduler


def check_device(device: str | None, *, offload: bool = False) -> None:
    """Refuse a device that torch does not know, or that this machine lacks.

    Args:
        device: none for the :func:`best_device`, which is there.
        offload: models are to be offloaded from it; there is nothing to offload to from the CPU.

    Raises:
        InputError: so it is.
    """
    device = device or best_device()
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if lack_of(error) is not None:
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {device!r} cannot be used: {reason}; take cuda, mps or cpu") from error
    if offload and torch.device(device).type == "cpu":
        raise InputError(
            "offloading is for a GPU that is too small, and this would run on the CPU; leave offload out: weights are "
            "mapped from their files there, where they are loaded in the type that they are stored in"
        )


def place(pipe: DiffusionPipeline, device: str | torch.device, *, offload: bool = False) -> DiffusionPipeline:
    """A pipeline on a device, or offloaded from it: its models are brought there one at a time, when they compute.

    Args:
        pipe: changed itself.
        device: where it computes.
        offload: keep its models in memory between their calls (diffusers' ``enable_model_cpu_offload``).

    Raises:
        InputError: a pipeline that cannot be offloaded, or not from there.
    """
    if not offload:
        return pipe.to(device)
    check_device(str(device), offload=True)
    try:
        pipe.enable_model_cpu_offload(device=device)
    except ValueError as error:
        raise InputError(f"{type(pipe).__name__} cannot be offloaded: {error}") from error
    return pipe


def best_device() -> str:
    """``"cuda"``, ``"mps"`` or ``"cpu"``, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
