"""Integers on a GPU: seconds, memory and fidelity of ptqd's W8A8 and W4A8 beside bfloat16, eager and compiled.

    python bench/gpu.py                # 8 minutes at most on a GPU
    python bench/gpu.py --device cpu --rounds 1 --case "fashion-ldm, batch 32"   # that it runs, where there is none

Pipelines are those of bench/engines.py, and a UNet of Stable Diffusion XL's configuration with random weights, one call
at 1024 x 1024 pixels. Each way is timed in turn, round by round; the ratio is of medians, to bfloat16 compiled. Peak
memory is what torch allocated on the device during a round. PSNR is of the samples against the simulation's, of the
same seeds.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from large import CONFIG

import ptqd
from engines import CASES as PIPELINES
from engines import quantized as quantize_case
from ptqd.diffusion import denoiser_name, run_batch, with_components
from ptqd.engines.export import export
from ptqd.engines.integer_layers import with_integer_layers
from ptqd.engines.torchao import to_torchao
from ptqd.errors import PtqdError

LIMIT = 480.0  # seconds for everything
SDXL = "SDXL's UNet, 1024 x 1024, one call"


def sdxl() -> tuple[Any, ptqd.Sampling]:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    made: Any = StableDiffusionXLPipeline
    vae = AutoencoderKL(block_out_channels=(32,) * 4, **kinds)
    unet = UNet2DConditionModel(**CONFIG).eval()
    pipe = made(vae, None, None, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False)
    generator = torch.Generator().manual_seed(1)
    call = {
        "prompt_embeds": torch.randn(1, 77, 2048, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 1280, generator=generator),
        "guidance_scale": 1.0,
    }
    return pipe, ptqd.Sampling(1, 0.0, 1, 1, call=call)


def compiled(pipe: Any) -> Any:
    name = denoiser_name(pipe)
    getattr(pipe, name).compile(fullgraph=False)
    return pipe


def in_half(pipe: Any, device: str) -> Any:
    import copy

    name = denoiser_name(pipe)
    model = copy.deepcopy(getattr(pipe, name)).to(device=device, dtype=torch.bfloat16)
    return with_components(pipe, **{name: _Half(model)})


class _Half(torch.nn.Module):
    """A denoiser that is called in bfloat16, by a pipeline of float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.dtype = model, model.config, torch.float32
        self.add_embedding = getattr(model, "add_embedding", None)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from torch.utils._pytree import tree_map_only

        def cast(dtype: torch.dtype) -> Callable[[Any], Any]:
            return lambda tree: tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)

        result = self.model(*cast(torch.bfloat16)(args), **cast(torch.bfloat16)(kwargs))
        return cast(torch.float32)(result)


def psnr(found: torch.Tensor, want: torch.Tensor) -> float:
    error = float((found.float() - want.float()).square().mean())
    span = float(want.max() - want.min())
    return float("inf") if error == 0 else 10 * float(torch.log10(torch.tensor(span**2 / error)))


class Ways:
    """The ways of one pipeline, and what they took."""

    def __init__(self, device: str, run: ptqd.Sampling, rounds: int) -> None:
        self.device, self.run, self.rounds = device, run, rounds
        self.ways: dict[str, Any] = {}

    def add(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self.ways[name] = make()
        except (PtqdError, ImportError, RuntimeError, NotImplementedError) as error:
            print(f"  {name:32s} not run: {' '.join(str(error).split())[:110]}", flush=True)

    def once(self, pipe: Any) -> torch.Tensor:
        count = min(self.run.batch, self.run.samples)
        return torch.as_tensor(run_batch(pipe, self.run, range(count), "latent")).cpu()

    def measure(self, reference: str, simulation: str) -> None:
        spent: dict[str, list[float]] = {name: [] for name in self.ways}
        peaks: dict[str, int] = dict.fromkeys(self.ways, 0)
        outputs: dict[str, torch.Tensor] = {}
        for round_ in range(self.rounds + 1):
            for name, pipe in list(self.ways.items()):
                if self.device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                try:
                    outputs[name] = self.once(pipe)
                except Exception as error:  # of a compiler, or a kernel: it is said, and the others go on
                    print(f"  {name:32s} failed: {' '.join(str(error).split())[:110]}", flush=True)
                    del self.ways[name]
                    continue
                if self.device == "cuda":
                    torch.cuda.synchronize()
                    peaks[name] = torch.cuda.max_memory_allocated()
                if round_:
                    spent[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(spent[name]) for name in self.ways if spent[name]}
        for name, median in medians.items():
            ratio = f"{medians[reference] / median:5.2f} x" if reference in medians else "    -  "
            exact = f"{psnr(outputs[name], outputs[simulation]):6.1f} dB" if simulation in outputs else ""
            memory = f"{peaks[name] / 1e6:9,.0f} MB" if peaks[name] else ""
            print(f"  {name:32s} {median:8.3f} s  {ratio} as fast as {reference}  {memory}  {exact}", flush=True)


def case(name: str, device: str, rounds: int) -> None:
    if name == SDXL:
        full, run = sdxl()
    else:
        make, run = PIPELINES[name]
        full = make()
    print(f"{name}: {run.steps} steps", flush=True)
    full.set_progress_bar_config(disable=True)
    values = {**ptqd.Recipe.parse("w8a8").to_dict(), "calibration_samples": 1}
    values["weights"]["range"] = values["activations"]["range"] = "minmax"
    full = full.to(device)
    simulated: dict[str, Any] = {}
    for text in ("w8a8", "w4a8"):
        if name == SDXL:
            values["weights"]["bits"] = int(text[1])
            simulated[text] = ptqd.quantize(full, ptqd.Recipe.from_dict(values), run)
        else:
            simulated[text] = quantize_case(full, text, run)
    ways = Ways(device, run, rounds)
    ways.add("bfloat16", lambda: in_half(full, device))
    ways.add("bfloat16 compiled", lambda: compiled(in_half(full, device)))
    ways.add("W8A8 simulated", lambda: simulated["w8a8"])
    ways.add("W8A8 int_mm compiled", lambda: compiled(with_integer_layers(simulated["w8a8"])[0]))
    ways.add("W8A8 triton compiled", lambda: compiled(with_integer_layers(simulated["w8a8"], "triton")[0]))
    ways.add("W4A8 triton compiled", lambda: compiled(with_integer_layers(simulated["w4a8"], "triton")[0]))
    ways.add(
        "W8A8 torchao compiled",
        lambda: compiled(to_torchao(simulated["w8a8"].to("cpu"), run, "int8")[0].to(device)),
    )
    simulated["w8a8"].to(device)
    if device == "cuda" and find_spec("onnxruntime") is not None:
        import tempfile
        from pathlib import Path

        def onnx() -> Any:
            folder = Path(tempfile.mkdtemp())
            export(simulated["w8a8"], run, "onnxruntime", folder, others="none", provider="cuda")
            return ptqd.load(folder).to(device)

        ways.add("W8A8 ONNX Runtime CUDA", onnx)
        simulated["w8a8"].to(device)
    ways.measure("bfloat16 compiled", "W8A8 simulated")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=[*PIPELINES, SDXL])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch knows; --device cpu shows that the command runs")
    card = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{card}; torch {torch.__version__}; {options.rounds} rounds")
    started = time.perf_counter()
    for name in [options.case] if options.case else [*PIPELINES, SDXL]:
        if time.perf_counter() - started > LIMIT * 0.8:
            print(f"{name}: left out, {LIMIT:.0f} seconds are nearly over")
            continue
        case(name, options.device, options.rounds)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
