"""Publish what ``train_fashion_ldm`` trained: weights in half precision, the reference, and the model card.

    python -m training.publish_fashion_ldm --data DIR --trained DIR --card DIR

Writes into the package's ``zoo/weights``; into the card's folder go ``README.md``, ``samples.png``, ``loss.png``,
``metrics.json`` and the training logs.
"""

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn

from ptqd.diffusion import pipeline_fingerprint
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import load_images, sample_images
from ptqd.experiments.report.grids import grid
from ptqd.files import read_json, replacing, write_json, write_text
from ptqd.loading import load, with_scheduler
from ptqd.metrics import FashionClassifier, Features, Metric, Reference, extract
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.run_folder import RunFolder
from ptqd.zoo import CLASSIFIER, MODELS, REFERENCE
from training import fashion_mnist

STAGES = ("classifier", "autoencoder", "unet")


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, C) of images (N, C, H, W) in [-1, 1]."""
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def save_half(module: nn.Module, folder: Path) -> None:
    """Save a diffusers module in half precision, without the path it was loaded from."""
    module.half().save_pretrained(folder)  # type: ignore[operator]
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)
    module.float()


def sampled(model: str, run: Sampling, card: Path, scheduler: str | None = None) -> torch.Tensor:
    """Images of a published model, kept beside the card while it is made."""
    pipe = with_scheduler(load(model), scheduler)
    inputs = {"pipeline": pipeline_fingerprint(pipe), "setting": run.to_dict()}
    path = RunFolder(card / ".samples").stage(
        f"{scheduler or 'own'}-g{run.call.get('guidance_scale', 1)}.safetensors",
        inputs,
        lambda target, scratch: sample_images(pipe, run, target, scratch, title="sampling"),
    )
    return load_images(path)


def draw_losses(trained: Path, path: Path, stages: Sequence[str]) -> None:
    """The training logs, one panel each."""
    figure, axes = plt.subplots(1, len(stages), figsize=(4.4 * len(stages), 3.4), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        rows = list(csv.DictReader((trained / f"{stage}.csv").open()))
        name = "l1" if stage == "autoencoder" else "loss"
        axis.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows])
        axis.set_yscale("log")
        axis.set_title(f"{stage}: {name}")
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3, which="both")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def text_of(metric: Metric, factor: float = 1.0, digits: int = 2) -> str:
    """A value and half its interval's width."""
    return f"{metric.value * factor:.{digits}f} ± {(metric.high - metric.low) / 2 * factor:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST idx files")
    parser.add_argument("--trained", type=Path, required=True, help="folder that train_fashion_ldm wrote")
    parser.add_argument("--card", type=Path, required=True, help="folder for the model card")
    parser.add_argument("--samples", type=int, default=2000, help="judged samples (default: %(default)s)")
    args = parser.parse_args()

    pipe = load(args.trained / "fashion-ldm")
    for name in ("vae", "unet", "class_embedder"):
        save_half(getattr(pipe, name), MODELS["fashion-ldm"] / name)
    pipe.scheduler.save_pretrained(MODELS["fashion-ldm"] / "scheduler")
    shutil.copy(args.trained / "fashion-ldm" / "model_index.json", MODELS["fashion-ldm"])
    save_half(FashionClassifier.from_pretrained(args.trained / "classifier"), CLASSIFIER)
    classifier = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()

    test_images, test_labels = fashion_mnist.load(args.data, "t10k")
    train_images, train_labels = fashion_mnist.load(args.data, "train")
    test: Features = extract(classifier, to_bytes(test_images))
    Reference.of(test, sample=2000).save(REFERENCE)
    reference = Reference.load(REFERENCE)
    accuracy = (test.logits.argmax(1) == test_labels).double().mean().item()

    labels = torch.arange(args.samples) % len(fashion_mnist.CLASSES)
    judged: dict[str, dict[str, Metric]] = {}
    shown: list[torch.Tensor] = []
    for guidance in (1.0, 1.5, 3.0):
        call = {"class_labels": list(range(10)), "guidance_scale": guidance}
        images = sampled("fashion-ldm", Sampling(50, 0.0, args.samples, 100, 0, call), args.card)
        judged[f"guidance {guidance:g}"] = evaluate(images, Evaluator(classifier, reference), labels=labels)
        if guidance == 1.5:
            shown = [images[i * 10 : i * 10 + 10] for i in range(10)]
    real = to_bytes(train_images[: args.samples])
    judged["training images"] = evaluate(real, Evaluator(classifier, reference), labels=train_labels[: args.samples])
    with torch.no_grad():
        vae = load("fashion-ldm").vae
        rebuilt = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in test_images.split(500)])
    psnr = -10 * ((rebuilt.clamp(-1, 1) - test_images) / 2).square().mean().log10().item()
    judged["test images through the autoencoder"] = evaluate(
        to_bytes(rebuilt.clamp(-1, 1)), Evaluator(classifier, reference), labels=test_labels
    )

    with replacing(args.card / "samples.png") as temporary:
        grid(shown).save(temporary, "PNG")
    draw_losses(args.trained, args.card / "loss.png", STAGES)
    for stage in STAGES:
        shutil.copy(args.trained / f"{stage}.csv", args.card / f"{stage}.csv")
    sizes = {
        f.name: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (CLASSIFIER, MODELS["fashion-ldm"])
    }
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("vae", "unet", "class_embedder")
    }
    facts: dict[str, Any] = {
        "samples": args.samples,
        "classifier_test_accuracy": accuracy,
        "autoencoder_test_psnr": psnr,
        "bytes": sizes,
        "parameters": counts,
        "metrics": {what: {name: vars(metric) for name, metric in row.items()} for what, row in judged.items()},
    }
    write_json(args.card / "metrics.json", facts)
    write_text(args.card / "README.md", card_text(facts, judged))
    shutil.rmtree(args.card / ".samples")


