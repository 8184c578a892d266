"""Engines that run an exported graph: arrays in, arrays out. Nothing of this needs torch."""

import importlib
import shutil
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal, get_args

import numpy as np

from ptqd.engines.processor import Processor, overflows, this_processor
from ptqd.errors import InputError

Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
LEAST: dict[str, tuple[int, ...]] = {
    "onnxruntime": (1, 20),
    "openvino": (2025, 0),
    "onnx": (1, 17),
    "onnxscript": (0, 5),
    "torchao": (0, 15),
}
COMPILED = 2  # batch sizes that OpenVINO keeps kernels for: all batches, and a smaller last one
Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def required(package: str) -> Any:
    """A package that an engine needs.

    Raises:
        InputError: it is not installed, or older than what is needed.
    """
    remedy = "pip install 'ptqd[engines]', or sample in simulation"
    try:
        module, found = importlib.import_module(package), version(package)
    except (ImportError, PackageNotFoundError) as error:
        if package == "onnxruntime" and "onnxruntime" in sys.modules:  # of a package by another name, as for GPUs
            return sys.modules["onnxruntime"]
        raise InputError(f"{package} is not installed: {remedy}") from error
    least = LEAST[package]
    if tuple(int(part) for part in found.split(".")[: len(least)]) < least:
        raise InputError(f"{package} {found} is older than {'.'.join(map(str, least))}: {remedy}")
    return module


