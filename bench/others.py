"""W8A8 quantizers of other packages, each on a diffusers pipeline's denoiser, at its documented settings.

The denoiser is calibrated on its real inputs over whole trajectories. Each package is imported only where it is used:

    pip install -c constraints.txt torchao optimum-quanto nncf onnxruntime onnx onnxscript

They do not quantize the same things. torchao: linears and 1x1 convolutions, activations dynamic; larger convolutions
and attention products stay in full precision. torchao-pt2e: convolutions and linears, static. quanto: int8 weights
everywhere, inputs of linears alone. nncf and onnxruntime: convolutions, linears and attention products.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ptqd import Sampling, sample
from ptqd.diffusion import denoiser_name, with_components

Inputs = dict[str, Tensor]  # a denoiser's tensor arguments by name, the batch first in each
Run = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class DenoiserOutput(BaseOutput):
    """What a foreign denoiser returns: ``.sample``, ``["sample"]`` and ``[0]``."""

    sample: Tensor


def tensor_inputs(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """The tensors among a denoiser's arguments, in the signature's order; the timestep becomes (N,)."""
    bound = {k: v for k, v in signature.bind(*args, **kwargs).arguments.items() if v is not None and k != "return_dict"}
    batch = len(next(iter(bound.values())))
    if "timestep" in bound:
        told = torch.as_tensor(bound["timestep"])
        told = told if told.is_floating_point() else told.to(torch.int64)
        bound["timestep"] = told.reshape(-1).expand(batch)
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the denoiser's argument {name!r} is {type(value).__name__}, not a tensor")
    return {name: value.detach().contiguous() for name, value in bound.items()}


def record_inputs(pipe: DiffusionPipeline, run: Sampling) -> list[Inputs]:
    """The denoiser's inputs of every call while the pipeline samples."""
    model = getattr(pipe, denoiser_name(pipe))
    signature = inspect.signature(model.forward)
    calls: list[Inputs] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append({name: value.clone() for name, value in tensor_inputs(signature, args, kwargs).items()})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for _ in sample(pipe, run, output="latent"):
            pass
    finally:
        handle.remove()
    return calls


class Flat(nn.Module):
    """A denoiser as a function of tensors alone, as exporters want it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The output of the tensors that ``names`` names."""
        output: Tensor = self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]
        return output


CHUNK = 32  # diffusers' upsampling branches at a batch of 64, and an exported graph holds one side of a branch


def export_arguments(call: Inputs) -> tuple[tuple[Tensor, ...], Any]:
    """Two samples, and the shapes of :class:`Flat`'s arguments for an exporter: the batch is free, the same in all."""
    batch = torch.export.Dim("batch", min=1, max=CHUNK)
    return tuple(torch.cat([v, v])[:2] for v in call.values()), (tuple({0: batch} for _ in call),)


def in_chunks(model: Callable[..., Tensor]) -> Run:
    """Call a function of tensors on at most ``CHUNK`` samples at once, without gradients."""

    def run(tensors: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(*parts) for parts in zip(*(t.split(CHUNK) for t in tensors), strict=True)])

    return run


