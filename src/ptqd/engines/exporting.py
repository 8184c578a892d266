"""A pipeline for an engine: its networks as graphs, in a diffusers folder that loads and runs like any other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ptqd.components import denoiser_name, with_components
from ptqd.engines.graph import Products, captured, trace
from ptqd.engines.module import EngineModule, write_component
from ptqd.engines.sessions import ENGINES
from ptqd.errors import InputError
from ptqd.files import replacing
from ptqd.sampling import Sampling

DECODERS, ENCODERS = ("vae", "vqvae"), ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        pipeline: its networks run in the engine.
        products: what of the denoiser is computed how.
        components: names of all components that the engine runs.
    """

    pipeline: DiffusionPipeline
    products: Products
    components: tuple[str, ...]


def export(pipe: DiffusionPipeline, run: Sampling, engine: str, folder: Path, *, others: bool = True) -> Exported:
    """Write a pipeline whose networks an engine runs, as a diffusers folder; :func:`ptqd.load` loads it again.

    The denoiser carries exactly its codes, scales and zero points, and follows its plan; a scheduler that corrects goes
    on to. Decoders and text encoders are in full precision.

    Args:
        pipe: quantized by ptqd, or in full precision.
        run: how it samples: its calls show what the networks are given.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        folder: written over.
        others: export decoders and text encoders too.

    Raises:
        InputError: a network that cannot be traced, number formats or operators that the engine lacks, or an engine that
            is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    name = denoiser_name(pipe)
    wanted = [(name, "forward")]
    if others:
        wanted += [(n, "decode") for n in DECODERS if _is_ours(getattr(pipe, n, None))]
        wanted += [(n, "forward") for n in ENCODERS if _is_ours(getattr(pipe, n, None))]
    with replacing(folder) as temporary:
        made: dict[str, Any] = {}
        for component, method in wanted:
            model = getattr(pipe, component)
            call = captured(pipe, run, model, method)
            graph = trace(model, call, method)
            if component == name:
                products = graph.products
                if engine == "openvino" and products.quantizers:
                    raise InputError(
                        "openvino fuses only ranges that stay the same; a plan, or ranges by step, needs onnxruntime"
                    )
            target = temporary / component
            write_component(target, graph, model, engine, method)
            made[component] = EngineModule(target)
        with_components(pipe, **made).save_pretrained(temporary)
    loaded = {component: EngineModule(folder / component) for component in made}
    return Exported(with_components(pipe, **loaded), products, tuple(made))


def _is_ours(component: Any) -> bool:
    return isinstance(component, nn.Module) and not isinstance(component, EngineModule)
