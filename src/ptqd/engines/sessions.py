"""Engines that run an exported graph: arrays in, arrays out. Nothing of this needs torch."""

import importlib
import itertools
import os
import shutil
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory, mkdtemp
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np
from packaging.version import Version

from ptqd.engines.cpu import Processor, overflows, this_processor
from ptqd.errors import InputError, MissingDependencyError, lack_of
from ptqd.files import check_readable

Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
LEAST: dict[str, tuple[int, ...]] = {
    "onnxruntime": (1, 20),
    "openvino": (2025, 0),
    "onnx": (1, 17),
    "onnxscript": (0, 5),
    "torchao": (0, 15),
    "gguf": (0, 10),
    "triton": (3, 0),
}
RANGES = ("ptqd.scale", "ptqd.zero", "ptqd.low", "ptqd.high")  # inputs: of each quantizer (Q,), float32 and uint8
COMPILED = 2  # numbers of samples that OpenVINO keeps kernels for: a share of a batch, and one that is smaller by 1
ROWS = 32
AS_SIMULATED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # OpenVINO: floats stay floats
UNUSED = 1000  # calls after which kernels for ranges that did not come again make place for others
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
    extra = {"torchao": "backends", "gguf": "backends", "triton": "gpu"}.get(package, "engines")
    remedy = f"pip install 'ptqd[{extra}]'" + ("" if package == "gguf" else ", or sample in simulation")
    try:
        with _without_telemetry():
            module, result = importlib.import_module(package), version(package)
    except (ImportError, PackageNotFoundError) as error:
        if package == "onnxruntime" and "onnxruntime" in sys.modules:  # of a package by another name, as for GPUs
            return sys.modules["onnxruntime"]
        raise MissingDependencyError(f"{package} is not installed: {remedy}") from error
    least = LEAST[package]
    if Version(result).release < least:
        raise MissingDependencyError(f"{package} {result} is older than {'.'.join(map(str, least))}: {remedy}")
    return module


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Importing an engine would call its maker: OpenVINO not where its package for that is missing,
    ONNX Runtime not where it is told so.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules  # None there makes importing it an ImportError
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


