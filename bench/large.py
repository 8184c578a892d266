"""Quantizing models of full size in little memory, and loading what was saved.

    python bench/large.py FOLDER [--only NAME]     # hours of one core, 12 GB of disk, 10 GB of memory

A UNet of Stable Diffusion XL's configuration, 2.6 B random weights in bfloat16, in shards of safetensors, is quantized
on one image of 256 x 256 pixels at 2 steps, without guidance: rounded to nearest, with SmoothQuant of the exponent 0.5,
and with GPTQ on 2 inputs. Each is a process of its own, as is loading what it wrote and calling it once. Reported is
the most that the process had in memory, pages of the mapped files included (``VmHWM``), and of its own (``RssAnon``).
GPTQ is killed in the middle and run again, and has to give the same files. The pipeline in FOLDER is made once. Linux
only.
"""

import argparse
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ptqd
from ptqd import Recipe, Sampling
from ptqd.quantization.budget import release_memory

SIZE, ROWS = 256, 2
RECIPES = {"nearest": "w4a8", "SmoothQuant": "w4a8-smooth", "GPTQ": "w4a8-gptq"}
CONFIG: dict[str, Any] = {  # of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}


def make(folder: Path) -> None:
    """Write the pipeline, its text encoders left out: it is given embeddings."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    unet = UNet2DConditionModel(**CONFIG)
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    made: Any = StableDiffusionXLPipeline
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe = made(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    pipe.save_pretrained(folder, max_shard_size="2GB")


def run() -> Sampling:
    generator = torch.Generator().manual_seed(1)
    call = {
        "prompt_embeds": torch.randn(1, 77, 2048, generator=generator).bfloat16(),
        "pooled_prompt_embeds": torch.randn(1, 1280, generator=generator).bfloat16(),
        "guidance_scale": 1.0,
        "height": SIZE,
        "width": SIZE,
    }
    return Sampling(2, 0.0, 1, 1, 0, call)


def recipe(name: str) -> Recipe:
    """Of one sample, two rows, and ranges from the least to the largest: their search is not what is looked at."""
    values = {**Recipe.parse(RECIPES[name]).to_dict(), "calibration_samples": 1}
    values["weights"]["range"] = values["activations"]["range"] = "minmax"
    given = {"gptq": {"inputs": ROWS}, "smooth": {"alpha": 0.5}}
    values["methods"] = [method | given[method["name"]] for method in values["methods"]]
    return Recipe.from_dict(values)


class Watch(threading.Thread):
    """The most memory of its own that the process had, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, status("RssAnon"))
            time.sleep(0.05)


def status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def quantize(model: Path, name: str, out: Path, scratch: Path) -> None:
    """In a process of its own."""
    watch = Watch()
    pipe, loading = seconds(lambda: ptqd.load(model, dtype=torch.bfloat16))
    quantized, taken = seconds(
        lambda: ptqd.quantize(pipe, recipe(name), run(), scratch=scratch, progress=bool(os.environ.get("PROGRESS")))
    )
    _, saving = seconds(lambda: quantized.save_pretrained(out))
    print(json.dumps({"seconds": [loading, taken, saving], "peak": status("VmHWM"), "own": watch.most}))


def load(out: Path) -> None:
    """In a process of its own."""
    watch = Watch()
    before = status("VmRSS")
    pipe, loading = seconds(lambda: ptqd.load(out, dtype=torch.bfloat16))
    peak = status("VmHWM")
    arguments = run().call
    x = torch.randn(1, 4, SIZE // 8, SIZE // 8).bfloat16()
    added = {"text_embeds": arguments["pooled_prompt_embeds"], "time_ids": torch.zeros(1, 6).bfloat16()}
    unet: Any = pipe.unet
    with torch.no_grad():
        _, calling = seconds(lambda: unet(x, 500, arguments["prompt_embeds"], added_cond_kwargs=added))
    gc.collect()
    release_memory()  # what the C library would use again
    print(
        json.dumps(
            {
                "seconds": [loading, calling],
                "peak": peak,
                "held": status("VmRSS") - before,
                "own": watch.most,
                "most": status("VmHWM"),
            }
        )
    )


def process(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def digest(folder: Path) -> str:
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("unet/*.safetensors"))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("unet/*.safetensors")) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=RECIPES)
    options = parser.parse_args()
    model = options.folder / "model"
    if not (model / "model_index.json").is_file():
        subprocess.run([sys.executable, __file__, "make", str(model)], check=True)
    print(f"weights in bfloat16: {size(model):.2f} GB on disk; torch {torch.__version__}, {SIZE} x {SIZE} pixels")
    for name in [options.only] if options.only else RECIPES:
        out, scratch = options.folder / name, options.folder / f"scratch-{name}"
        found = process("quantize", model, name, out, scratch)
        loading, taken, saving = found["seconds"]
        print(
            f"{name:12s} peak {found['peak'] / 1e9:5.2f} GB, of its own {found['own'] / 1e9:5.2f} GB; loaded in "
            f"{loading:.1f} s, quantized in {taken:.0f} s, saved in {saving:.1f} s: {size(out):.2f} GB",
            flush=True,
        )
        found = process("load", out)
        loading, calling = found["seconds"]
        print(
            f"{'':12s} loaded in {loading:.1f} s, peak {found['peak'] / 1e9:5.2f} GB; a call of {calling:.1f} s leaves "
            f"{found['held'] / 1e9:5.2f} GB more than before, and had at most {found['own'] / 1e9:.2f} GB of its own",
            flush=True,
        )
    if options.only in (None, "GPTQ"):
        killed(model, options.folder)


def killed(model: Path, folder: Path) -> None:
    """GPTQ, killed once it has kept some layers."""
    out, scratch = folder / "killed", folder / "scratch-killed"
    command = [sys.executable, __file__, "quantize", str(model), "GPTQ", str(out), str(scratch)]
    worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while worker.poll() is None and len(list(scratch.glob("*/gptq/layers-*.safetensors"))) < 3:
        time.sleep(1)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    found = process("quantize", model, "GPTQ", out, scratch)
    same = digest(out) == digest(folder / "GPTQ")
    print(
        f"GPTQ, killed after three minutes of rounding, went on for {found['seconds'][1]:.0f} s; peak "
        f"{found['peak'] / 1e9:.2f} GB, of its own {found['own'] / 1e9:.2f} GB; "
        f"{'the same files' if same else 'OTHER FILES'}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif sys.argv[1] == "quantize":
        quantize(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1] == "load":
        load(Path(sys.argv[2]))
    else:
        main()
