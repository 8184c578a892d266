"""Every way to quantize, on every embedded model: the same seeds, the same calibration samples.

    python bench/quantizers.py --out DIR --models fashion-ldm      # a cell: 1 to 6 minutes of a core, ddpm 25
    python bench/quantizers.py --out DIR --table

Rows: rounding to nearest; PTQ4DM's, Q-Diffusion's and TFMQ-DM's published recipes as ptqd recipes (what is theirs:
which steps are calibrated on, affine weights, split shortcuts, softmax at 16 bits, exact time embeddings, block
reconstruction); on the transformer SmoothQuant, GPTQ and SVDQuant too; ptqd's default, also with affine weights; at
W8A8 the quantizers of other packages (bench/others.py, which says what each of them leaves in full precision), and
ours of just what torchao quantizes.
Judged by PSNR to the full-precision images of the same seeds, and by the Frechet distance to the test images in the
classifier's features: its value, and how far it is above full precision's, in percent, with the bootstrap's interval
over samples, drawn for both together. "to FP" is the Frechet distance to the full-precision images. Rows with a
correction show what the sampler's corrections add to a quantizer. The same command resumes; cells can be shared among
processes by --models and --rows.
"""

import argparse
import dataclasses
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from plans import above, plus_minus

import ptqd
from ptqd.diffusion.sampling import Sampling
from ptqd.experiments import load_images, sample_images
from ptqd.files import read_json, write_json
from ptqd.loading import with_scheduler
from ptqd.metrics import (
    FashionClassifier,
    Reference,
    extract,
    frechet_statistic,
    mean_metric,
    paired_frechet_statistic,
    psnr,
)
from ptqd.noise.stats import NoiseStats
from ptqd.quantization import run_cost
from ptqd.quantization.recipe import Recipe, Rule
from ptqd.run_folder import RunFolder
from ptqd.zoo import CLASSIFIER, REFERENCE

CALIBRATION = 64  # samples, whole trajectories, for every row
MEASURED = 64
CALL = {"class_labels": list(range(10)), "guidance_scale": 1.5}
MODELS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "fashion-ldm": (None, CALL),
    "fashion-ddpm": (None, {}),
    "fashion-flow": (None, CALL),
    "fashion-dit": (None, CALL),
}
PUBLISHED = ("ptq4dm", "qdiffusion", "tfmq")
TRANSFORMER = ("dynamic", "smooth", "gptq", "smooth-gptq-dynamic", "svd", "svd-gptq-dynamic", "svd-best")
OTHERS = ("torchao", "quanto", "nncf", "onnxruntime-exact")
ABLATION = ("split", "unclipped", "time", "steps8", "dynamic", "smooth", "svd", "gptq", "adaround", "brecq", "distill")
TOGETHER = ("split-unclipped", "split-unclipped-time", "smooth-gptq-distill", "svd-best")
BESIDE = ("smooth", "rotate", "svd16x8", "rotate-best", "svd16x8-best", "svd8x8-best", "svd16x4-best")
COHERENT = ("split cnc+bc", "steps8 cnc+bc")
CORRECTIONS = ("cnc+bc", "auto")
ONE_BY_ONE = ("*conv_shortcut", "*attentions.*proj_in", "*attentions.*proj_out")  # as in diffusers' UNets
LIKE_TORCHAO = "w8a8-like-torchao"
OWN = {
    LIKE_TORCHAO: dataclasses.replace(
        Recipe.parse("w8a8-gptq-dynamic"),
        attention=False,
        rules=(
            Rule("*", type="conv", skip=True, optional=True),
            *(Rule(name, type="conv", optional=True) for name in ONE_BY_ONE),
        ),
    )
}


def rows_of(model: str) -> list[str]:
    """The rows of a model's table: recipe, or package at W8A8, and a correction after a blank."""
    rows = ["w8a8", "w8a8-dynamic", "w8a8-best", LIKE_TORCHAO, *(f"w8a8 {package}" for package in OTHERS)]
    extra = TRANSFORMER if model == "fashion-dit" else ()
    for bits in ("w4a8", "w4a4"):
        words = ("affine", *PUBLISHED, *extra, "best", "best-affine", *(BESIDE if bits == "w4a4" else ()))
        rows += [bits, *(f"{bits}-{word}" for word in words)]
        rows += [f"{recipe} {correction}" for recipe in (bits, f"{bits}-best") for correction in CORRECTIONS]
    alone = [f"w4a4-{word}" for word in (*ABLATION, *TOGETHER, *COHERENT)] if model == "fashion-ldm" else []
    return list(dict.fromkeys([*rows, "w3a8-best", *alone]))