class ForeignDenoiser(nn.Module):
    """Stands in a pipeline for a denoiser that something else computes; takes what the original's forward takes."""

    def __init__(self, original: Any, names: Sequence[str], run: Run, state: nn.Module | bytes) -> None:
        super().__init__()
        self.config, self.dtype, self.device = original.config, original.dtype, original.device
        self.names, self.run = tuple(names), run
        self.signature = inspect.signature(original.forward)
        if isinstance(state, nn.Module):
            self.state = state
        else:  # the file's bytes, so that the state dictionary tells one model from another
            self.register_buffer("state", torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def forward(self, *args: Any, **kwargs: Any) -> DenoiserOutput | tuple[Tensor]:
        """The denoiser's output, of the arguments that the original takes."""
        inputs = tensor_inputs(self.signature, args, kwargs)
        if tuple(inputs) != self.names:
            raise TypeError(f"calibrated with {', '.join(self.names)}; called with {', '.join(inputs)}")
        output = self.run(list(inputs.values()))
        return DenoiserOutput(sample=output) if kwargs.get("return_dict", True) else (output,)


def frozen_copy(model: nn.Module) -> Any:
    """A copy without gradients, for inference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def torchao(pipe: DiffusionPipeline, calibration: Sampling) -> nn.Module:
    """torchao: int8 dynamic activations a row, int8 weights a channel, in linears and 1x1 convolutions.

    ``quantize_`` has no int8 for larger convolutions: they stay in full precision. Dynamic: nothing is calibrated.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.quant_api import swap_conv2d_1x1_to_linear

    def is_linear(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Conv2d):
            return False
        return (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)

    model = frozen_copy(getattr(pipe, denoiser_name(pipe)))
    swap_conv2d_1x1_to_linear(model, is_linear)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def torchao_pt2e(pipe: DiffusionPipeline, calibration: Sampling) -> nn.Module:
    """PT2E of torchao, for x86: static u8 activations, s8 weights a channel, in convolutions and linears.

    Run as the reference graph (quantize and dequantize in floats), so that nothing saturates.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    original = getattr(pipe, denoiser_name(pipe))
    calls = record_inputs(pipe, calibration)
    names = list(calls[0])
    example, shapes = export_arguments(calls[0])
    exported = torch.export.export(Flat(frozen_copy(original), names), example, dynamic_shapes=shapes)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    quantizer.set_function_type_qconfig(torch.mul, None)  # by default integer timesteps too, which cannot be observed
    prepared = prepare_pt2e(exported.module(), quantizer)
    for call in calls:
        in_chunks(prepared)(list(call.values()))
    quantized = allow_exported_model_train_eval(convert_pt2e(prepared))
    return ForeignDenoiser(original, names, in_chunks(quantized), quantized)


def quanto(pipe: DiffusionPipeline, calibration: Sampling, *, shuffle: bool = False) -> nn.Module:
    """optimum-quanto: qint8 weights a channel in linears and convolutions, qint8 static activations.

    Its scales are moving averages (0.9) of the calls' maxima, so they depend on the order, latest calls most;
    ``shuffle`` shows it the same inputs in random order. Only linears quantize their inputs, not convolutions.
    """
    from optimum.quanto import Calibration, freeze, qint8, quantize

    name = denoiser_name(pipe)
    model = frozen_copy(getattr(pipe, name))
    calls = record_inputs(pipe, calibration) if shuffle else []
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(calibration.seed)).tolist()
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        if shuffle:
            for i in order:
                model(**calls[i])
        else:
            for _ in sample(with_components(pipe, **{name: model}), calibration, output="latent"):
                pass
    freeze(model)
    return model.requires_grad_(False)  # type: ignore[no-any-return]


def nncf(pipe: DiffusionPipeline, calibration: Sampling, *, halve_range: bool = False) -> nn.Module:
    """NNCF on the torch model: fake quantizers in floats, so nothing saturates and ``OverflowFix`` is off.

    ``halve_range`` turns it on: weights of 7 bits, as a processor without VNNI needs them.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    original = getattr(pipe, denoiser_name(pipe))
    calls = record_inputs(pipe, calibration)
    names = list(calls[0])
    fix = OverflowFix.ENABLE if halve_range else OverflowFix.DISABLE
    quantized = nncf.quantize(
        frozen_copy(original),
        nncf.Dataset([{**call, "return_dict": False} for call in calls]),
        subset_size=len(calls),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER,  # every denoiser here has attention
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=fix),
    )

    def run(tensors: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            output: Tensor = quantized(**dict(zip(names, tensors, strict=True)), return_dict=False)[0]
        return output

    return ForeignDenoiser(original, names, run, quantized)


def onnxruntime(pipe: DiffusionPipeline, calibration: Sampling, *, exact: bool = False) -> nn.Module:
    """ONNX Runtime: static QDQ, u8 activations, s8 weights a channel, in Conv, MatMul and Gemm.

    Weights have 7 bits (``reduce_range``) so that AVX2 does not saturate; with ``exact`` they have 8, and the session
    is told to multiply exactly (``x64quantprecision``), which changes nothing on a processor with VNNI.
    """
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        """Hands the recorded inputs over, one call at a time."""

        def __init__(self, calls: Sequence[Inputs]) -> None:
            self.calls: Iterator[Inputs] = iter(calls)

        def get_next(self) -> dict[str, Any] | None:
            """The next call's inputs, or None at the end."""
            call = next(self.calls, None)
            return call if call is None else {k: v.numpy() for k, v in call.items()}

    original = getattr(pipe, denoiser_name(pipe))
    calls = record_inputs(pipe, calibration)
    names = list(calls[0])
    with tempfile.TemporaryDirectory() as folder:
        full, prepared, quantized = (Path(folder) / f"{n}.onnx" for n in ("full", "prepared", "quantized"))
        example, shapes = export_arguments(calls[0])
        program = torch.onnx.export(
            Flat(frozen_copy(original), names),
            example,
            input_names=names,
            output_names=["output"],
            dynamic_shapes=shapes,
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        proto = program.model_proto
        del proto.graph.value_info[:]  # shapes that the exporter left and the preparation takes amiss
        onnx.save(proto, full)
        quant_pre_process(full, prepared, auto_merge=True)
        quantize_static(
            prepared,
            quantized,
            Reader(calls),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not exact,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        content = quantized.read_bytes()

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return ForeignDenoiser(original, names, run, content)


PACKAGES: Mapping[str, Callable[[DiffusionPipeline, Sampling], nn.Module]] = {
    "torchao": torchao,
    "torchao-pt2e": torchao_pt2e,
    "quanto": quanto,
    "quanto-shuffled": lambda pipe, calibration: quanto(pipe, calibration, shuffle=True),
    "nncf": nncf,
    "nncf-7bit": lambda pipe, calibration: nncf(pipe, calibration, halve_range=True),
    "onnxruntime": onnxruntime,
    "onnxruntime-exact": lambda pipe, calibration: onnxruntime(pipe, calibration, exact=True),
}


def quantize_with(
    package: str, pipe: DiffusionPipeline, run: Sampling, calibration_samples: int = 32
) -> DiffusionPipeline:
    """A pipeline like ``pipe`` whose denoiser one of ``PACKAGES`` quantized to W8A8.

    It is calibrated on the denoiser's real inputs while the pipeline samples ``calibration_samples`` whole
    trajectories, of other seeds than ``run``'s. ``pipe`` is left untouched. What floats simulate (all but ONNX
    Runtime) rounds the same in every batch size only up to ties: a sample may differ by a few quantization steps.
    """
    calibration = run.with_seed_for("calibration").replace(samples=calibration_samples)
    return with_components(pipe, **{denoiser_name(pipe): PACKAGES[package](pipe, calibration)})
