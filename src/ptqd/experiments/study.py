"""A study: a published table row as a file, with the figures it is held against, and its twin on an embedded model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ptqd import zoo
from ptqd.diffusion.compvis.pipeline import blank
from ptqd.diffusion.macs import on_meta, run_macs
from ptqd.diffusion.pipeline_parts import denoiser_of
from ptqd.diffusion.sampling import MOST_CLASSES, Sampling
from ptqd.errors import InputError
from ptqd.experiments.experiment import Experiment, named_recipes
from ptqd.experiments.meta_pipeline import meta_pipeline, with_meta_proxies
from ptqd.experiments.plan_request import PlanRequest
from ptqd.experiments.results import PublishedRow, Row
from ptqd.files import read_toml
from ptqd.quantization.bops import cost_of, disk_bytes
from ptqd.quantization.memory import memory_bytes
from ptqd.quantization.schema import build
from ptqd.quantization.swap import insert_quantizers

TRIED = 7 * 32  # quantized samples that auto runs, about (bench/samples.txt)
GPUS = {  # dense float32, TFLOP/s, of the makers' data sheets: quantization is simulated in float32
    "a100": 19.5,
    "h100": 66.9,
    "l40s": 91.6,
    "rtx3090": 35.6,
    "rtx4090": 82.6,
    "t4": 8.1,
    "v100": 15.7,
}
FEATURES = 2048 + 17 * 17 * 7 + 1008  # of an image, in Inception's features
REACHED = 0.4  # of that rate, about what convolutions and products of these sizes reach


@dataclass(frozen=True)
class Setting:
    """How a study samples; ``classes`` are asked for in turn, 0 where the model knows none."""

    steps: int
    eta: float
    classes: int
    samples: int
    guidance: float | None = None
    batch: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.classes <= MOST_CLASSES:
            raise InputError(f"classes must be 0 to {MOST_CLASSES:,}; got {self.classes}")


@dataclass(frozen=True)
class EvaluationSpec:
    """What a study is judged by, and where the reference is published."""

    features: str
    reference: str
    published_at: str


@dataclass(frozen=True)
class Published:
    """A published figure of a row: a metric's name as in the report, and the source."""

    recipe: str
    correction: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Twin:
    """The same study on an embedded model, at a size that two cores run."""

    model: str
    steps: int
    samples: int
    measured: int


@dataclass(frozen=True)
class Study:
    """A file under ``reproduce/``."""

    title: str
    architecture: Literal["ldm4-imagenet", "ldm4-bedrooms", "ldm8-churches"]
    recipes: tuple[str, ...]
    corrections: tuple[str, ...]
    measured: int
    sampling: Setting
    judge: EvaluationSpec
    twin: Twin
    plan: str | None = None
    published: tuple[Published, ...] = ()

    @classmethod
    def load(cls, path: Path) -> "Study":
        """Read a TOML file.

        Raises:
            InputError: it is missing, no TOML, or has unknown or missing keys.
        """
        return cls.from_dict(read_toml(path), str(path))

    @classmethod
    def from_dict(cls, values: object, where: str) -> "Study":
        """From plain values.

        Raises:
            InputError: unknown or missing keys, or values that cannot be run.
        """
        study = build(cls, values, where)
        study.experiment("").check()
        return study

    def as_twin(self) -> "Study":
        """On the embedded model: its classes, and without figures to be held against."""
        classes = 10
        setting = dataclasses.replace(
            self.sampling, steps=self.twin.steps, samples=self.twin.samples, classes=classes,
            guidance=self.sampling.guidance or 1.0,
        )  # fmt: skip
        return dataclasses.replace(self, sampling=setting, measured=self.twin.measured, published=())

    def experiment(self, model: str) -> Experiment:
        """What is run.

        Args:
            model: its name in the report.
        """
        setting = self.sampling
        call: dict[str, Any] = {"class_labels": list(range(setting.classes))} if setting.classes else {}
        if setting.guidance is not None:
            call["guidance_scale"] = setting.guidance
        return Experiment(
            model=model,
            settings=(Sampling(setting.steps, setting.eta, setting.samples, setting.batch, setting.seed, call),),
            recipes=named_recipes(self.recipes),
            measured=self.measured,
            corrections=tuple(
                () if text == "none" else tuple(part.strip() for part in text.split(",")) for text in self.corrections
            ),
            plan=None if self.plan is None else PlanRequest.parse(self.plan, None, None, None),
        )


