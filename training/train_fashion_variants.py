"""Train the three variants of fashion-ldm from scratch: pixels, a transformer, and flow matching.

    python -m training.train_fashion_variants ddpm --data DIR --out DIR
    python -m training.train_fashion_variants dit  --data DIR --out DIR
    python -m training.train_fashion_variants flow --data DIR --out DIR

``dit`` and ``flow`` work on the latents of the published fashion-ldm's autoencoder. A killed stage resumes from its
checkpoint; the log (``STAGE.csv``) holds the loss curve. One processor core needs about 60, 30 and 30 minutes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from torch import nn

from ptqd.loading import load
from ptqd.pipelines.latent_class import ClassEmbedder, LatentClassPipeline
from training import fashion_mnist
from training.train_fashion_ldm import SCHEDULE, Run, trapezoid

NULL = 1000  # DiTPipeline's null class, whatever the number of classes
COSINE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}

Batch = tuple[torch.Tensor, torch.Tensor]  # clean samples and their labels
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Task:
    """What one stage trains: modules, the loss of a batch, and the pipeline they make."""

    modules: nn.ModuleDict
    draw: Callable[[int], Batch]
    loss: Loss
    pipeline: Callable[[], DiffusionPipeline]
    steps: int
    batch: int
    rate: float


def new_ddpm() -> UNet2DModel:
    """Pixels: four levels, self-attention at 8 x 8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def new_dit() -> DiTTransformer2DModel:
    """Six blocks over 4 x 4 tokens of 2 x 2 latents."""
    return DiTTransformer2DModel(
        num_attention_heads=7,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL,
    )


def new_flow() -> UNet2DConditionModel:
    """fashion-ldm's denoiser, narrower at its lowest level."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=64,
    )


def pixels(data: Path) -> Callable[[int], Batch]:
    """Draws images (n, 1, 32, 32) in [-1, 1]."""
    images, labels = fashion_mnist.load(data, "train")

    def draw(count: int) -> Batch:
        index = torch.randint(len(images), (count,))
        return images[index], labels[index]

    return draw


def latents(data: Path, vae: Any) -> Callable[[int], Batch]:
    """Draws scaled latents (n, 4, 8, 8) from the autoencoder's posteriors."""
    images, labels = fashion_mnist.load(data, "train")
    with torch.no_grad():
        dists = [vae.encode(x).latent_dist for x in images.split(500)]
    mean = torch.cat([d.mean for d in dists]) * vae.config.scaling_factor
    std = torch.cat([d.std for d in dists]) * vae.config.scaling_factor

    def draw(count: int) -> Batch:
        index = torch.randint(len(images), (count,))
        return mean[index] + std[index] * torch.randn(count, *mean.shape[1:]), labels[index]

    return draw


def without_some(labels: torch.Tensor, null: int) -> torch.Tensor:
    """Labels of which one in ten is the null class, for classifier-free guidance."""
    return torch.where(torch.rand(len(labels)) < 0.1, null, labels)


def ddpm(data: Path) -> Task:
    """eps-prediction of pixels, unconditional."""
    unet, schedule = new_ddpm(), DDPMScheduler(**COSINE)

    def loss(x0: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
        return F.mse_loss(unet(schedule.add_noise(x0, noise, t), t).sample, noise)

    modules = nn.ModuleDict({"unet": unet})
    return Task(modules, pixels(data), loss, lambda: DDPMPipeline(unet, schedule), 4300, 32, 1e-3)


def dit(data: Path) -> Task:
    """eps-prediction of latents by a class-conditional transformer."""
    vae, model, schedule = load("fashion-ldm").vae, new_dit(), DDPMScheduler(**SCHEDULE)
    for block in model.transformer_blocks:  # labels are dropped here: a block alone would drop others than the next
        block.norm1.emb.class_embedder.dropout_prob = 0.0

    def loss(x0: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
        noisy = schedule.add_noise(x0, noise, t)
        return F.mse_loss(model(noisy, timestep=t, class_labels=without_some(labels, NULL)).sample, noise)

    def pipeline() -> DiffusionPipeline:
        scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1)
        return DiTPipeline(model, vae, scheduler, id2label=dict(enumerate(fashion_mnist.CLASSES)))

    return Task(nn.ModuleDict({"transformer": model}), latents(data, vae), loss, pipeline, 12000, 64, 8e-4)


def flow(data: Path) -> Task:
    """Velocity prediction along straight paths (Lipman et al., arXiv 2210.02747): v = noise - x0."""
    vae, unet, embedder = load("fashion-ldm").vae, new_flow(), ClassEmbedder(len(fashion_mnist.CLASSES), 64)

    def loss(x0: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise, sigma = torch.randn_like(x0), torch.rand(len(x0))
        s = sigma.view(-1, 1, 1, 1)
        context = embedder(without_some(labels, len(fashion_mnist.CLASSES)))
        v = unet((1 - s) * x0 + s * noise, 1000 * sigma, encoder_hidden_states=context).sample
        return F.mse_loss(v, noise - x0)

    def pipeline() -> DiffusionPipeline:
        return LatentClassPipeline(vae, unet, embedder, FlowMatchEulerDiscreteScheduler())

    modules = nn.ModuleDict({"unet": unet, "class_embedder": embedder})
    return Task(modules, latents(data, vae), loss, pipeline, 8000, 64, 1.2e-3)


STAGES: dict[str, Callable[[Path], Task]] = {"ddpm": ddpm, "dit": dit, "flow": flow}


def train(task: Task, out: Path, stage: str, steps: int) -> None:
    """Train, with an exponential moving average of the weights; write the pipeline it gives beside the checkpoint."""
    parameters = list(task.modules.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
    run = Run(out, stage, ("loss",))
    parts = {"model": task.modules, "optimizer": optimizer, "ema": ema}
    start, total = run.restore(parts), 0.0
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = task.rate * trapezoid(step, steps)
        loss = task.loss(*task.draw(task.batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        total += loss.item()
        if (step + 1) % 100 == 0:
            run.log(step + 1, total / 100)
            total = 0.0
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            run.save(step + 1, parts)
            ema.store(parameters)
            ema.copy_to(parameters)
            task.pipeline().save_pretrained(out / f"fashion-{stage}")
            ema.restore(parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and weights")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: as shipped)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task = STAGES[args.stage](args.data)
    train(task, args.out, args.stage, args.steps or task.steps)


if __name__ == "__main__":
    main()
