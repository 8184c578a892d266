"""A pipeline for an engine: its networks as graphs, in a diffusers folder that loads and runs like any other."""

import copy
import dataclasses
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ptqd.diffusion.deep_part import deep_modules
from ptqd.diffusion.pipeline_parts import denoiser_names, denoisers_of, with_components
from ptqd.diffusion.plain_copy import as_plain, plain_copy
from ptqd.diffusion.sampling import Sampling, sample
from ptqd.engines.calls import captured
from ptqd.engines.module import FACTS, EngineFacts, EngineModule, write_component
from ptqd.engines.onnx_graph import Graph, Products, trace
from ptqd.engines.sessions import ENGINES, Provider, required
from ptqd.engines.torchao import Layout, to_torchao
from ptqd.errors import InputError
from ptqd.outputs import OutputFolder, output_folder
from ptqd.quantization.plan_steps import plan_steps_of
from ptqd.quantization.recipe import Recipe
from ptqd.quantization.sites import activation_quantizers, quantized_layers, quantized_sites
from ptqd.quantization.swap import insert_quantizers

TORCHAO = "torchao"
DECODERS, ENCODERS = ("vae", "vqvae"), ("text_encoder", "text_encoder_2", "text_encoder_3")
Others = Literal["fp32", "int8", "none"]
CALIBRATED = 16  # samples that decoders and text encoders find their ranges on


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


def export(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    engine: str,
    folder: str | Path,
    *,
    others: Others = "fp32",
    provider: Provider = "cpu",
    layout: Layout = "int8",
    hold_deep: bool = False,
) -> Exported:
    """Write a pipeline whose networks an engine runs, as a diffusers folder; :func:`ptqd.load` loads it again.

    The denoiser carries exactly its codes, scales and zero points, and follows its plan; a scheduler that corrects goes
    on to. The pipeline is moved to the CPU. One that is given pictures keeps its autoencoder in torch, to encode them.

    Args:
        pipe: quantized by ptqd, or in full precision.
        sampling: how it samples: its calls show what the networks are given.
        engine: ``"onnxruntime"``, ``"openvino"``, or ``"torchao"``, which leaves other networks as they are.
        folder: a new or an empty one, or one that ptqd wrote.
        others: decoders and text encoders: in full precision, as int8, or left to torch (``"none"``).
        provider: of ONNX Runtime, that the graph is made for.
        layout: of torchao's weights.
        hold_deep: write the denoiser's outer blocks as a graph of their own too, for plans whose steps hold the deep
            part (:mod:`ptqd.diffusion.deep_part`); a plan that the pipeline has and that does so asks for it as well.

    Raises:
        InputError: a folder that is not ptqd's to write, a network that cannot be traced, number formats or operators
            that the engine or provider lacks, or an engine that is not installed.
    """
    check_engine(engine, provider, others)
    with output_folder(Path(folder)) as out:
        return _export(
            pipe, sampling, engine, out, others=others, provider=provider, layout=layout, hold_deep=hold_deep
        )


def check_engine(engine: str, provider: Provider = "cpu", others: Others = "fp32") -> None:
    """Refuse an engine that is not known or not installed, and what it has not.

    Raises:
        InputError: so it is.
    """
    if engine not in (*ENGINES, TORCHAO):
        raise InputError(f"unknown engine {engine!r}; known are {', '.join((*ENGINES, TORCHAO))}")
    if provider != "cpu" and engine != "onnxruntime":
        raise InputError(f"{provider} is a provider of onnxruntime; leave --provider out for {engine}")
    for package in (engine,) if engine == TORCHAO else (engine, "onnx", "onnxscript"):
        required(package)
    if provider == "tensorrt" and others == "int8":
        raise InputError("decoders in 8 bits have zero points, which TensorRT does not multiply; take --others fp32")


def _export(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    engine: str,
    out: OutputFolder,
    *,
    others: Others,
    provider: Provider,
    layout: Layout,
    hold_deep: bool,
) -> Exported:
    names = denoiser_names(pipe)
    for name, model in denoisers_of(pipe).items():
        if isinstance(model, EngineModule):
            raise InputError("the pipeline was exported already; export the quantized pipeline that it was made from")
        if hasattr(model, "post_process_latents"):
            raise InputError(f"the {name} computes beside its call too, which no graph holds; leave it to torch")
        if hold_deep:
            deep_modules(model)
        if model.dtype != torch.float32:
            raise InputError(f"the {name} is in {model.dtype}; load the pipeline in float32 to export it")
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    hooked = {name: plain_copy(part) for name, part in models.items() if hasattr(part, "_hf_hook")}
    plain = hooked | {name: as_plain(model) for name, model in denoisers_of(pipe).items()}
    pipe = with_components(pipe, **plain).to("cpu")
    pipe._all_hooks = []  # by which diffusers would offload it again
    if engine == TORCHAO:
        if hold_deep:
            raise InputError("torchao's pipelines hold no deep part; leave hold_deep (--hold-deep) out")
        output, products = to_torchao(pipe, sampling, layout)
        with out.replacing() as temporary:
            output.save_pretrained(temporary)
        return Exported(output, products, names)
    for model in denoisers_of(pipe).values():
        if provider == "tensorrt":
            _check_symmetric(model)
    with out.replacing() as temporary:
        graphs = [
            _written(
                pipe, sampling, name, "forward", temporary, engine, provider, hold_deep=hold_deep or _is_held(model)
            )
            for name, model in denoisers_of(pipe).items()
        ]
        components = list(names)
        for component, method in _others(pipe) if others != "none" else ():
            source = pipe
            if others == "int8":
                source = with_components(pipe, **{component: _in_8_bits(pipe, sampling, component, method)})
            _written(source, sampling, component, method, temporary, engine, provider)
            components.append(component)
        loaded = with_components(pipe, **{component: EngineModule(temporary / component) for component in components})
        loaded.save_pretrained(temporary)
    engines = {component: EngineModule(out.path / component) for component in components}
    return Exported(with_components(pipe, **engines), _together(graphs, names), tuple(components))