@dataclass(frozen=True)
class Estimate:
    """What a study will take, counted on the meta device.

    Attributes:
        parameters: of the denoiser.
        calls: of the denoiser by purpose, each for one sample: guidance makes two of one.
        flops: by purpose.
        bops: bit operations of one sample by recipe, full precision first.
        disk: bytes of the quantized denoiser by recipe.
        memory: bytes of full-precision and quantized weights together, as they are while measuring.
        files: what is written, with its bytes.
    """

    parameters: int
    calls: Mapping[str, int]
    flops: Mapping[str, float]
    bops: Mapping[str, int]
    disk: Mapping[str, int]
    memory: int
    files: Mapping[str, int]

    def hours(self, gpu: str) -> float:
        """On a named GPU, from its arithmetic rate alone.

        Raises:
            InputError: one whose rate is not known.
        """
        if gpu not in GPUS:
            raise InputError(f"the rate of {gpu!r} is not known; known are {', '.join(GPUS)}")
        return sum(self.flops.values()) / (GPUS[gpu] * 1e12 * REACHED) / 3600


def estimate(study: Study, model: str | None, *, images: bool = True) -> Estimate:
    """Build all of a study on the meta device and count what it takes.

    Args:
        study: whose pipeline is built from the published configuration, where there is no model.
        model: a pipeline's folder, hub id or embedded name.
        images: whether they are kept.

    Raises:
        InputError: no such model, or a recipe that does not fit it.
    """
    pipe = with_meta_proxies(blank(zoo.CONFIGS[study.architecture])) if model is None else meta_pipeline(model)
    experiment = study.experiment(model or study.architecture)
    run = experiment.settings[0]
    macs = run_macs(pipe, run)
    denoiser: Any = on_meta(denoiser_of(pipe))
    calls_each = run.steps * (2 if (study.sampling.guidance or 1.0) != 1.0 else 1)
    flops_each = 2.0 * macs.total
    bops, disk, memory = {"fp32": cost_of(denoiser, macs).total}, {"fp32": disk_bytes(denoiser)}, 0
    samples: dict[str, int] = {"sampling": run.samples, "calibrating": 0, "measuring": 0, "choosing corrections": 0}
    drawing = study.sampling.eta > 0
    rows = [methods for methods in experiment.corrections if drawing or "vsc" not in methods]
    for name, recipe in experiment.recipes.items():
        quantized = on_meta(denoiser_of(pipe))
        with torch.device("meta"):
            insert_quantizers(quantized, recipe)
        bops[name], disk[name] = cost_of(quantized, macs).total, disk_bytes(quantized)
        memory = max(memory, memory_bytes(denoiser) + memory_bytes(quantized))
        samples["sampling"] += len(rows) * run.samples
        samples["calibrating"] += recipe.calibration_samples
        samples["measuring"] += 2 * study.measured + (1 + len(recipe.widths)) * study.measured * (
            study.plan is not None
        )
        samples["choosing corrections"] += TRIED * (("auto",) in rows)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    sets = (1 + len(rows) * len(experiment.recipes)) * run.samples
    others = sum(
        disk_bytes(part) for part in pipe.components.values() if part is not pipe.unet and isinstance(part, nn.Module)
    )
    copies = 2 if study.plan else 1  # as quantized, and with its plan
    files = {
        "images": sets * size * size * pipe.vae.config.out_channels if images else 0,
        "latents": sets * pipe.unet.config.in_channels * pipe.unet.config.sample_size**2 * 4,
        "features": sets * 4 * FEATURES,
        "quantized pipelines": (sum(disk.values()) - disk["fp32"] + others * len(experiment.recipes)) * copies,
    }
    return Estimate(
        parameters=sum(p.numel() for p in denoiser.parameters()),
        calls={what: count * calls_each for what, count in samples.items()},
        flops={what: count * flops_each for what, count in samples.items()},
        bops=bops,
        disk=disk,
        memory=memory,
        files=files,
    )


def compare_with_published(study: Study, rows: Sequence[Row]) -> list[PublishedRow]:
    """Each published figure beside the one of the same row."""
    compared = []
    for figure in study.published:
        required = (figure.recipe, figure.correction)
        row = next((r for r in rows if (r.key.recipe, r.key.correction) == required), None)
        ours = None if row is None else row.metrics.get(figure.metric)
        inception = row is not None and row.inception
        compared.append(
            PublishedRow(figure.recipe, figure.correction, figure.metric, figure.value, figure.source, ours, inception)
        )
    return compared