class Session(ABC):
    """A graph that an engine has loaded."""

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in order, of inputs by their names."""


class OnnxRuntimeSession(Session):
    """ONNX Runtime: products of integers on the CPU, or the graph as it is for the providers of a GPU.

    Args:
        path: of the graph.
        threads: of the CPU.
        provider: where it runs.
        processor: of the CPU.
        shown: tensors inside the graph that are outputs too, after its own.

    Raises:
        InputError: ONNX Runtime or the provider is not there, the processor lacks AVX2, or the graph is damaged or has
            an operator that ONNX Runtime lacks.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        provider: Provider = "cpu",
        processor: Processor | None = None,
        shown: Sequence[str] = (),
    ) -> None:
        runtime = required("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other sessions, and torch, wait
        wanted = PROVIDERS[provider]
        if wanted not in runtime.get_available_providers():
            there = ", ".join(runtime.get_available_providers())
            raise InputError(f"this onnxruntime has no {wanted} ({there}): pip install onnxruntime-gpu, or use the CPU")
        options.enable_mem_pattern = False  # of no use where batches differ, and twice the memory
        with TemporaryDirectory() as temporary:
            if provider == "cpu" and has_codes(path):
                path = self._lowered(path, Path(temporary), processor or this_processor(), shown)
            try:
                self.session = runtime.InferenceSession(str(path), options, providers=[wanted])
            except Exception as error:  # each of onnxruntime's kinds of errors is an Exception of its own
                reason = " ".join(str(error).split())[-300:]
                raise InputError(
                    f"onnxruntime does not load the graph: {reason}; export it again, or simulate"
                ) from error
        self._outputs = [output.name for output in self.session.get_outputs()]

    @staticmethod
    def _lowered(path: Path, folder: Path, processor: Processor, shown: Sequence[str]) -> Path:
        """The graph as the CPU's kernels compute it fastest, in a file: what ONNX Runtime packs anew it then drops."""
        from ptqd.engines.lowering import lowered

        if not processor.avx2:
            raise InputError("this processor has no AVX2, which kernels of integers need; sample in simulation")
        return _written(lowered(showing(read_graph(path), shown), processor), folder)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in order, of inputs by their names."""
        found: list[np.ndarray] = self.session.run(self._outputs, dict(inputs))
        return found


class OpenVinoSession(Session):
    """OpenVINO on the CPU, which itself makes integer kernels of the graph.

    Args:
        path: of the graph.
        threads: of the CPU.
        processor: of the CPU.
        shown: tensors inside the graph that are outputs too, after its own.

    Raises:
        InputError: OpenVINO is not there, an operator that it lacks, or weights that would overflow on this processor.
    """

    def __init__(
        self, path: Path, *, threads: int = 1, processor: Processor | None = None, shown: Sequence[str] = ()
    ) -> None:
        openvino = required("openvino")
        from ptqd.engines.expansion import expanded

        self._core = openvino.Core()
        self._config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self._names = [value.name for value in read_graph(path, weights=False).graph.input]
        self._path = path
        if has_codes(path):
            model = expanded(showing(read_graph(path), shown))
            _check_overflow(model, processor or this_processor())
            temporary = mkdtemp()
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            self._path = _written(model, Path(temporary))
        self._read()
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def _read(self) -> Any:
        try:
            return self._core.read_model(self._path)  # weights are mapped from disk
        except RuntimeError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[-300:]
        return InputError(f"openvino does not load the graph: {reason}; use onnxruntime, or simulate")

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in order, of inputs by their names."""
        arrays = [inputs[name] for name in self._names]
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self._requests:
            while len(self._requests) >= COMPILED:
                del self._requests[next(iter(self._requests))]
            self._requests[shapes] = self._compiled(shapes)
        found = self._requests[shapes].infer(arrays)
        return [np.array(found[i]) for i in range(len(found))]

    def _compiled(self, shapes: Sequence[tuple[int, ...]]) -> Any:
        """The graph for one batch: kernels for shapes that vary are two to three times as slow."""
        model = self._read()
        try:
            model.reshape({model.inputs[i]: list(shape) for i, shape in enumerate(shapes)})
            return self._core.compile_model(model, "CPU", self._config).create_infer_request()
        except RuntimeError as error:
            raise self._refused(error) from error


def _check_overflow(model: Any, processor: Processor) -> None:
    """OpenVINO multiplies signed weights, which may overflow where there is no VNNI."""
    from onnx import numpy_helper

    if processor.vnni:
        return
    used = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name not in used:
            continue
        codes = numpy_helper.to_array(tensor)
        if codes.dtype != np.int8:
            continue
        rows = codes.transpose(*range(2, codes.ndim), 1, 0).reshape(-1, len(codes)) if codes.ndim > 2 else codes
        if overflows(rows):
            raise InputError(
                f"{tensor.name}: on this processor (without VNNI) openvino's sums of two products would saturate; "
                "use onnxruntime, which computes them exactly, or weights of 7 bits and less (w7a8)"
            )


def _written(model: Any, folder: Path) -> Path:
    """A graph in a file, its weights in another."""
    import onnx

    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights", size_threshold=1024)
    return path


def read_graph(path: Path, *, weights: bool = True) -> Any:
    """An ONNX graph, with its weights or without them.

    Raises:
        InputError: there is none, or it is damaged.
    """
    onnx = required("onnx")
    try:
        return onnx.load(path, load_external_data=weights)
    except Exception as error:  # protobuf's errors have no common class
        raise InputError(f"{path} is no ONNX graph ({' '.join(str(error).split())[:200]}); export it again") from error


def showing(model: Any, shown: Sequence[str]) -> Any:
    """A graph that gives tensors inside it as outputs too, in place."""
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in shown)
    return model


def has_codes(path: Path) -> bool:
    """Whether a graph is of a quantized network."""
    return any(node.op_type == "DequantizeLinear" for node in read_graph(path, weights=False).graph.node)


def open_session(
    path: Path, engine: str, *, threads: int, provider: Provider = "cpu", shown: Sequence[str] = ()
) -> Session:
    """A graph in an engine.

    Args:
        path: of the graph.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        threads: of the CPU.
        provider: where ONNX Runtime runs it.
        shown: tensors inside the graph that are outputs too, after its own.

    Raises:
        InputError: an engine that is not known, or see the engines themselves.
    """
    if engine == "onnxruntime":
        return OnnxRuntimeSession(path, threads=threads, provider=provider, shown=shown)
    if engine == "openvino":
        return OpenVinoSession(path, threads=threads, shown=shown)
    raise InputError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
