"""Publish what ``train_fashion_variants`` trained: weights in half precision, and a model card each.

    python -m training.publish_fashion_variants ddpm --data DIR --trained DIR --card DIR

Writes into the package's ``zoo/weights``; into the card's folder go ``README.md``, ``samples.png``, ``loss.png``,
``metrics.json`` and the training log.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqd.diffusion.sampling import Sampling
from ptqd.experiments.report.grids import grid
from ptqd.files import read_json, replacing, write_json, write_text
from ptqd.loading import load
from ptqd.metrics import FashionClassifier, Metric, Reference
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.zoo import CLASSIFIER, MODELS, REFERENCE
from training import fashion_mnist
from training.publish_fashion_ldm import draw_losses, sampled, save_half, text_of, to_bytes


@dataclass(frozen=True)
class Kind:
    """What a card says of a model, and how it is judged."""

    what: str
    runs: Mapping[str, tuple[str | None, dict[str, Any]]]  # by name: a scheduler to use, and arguments of the call


LABELS = list(range(10))
GUIDED: dict[str, tuple[str | None, dict[str, Any]]] = {
    f"guidance {g:g}": (None, {"class_labels": LABELS, "guidance_scale": g}) for g in (1.0, 1.5, 3.0)
}
KINDS = {
    "ddpm": Kind(
        "An unconditional pixel-space diffusion model: a `UNet2DModel` of four levels (24, 48, 96 and 96 channels) on "
        "1 x 32 x 32, with self-attention at 8 x 8; eps-prediction, a cosine schedule, clipped samples. "
        "It loads as a `DDPMPipeline`.",
        {"DDPM, 50 steps": (None, {}), "DDIM, 50 steps": ("DDIMScheduler", {})},
    ),
    "dit": Kind(
        "A class-conditional transformer (`DiTTransformer2DModel`, six blocks of width 112 with seven heads, over "
        "4 x 4 tokens) on fashion-ldm's latents, with a copy of its autoencoder; eps-prediction, LDM's scaled-linear "
        "schedule, 10 % label dropout. It loads as a `DiTPipeline`, whose null class is number 1000, so the embedding "
        "has 1001 entries, of which eleven are used.",
        GUIDED,
    ),
    "flow": Kind(
        "Flow matching on fashion-ldm's latents, with a copy of its autoencoder: a `UNet2DConditionModel` like its own "
        "but narrower (32, 64, 80 channels) predicts the velocity `noise - x0` along straight paths (arXiv "
        "2210.02747), class-conditional, 10 % label dropout. It samples with `FlowMatchEulerDiscreteScheduler`.",
        GUIDED,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four Fashion-MNIST idx files")
    parser.add_argument("--trained", type=Path, required=True, help="folder that train_fashion_variants wrote")
    parser.add_argument("--card", type=Path, required=True, help="folder for the model card")
    parser.add_argument("--samples", type=int, default=1000, help="judged samples (default: %(default)s)")
    args = parser.parse_args()
    name, kind = f"fashion-{args.kind}", KINDS[args.kind]
    pipe = load(args.trained / name)
    target = MODELS[name]
    modules = {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}
    for part, module in modules.items():
        save_half(module, target / part)
    pipe.scheduler.save_pretrained(target / "scheduler")
    index = read_json(args.trained / name / "model_index.json")
    if args.kind == "dit":
        index["id2label"] = dict(enumerate(fashion_mnist.CLASSES))
    write_json(target / "model_index.json", index)

    classifier, reference = FashionClassifier.from_pretrained(CLASSIFIER).float().eval(), Reference.load(REFERENCE)
    judged: dict[str, dict[str, Metric]] = {}
    shown: torch.Tensor | None = None
    for what, (scheduler, call) in kind.runs.items():
        images = sampled(name, Sampling(50, 0.0, args.samples, 100, 0, call), args.card, scheduler)
        labels = torch.arange(args.samples) % len(LABELS) if call else None
        judged[what] = evaluate(images, Evaluator(classifier, reference), labels=labels)
        shown = images if shown is None or call.get("guidance_scale") == 1.5 else shown
    train_images, train_labels = fashion_mnist.load(args.data, "train")
    real = to_bytes(train_images[: args.samples])
    judged["training images"] = evaluate(real, Evaluator(classifier, reference), labels=train_labels[: args.samples])
    assert shown is not None
    with replacing(args.card / "samples.png") as temporary:
        grid([shown[i * 10 : i * 10 + 10] for i in range(10)]).save(temporary, "PNG")
    draw_losses(args.trained, args.card / "loss.png", (args.kind,))
    shutil.copy(args.trained / f"{args.kind}.csv", args.card)
    facts: dict[str, Any] = {
        "samples": args.samples,
        "bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        "parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()},
        "metrics": {what: {key: vars(metric) for key, metric in row.items()} for what, row in judged.items()},
    }
    write_json(args.card / "metrics.json", facts)
    write_text(args.card / "README.md", card_text(name, kind, facts, judged))
    shutil.rmtree(args.card / ".samples")


def card_text(name: str, kind: Kind, facts: dict[str, Any], judged: dict[str, dict[str, Metric]]) -> str:
    """The model card."""
    guided = any(call for _, call in kind.runs.values())
    lines = [
        f"| {what} | {text_of(row['class_agreement'], 100, 1) if 'class_agreement' in row else ''} "
        f"| {text_of(row['frechet_distance'])} | {text_of(row['spatial_frechet_distance'])} "
        f"| {text_of(row['kernel_distance'], 1000)} |"
        for what, row in judged.items()
    ]
    counts = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in facts["parameters"].items())
    shown = (
        "guidance 1.5, 50 DDIM steps, eta 0, not selected; a column is a class"
        if guided
        else ("50 DDPM steps, not selected")
    )
    if name == "fashion-flow":
        shown = shown.replace("50 DDIM steps, eta 0", "50 Euler steps")
    return f"""# {name}

{kind.what}

Parameters: {counts}. Weights are stored in half precision: {facts["bytes"] / 1e6:.1f} MB.

Trained from scratch on the 60,000 training images of Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747, MIT
licence), padded to 32 x 32, by `training.train_fashion_variants`; published and judged by
`training.publish_fashion_variants`. The training log stands beside this card.

![samples](samples.png)

Samples at {shown}.

![training loss](loss.png)

## How good it is

Judged by an independent classifier trained on the same data, which the generator never saw; {facts["samples"]:,}
samples at 50 steps, against the 10,000 test images. Distances are in the classifier's features: they are not Inception
FID, sFID or KID. 95 % intervals.

| images | asked-for class % | Frechet distance | spatial Frechet distance | kernel distance x 1000 |
|---|---|---|---|---|
{chr(10).join(lines)}

Made for measuring what quantization does to a real diffusion model on a small machine.
"""


if __name__ == "__main__":
    main()
