"""A component of a pipeline that an engine runs, in the place of the one it was exported from.

It is called, saved and loaded like any other, and shows the configuration of the one that it stands for, so that
guidance, schedulers, corrections and plans work unchanged.
"""

import functools
import importlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import msgspec
import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from torch import nn

from ptqd.diffusion.deep_part import OwnDeepPart, current_features
from ptqd.diffusion.fingerprints import fingerprint
from ptqd.diffusion.timesteps import NAMES
from ptqd.engines.calls import CODES, flat_arguments, timesteps_of
from ptqd.engines.onnx_graph import Graph
from ptqd.engines.sessions import RANGES, Provider, Session, open_session, read_graph, required
from ptqd.errors import ArtifactError, InputError
from ptqd.files import read_json, read_tensors, write_json, write_tensors
from ptqd.quantization.hf_quantizer import PtqdConfig, PtqdQuantizer
from ptqd.quantization.modules.activation import ActivationQuantizer
from ptqd.quantization.modules.linear_conv import find_layer
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.plan_steps import set_plan
from ptqd.quantization.recipe import QuantSpec
from ptqd.quantization.sites import activation_quantizers
from ptqd.quantization.step_ranges import StepRanges, set_ranges
from ptqd.quantization.swap import Coverage
from ptqd.schema import check_version, read_as, typed

GRAPH, WEIGHTS, FACTS, TABLE = "model.onnx", "model.onnx.data", "engine.json", "ranges.safetensors"
SHALLOW, SHALLOW_WEIGHTS = "shallow.onnx", "shallow.onnx.data"  # of the outer blocks alone
FILES = (GRAPH, WEIGHTS, TABLE, SHALLOW, SHALLOW_WEIGHTS)
FORMAT = 1
MOST = 1 << 40
AGAIN = "export the pipeline again"
LIBRARIES = ("diffusers", "transformers")
ELEMENTS = 1 << 21  # of the largest tensor that samples computed at once share: enough for the kernels


@dataclass(frozen=True)
class InputFacts:
    """One of a graph's inputs: its shape, None where it is the number of samples, and its type."""

    shape: tuple[int | None, ...]
    dtype: Literal["float32", "int64", "int32", "bool", "uint8", "float64", "float16"]


@dataclass(frozen=True)
class RangeFacts:
    """An activation quantizer whose range is given to the graph."""

    bits: int
    symmetric: bool
    dynamic: bool
    widths: tuple[int, ...]
    ranges: int


@dataclass(frozen=True)
class EngineFacts:
    """``engine.json``: what is known of an exported component beside its graph.

    Attributes:
        format: of this schema.
        engine: that it is for.
        provider: of ONNX Runtime.
        component: class of what it was exported from.
        method: of it, that the graph computes.
        parameters: names of the method's parameters.
        inputs: of the graph.
        constants: arguments that the graph was made for.
        outputs: names.
        returns: class of the method's result, or ``"tuple"``.
        codes: activation quantizers whose codes the graph can give.
        as_they_come: those whose ranges are found in the graph.
        elements: of the largest tensor of one sample.
        integer: products of integers.
        floating: other products, and why.
        ranges: quantizers whose range is given to the graph.
        quantized: what the recipe quantized.
        skipped: what it left, and why.
        simulated_by: fingerprint of the denoiser that it was exported from.
        sha256: of the graph's files.
        versions: of packages.
        deep: what the outer blocks get of the deep part: outputs of the graph after its own, and inputs of the graph
            of the outer blocks alone. None where there is no such graph.
    """

    format: int
    engine: str
    provider: Provider
    component: str
    method: str
    parameters: tuple[str, ...]
    inputs: dict[str, InputFacts]
    constants: dict[str, Any]
    outputs: tuple[str, ...]
    returns: str
    codes: tuple[str, ...]
    as_they_come: tuple[str, ...]
    elements: int
    integer: tuple[str, ...]
    floating: dict[str, str]
    ranges: dict[str, RangeFacts]
    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    simulated_by: str | None
    sha256: str
    versions: dict[str, str]
    deep: dict[str, InputFacts] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "EngineFacts":
        """Of a component's folder.

        Raises:
            ArtifactError: they are damaged, or of another version.
        """
        values = read_json(folder / FACTS)
        check_version(values, FORMAT, str(folder / FACTS), key="format")
        facts = typed(values, cls, str(folder / FACTS), AGAIN)
        sizes = [facts.elements, *(n for spec in facts.ranges.values() for n in (spec.ranges, len(spec.widths)))]
        if not all(1 <= size <= MOST for size in sizes) or not facts.inputs:
            raise ArtifactError(f"{folder / FACTS} has sizes that no network has; {AGAIN}")
        return facts

    def save(self, folder: Path) -> None:
        """Write ``engine.json``."""
        write_json(folder / FACTS, msgspec.to_builtins(self))


