"""Train fashion-ldm from scratch: the classifier, the autoencoder, then the UNet on its latents.

    python -m training.train_fashion_ldm classifier  --data DIR --out DIR
    python -m training.train_fashion_ldm autoencoder --data DIR --out DIR
    python -m training.train_fashion_ldm unet        --data DIR --out DIR

Each stage writes a checkpoint as it goes and resumes from it; the log (``STAGE.csv``) holds the loss curve.
Two processor cores need about 10, 20 and 70 minutes.
"""

import argparse
import csv
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from ptqd.metrics import FashionClassifier
from ptqd.pipelines.latent_class import ClassEmbedder, LatentClassPipeline
from training import fashion_mnist

SCHEDULE: dict[str, Any] = {  # LDM-4 on ImageNet
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def new_autoencoder() -> AutoencoderKL:
    """A KL autoencoder with downsampling 4: grey 32 x 32 to 4 x 8 x 8."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def new_unet() -> UNet2DConditionModel:
    """The denoiser: three levels, cross-attention to the class token on the lower two."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=64,
    )


class Run:
    """One stage's folder: a checkpoint that is replaced atomically, and a CSV log that grows."""

    def __init__(self, out: Path, stage: str, columns: tuple[str, ...]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = out / f"{stage}.ckpt"
        self.log_path = out / f"{stage}.csv"
        if not self.checkpoint.exists():
            with self.log_path.open("w", newline="") as f:
                csv.writer(f).writerow(("step", "seconds", *columns))
        self.started = time.monotonic()

    def restore(self, parts: dict[str, Any]) -> int:
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = int(state["step"])
        header, *rows = self.log_path.read_text("utf-8").splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= step]  # what came after is logged again
        self.log_path.write_text("\n".join([header, *kept]) + "\n", "utf-8")
        return step

    def save(self, step: int, parts: dict[str, Any]) -> None:
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({"step": step, **{k: v.state_dict() for k, v in parts.items()}}, temporary)
        temporary.replace(self.checkpoint)

    def log(self, step: int, *values: float) -> None:
        row = (step, f"{time.monotonic() - self.started:.0f}", *(f"{v:.5f}" for v in values))
        with self.log_path.open("a", newline="") as f:
            csv.writer(f).writerow(row)
        print(*row, flush=True)


def trapezoid(step: int, steps: int, warmup: int = 200, cooldown: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, constant, linear cool-down over the last ``cooldown`` of the steps."""
    return min(1.0, (step + 1) / warmup, max(0.0, steps - step) / (cooldown * steps))


def train_classifier(args: argparse.Namespace) -> None:
    images, labels = fashion_mnist.load(args.data, "train")
    test_images, test_labels = fashion_mnist.load(args.data, "t10k")
    model = FashionClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    run = Run(args.out, "classifier", ("loss", "test_accuracy"))
    parts = {"model": model, "optimizer": optimizer}
    steps = args.steps or 2200
    start, batch, total = run.restore(parts), 128, 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * trapezoid(step, steps)
        index = torch.randint(len(images), (batch,))
        x = images[index]
        flip = torch.rand(batch, 1, 1, 1) < 0.5
        x = torch.where(flip, x.flip(-1), x)
        dy, dx = torch.randint(0, 5, (2,)).tolist()
        x = F.pad(x, (2, 2, 2, 2), value=-1.0)[..., dy : dy + 32, dx : dx + 32]
        loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % 200 == 0:
            model.eval()
            with torch.no_grad():
                guesses = torch.cat([model(x).argmax(1) for x in test_images.split(1000)])
            run.log(step + 1, total / 200, (guesses == test_labels).float().mean().item())
            run.save(step + 1, parts)
            model.train()
            total = 0.0
    model.eval().half().save_pretrained(args.out / "classifier")


def train_autoencoder(args: argparse.Namespace) -> None:
    images, _ = fashion_mnist.load(args.data, "train")
    test_images, _ = fashion_mnist.load(args.data, "t10k")
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(args.out, "autoencoder", ("l1", "kl", "test_psnr"))
    parts = {"model": vae, "optimizer": optimizer}
    steps = args.steps or 3300
    start, batch = run.restore(parts), 32
    sums = [0.0, 0.0]
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * trapezoid(step, steps)
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1 = F.l1_loss(decoded, x)
        kl = posterior.kl().mean() / 256
        loss = l1 + 2.0 * F.mse_loss(decoded, x) + args.kl * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        sums = [sums[0] + l1.item(), sums[1] + kl.item()]
        if (step + 1) % 250 == 0:
            with torch.no_grad():
                x = test_images[:500]
                mse = F.mse_loss(vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1), x)
            run.log(step + 1, sums[0] / 250, sums[1] / 250, 10 * math.log10(4 / mse.item()))
            run.save(step + 1, parts)
            sums = [0.0, 0.0]
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.sample() for x in images[:10_000].split(500)])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 6))
    vae.save_pretrained(args.out / "vae")


def train_unet(args: argparse.Namespace) -> None:
    images, labels = fashion_mnist.load(args.data, "train")
    vae = AutoencoderKL.from_pretrained(args.out / "vae")
    moments = args.out / "latents.pt"
    if not moments.exists():
        with torch.no_grad():
            dists = [vae.encode(x).latent_dist for x in images.split(500)]
        torch.save([torch.cat([d.mean for d in dists]), torch.cat([d.std for d in dists])], moments)
    mean, std = (m * vae.config.scaling_factor for m in torch.load(moments, weights_only=True))

    unet, embedder = new_unet(), ClassEmbedder(len(fashion_mnist.CLASSES), 64)
    both = nn.ModuleDict({"unet": unet, "class_embedder": embedder})
    noise_schedule = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(both.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    run = Run(args.out, "unet", ("loss",))
    parts = {"model": both, "optimizer": optimizer, "ema": ema}
    steps = args.steps or 10000
    start, batch, total = run.restore(parts), 64, 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = 1.2e-3 * trapezoid(step, steps)
        index = torch.randint(len(images), (batch,))
        x0 = mean[index] + std[index] * torch.randn(batch, 4, 8, 8)
        y = torch.where(torch.rand(batch) < 0.1, len(fashion_mnist.CLASSES), labels[index])
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (batch,))
        eps = unet(noise_schedule.add_noise(x0, noise, t), t, encoder_hidden_states=embedder(y)).sample
        loss = F.mse_loss(eps, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        ema.step(both.parameters())
        total += loss.item()
        if (step + 1) % 100 == 0:
            run.log(step + 1, total / 100)
            total = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            run.save(step + 1, parts)
            ema.store(both.parameters())
            ema.copy_to(both.parameters())
            scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)
            LatentClassPipeline(vae, unet, embedder, scheduler).save_pretrained(args.out / "fashion-ldm")
            ema.restore(both.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("classifier", "autoencoder", "unet"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and weights")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: as shipped)")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the autoencoder's KL term per latent")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    {"classifier": train_classifier, "autoencoder": train_autoencoder, "unet": train_unet}[args.stage](args)


if __name__ == "__main__":
    main()