class Session(ABC):
    """A graph that an engine has loaded.

    Every core computes samples of its own, some at a time: it waits for no other, and what it holds stays small. All
    cores share a sample only where there is but one.

    Args:
        path: of the graph.
        threads: of the CPU.
        rows: samples that a core computes at once, at most; 0: all of them, by all cores.
        counts: how many ranges each quantizer has, of those whose ranges are inputs.

    Attributes:
        most_ranges: so many different vectors of ranges become constants of kernels of their own; the ranges of
            quantizers that have more of them stay inputs.
    """

    most_ranges = 0

    def __init__(self, path: Path, threads: int, rows: int, counts: Sequence[int] = ()) -> None:
        graph = read_graph(path, weights=False).graph
        shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
        self._by_sample = [name for name, dims in shapes.items() if dims and not dims[0].dim_value]
        self._names = list(shapes)
        self.threads, self.rows, self._counts = threads, rows, counts
        self._last_call: dict[bytes, int] = {}  # of each row whose ranges kernels have
        self._calls = 0
        self._pool = ThreadPoolExecutor(threads)
        self._lock = Lock()  # copies of a pipeline share a session

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in order, of inputs by their names."""
        batch = len(inputs[self._by_sample[0]]) if self._by_sample else 1
        with self._lock:
            return self._shared(inputs, batch)

    def _shared(self, inputs: Mapping[str, np.ndarray], batch: int) -> list[np.ndarray]:
        alone = batch == 1 or self.rows == 0
        row = self._row_of(inputs)
        self._prepare(inputs, row, alone=alone)
        if alone:
            return self._run(inputs, row, alone=True)
        shares = -(-batch // self.rows)
        shares = min(batch, -(-shares // self.threads) * self.threads)
        edges = [batch * i // shares for i in range(shares + 1)]
        parts = [
            {**inputs, **{name: inputs[name][start:end] for name in self._by_sample}}
            for start, end in itertools.pairwise(edges)
        ]
        result = list(self._pool.map(lambda part: self._run(part, row, alone=False), parts))
        return [np.concatenate(outputs) for outputs in zip(*result, strict=True)]

    def _row_of(self, inputs: Mapping[str, np.ndarray]) -> bytes:
        """What tells the ranges that kernels have as constants from others; nothing where they have none."""
        values = [np.delete(inputs[name], self._by_step) for name in self._names if name in RANGES]
        row = b"".join(value.tobytes() for value in values)
        self._calls += 1
        if row not in self._last_call:
            first = next(iter(self._last_call), None)
            is_full = len(self._last_call) >= self.most_ranges
            if not row or (is_full and (first is None or self._calls - self._last_call[first] <= UNUSED)):
                return b""
            if is_full and first is not None:
                del self._last_call[first]
                self._forget(first)
        self._last_call.pop(row, None)  # the one that was not used for longest comes first
        self._last_call[row] = self._calls
        return row

    def _forget(self, row: bytes) -> None:  # noqa: B027
        """Drop the kernels that have the ranges of a row, where there are any."""

    @property
    def _by_step(self) -> list[int]:
        """Places in the vectors of ranges that stay inputs."""
        return [i for i, count in enumerate(self._counts) if count > self.most_ranges]

    def _fixed(self, model: Any, inputs: Mapping[str, np.ndarray], row: bytes) -> Any:
        """A graph with the ranges of a row as constants."""
        if not row:
            return model
        from ptqd.engines.fixed_ranges import with_fixed_ranges

        return with_fixed_ranges(model, {name: inputs[name] for name in self._names if name in RANGES}, self._by_step)

    def _prepare(self, inputs: Mapping[str, np.ndarray], row: bytes, *, alone: bool) -> None:  # noqa: B027
        """Before samples are run, alone or by a core each; most have nothing to do."""

    @abstractmethod
    def _run(self, inputs: Mapping[str, np.ndarray], row: bytes, *, alone: bool) -> list[np.ndarray]:
        """The outputs of some samples; with all cores if they are alone, else with one."""


class OnnxRuntimeSession(Session):
    """ONNX Runtime: products of integers on the CPU, or the graph as it is for the providers of a GPU.

    Args:
        path: of the graph.
        threads: of the CPU.
        rows: samples that a core computes at once; see :class:`Session`.
        provider: where it runs; a GPU gets all samples at once.
        processor: of the CPU.
        shown: tensors inside the graph that are outputs too, after its own.
        counts: see :class:`Session`.

    Raises:
        InputError: ONNX Runtime or the provider is not there, the processor lacks AVX2, or the graph is damaged or has
            an operator that ONNX Runtime lacks.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        rows: int = ROWS,
        provider: Provider = "cpu",
        processor: Processor | None = None,
        shown: Sequence[str] = (),
        counts: Sequence[int] = (),
    ) -> None:
        runtime = required("onnxruntime")
        if PROVIDERS[provider] not in runtime.get_available_providers():
            there = ", ".join(runtime.get_available_providers())
            raise InputError(
                f"this onnxruntime has no {PROVIDERS[provider]} ({there}): pip install onnxruntime-gpu, or use the CPU"
            )
        super().__init__(path, threads, rows if provider == "cpu" else 0, counts)
        self._path, self._provider, self._shown = path, provider, shown
        self._processor = processor or this_processor()
        self.most_ranges = 4 if provider == "cpu" else 0
        self._sessions: dict[bytes, tuple[Any, list[str]]] = {}
        self._open(1, {})
        self._only_tried = True  # opened without constants to see that it can be; it has not run

    def _open(self, threads: int, inputs: Mapping[str, np.ndarray], row: bytes = b"") -> None:
        """Load the graph, for so many cores at one sample, with the ranges of a row as constants."""
        runtime = required("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other sessions, and torch, wait
        options.enable_mem_pattern = False  # of no use where batches differ, and twice the memory
        with TemporaryDirectory() as temporary:
            path = self._path
            if self._provider == "cpu" and has_codes(path):
                path = self._lowered(Path(temporary), inputs, row)
            try:
                session = runtime.InferenceSession(str(path), options, providers=[PROVIDERS[self._provider]])
            except Exception as error:  # each of onnxruntime's kinds of errors is an Exception of its own
                reason = " ".join(str(error).split())[-300:]
                raise InputError(
                    f"onnxruntime does not load the graph: {reason}; export it again, or simulate"
                ) from error
        self._opened = threads
        self._outputs = [output.name for output in session.get_outputs()]
        self._sessions[row] = session, [given.name for given in session.get_inputs()]

    def _lowered(self, folder: Path, inputs: Mapping[str, np.ndarray], row: bytes) -> Path:
        """The graph as the CPU's kernels compute it fastest, in a file: what ONNX Runtime packs anew it then drops."""
        from ptqd.engines.lowering import lowered

        _check_kernels(self._processor)
        model = self._fixed(showing(read_graph(self._path), self._shown), inputs, row)
        return _written(lowered(model, self._processor), folder)

    def _prepare(self, inputs: Mapping[str, np.ndarray], row: bytes, *, alone: bool) -> None:
        threads = self.threads if alone and self._provider == "cpu" else 1
        if self._opened != threads:
            self._sessions.clear()  # what was there before has to go first
        elif row and self._only_tried:
            del self._sessions[b""]
        self._only_tried = False
        if row not in self._sessions:
            self._open(threads, inputs, row)

    def _forget(self, row: bytes) -> None:
        self._sessions.pop(row, None)

    def _run(self, inputs: Mapping[str, np.ndarray], row: bytes, *, alone: bool) -> list[np.ndarray]:
        session, names = self._sessions[row]
        result: list[np.ndarray] = session.run(self._outputs, {name: inputs[name] for name in names})
        return result


class OpenVinoSession(Session):
    """OpenVINO on the CPU, which itself makes integer kernels of the graph.

    Args:
        path: of the graph.
        threads: of the CPU.
        rows: samples that a core computes at once; see :class:`Session`.
        processor: of the CPU.
        shown: tensors inside the graph that are outputs too, after its own.
        counts: see :class:`Session`.

    Raises:
        InputError: OpenVINO is not there, an operator that it lacks, or weights that would overflow on this processor.
    """

    most_ranges = 16

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        rows: int = ROWS,
        processor: Processor | None = None,
        shown: Sequence[str] = (),
        counts: Sequence[int] = (),
    ) -> None:
        openvino = required("openvino")
        from ptqd.engines.expansion import expanded

        super().__init__(path, threads, rows, counts)
        self._core, self._tensor = openvino.Core(), openvino.Tensor
        self._path = path
        if has_codes(path):
            _check_kernels(processor or this_processor())
            model = expanded(showing(read_graph(path), shown))
            _check_overflow(model, processor or this_processor())
            self._path = self._kept(model)
        elif counts or any(part.is_symlink() for part in path.parent.iterdir()):  # of a hub cache: not followed
            self._path = self._kept(read_graph(path))
        self._read()
        self._compiled: dict[Any, dict[bytes, tuple[SimpleQueue[Any], list[str]]]] = {}
        self._compiling = Lock()

    def _kept(self, model: Any) -> Path:
        """A graph in a file that is there as long as the session is."""
        temporary = mkdtemp()
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        return _written(model, Path(temporary))

    def _read(self, inputs: Mapping[str, np.ndarray] | None = None, row: bytes = b"") -> Any:
        """The graph, with the ranges of a row as constants: kernels of integers need that."""
        path = self._path
        if self._counts:
            from ptqd.engines.fixed_ranges import rounding_floats

            model = read_graph(path, weights=False)
            model = rounding_floats(model if inputs is None else self._fixed(model, inputs, row))
            path = path.with_name("ranges.onnx")  # beside the weights, which it shares
            path.write_bytes(model.SerializeToString())
        try:
            return self._core.read_model(path)  # weights are mapped from disk
        except RuntimeError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[-300:]
        return InputError(f"openvino does not load the graph: {reason}; use onnxruntime, or simulate")

    def _forget(self, row: bytes) -> None:
        for kernels in self._compiled.values():
            kernels.pop(row, None)

    def _run(self, inputs: Mapping[str, np.ndarray], row: bytes, *, alone: bool) -> list[np.ndarray]:
        with self._compiling:
            requests, names = self._requests(inputs, row, 1 if alone else self.threads)
        arrays = [np.ascontiguousarray(inputs[name]) for name in names]
        request = requests.get()
        try:
            for i, array in enumerate(arrays):
                request.set_input_tensor(i, self._tensor(array, shared_memory=True))
            request.start_async()
            request.wait()
            return [tensor.data.copy() for tensor in request.output_tensors]
        finally:
            requests.put(request)

    def _requests(
        self, inputs: Mapping[str, np.ndarray], row: bytes, streams: int
    ) -> tuple["SimpleQueue[Any]", list[str]]:
        """As many requests as run at once, for one batch and one row of ranges, and the names of what they take.

        Kernels for shapes that vary are 2 to 3 times as slow, and those for ranges that vary are of floats.
        """
        key = (tuple(inputs[name].shape for name in self._names), streams)
        if key not in self._compiled:
            while len(self._compiled) >= COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = {}
        kernels = self._compiled[key]
        if row not in kernels:
            model = self._read(inputs, row)
            names = [given.any_name for given in model.inputs]
            config = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": streams, **AS_SIMULATED}
            try:
                model.reshape({name: list(inputs[name].shape) for name in names})
                compiled = self._core.compile_model(model, "CPU", config)
            except RuntimeError as error:
                raise self._refused(error) from error
            kernels[row] = SimpleQueue(), names
            for _ in range(streams):
                kernels[row][0].put(compiled.create_infer_request())
        return kernels[row]