def card_text(facts: dict[str, Any], judged: dict[str, dict[str, Metric]]) -> str:
    """The model card."""
    lines = [
        f"| {what} | {text_of(row['class_agreement'], 100, 1)} | {text_of(row['frechet_distance'])} "
        f"| {text_of(row['spatial_frechet_distance'])} | {text_of(row['kernel_distance'], 1000)} |"
        for what, row in judged.items()
    ]
    parameters, sizes = facts["parameters"], facts["bytes"]
    return f"""# fashion-ldm

A class-conditional latent diffusion model, of the shape of LDM-4 on ImageNet, small: a KL autoencoder with
downsampling 4 (1 x 32 x 32 to 4 x 8 x 8, {parameters["vae"] / 1e6:.2f} M parameters), a `UNet2DConditionModel` of three
levels with cross-attention to a class token ({parameters["unet"] / 1e6:.2f} M parameters), eps-prediction, LDM's
scaled-linear schedule (0.0015 to 0.0195), 10 % label dropout for classifier-free guidance. Weights are stored in half
precision: {sizes["fashion-ldm"] / 1e6:.1f} MB, and {sizes["fashion-classifier"] / 1e6:.1f} MB for the classifier.

Trained from scratch on the 60,000 training images of Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747, MIT
licence), padded to 32 x 32, by `training.train_fashion_ldm`; published and judged by `training.publish_fashion_ldm`.
The training logs stand beside this card (`*.csv`).

![samples, one class a column, guidance 1.5, 50 steps](samples.png)

Samples at guidance 1.5, 50 DDIM steps, eta 0, not selected; a column is a class.

![training losses](loss.png)

## How good it is

Judged by an independent classifier trained on the same data ({facts["classifier_test_accuracy"] * 100:.2f} % test
accuracy), which the generator never saw; {facts["samples"]:,} samples at 50 DDIM steps, eta 0, against the 10,000 test
images. Distances are in the classifier's features: they are not Inception FID, sFID or KID. 95 % intervals.

| images | asked-for class % | Frechet distance | spatial Frechet distance | kernel distance x 1000 |
|---|---|---|---|---|
{chr(10).join(lines)}

The autoencoder rebuilds test images at {facts["autoencoder_test_psnr"]:.1f} dB.

Made for measuring what quantization does to a real diffusion model on a small machine.
"""


if __name__ == "__main__":
    main()
