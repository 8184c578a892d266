"""Converting CompVis' checkpoints: outputs against the original code's, and time and peak memory at full size.

python bench/convert.py outputs FOLDER    # NAME.small.yaml, .safetensors and .io.safetensors of the original code
python bench/convert.py sizes             # random checkpoints of the published names and shapes; 10 GB of disk
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from ptqd.diffusion.compvis import convert, save_converted
from ptqd.loading import load
from ptqd.zoo import CONFIGS

SHAPES = Path(__file__).parent.parent / "tests" / "data" / "ldm"
NAMES = ("ldm4-imagenet", "ldm4-bedrooms", "ldm8-churches")


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference against the largest value."""
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def outputs(folder: Path) -> None:
    for name in NAMES:
        with TemporaryDirectory() as out:
            save_converted(convert(folder / f"{name}.small.safetensors", folder / f"{name}.small.yaml"), Path(out))
            pipe: Any = load(out)
        io = load_file(folder / f"{name}.small.io.safetensors")
        given = {}
        if "class_labels" in io:
            given = {"encoder_hidden_states": pipe.class_embedder(io["class_labels"])}
        found = {"denoiser": apart(pipe.unet(io["unet.x"], io["unet.t"], **given).sample, io["unet.eps"])}
        latents = io["first_stage.z"] / pipe.vae.config.scaling_factor
        found["decoder"] = apart(pipe.vae.decode(latents).sample, io["first_stage.decoded"])
        encoded = pipe.vae.encode(io["first_stage.image"])
        if "first_stage.prequant" in io:
            found["encoder"] = apart(encoded.latents, io["first_stage.prequant"])
            found["codebook"] = apart(pipe.vae.quantize(latents)[0], io["first_stage.quantized"])
        else:
            found["encoder's mean"] = apart(encoded.latent_dist.mean, io["first_stage.encoded_mean"])
            found["its log variance"] = apart(encoded.latent_dist.logvar, io["first_stage.encoded_logvar"])
        for steps in (20, 50, 200, 250, 500):
            scheduler = pipe.scheduler
            scheduler.set_timesteps(steps)
            t = scheduler.timesteps.flip(0)
            if not torch.equal(t, io[f"S{steps}.eta1.timesteps"].long()):
                raise SystemExit(f"{name}: other timesteps at {steps} steps")
            before = t - 1000 // steps
            sigmas = torch.stack(
                [scheduler._get_variance(int(a), int(b)) ** 0.5 for a, b in zip(t, before, strict=True)]
            )
            found[f"sigmas, {steps} steps"] = apart(sigmas, io[f"S{steps}.eta1.sigmas"])
        print(f"{name}: largest difference against largest value; timesteps equal")
        for what, value in found.items():
            print(f"  {what:20s} {value:.1e}")


def random_checkpoint(name: str, path: Path) -> None:
    """In a process of its own: a child's peak memory begins at what its parent has."""
    subprocess.run([sys.executable, __file__, "random", str(path), name], check=True)


def make_random(name: str, path: Path) -> None:
    shapes = json.loads((SHAPES / f"{name}.json").read_text())
    state = {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}
    ends = {"ldm8-churches": 0.0155}.get(name, 0.0195)
    state["betas"] = torch.linspace(0.0015**0.5, ends**0.5, 1000, dtype=torch.float64).float() ** 2
    torch.save({"state_dict": state}, path)


def sizes() -> None:
    for name in NAMES:
        with TemporaryDirectory() as folder:
            checkpoint, out = Path(folder) / "model.ckpt", Path(folder) / "out"
            random_checkpoint(name, checkpoint)
            command = [sys.executable, "-m", "ptqd", "convert", str(checkpoint), str(CONFIGS[name]), str(out)]
            before = time.monotonic()
            child = os.posix_spawn(sys.executable, command, dict(os.environ))
            _, status, usage = os.wait4(child, 0)
            if status:
                raise SystemExit(f"{name}: status {status}")
            seconds, peak, size = time.monotonic() - before, usage.ru_maxrss * 1024, checkpoint.stat().st_size
            written = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            shapes = json.loads((SHAPES / f"{name}.json").read_text())
            print(
                f"{name}: {len(shapes)} tensors, checkpoint {size / 1e9:.2f} GB, pipeline {written / 1e9:.2f} GB: "
                f"{seconds:.0f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} x the checkpoint",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("outputs", "sizes", "random"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "sizes":
        sizes()
    elif args.what == "random":
        make_random(args.name, args.folder)
    else:
        outputs(args.folder)


if __name__ == "__main__":
    main()
