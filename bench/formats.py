"""Files for other programs: bytes, memory and seconds of loading, and the error against the simulation.

    python bench/formats.py            # a quarter of an hour of a core, 8 GB

The denoiser is Flux's architecture at its own widths, one block of each kind (0.5 B random weights with outliers), so
that diffusers' own conversion of names applies. Each recipe is the one that its format loses the least of. A file is
read by what does not know ptqd: a plain reader in numpy that computes as ComfyUI does, comfy-kitchen's own layers where
that is installed, and diffusers, which loads GGUF and torchao's safetensors itself, in a process that never imports
ptqd. The error is the output's, of 64 + 32 tokens, relative to the simulation's; beside it stands the simulation's own
against full precision. Memory is the resident set's growth over loading and one call. Linux only.
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

TOKENS, TEXT = 64, 32
READER = """
import sys, time, json, torch, diffusers, psutil
from pathlib import Path
kind, path, calls, out = sys.argv[1:]
call = torch.load(calls, weights_only=True)
before = psutil.Process().memory_info().rss
start = time.perf_counter()
if kind == "gguf":
    model = diffusers.FluxTransformer2DModel.from_single_file(
        path, config=str(Path(path).parent), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32))
else:
    model = diffusers.FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)
loading = time.perf_counter() - start
start = time.perf_counter()
with torch.no_grad():
    output = model(**call)[0]
calling = time.perf_counter() - start
torch.save(output, out)
assert "ptqd" not in sys.modules
print(json.dumps([loading, calling, psutil.Process().memory_info().rss - before]))
"""


def model() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    made = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, :: module.in_features // 4] *= 8  # outliers, in a few inputs
    return made


def call() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.zeros(TOKENS, 3)
    ids[:, 1], ids[:, 2] = torch.arange(TOKENS) // 8, torch.arange(TOKENS) % 8
    return {
        "hidden_states": draw(1, TOKENS, 64),
        "encoder_hidden_states": draw(1, TEXT, 4096),
        "pooled_projections": draw(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def pipeline(transformer: Any) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=16, **kinds)
    made: Any = FluxPipeline
    return made(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.float() - want.float()).norm() / want.float().norm())


def size(path: Path) -> float:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


def by_diffusers(
    kind: str, path: Path, folder: Path, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[float]]:
    torch.save(given, folder / "call.pt")
    words = [kind, str(path), str(folder / "call.pt"), str(folder / "out.pt")]
    done = subprocess.run([sys.executable, "-c", READER, *words], check=True, stdout=subprocess.PIPE, text=True)
    return torch.load(folder / "out.pt", weights_only=True), json.loads(done.stdout.strip().splitlines()[-1])


def with_read_layers(full: Any, path: Path, *, kitchen: bool) -> Any:
    """Full precision's network, its layers those of a ComfyUI file: by the tests' numpy reader, or comfy-kitchen's."""
    import numpy as np

    from comfy_reader import computed, read_comfy
    from ptqd.engines.native_names import SWAPPED, native_names

    layers = read_comfy(path)
    modules = dict(full.named_modules())
    for theirs, ours in native_names(full).items():
        if theirs not in layers:
            continue
        codes, scale, marker = layers[theirs]
        if theirs == SWAPPED:
            codes, scale = (np.concatenate(np.split(x, 2)[::-1]) for x in (codes, scale))
        start = 0
        for name in ours:
            rows = slice(start, start + modules[name].out_features)
            start = rows.stop
            own = (codes[rows], scale[rows], marker)
            if kitchen:
                modules[name].forward = _kitchen(modules[name], own)
            else:
                modules[name].forward = _numpy(modules[name], own, computed)
    return full