def _check_kernels(processor: Processor) -> None:
    if not processor.avx2:
        raise InputError("this processor has no AVX2, which kernels of integers need; sample in simulation")


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
        rows = codes
        if codes.ndim > 2:  # neighbours are channels of one tap
            even = np.pad(codes, [(0, 0), (0, codes.shape[1] % 2), *[(0, 0)] * (codes.ndim - 2)])
            rows = even.transpose(*range(2, codes.ndim), 1, 0).reshape(-1, len(codes))
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
    check_readable(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common class
        if lack_of(error) is not None:
            raise
        raise InputError(f"{path} is no ONNX graph ({' '.join(str(error).split())[:200]}); export it again") from error
    if weights:
        _read_weights(model, path)
    return model


def _read_weights(model: Any, path: Path) -> None:
    """Read a graph's weights from the files beside it; links, as hub caches and backups have, are followed."""
    from onnx.external_data_helper import ExternalDataInfo

    for tensor in model.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        beside = path.parent / info.location
        if Path(info.location).name != info.location or info.location in ("", ".", ".."):
            raise InputError(f"{path} has weights in {info.location!r}, which is not beside it; export it again")
        check_readable(beside)
        size = beside.stat().st_size
        with beside.open("rb") as file:
            file.seek(int(info.offset or 0))
            data = file.read(min(int(vars(info)["length"] or size), size))
        if len(data) != int(vars(info)["length"] or len(data)):
            raise InputError(f"{beside} is shorter than {path} says; export it again")
        tensor.raw_data = data
        tensor.ClearField("external_data")
        tensor.data_location = tensor.DEFAULT


def showing(model: Any, shown: Sequence[str]) -> Any:
    """A graph that gives tensors inside it as outputs too, in place."""
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in shown)
    return model


def has_codes(path: Path) -> bool:
    """Whether a graph is of a quantized network."""
    return any(node.op_type == "DequantizeLinear" for node in read_graph(path, weights=False).graph.node)


def open_session(
    path: Path,
    engine: str,
    *,
    threads: int,
    rows: int = ROWS,
    provider: Provider = "cpu",
    shown: Sequence[str] = (),
    counts: Sequence[int] = (),
) -> Session:
    """A graph in an engine.

    Args:
        path: of the graph.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        threads: of the CPU.
        rows: samples that a core computes at once, at most.
        provider: where ONNX Runtime runs it.
        shown: tensors inside the graph that are outputs too, after its own.
        counts: how many ranges each quantizer has, of those whose ranges are inputs.

    Raises:
        InputError: an engine that is not known, or see the engines themselves.
    """
    if engine == "onnxruntime":
        return OnnxRuntimeSession(path, threads=threads, rows=rows, provider=provider, shown=shown, counts=counts)
    if engine == "openvino":
        return OpenVinoSession(path, threads=threads, rows=rows, shown=shown, counts=counts)
    raise InputError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
