import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from training import fashion_mnist

from conftest import SCHEDULE
from ptqd import InputError, LatentClassPipeline, Sampling, load, sample
from ptqd.loading import with_scheduler
from ptqd.metrics import FashionClassifier, Reference
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.zoo import CLASSIFIER, MODELS, REFERENCE


@pytest.fixture(scope="module")
def fashion() -> LatentClassPipeline:
    pipe = load("fashion-ldm")
    assert isinstance(pipe, LatentClassPipeline)
    return pipe


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_weights_are_half_precision_and_small() -> None:
    assert size(MODELS["fashion-ldm"]) + size(CLASSIFIER) <= 8e6
    assert size(CLASSIFIER) <= 1e6
    assert load("fashion-ldm", dtype=torch.float16).unet.dtype == torch.float16


def test_the_model_has_the_shape_of_ldm4(fashion: Any) -> None:
    assert fashion.vae_scale_factor == 4
    assert fashion.unet.config.cross_attention_dim == fashion.class_embedder.config.embed_dim
    assert fashion.scheduler.config.prediction_type == "epsilon"
    assert {k: fashion.scheduler.config[k] for k in SCHEDULE} == SCHEDULE


def test_samples_are_of_the_asked_for_class(fashion: Any) -> None:
    """60 samples at 20 steps; the model card judges more, at 50."""
    call = {"class_labels": list(range(10)), "guidance_scale": 1.5}
    run = Sampling(20, 0.0, 60, 60, 0, call)
    ((_, images),) = sample(fashion, run)
    pixels = torch.from_numpy((images * 255).round()).to(torch.uint8)
    classifier = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    labels = torch.arange(60) % 10
    metrics = evaluate(pixels, Evaluator(classifier, Reference.load(REFERENCE)), labels=labels)
    assert metrics["class_agreement"].value >= 0.85
    noise = evaluate(torch.randint_like(pixels, 256), Evaluator(classifier, Reference.load(REFERENCE)))
    assert metrics["frechet_distance"].value < noise["frechet_distance"].value / 3


def test_the_reference_is_of_the_whole_test_set() -> None:
    reference = Reference.load(REFERENCE)
    assert reference.count == 10_000
    assert reference.sample.shape == (2000, 96)
    assert torch.linalg.eigvalsh(reference.covariance).min() > -1e-5


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes()))


def test_idx_files(tmp_path: Path) -> None:
    images = torch.arange(2 * 28 * 28).view(2, 28, 28).to(torch.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.tensor([3, 7], dtype=torch.uint8))
    x, y = fashion_mnist.load(tmp_path, "train")
    assert x.shape == (2, 1, 32, 32)
    assert torch.equal(((x[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().to(torch.uint8), images)
    assert bool((x[:, :, :2] == -1).all())
    assert y.tolist() == [3, 7]


def test_bad_idx_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with pytest.raises(InputError, match="is missing; put the four original"):
        fashion_mnist.read_idx(path)
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(InputError, match="is not an idx file"):
        fashion_mnist.read_idx(path)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">i", 5) + b"abc"))
    with pytest.raises(InputError, match="truncated"):
        fashion_mnist.read_idx(path)


@pytest.mark.slow
def test_nine_of_ten_samples_are_of_the_asked_for_class(fashion: Any) -> None:
    """The figure of the model card: guidance 1.5, 50 steps."""
    run = Sampling(50, 0.0, 1000, 100, 0, {"class_labels": list(range(10)), "guidance_scale": 1.5})
    pixels = torch.cat([torch.from_numpy((x * 255).round()).to(torch.uint8) for _, x in sample(fashion, run)])
    classifier = FashionClassifier.from_pretrained(CLASSIFIER).float().eval()
    metrics = evaluate(pixels, Evaluator(classifier, Reference.load(REFERENCE)), labels=torch.arange(1000) % 10)
    assert metrics["class_agreement"].value >= 0.9


@pytest.mark.parametrize(
    ("name", "kind", "prediction"),
    [
        pytest.param("fashion-ddpm", "DDPMPipeline", "epsilon", marks=pytest.mark.slow),
        ("fashion-dit", "DiTPipeline", "epsilon"),
        ("fashion-flow", "LatentClassPipeline", None),
    ],
)
def test_the_variants_are_small_and_sample(name: str, kind: str, prediction: str | None) -> None:
    pipe = with_scheduler(load(name), "DDIMScheduler" if name == "fashion-ddpm" else None)
    assert type(pipe).__name__ == kind
    assert size(MODELS[name]) <= 6.1e6
    assert pipe.scheduler.config.get("prediction_type") == prediction
    call = {} if name == "fashion-ddpm" else {"class_labels": list(range(10)), "guidance_scale": 1.5}
    ((_, images),) = sample(pipe, Sampling(20, 0.0, 40, 40, 0, call))
    pixels = torch.from_numpy((images * 255).round()).to(torch.uint8)
    classifier, reference = FashionClassifier.from_pretrained(CLASSIFIER).float().eval(), Reference.load(REFERENCE)
    metrics = evaluate(pixels, Evaluator(classifier, reference), labels=torch.arange(40) % 10 if call else None)
    if call:
        assert metrics["class_agreement"].value >= 0.75
    noise = evaluate(torch.randint_like(pixels, 256), Evaluator(classifier, reference))
    assert metrics["frechet_distance"].value < noise["frechet_distance"].value / 3


def test_the_flow_model_runs_with_stochastic_and_other_flow_schedulers() -> None:
    pipe = with_scheduler(load("fashion-flow"), "FlowMatchHeunDiscreteScheduler")
    ((_, latents),) = sample(pipe, Sampling(4, 0.0, 2, 2, 0, {"class_labels": [1, 2]}), output="latent")
    assert bool(torch.isfinite(latents).all())