def _numpy(layer: Any, own: Any, computed: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.from_numpy(computed(x.reshape(-1, x.shape[-1]).numpy(), *own)).view(*x.shape[:-1], -1)
        return y if layer.bias is None else y + layer.bias

    return forward


def _kitchen(layer: Any, own: Any) -> Any:
    from comfy_kitchen import tensor as kitchen

    codes, scale, marker = own
    narrow = marker["format"] == "convrot_w4a4"
    kind = kitchen.TensorCoreConvRotW4A4Layout if narrow else kitchen.TensorWiseINT8Layout
    given = {key: value for key, value in marker.items() if key in kind.Params.__dataclass_fields__}
    stored = torch.from_numpy((codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4) if narrow else codes.copy())
    scales = torch.from_numpy(scale.copy()) if narrow else torch.from_numpy(scale.copy()).view(-1, 1)
    params = kind.Params(scale=scales, orig_dtype=torch.float32, orig_shape=tuple(codes.shape), **given)
    weight = kitchen.QuantizedTensor(stored, kind.__name__, params)
    return lambda x: torch.nn.functional.linear(x, weight, layer.bias)


def compare(full: Any, path: Path, given: dict[str, torch.Tensor], want: torch.Tensor, exact: torch.Tensor) -> None:
    """A ComfyUI file as its readers compute it."""
    for kitchen, reader in ((False, "numpy reader"), (True, "comfy-kitchen")):
        if not kitchen or find_spec("comfy_kitchen") is not None:
            with torch.no_grad():
                output = with_read_layers(copy.deepcopy(full), path, kitchen=kitchen)(**given)[0]
            off = f"{error(output, want):.2%} off the simulation, {error(output, exact):.1%} off full precision"
            print(f"{'':8s} {reader}: {off}", flush=True)


def main() -> None:
    import ptqd
    from ptqd import Recipe, Sampling
    from ptqd.quantization.sites import activation_quantizers

    full, given = model(), call()
    size_full = sum(p.numel() for p in full.parameters()) * 4 / 1e6
    print(f"Flux, one block of each kind: {size_full:,.0f} MB in float32; torch {torch.__version__}", flush=True)
    run = Sampling(1, 0.0, 1, 1, call={
        "prompt_embeds": given["encoder_hidden_states"],
        "pooled_prompt_embeds": given["pooled_projections"],
        "height": 128,
        "width": 128,
    })  # fmt: skip
    with torch.no_grad():
        exact = full(**given)[0]
    cases = (
        ("comfy", "w8a8-comfy"),
        ("comfy", "w4a4-comfy-convrot"),
        ("gguf", "w8a16-g32"),
        ("gguf", "w4a16-g32"),
        ("torchao", "w8a8"),
    )
    for kind, text in cases:
        values = {**Recipe.parse(text).to_dict(), "calibration_samples": 1}
        values["weights"]["range"] = values["activations"]["range"] = "minmax"
        quantized = ptqd.quantize(pipeline(full), Recipe.from_dict(values), run)
        transformer: Any = quantized.transformer
        if kind == "gguf":
            for _, quantizer in activation_quantizers(transformer):
                quantizer.bypass()
        with torch.no_grad():
            want = transformer(**given)[0]
        own = f"simulation {error(want, exact):.1%} off full precision"
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            start = time.perf_counter()
            if kind == "torchao":
                ptqd.export(quantized, run, "torchao", folder / "ao", others="none")
                path, what = folder / "ao" / "transformer", "safetensors"
            else:
                path = folder / f"model.{'safetensors' if kind == 'comfy' else 'gguf'}"
                written = ptqd.export_checkpoint(quantized, kind, path)  # type: ignore[arg-type]
                forms = [form for _, form in written.quantized]
                what = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
                what += f", {len(written.floating)} in floating point"
            seconds = time.perf_counter() - start
            print(f"{kind:8s} {text:20s} {size(path):6,.0f} MB written in {seconds:.1f} s ({what}); {own}", flush=True)
            if kind == "comfy":
                compare(full, path, given, want, exact)
                if len(dict.fromkeys(forms)) > 1:
                    print(f"{'':8s} (layers stored in 8 bits have activations of 8 bits there, of 4 in the simulation)")
                continue
            if kind == "gguf":
                full.save_config(folder)  # without what only ptqd knows
            output, (loading, calling, held) = by_diffusers(kind, path, folder, given)
            print(
                f"{'':8s} diffusers alone: loaded in {loading:.1f} s, called in {calling:.1f} s, {held / 1e6:,.0f} MB "
                f"more; {error(output, want):.2%} off the simulation, {error(output, exact):.1%} off full precision",
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    main()
