"""Pipelines that other libraries quantized, through diffusers' own configurations: measured, corrected, saved."""

import copy
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    QuantoConfig,
    SDNQConfig,
    TorchAoConfig,
    UNet2DConditionModel,
)
from torch import nn

from conftest import SCHEDULE
from ptqd import InputError, LatentClassPipeline, MismatchError, NoiseStats, Sampling, correct, load, measure, quantize
from ptqd.diffusion import fingerprint, run_batch, with_components
from ptqd.pipelines.latent_class import ClassEmbedder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`Quanto:FutureWarning"),  # diffusers will drop it, one day
]

WITHOUT_ENCODERS = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def torchao(name: str, **settings: Any) -> Any:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)(**settings))


def sdnq() -> Any:
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # needs no compiler, then
    return SDNQConfig(weights_dtype="uint4")


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),  # type: ignore[attr-defined]
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "quanto int8": lambda: QuantoConfig("int8"),
    "quanto float8": lambda: QuantoConfig("float8"),
    "quanto int4": lambda: QuantoConfig("int4"),
    "quanto int2": lambda: QuantoConfig("int2"),
    "sdnq uint4": sdnq,
}
GGUF = ("gguf Q8_0", "gguf Q4_0")
COMPILES = {"quanto int4", "quanto int2"}  # they build an extension when they first run
BACKENDS = [pytest.param(b, marks=pytest.mark.slow if b in COMPILES else ()) for b in (*CONFIGS, *GGUF)]


@pytest.fixture(scope="module")
def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    ).eval()
    transformer.norm_out.linear.weight.data *= 10  # time shifts the output, and so do errors there: a bias
    return FluxPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **WITHOUT_ENCODERS)


@pytest.fixture(scope="module")
def run() -> Sampling:
    g = torch.Generator().manual_seed(0)
    prompts = {
        "prompt_embeds": torch.randn(16, 3, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(32, generator=g) + 0.1 * torch.randn(16, 32, generator=g),
    }
    return Sampling(steps=4, samples=16, batch=16, call={**prompts, "height": 64, "width": 64, "guidance_scale": 1.0})


@pytest.fixture(scope="module")
def folder(flux: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-precision pipeline, as a folder and as GGUF files."""
    path = tmp_path_factory.mktemp("flux")
    flux.save_pretrained(path)
    for name in GGUF:
        write_gguf(flux.transformer, path / f"{name}.gguf", name.split()[1])
    return path


def write_gguf(model: nn.Module, path: Path, quantization: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if value.ndim == 2 and value.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(flux: FluxPipeline, folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline with its transformer loaded anew, quantized by that backend."""
    if backend in CONFIGS:
        transformer = FluxTransformer2DModel.from_pretrained(
            folder / "transformer", quantization_config=CONFIGS[backend](), dtype=dtype
        )
    else:
        transformer = FluxTransformer2DModel.from_single_file(
            str(folder / f"{backend}.gguf"),
            config=str(folder),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
        )
    return with_components(flux, transformer=transformer)


def latents(pipe: Any, run: Sampling) -> torch.Tensor:
    result: torch.Tensor = run_batch(pipe, run, range(run.samples), "latent")
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_another_library_quantized_is_measured_and_corrected(
    backend: str, flux: FluxPipeline, run: Sampling, folder: Path, tmp_path: Path
) -> None:
    qpipe = quantized(flux, folder, backend)
    stats = measure(flux, qpipe, run)
    snr = stats.fit().snr.value
    assert bool(torch.isfinite(snr).all())

    full, plain = latents(flux, run), latents(qpipe, run)
    noise = (plain - full).square().mean()
    assert noise > 0
    for method, share in (("bc", 0.9), ("joint", 0.9)):
        assert (latents(correct(qpipe, stats, [method]), run) - full).square().mean() < share * noise
    assert torch.equal(latents(correct(qpipe, stats, ()), run), plain)

    again = quantized(flux, folder, backend)
    stats.save(tmp_path / "noise.safetensors")
    corrected = correct(again, NoiseStats.load(tmp_path / "noise.safetensors"), ["bc"])
    want = latents(corrected, run)
    assert torch.equal(want, latents(correct(qpipe, stats, ["bc"]), run))
    with pytest.raises(MismatchError, match="another transformer"):
        correct(flux, stats, ("cnc", "bc", "vsc"))

    corrected.scheduler.save_pretrained(tmp_path / "scheduler")  # where the model itself cannot be saved
    scheduler = type(corrected.scheduler).from_pretrained(tmp_path / "scheduler")
    assert torch.equal(latents(with_components(again, scheduler=scheduler), run), want)

    library = "[^;]*sdnq" if "sdnq" in backend else f"{backend.split(maxsplit=1)[0]}"
    with pytest.raises(InputError, match=rf"transformer is already quantized \({library}\); give the full-precision"):
        quantize(qpipe, "w4a8", run)


def test_a_model_that_was_quantized_by_hand_is_named(flux: FluxPipeline, run: Sampling) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    transformer = copy.deepcopy(flux.transformer)
    quantize_(transformer, Int8WeightOnlyConfig())
    with pytest.raises(InputError, match=r"transformer is already quantized \(.* weights\); give the full-precision"):
        quantize(with_components(flux, transformer=transformer), "w4a8", run)


@pytest.mark.parametrize("backend", ["torchao int4", "gguf Q4_0"])
def test_in_the_dtype_that_such_pipelines_run_in(backend: str, flux: FluxPipeline, run: Sampling, folder: Path) -> None:
    dtype = torch.bfloat16
    run = run.replace(call={k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in run.call.items()})
    full = with_components(
        flux, transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    )
    qpipe = quantized(flux, folder, backend, dtype)
    stats = measure(full, qpipe, run)
    errors = {}
    for methods in ((), ("bc",), ("joint",)):
        result = latents(correct(qpipe, stats, methods), run)
        assert result.dtype == dtype
        errors[methods] = (result - latents(full, run)).float().square().mean()
    assert max(errors["bc",], errors["joint",]) < 0.92 * errors[()]


def test_every_quantization_has_a_fingerprint_of_its_own(flux: FluxPipeline, folder: Path) -> None:
    backends = [b for b in (*CONFIGS, *GGUF) if b not in COMPILES]
    models = [quantized(flux, folder, backend).transformer for backend in backends]
    assert len({fingerprint(model) for model in (flux.transformer, *models)}) == len(models) + 1


@pytest.mark.parametrize("backend", [b for b in CONFIGS if b not in COMPILES])
def test_a_corrected_pipeline_is_saved_as_its_library_saves(
    backend: str, flux: FluxPipeline, run: Sampling, folder: Path, tmp_path: Path
) -> None:
    qpipe = quantized(flux, folder, backend)
    stats = measure(flux, qpipe, run)
    corrected = correct(qpipe, stats, ["bc"])
    corrected.save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path, dtype=torch.float32, **WITHOUT_ENCODERS).to("cpu")
    assert torch.equal(latents(again, run), latents(corrected, run))
    assert again.scheduler.correction == corrected.scheduler.correction
    assert torch.equal(latents(correct(again, stats, ()), run), latents(qpipe, run))


@pytest.mark.parametrize("backend", GGUF)
def test_gguf_cannot_be_saved_by_diffusers(backend: str, flux: FluxPipeline, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        quantized(flux, folder, backend).save_pretrained(tmp_path)


@pytest.mark.parametrize("backend", ["torchao int8 dynamic", "quanto int8"])
def test_a_pipeline_quantized_while_loading(backend: str, tmp_path: Path) -> None:
    """A UNet, quantized by the pipeline's own configuration, corrected, saved, and loaded by ptqd."""
    torch.manual_seed(0)
    blocks = {"in_channels": 1, "out_channels": 1, "latent_channels": 4, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    pipe = LatentClassPipeline(
        AutoencoderKL(block_out_channels=(8,), **blocks).eval(),
        unet.eval(),
        ClassEmbedder(10, 32),
        DDIMScheduler(**SCHEDULE),
    )
    pipe.save_pretrained(tmp_path / "full")
    run = Sampling(steps=4, samples=16, batch=16, call={"class_labels": list(range(10)), "guidance_scale": 1.5})
    config = PipelineQuantizationConfig(quant_mapping={"unet": CONFIGS[backend]()})
    qpipe = LatentClassPipeline.from_pretrained(tmp_path / "full", quantization_config=config, dtype=torch.float32)
    corrected = correct(qpipe, measure(pipe, qpipe, run), ["bc"])
    full, plain, better = (latents(p, run) for p in (pipe, qpipe, corrected))
    assert (better - full).square().mean() < 0.98 * (plain - full).square().mean()
    corrected.save_pretrained(tmp_path / "corrected")
    assert torch.equal(latents(load(tmp_path / "corrected"), run), better)


class Wrapped(torch.Tensor):
    """A tensor made of another, with something else that it knows."""

    codes: torch.Tensor
    context: Any

    @staticmethod
    def __new__(cls, codes: torch.Tensor, context: Any) -> "Wrapped":
        self: Wrapped = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        self.codes, self.context = codes, context
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes"], self.context

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert func is torch.ops.aten.detach.default, "made of parts, it has no values to read"
        return Wrapped(args[0].codes, args[0].context)


class Holder(nn.Module):
    def __init__(self, weight: torch.Tensor, extra: Any = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra


@dataclass
class Activations:
    bits: int
    block: Any = (1, 4)


def wrapped(*codes: int, bits: int = 8, block: Any = (1, 4), device: str = "cpu", extra: Any = None) -> str:
    inner = Wrapped(torch.tensor(codes, dtype=torch.int8), "inside")
    context = {"activations": Activations(bits, block), "kernel": object(), "device": torch.device(device)}
    return fingerprint(Holder(Wrapped(inner, context), extra))


def test_a_wrapper_is_its_parts_and_what_it_knows() -> None:
    same = wrapped(1, 2)
    assert wrapped(1, 2, device="cuda:0") == same
    assert wrapped(1, 2, block=[1, 4]) == same  # as some loaders give it back
    others = [wrapped(1, 3), wrapped(1, 2, bits=4), wrapped(1, 2, block=(1, 8)), wrapped(1, 2, extra={"scale": 2})]
    assert len({same, *others}) == 5


def test_equal_codes_of_two_types_are_two_weights() -> None:
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGMLQuantizationType

    codes = torch.arange(18, dtype=torch.uint8)[None]  # one block of either
    types = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.IQ4_NL)
    assert len({fingerprint(Holder(GGUFParameter(codes, quant_type=t))) for t in types}) == 2


def test_the_fingerprint_of_a_plain_model_is_that_of_earlier_statistics() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])
    bias, weight = (np.array(values, np.float32).tobytes() for values in ([3], [1, 2]))
    text = b"bias torch.float32 (1,)" + bias + b"weight torch.float32 (1, 2)" + weight
    assert fingerprint(layer) == hashlib.sha256(text).hexdigest()[:16]