def _together(graphs: Sequence[Graph], names: Sequence[str]) -> Products:
    """What is computed how, of two denoisers by their names."""
    if len(graphs) == 1:
        return graphs[0].products
    pairs = [(name, graph.products) for name, graph in zip(names, graphs, strict=True)]
    return Products(
        tuple(f"{name}.{layer}" for name, products in pairs for layer in products.integer),
        tuple((f"{name}.{layer}", why) for name, products in pairs for layer, why in products.floating),
        tuple(f"{name}.{layer}" for name, products in pairs for layer in products.quantizers),
    )


def for_engine(exported: Path, engine: str, folder: Path) -> None:
    """Write an exported pipeline once more, for another engine that reads the same graphs.

    Args:
        exported: what :func:`export` wrote.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        folder: a new one.

    Raises:
        InputError: the engine lacks what the graphs need.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    shutil.copytree(exported, folder)
    for path in folder.glob(f"*/{FACTS}"):
        dataclasses.replace(EngineFacts.load(path.parent), engine=engine).save(path.parent)


def _others(pipe: DiffusionPipeline) -> list[tuple[str, str]]:
    """Decoders and text encoders, with what of them is called."""
    encodes = "image" in inspect.signature(type(pipe).__call__).parameters
    parts = [(name, "decode") for name in DECODERS if not encodes] + [(name, "forward") for name in ENCODERS]
    result = [(name, method) for name, method in parts if isinstance(getattr(pipe, name, None), nn.Module)]
    return [(name, method) for name, method in result if not isinstance(getattr(pipe, name), EngineModule)]


def _is_held(model: nn.Module) -> bool:
    """Whether a denoiser's plan has steps that hold its deep part."""
    steps = plan_steps_of(model)
    return steps is not None and bool(steps.plan.shallow)


def _written(
    pipe: DiffusionPipeline,
    sampling: Sampling,
    name: str,
    method: str,
    folder: Path,
    engine: str,
    provider: Provider,
    *,
    hold_deep: bool = False,
) -> Graph:
    """Trace one component as the pipeline calls it, and write it."""
    model = getattr(pipe, name)
    call = captured(pipe, sampling, model, method)
    graph = trace(model, call, method, signed=provider == "tensorrt", hold_deep=hold_deep)
    write_component(folder / name, graph, model, engine, provider)
    return graph


def _in_8_bits(pipe: DiffusionPipeline, sampling: Sampling, name: str, method: str) -> nn.Module:
    """A decoder or text encoder of 8-bit weights and activations, calibrated on what the pipeline gives it."""
    model = copy.deepcopy(getattr(pipe, name))
    part = model.decoder if method == "decode" else model
    insert_quantizers(part, Recipe.parse("w8a8"))
    for site in quantized_sites(part):
        site.module.observe()
    for _ in sample(with_components(pipe, **{name: model}), sampling.with_seed_for(name).replace(samples=CALIBRATED)):
        pass
    for site in quantized_sites(part):
        site.module.freeze()
    return model  # type: ignore[no-any-return]


def _check_symmetric(model: nn.Module) -> None:
    """Whether TensorRT multiplies a denoiser's integers: it knows no zero points, and no ranges that change.

    Raises:
        InputError: it does not.
    """
    for name, layer in quantized_layers(model):
        if layer.zero_point is not None or layer.scale.ndim != 1:
            raise InputError(
                f"{name} has weights with zero points or groups, which TensorRT does not multiply; quantize with "
                "[weights] symmetric = true and group = 0, or export for cuda"
            )
    for name, quantizer in activation_quantizers(model):
        changing = quantizer.spec.dynamic or len(quantizer.widths) > 1 or quantizer.ranges > 1
        what = "a range that changes" if changing else None if quantizer.spec.symmetric else "a zero point"
        if what is not None:
            raise InputError(
                f"{name} has {what}, which TensorRT does not multiply; quantize with a recipe of one width, with "
                "attention = false and [activations] symmetric = true and dynamic = false, or export for cuda"
            )
