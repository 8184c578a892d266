"""Networks that judge, and what is kept of what they see."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import tiny_pipeline
from ptqd import InputError, Sampling
from ptqd.experiments import load_images, named_recipes
from ptqd.experiments.compare import compare_runs
from ptqd.experiments.experiment import Experiment, run_experiment
from ptqd.files import join_tensors, read_tensors, write_tensors
from ptqd.metrics import (
    Features,
    ImageEncoder,
    ImageFeatures,
    Inception,
    Lpips,
    Pixels,
    Reference,
    extract,
    extract_features,
    latent_statistic,
    load_reference,
    open_images,
    resized,
    statistics,
)
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.metrics.features import inception, lpips
from ptqd.metrics.registry import PAIRED_METRICS
from ptqd_cli.main import main

NOWHERE = "http://127.0.0.1:9"


def images(count: int, size: int = 16, channels: int = 1, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, channels), generator=random, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network() -> Inception:
    torch.manual_seed(0)
    return Inception().eval()


@pytest.fixture(scope="module")
def weights(network: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inceptions_features_are_where_adm_takes_them(network: Inception) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _, args, out: seen.update(spatial=out)),
        network.Mixed_7c.register_forward_hook(lambda _, args, out: seen.update(last=out)),
    ]
    made = extract(network, images(2, 32))
    for hook in hooks:
        hook.remove()
    assert made.pooled.shape == (2, 2048)
    assert made.spatial.shape == (2, 7 * 17 * 17)
    assert made.logits.shape == (2, 1008)
    assert torch.equal(made.spatial, seen["spatial"].permute(0, 2, 3, 1)[..., :7].flatten(1))
    assert torch.allclose(made.pooled, seen["last"].mean((2, 3)), atol=1e-6)
    assert torch.allclose(made.logits, made.pooled @ network.fc.weight.T, atol=1e-5)
    assert not network.classifies


def test_images_are_resized_from_corner_to_corner() -> None:
    x = torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    made = resized(x, (7, 4))
    for i in range(7):
        for j in range(4):
            row, column = i * 3 / 7, j * 5 / 4
            a, b = int(row), int(column)
            c, d = min(a + 1, 2), min(b + 1, 4)
            top = x[0, 0, a, b] + (x[0, 0, a, d] - x[0, 0, a, b]) * (column - b)
            low = x[0, 0, c, b] + (x[0, 0, c, d] - x[0, 0, c, b]) * (column - b)
            assert made[0, 0, i, j].item() == pytest.approx((top + (low - top) * (row - a)).item(), abs=1e-6)


def test_inceptions_weights_come_from_a_file_or_the_hub(
    network: Inception, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Inception.from_pretrained(weights).key == network.key
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    assert Inception.from_pretrained(tmp_path / "inception.safetensors").key == network.key
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL", f"{NOWHERE}/pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(InputError, match=r"are not in .*checkpoints and cannot be downloaded .*get http"):
        Inception.from_pretrained()
    kept = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(weights.read_bytes())
    assert Inception.from_pretrained().key == network.key


def test_other_weights_are_refused(network: Inception, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({name: value for name, value in state.items() if "Mixed_7" not in name}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"missing, of another shape or unknown \(Mixed_7a"):
        Inception.from_pretrained(tmp_path / "part.pth")
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "classes.pth")
    with pytest.raises(InputError, match=r"1 are missing, .* \(fc\.weight\)"):
        Inception.from_pretrained(tmp_path / "classes.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="no state dict of tensors"):
        Inception.from_pretrained(tmp_path / "list.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    with pytest.raises(InputError, match=r"holds torch\.nn\.modules\.linear\.Linear beside tensors"):
        Inception.from_pretrained(tmp_path / "code.pth")


def test_the_verb_judges_by_inception(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, seed in (("real", 1), ("made", 0)):
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name / "samples.safetensors", {"images": images(6, seed=seed)}, {"ptqd.samples": "6"})
    asked = ["--judge", weights, "--reference", tmp_path / "real", "--classes", 0]
    seen: list[int] = []

    def small(features: torch.Tensor) -> torch.Tensor:
        seen.append(features.shape[1])
        return features[:, :8]  # 2048 x 2048 eigenvalues take a minute here

    plain = Inception.features

    def narrow(self: Inception, x: torch.Tensor) -> Features:
        made = plain(self, x)
        return Features(small(made.pooled), small(made.spatial), made.logits)

    monkeypatch.setattr(Inception, "features", narrow)
    assert main([str(word) for word in ["evaluate", tmp_path / "made", *asked]]) == 0
    shown = capsys.readouterr()
    assert set(seen) == {2048, 2023}
    assert {"frechet_distance", "spatial_frechet_distance", "kernel_distance", "inception_score", "precision"} <= set(
        json.loads(shown.out)
    )
    assert "6 samples are no more than the 8 features" in shown.err
    assert len(list((tmp_path / "cache" / "ptqd" / "observed").glob("*.safetensors"))) == 1


@pytest.fixture(scope="module")
def perceptual() -> Lpips:
    torch.manual_seed(0)
    network = Lpips().eval()
    for i in range(5):
        nn.init.uniform_(getattr(network, f"lin{i}").model[1].weight)
    return network


def test_lpips_by_its_definition(perceptual: Lpips) -> None:
    random = torch.Generator().manual_seed(0)
    x, y = (2 * torch.rand(2, 3, 32, 32, generator=random) - 1 for _ in range(2))
    found = perceptual.distances(x, y)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, a, b = torch.zeros(2), *((z - shift[:, None, None]) / scale[:, None, None] for z in (x, y))
    stage = 0
    with torch.no_grad():
        for i, layer in enumerate([*perceptual.net.features, nn.MaxPool2d(2)]):
            if i in (4, 9, 16, 23, 30):
                unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b)]
                weight = getattr(perceptual, f"lin{stage}").model[1].weight[0]
                total += ((unit[0] - unit[1]).square() * weight).sum(1).mean((1, 2))
                stage += 1
            a, b = layer(a), layer(b)
    assert stage == 5
    assert torch.allclose(found, total, rtol=1e-5)
    assert perceptual.distances(x, x).tolist() == [0, 0]
    with pytest.raises(InputError, match="16 x 16 or more"):
        perceptual.distances(x[..., :8, :8], y[..., :8, :8])


def test_lpips_is_judged_by_where_its_weights_are(
    perceptual: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, url in (("URL", lpips.URL), ("VGG_URL", lpips.VGG_URL)):
        monkeypatch.setattr(lpips, name, f"{NOWHERE}/{url.rsplit('/', 1)[-1]}")
    write_tensors(tmp_path / "a.safetensors", {"images": images(5)}, {"ptqd.samples": "5"})
    write_tensors(tmp_path / "b.safetensors", {"images": images(5, seed=1)}, {"ptqd.samples": "5"})
    asked = [
        "evaluate",
        str(tmp_path / "a.safetensors"),
        "--against",
        str(tmp_path / "b.safetensors"),
        "--judge",
        "none",
    ]
    assert main(asked) == 0
    assert "lpips" not in json.loads(capsys.readouterr().out)
    assert main([*asked, "--lpips"]) == 2
    assert "LPIPS' weights are not in" in capsys.readouterr().err
    folder = tmp_path / "weights"
    folder.mkdir()
    state = perceptual.state_dict()
    torch.save({n: v for n, v in state.items() if n.startswith("lin")}, folder / "weights-vgg16-lpips.pth")
    vgg = {n.removeprefix("net."): v for n, v in state.items() if n.startswith("net.")}
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2)}, folder / "vgg16-397923af.pth")
    assert main([*asked, "--lpips", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)["lpips"]
    assert found["low"] < found["value"] < found["high"]
    (tmp_path / "torch" / "hub").mkdir(parents=True, exist_ok=True)
    folder.rename(tmp_path / "torch" / "hub" / "checkpoints")
    assert main([*asked, "--lpips"]) == 0
    assert json.loads(capsys.readouterr().out)["lpips"] == found
    assert main(asked) == 0  # only when it is asked for: results do not depend on what a machine has
    assert "lpips" not in json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    folder: Path = tmp_path_factory.mktemp("encoders") / "clip"
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "a", "shoe", "bag"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    kind: Any = PreTrainedTokenizerFast
    fast = kind(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8)
    fast.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 5, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 4}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=12
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder


def test_clip_scores_of_prompts(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = images(4, 32, 3)
    encoder = ImageEncoder.from_pretrained(clip, texts=True)
    texts = ["a shoe", "a bag", "a shoe", "a bag"]
    seen = encoder.features(shown.permute(0, 3, 1, 2) / 127.5 - 1).pooled
    want = (100 * torch.cosine_similarity(seen, encoder.text_features(texts))).clamp(min=0).mean().item()
    write_tensors(tmp_path / "a.safetensors", {"images": shown}, {"ptqd.samples": "4"})
    (tmp_path / "prompts.txt").write_text("a shoe\na bag\n")
    asked = ["evaluate", tmp_path / "a.safetensors", "--judge", "none", "--clip", clip]
    assert main([str(word) for word in [*asked, "--prompts", tmp_path / "prompts.txt"]]) == 0
    assert json.loads(capsys.readouterr().out)["clip_score"]["value"] == pytest.approx(want, rel=1e-5)
    assert main([str(word) for word in [*asked, "--prompts", tmp_path / "none.txt"]]) == 2
    assert "a prompt on each line" in capsys.readouterr().err


class Corners:
    """An extractor whose features are a few pixels."""

    image_shape = (16, 16, 1)
    classifies = False
    inception = False
    key = "corners"

    def features(self, images: torch.Tensor) -> Features:
        flat = images.flatten(1)
        return Features(flat[:, 200:204], flat[:, 40:43], flat[:, :3])


def judge() -> Evaluator:
    return Evaluator(Corners(), Reference.of(extract(Corners(), images(50))), "corners")


def test_what_is_kept_says_all_that_the_images_would(tmp_path: Path) -> None:
    mine, full = images(12), images(12, seed=1)
    seen = extract_features(mine, judge(), same_seed=full)
    write_tensors(tmp_path / "seen.safetensors", seen.tensors(), {})
    again = statistics(ImageFeatures.load(tmp_path / "seen.safetensors"), judge(), full=extract_features(full, judge()))
    direct = evaluate(mine, judge(), same_seed=full)
    assert {name: found.value for name, found in again.items()} == {name: m.value for name, m in direct.items()}
    assert {"psnr", "ssim", "recall", "coverage", "inception_score"} <= set(again)
    assert len(again["recall"].influence) == 12
    with pytest.raises(InputError, match="of the same seeds differ"):
        extract_features(mine, judge(), same_seed=full[:3])
    two = (torch.zeros(2), torch.eye(2))
    narrow = Evaluator(Corners(), Reference(torch.zeros(4), torch.eye(4), *two, torch.zeros(0, 4), 9))
    with pytest.raises(InputError, match="of 2 spatial features, the extractor gives 3"):
        statistics(seen, narrow)


def test_influence_on_an_inception_score() -> None:
    from ptqd.metrics import inception_score, inception_statistic

    logits = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = inception_statistic(logits)
    assert found.value == pytest.approx(inception_score(logits, splits=1)[0], rel=1e-12)
    p = logits.softmax(1)

    def score(weights: torch.Tensor) -> float:
        mean = weights @ p
        return float((weights @ (p * (p / mean).log()).sum(1)).exp())

    alike = torch.full((60,), 1 / 60, dtype=torch.float64)
    for i in (0, 31):
        more = alike * (1 - 1e-6)
        more[i] += 1e-6
        assert found.influence[i].item() == pytest.approx((score(more) - score(alike)) / 1e-6, rel=1e-3, abs=1e-5)
    halves = inception_statistic(logits, size=30)
    assert halves.value == pytest.approx(inception_score(logits, splits=2)[0], rel=1e-12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder: Path = tmp_path_factory.mktemp("runs")
    (folder / "small.toml").write_text('calibration_samples = 2\n[weights]\nbits = 3\nrange = "minmax"\n')
    run = Sampling(steps=2, samples=8, batch=4, call={"class_labels": [0, 1], "guidance_scale": 2.0})
    for name, kept in (("kept", True), ("streamed", False)):
        rows = Experiment(
            "tiny", (run,), named_recipes([str(folder / "small.toml")]), measured=4, corrections=((),), images=kept
        )
        run_experiment(tiny_pipeline(), rows, folder / name, judge(), progress=False)
    return folder / "kept", folder / "streamed"


def test_without_images_there_are_the_same_distances(runs: tuple[Path, Path]) -> None:
    kept, streamed = (json.loads((run / "report.json").read_text())["rows"] for run in runs)
    for mine, theirs in zip(kept, streamed, strict=True):
        gone = {"psnr", "ssim", *PAIRED_METRICS} if mine["key"]["recipe"] != "fp32" else set()
        assert set(mine["metrics"]) - set(theirs["metrics"]) == gone
        assert theirs["metrics"] == {name: mine["metrics"][name] for name in theirs["metrics"]}
    assert "latent_distance" in streamed[1]["metrics"]
    assert not list(runs[1].rglob("observed.safetensors"))
    assert len(load_images(runs[1] / streamed[1]["images"])) == 8  # the first hundred
    found = compare_runs([runs[1]], judge())
    assert asdict(found[1].row.metrics["frechet_distance"]) == kept[1]["metrics"]["frechet_distance"]
    with pytest.raises(InputError, match="an extractor"):
        run_experiment(tiny_pipeline(), Experiment("tiny", (), {}, images=False), runs[1] / "x", None)


def test_latents_are_those_that_are_decoded(runs: tuple[Path, Path]) -> None:
    full, quantized = (json.loads((runs[0] / "report.json").read_text())["rows"][i]["images"] for i in (0, 1))
    tensors = read_tensors(runs[0] / full)[0]
    pipe = tiny_pipeline()
    with torch.no_grad():
        decoded = pipe.vae.decode(tensors["latents"] / pipe.vae.config.scaling_factor).sample
    shown = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (shown - tensors["images"].float()).abs().max() <= 1
    theirs = read_tensors(runs[0] / quantized)[0]["latents"]
    want = (theirs.double() - tensors["latents"].double()).square().mean().item()
    assert latent_statistic(theirs, tensors["latents"]).value == pytest.approx(want)
    with pytest.raises(InputError, match="latents and those of the same seeds differ"):
        latent_statistic(theirs, tensors["latents"][:2])


def test_images_that_a_streamed_run_did_not_keep_are_missed(tmp_path: Path) -> None:
    tensors = {"images": images(3)} | {f"features.{name}": torch.zeros(9, 2) for name in Features._fields}
    write_tensors(tmp_path / "samples.safetensors", tensors, {"ptqd.samples": "9", "ptqd.networks": "another"})
    with pytest.raises(InputError, match="kept no images, only what a judge saw of them"):
        open_images(tmp_path, grey=True)
    with pytest.raises(InputError, match="kept no images"):
        load_reference(tmp_path, Corners(), tmp_path / "cache")


def test_samples_as_features_and_as_adms_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sample", "fashion-ldm", "--steps", "1", "--samples", "12", "--batch", "6", "--out"]
    assert main([*command, str(tmp_path / "images"), "--npz"]) == 0
    assert main([*command, str(tmp_path / "features"), "--judge", "fashion", "--no-images"]) == 0
    made = np.load(tmp_path / "images" / "samples.npz")
    kept = load_images(tmp_path / "images" / "samples.safetensors")
    assert made["arr_0"].dtype == np.uint8
    assert made["arr_0"].shape == (12, 32, 32, 3)
    assert (made["arr_0"][..., 1] == kept[..., 0].numpy()).all()
    assert made["arr_1"].tolist() == [*range(10), 0, 1]
    assert (tmp_path / "features" / "grid.png").is_file()
    capsys.readouterr()
    found = []
    for what in ("images", "features", "images/samples.npz"):
        assert main(["evaluate", str(tmp_path / what)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert main(["evaluate", str(tmp_path / "features"), "--judge", "none"]) == 2
    assert "nothing judges these images" in capsys.readouterr().err
    against = ["--against", str(tmp_path / "features")]
    assert main(["evaluate", str(tmp_path / "images"), *against]) == 0
    paired = json.loads(capsys.readouterr().out)
    assert paired["frechet_distance_to_full_precision"]["value"] == pytest.approx(0, abs=1e-6)
    assert paired["latent_distance"]["value"] == 0
    assert main([*command, str(tmp_path / "both"), "--judge", "fashion"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "both"), "--against", str(tmp_path / "images")]) == 0
    assert json.loads(capsys.readouterr().out)["psnr"]["value"] == 100
    for wrong in (["--png", "--judge", "fashion"], []):
        assert main([*command, str(tmp_path / "x"), "--no-images", *wrong]) == 2
        assert "--no-images keeps" in capsys.readouterr().err


def test_parts_are_joined_as_they_are(tmp_path: Path) -> None:
    parts = []
    for i, n in enumerate((3, 2)):
        tensors = {"x": images(n, 4, seed=i), "y": torch.randn(n, 2), "none": torch.zeros(n, 0)}
        tensors |= {} if i else {"first": torch.arange(n)}
        write_tensors(tmp_path / f"{i}.safetensors", tensors, {"key": "a"})
        parts.append((tmp_path / f"{i}.safetensors", tensors))
    join_tensors(tmp_path / "whole.safetensors", [path for path, _ in parts], {"n": "5"})
    whole, metadata = read_tensors(tmp_path / "whole.safetensors")
    assert metadata == {"n": "5"}
    for name in ("x", "y", "none"):
        assert torch.equal(whole[name], torch.cat([tensors[name] for _, tensors in parts]))
    assert torch.equal(whole["first"], torch.arange(3))
    write_tensors(tmp_path / "2.safetensors", {"x": images(2, 4)}, {"key": "b"})
    with pytest.raises(InputError, match=r"2\.safetensors was written by another configuration"):
        join_tensors(tmp_path / "other.safetensors", [parts[0][0], tmp_path / "2.safetensors"], {})
    write_tensors(tmp_path / "3.safetensors", {"x": images(2, 5)}, {"key": "a"})
    with pytest.raises(InputError, match="of another shape"):
        join_tensors(tmp_path / "other.safetensors", [parts[0][0], tmp_path / "3.safetensors"], {})
    assert not (tmp_path / "other.safetensors").exists()


def test_datasets_are_sets_of_images(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    pixels = images(5, 8, 3)
    rows = {"label": list(range(5)), "picture": [Image.fromarray(image.numpy()) for image in pixels]}
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    made = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": made, "test": made.select(range(2))}).save_to_disk(tmp_path / "saved")
    found = open_images(Path(f"{tmp_path / 'saved'}:train"), grey=False)
    assert torch.equal(found.part(range(1, 5)), pixels[1:])
    assert len(open_images(Path(f"{tmp_path / 'saved'}:test"), grey=False)) == 2
    assert found.digest() == open_images(tmp_path / "saved", grey=False).digest()
    assert found.digest() != Pixels(pixels).digest()
    with pytest.raises(InputError, match="no split 'x'; it has train, test"):
        open_images(Path(f"{tmp_path / 'saved'}:x"), grey=False)
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(InputError, match="has no column of images; it has label"):
        open_images(tmp_path / "numbers", grey=False)


def test_adms_moments_are_the_references_and_its_images_the_sample(tmp_path: Path) -> None:
    shown = images(60)
    seen = extract(Corners(), shown)
    whole: dict[str, Any] = {"mu": np.full(4, 0.5), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "both.npz", shown.numpy(), **whole)
    found = load_reference(tmp_path / "both.npz", Corners(), tmp_path / "cache")
    assert found.mean.tolist() == [0.5] * 4
    assert torch.equal(found.spatial_covariance, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(found.sample, seen.pooled)
    np.savez_compressed(tmp_path / "small.npz", shown.numpy(), **whole)
    assert load_reference(tmp_path / "small.npz", Corners(), tmp_path / "cache").key == found.key
    np.savez(tmp_path / "nan.npz", **{**whole, "mu": np.full(4, np.nan)})
    with pytest.raises(InputError, match="mu holds NaN"):
        load_reference(tmp_path / "nan.npz", Corners(), tmp_path / "cache")


class Broken(Corners):
    """Features that are not finite."""

    key = "broken"

    def features(self, images: torch.Tensor) -> Features:
        return Features(*(part / 0 for part in super().features(images)))


def test_a_reference_of_features_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images(8).numpy())
    with pytest.raises(InputError, match="features of some of the reference's images are not finite"):
        load_reference(tmp_path / "images.npz", Broken(), tmp_path / "cache")


def test_videos_are_judged_by_psnr_alone() -> None:
    clips = torch.randint(0, 256, (2, 5, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert set(extract_features(clips, Evaluator(), same_seed=clips).values) == {"psnr"}
    with pytest.raises(InputError, match="are no images; judge them by none"):
        extract_features(clips, judge())