@dataclass
class _Held:
    """The sessions of a graph, which copies of a module share.

    Attributes:
        session: of the whole graph.
        outer: of the outer blocks alone, once a plan has shallow steps.
        lock: held while that is opened.
    """

    session: Session
    outer: Session | None = None
    lock: Any = field(default_factory=Lock)

    def __deepcopy__(self, memo: dict[int, object]) -> "_Held":
        return self


class EngineModule(ModelMixin, ConfigMixin, CacheMixin, OwnDeepPart):
    """A component that an engine runs; :func:`ptqd.load` makes it of a folder that ``ptqd export`` wrote.

    Args:
        folder: with the graph and what is known of it.
        threads: of the CPU; as many as torch has where it is 0.
        provider: where ONNX Runtime runs it.

    Raises:
        InputError: the engine is not installed or too old, or does not load the graph; or the folder is damaged.
    """

    config_name = "config.json"
    graph_hash: torch.Tensor

    def __init__(self, folder: Path, *, threads: int = 0, provider: Provider = "cpu") -> None:
        super().__init__()
        self.folder = folder
        facts = EngineFacts.load(folder)
        self.facts = facts
        self._check_outputs()
        self.engine: str = facts.engine
        self.call_parameters = facts.parameters
        digest = _digest(folder)
        if digest != facts.sha256:
            raise InputError(f"{folder}: the graph is not the one that was exported; export the pipeline again")
        self.register_buffer("graph_hash", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
        self.register_to_config(**read_as(folder / "config.json", dict[str, Any], AGAIN))
        self.open(threads=threads, provider=provider)
        self._adopt()
        self.eval()

    def _check_outputs(self) -> None:
        """The graph gives as many outputs as the facts name, and what is returned can hold them.

        Raises:
            ArtifactError: it does not.
        """
        facts = self.facts
        given = [value.name for value in read_graph(self.folder / GRAPH, weights=False).graph.output]
        there, deep = len(given), list(facts.deep)
        if deep:
            taken = {value.name for value in read_graph(self.folder / SHALLOW, weights=False).graph.input}
            if given[len(facts.outputs) :] != deep or not set(deep) <= taken:
                raise ArtifactError(f"{self.folder / FACTS} names another deep part than the graphs have; {AGAIN}")
        named = (
            set(facts.outputs) if facts.returns == "tuple" else {f.name for f in fields(_output_class(facts.returns))}
        )
        names = [*facts.outputs, *facts.deep]
        if len(names) != there or len(set(names)) != there or not set(facts.outputs) <= named:
            raise ArtifactError(f"{self.folder / FACTS} names other outputs than the graph has; {AGAIN}")

    def __getattr__(self, name: str) -> Any:
        """What pipelines look up inside a network, such as a layer's sizes: of its architecture, without weights."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_internal_dict" not in vars(self):
                raise
            if self._architecture is None:
                raise
            return getattr(self._architecture, name)

    @functools.cached_property
    def _architecture(self) -> Any:
        module, _, kind = self.facts.component.rpartition(".")
        if not module.startswith("diffusers."):
            return None
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        with torch.device("meta"):
            return getattr(importlib.import_module(module), kind).from_config(config)

    def open(self, *, threads: int = 0, provider: Provider = "cpu") -> None:
        """Load the graph into the engine, with as many threads of the CPU, or on a GPU."""
        self.threads, self.provider = threads or torch.get_num_threads(), provider
        before: _Held | None = vars(self).get("_held")
        outer = None if before is None or before.outer is None else self._open(SHALLOW)
        self._held = _Held(self._open(GRAPH), outer)

    def _open(self, name: str) -> Session:
        rows = max(1, ELEMENTS // self.facts.elements)
        counts = [spec.ranges for spec in self.facts.ranges.values()]
        path = self.folder / name
        return open_session(path, self.engine, threads=self.threads, rows=rows, provider=self.provider, counts=counts)

    def open_deep_part(self) -> None:
        """Load the graph of the outer blocks alone.

        Raises:
            InputError: it was not exported.
        """
        if not self.facts.deep:
            raise InputError(
                "the plan holds the deep part of the network, and the pipeline was exported as a whole; export it with "
                "--hold-deep (hold_deep=True), or with the plan"
            )
        with self._held.lock:
            if self._held.outer is None:
                self._held.outer = self._open(SHALLOW)

    def _adopt(self) -> None:
        """What follows the steps: ranges and plans; and what marks a quantized denoiser."""
        tables, _ = read_tensors(self.folder / TABLE) if (self.folder / TABLE).is_file() else ({}, {})
        self.quantizers: list[ActivationQuantizer] = []
        for name, spec in self.facts.ranges.items():
            kind = QuantSpec(spec.bits, symmetric=spec.symmetric, dynamic=spec.dynamic)
            quantizer = ActivationQuantizer(kind, spec.widths, ranges=spec.ranges)
            for what in ("scale", "zero_point"):
                value, own = tables.get(f"{name}.{what}"), getattr(quantizer, what)
                if value is None or value.shape != own.shape:
                    raise ArtifactError(f"{self.folder / TABLE} lacks the ranges of {name}; export the pipeline again")
                own.copy_(value)
            _put(self, name, quantizer)
            self.quantizers.append(quantizer)
        self._vectors: dict[Any, dict[str, Any]] = {}
        config = self.config.get("quantization_config")
        if config is None or config.get("quant_method") != "ptqd":
            return
        result = PtqdQuantizer(PtqdConfig(**config))
        result.adopt(self, Coverage(self.facts.quantized, self.facts.skipped))
        if config.get("ranges") is not None and self.quantizers:
            set_ranges(self, StepRanges.from_dict(config["ranges"]))
        if config.get("plan") is not None:
            set_plan(self, PrecisionPlan.from_dict(config["plan"], "the saved plan"))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One without numbers: some pipelines read their network's type off the first."""
        yield nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, *args: object, **kwargs: object) -> Any:
        """What the component that it stands for returns for the same arguments."""
        return self._run("forward", args, kwargs)

    def decode(self, *args: object, **kwargs: object) -> Any:
        """The images of latents, of an autoencoder's decoder."""
        return self._run("decode", args, kwargs)

    def encode(self, *args: object, **kwargs: object) -> Any:
        """Not exported.

        Raises:
            InputError: always.
        """
        raise InputError("an autoencoder's encoder is not exported; take the one of the pipeline in full precision")

    def _run(self, method: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
        inputs, like = self._inputs(method, args, kwargs)
        tensors = [torch.from_numpy(array).to(like.device) for array in self._outputs(inputs)]
        if like.is_floating_point():
            tensors = [t.to(like.dtype) if t.is_floating_point() else t for t in tensors]
        if kwargs.get("return_dict", True) is False or self.facts.returns == "tuple":
            return tuple(tensors)
        return _output_class(self.facts.returns)(**dict(zip(self.facts.outputs, tensors, strict=True)))

    def _outputs(self, inputs: dict[str, Any]) -> list[Any]:
        """The graph's own outputs of a call, whose deep part is held or kept where that is wanted."""
        features, count = current_features(), len(self.facts.outputs)
        if features is not None and features.known:
            assert self._held.outer is not None
            return self._held.outer.run(inputs | features.outputs)
        arrays = self._held.session.run(inputs)
        if features is not None:
            features.outputs = dict(zip(self.facts.deep, arrays[count:], strict=True))
        return arrays[:count]

    def codes(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        """What each activation quantizer makes of a call in the engine, by its name: uint8 or uint16."""
        names = [name for name in self.facts.codes if name not in self.facts.as_they_come]
        shown = [f"{CODES}{name}" for name in names]
        counts = [1] * len(self.facts.ranges)  # for one call all of them are constants
        path, threads = self.folder / GRAPH, torch.get_num_threads()
        session = open_session(path, self.engine, threads=threads, shown=shown, counts=counts)
        for hook in self._forward_pre_hooks.values():  # its step state
            hook(self, args, kwargs)
        output = session.run(self._inputs("forward", args, kwargs)[0])
        own = len(self.facts.outputs) + len(self.facts.deep)
        return dict(zip(names, map(torch.from_numpy, output[own:]), strict=True))

    def _inputs(
        self, method: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """The graph's inputs of a call, and the tensor of it that its outputs are like."""
        kind = self.facts.component.rpartition(".")[2]
        if method != self.facts.method:
            raise InputError(f"of {kind} only {self.facts.method!r} was exported; export what calls {method!r}")
        given = dict(flat_arguments(self.call_parameters, args, kwargs))
        timestep = next((name for name in NAMES if name in given and name in self.facts.inputs), None)
        like = next((value for value in given.values() if isinstance(value, torch.Tensor) and value.ndim), None)
        if like is None:
            raise InputError(f"{kind} was called without a tensor; give it what the exported pipeline gives it")
        if timestep is not None and method == "forward":
            given[timestep] = timesteps_of(given[timestep], len(like))
        self._check(kind, given, len(like))
        inputs = {name: _array(given[name], spec.dtype) for name, spec in self.facts.inputs.items()}
        return inputs | self._ranges(), like

    def _check(self, kind: str, given: Mapping[str, Any], batch: int) -> None:
        """Whether the graph was made for a call."""
        known, constants = self.facts.inputs, self.facts.constants
        for name, value in given.items():
            if name not in known and (name not in constants or constants[name] != value):
                output = "without it" if name not in constants else f"for {constants[name]!r}"
                raise InputError(
                    f"{kind}: the graph was made {output}: {name!r}; export the pipeline as it is called now"
                )
        for name, spec in known.items():
            if name not in given:
                raise InputError(f"{kind}: the graph takes {name!r} too; export the pipeline as it is called now")
            required = [batch if size is None else size for size in spec.shape]
            shape = list(given[name].shape)
            if shape != required:
                sizes = " x ".join("N" if size is None else str(size) for size in spec.shape)
                raise InputError(
                    f"{kind}: the graph was made for {name} of {sizes}, it is given {' x '.join(map(str, shape))}; "
                    "export the pipeline again for another resolution or length"
                )

    def _ranges(self) -> dict[str, Any]:
        """Scale, zero point, least and largest value of each quantizer whose range follows the steps, at this one."""
        if not self.quantizers:
            return {}
        steps = [quantizer.step.index for quantizer in self.quantizers]
        if any(isinstance(step, torch.Tensor) for step in steps):
            raise InputError("the samples of a batch are at several steps; an engine has the ranges of one")
        key = tuple((step, quantizer.active.index) for step, quantizer in zip(steps, self.quantizers, strict=True))
        if key not in self._vectors:
            rows = []
            for quantizer, (step, width) in zip(self.quantizers, key, strict=True):
                row, grid = step if quantizer.ranges > 1 else 0, quantizer.grids[width]
                scale = quantizer.scale.view(quantizer.ranges, -1)[row, width]
                zero = quantizer.zero_point.view(quantizer.ranges, -1)[row, width]
                low, high = (grid.qmin - zero) * scale, (grid.qmax - zero) * scale
                if quantizer.spec.dynamic:  # found in the graph, of so many codes
                    low, high = torch.tensor(0.0), torch.tensor(float(grid.qmax - grid.qmin))
                rows.append((scale, zero - grid.qmin, low, high))
            values = [torch.stack(column) for column in zip(*rows, strict=True)]
            values[1] = values[1].to(torch.uint8)
            self._vectors[key] = {name: value.numpy() for name, value in zip(RANGES, values, strict=True)}
        return self._vectors[key]

    @classmethod
    def from_config(cls, config: object = None, **kwargs: object) -> "EngineModule":
        """Not possible: a graph is more than a configuration.

        Raises:
            InputError: always.
        """
        raise InputError("a network that an engine runs cannot be made anew; use the pipeline it was exported from")

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Copy the graph and what is known of it, with the plan that it follows now."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, FACTS, "config.json") if folder.resolve() != self.folder.resolve() else ():
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of what was saved there before
        quantizer: PtqdQuantizer | None = getattr(self, "hf_quantizer", None)
        if quantizer is None:
            return
        values = read_as(folder / "config.json", dict[str, Any], AGAIN)
        plan, saved = quantizer.quantization_config.plan, values["quantization_config"]
        if saved.get("plan") != plan:
            kept = {name: value for name, value in saved.items() if name != "plan"}
            values["quantization_config"] = kept if plan is None else {**kept, "plan": plan}
            write_json(folder / "config.json", values)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: object) -> "EngineModule":
        """Load what :func:`write_component` wrote."""
        return cls(Path(pretrained_model_name_or_path))

    def to(self, *args: Any, **kwargs: Any) -> "EngineModule":
        """Run on a CPU or a GPU from now on; its numbers stay as they are."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and self.engine == "onnxruntime":
            other: Provider = "tensorrt" if self.facts.provider == "tensorrt" else "cuda"
            provider: Provider = other if device.type == "cuda" else "cpu"
            if (self.provider == "cpu") != (provider == "cpu"):
                self.open(provider=provider)
        return self

    @property
    def simulated_by(self) -> str | None:
        """The fingerprint of the denoiser that it was exported from: statistics of that one hold."""
        return self.facts.simulated_by

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu" if self.provider == "cpu" else "cuda")


def _digest(folder: Path) -> str:
    """Of a graph and its weights."""
    digest = sha256()
    for name in FILES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _output_class(name: str) -> Any:
    """What a network returns: a class of diffusers or transformers, whatever the file says.

    Raises:
        InputError: it is none.
    """
    module, _, kind = name.rpartition(".")
    result = getattr(importlib.import_module(module), kind, None) if module.split(".")[0] in LIBRARIES else None
    if not isinstance(result, type) or not issubclass(result, Mapping):
        raise InputError(f"a network cannot return {name!r}; export the pipeline again")
    return result


def _elements(graph: Graph) -> int:
    """Of a sample: how many numbers its largest tensor has."""
    proto = graph.model.graph
    values = [value.type.tensor_type.shape.dim for value in (*proto.value_info, *proto.input, *proto.output)]
    sizes = [math.prod(max(1, int(d.dim_value)) for d in dims) for dims in values if dims and not dims[0].dim_value]
    return max(sizes)


def _array(value: Any, dtype: str) -> Any:
    return value.detach().cpu().to(getattr(torch, dtype)).contiguous().numpy()


def _put(model: nn.Module, name: str, leaf: nn.Module) -> None:
    """Put a module at a dotted name, with what lies between."""
    *parents, last = name.split(".")
    for parent in parents:
        model = model._modules.setdefault(parent, nn.Module())  # type: ignore[assignment]
    model._modules[last] = leaf


def _input_facts(value: torch.Tensor, *, by_sample: bool) -> InputFacts:
    """Of a tensor; with a row for each sample, or the same for all."""
    dtype: Any = "float32" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return InputFacts((None, *value.shape[1:]) if by_sample else tuple(value.shape), dtype)


def write_component(folder: Path, graph: Graph, model: nn.Module, engine: str, provider: Provider = "cpu") -> None:
    """Write a traced component to a folder that :class:`EngineModule` reads.

    Args:
        folder: an empty or a new one.
        graph: of the component.
        model: the component itself.
        engine: that it is for.
        provider: of ONNX Runtime, on a GPU.
    """
    onnx = required("onnx")
    folder.mkdir(parents=True, exist_ok=True)
    files = ((graph.model, GRAPH, WEIGHTS), (graph.shallow, SHALLOW, SHALLOW_WEIGHTS))
    for proto, name, weights in files[: 1 if graph.shallow is None else 2]:
        onnx.save_model(proto, folder / name, save_as_external_data=True, location=weights, size_threshold=1024)
    by_sample = set(graph.call.by_sample)
    quantizers: dict[str, Any] = {name: find_layer(model, name) for name in graph.products.quantizers}
    coverage = getattr(getattr(model, "hf_quantizer", None), "coverage", Coverage((), ()))
    if quantizers:
        tables = {
            f"{name}.{what}": getattr(q, what) for name, q in quantizers.items() for what in ("scale", "zero_point")
        }
        write_tensors(folder / TABLE, tables, {})
    tensors = graph.call.tensors
    facts = EngineFacts(
        format=FORMAT,
        engine=engine,
        provider=provider,
        component=f"{type(model).__module__}.{type(model).__qualname__}",
        method=graph.method,
        parameters=tuple(graph.call.parameters),
        inputs={name: _input_facts(value, by_sample=name in by_sample) for name, value in tensors.items()},
        constants=dict(graph.call.constants),
        outputs=tuple(graph.outputs),
        returns=graph.kind,
        codes=tuple(o.removeprefix(CODES) for n in graph.model.graph.node for o in n.output if o.startswith(CODES)),
        as_they_come=tuple(name for name, q in activation_quantizers(model) if q.spec.dynamic),
        elements=_elements(graph),
        integer=tuple(graph.products.integer),
        floating=dict(graph.products.floating),
        ranges={
            name: RangeFacts(q.spec.bits, q.spec.symmetric, q.spec.dynamic, tuple(q.widths), q.ranges)
            for name, q in quantizers.items()
        },
        quantized=tuple(coverage.quantized),
        skipped=tuple(coverage.skipped),
        simulated_by=fingerprint(model),
        sha256=_digest(folder),
        versions={name: version(name) for name in ("ptqd", "torch", "onnx")},
        deep={
            name: _input_facts(value, by_sample=name in graph.call.with_rows(graph.features))
            for name, value in graph.features.items()
        },
    )
    config: Any = getattr(model, "config", {})
    values = dict(config.items()) if isinstance(config, Mapping) else config.to_dict()
    if isinstance(values.get("quantization_config"), PtqdConfig):
        values["quantization_config"] = values["quantization_config"].to_dict()
    write_json(folder / "config.json", json.loads(json.dumps(values, default=str)))
    facts.save(folder)