class Bench:
    def __init__(self, model: str, folder: Path, samples: int) -> None:
        scheduler, call = MODELS[model]
        self.folder = RunFolder(folder / model)
        self.pipe = with_scheduler(ptqd.load(model), scheduler)
        self.run = Sampling(20, 0.0, samples, 100, call=call)
        self.facts = {"samples": samples, "model": model}

    def quantized(self, recipe: str) -> Any:
        """The quantized pipeline; made once, its time and memory noted."""

        wanted = dataclasses.replace(OWN.get(recipe) or Recipe.parse(recipe), calibration_samples=CALIBRATION)

        def build(path: Path, scratch: Path) -> None:
            before = time.monotonic()
            ptqd.quantize(self.pipe, wanted, self.run.replace(batch=32), scratch=scratch).save_pretrained(path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            facts = {"seconds": time.monotonic() - before, "peak": peak, "threads": torch.get_num_threads()}
            write_json(path / "made.json", facts)

        return ptqd.load(self.folder.stage(f"{recipe}/quantized", {"recipe": wanted.to_dict()}, build))

    def made(self, row: str) -> Any:
        """The pipeline of a row."""
        recipe, _, more = row.partition(" ")
        if more in OTHERS:
            from others import quantize_with

            return quantize_with(more, self.pipe, self.run.replace(batch=32), CALIBRATION)
        quantized = self.quantized(recipe)
        if not more:
            return quantized
        run = self.run.replace(samples=MEASURED, batch=64)

        def measure(path: Path, scratch: Path) -> None:
            ptqd.measure(self.pipe, quantized, run).save(path)

        made = self.folder.key(f"{recipe}/quantized")
        stats = NoiseStats.load(self.folder.stage(f"{recipe}/noise.safetensors", {"quantized": made}, measure))
        if more == "auto":
            return ptqd.correct(quantized, ptqd.search_correction(quantized, stats, run).correction)
        return ptqd.correct(quantized, stats, more.split("+"))

    def images(self, row: str) -> torch.Tensor:
        """Images of a row; ``"full"`` is full precision."""

        def build(path: Path, scratch: Path) -> None:
            sample_images(self.pipe if row == "full" else self.made(row), self.run, path, scratch, title=None)

        inputs: dict[str, Any] = {**self.facts, "row": row}
        recipe, _, more = row.partition(" ")
        if row != "full" and more not in OTHERS:
            self.quantized(recipe)
            inputs["quantized"] = self.folder.key(f"{recipe}/quantized")
        return load_images(self.folder.stage(f"{row.replace(' ', '-')}.safetensors", inputs, build))

    def has(self, row: str) -> bool:
        return (self.folder.folder / f"{row.replace(' ', '-')}.safetensors").exists()


def table(folder: Path, models: list[str], samples: int) -> Iterator[str]:
    judge, reference = FashionClassifier.from_pretrained(CLASSIFIER).float().eval(), Reference.load(REFERENCE)
    yield f"{samples} samples, 20 steps, eta 0, calibration on {CALIBRATION} samples, torch {torch.__version__}"
    for model in models:
        bench = Bench(model, folder, samples)
        if not bench.has("full"):
            continue
        full = bench.images("full")
        theirs = extract(judge, full).pooled
        own = frechet_statistic(theirs, reference.mean, reference.covariance).value
        guidance = f", guidance {bench.run.call['guidance_scale']:g}" if bench.run.call else ""
        yield f"\n{model}: {type(bench.pipe.scheduler).__name__}{guidance}; full precision: Frechet {own:.3f}"
        yield (
            f"  {'row':28s} {'PSNR dB':>13s} {'Frechet':>13s} {'above FP %':>15s} {'to FP':>8s} {'fewer BOPs':>10s} "
            f"{'quantizing':>12s}"
        )
        for row in rows_of(model):
            if not bench.has(row):
                continue
            images = bench.images(row)
            mine = extract(judge, images).pooled
            value, relative = above(mine, theirs, reference.mean, reference.covariance)
            apart = paired_frechet_statistic(mine, theirs).value
            near = mean_metric(psnr(images / 255, full / 255))
            made = bench.folder.folder / row.partition(" ")[0] / "quantized" / "made.json"
            spent = f"{read_json(made)['seconds']:.0f} s" if " " not in row and made.exists() else ""
            foreign = row.partition(" ")[2] in OTHERS
            fewer = "" if foreign else f"{run_cost(ptqd.load(made.parent), bench.run).ratio:.1f}x"
            yield (
                f"  {row:28s} {plus_minus(near, 2):>13s} {plus_minus(value, 3):>13s} "
                f"{plus_minus(relative, 1):>15s} {apart:8.4f} {fewer:>10s} {spent:>12s}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", help="some rows instead of all")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        for line in table(args.out, args.models, args.samples):
            print(line, flush=True)
        return
    for model in args.models:
        bench = Bench(model, args.out, args.samples)
        for row in ["full", *(args.rows or rows_of(model))]:
            started = time.monotonic()
            try:
                bench.images(row)
            except ImportError as error:
                print(f"{model} {row}: left out, {error}", flush=True)
                continue
            print(f"{model} {row}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
