import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ptqd import InputError
from ptqd.files import write_tensors
from ptqd.metrics import Features, ImageEncoder, Moments, Reference, extract, load_reference
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd_cli.main import main


class Colours:
    """An extractor of any images: their mean colours and two pixels."""

    image_shape = None
    classifies = False
    inception = False

    def __init__(self, key: str = "key") -> None:
        self.key = key

    def features(self, images: torch.Tensor) -> Features:
        return Features(images.mean((2, 3)), images[:, 0, 0, :2], images.new_zeros(len(images), 0))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (600, 6, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def folder(images: torch.Tensor, tmp_path: Path) -> Path:
    made = tmp_path / "images"
    (made / "more").mkdir(parents=True)
    for i, image in enumerate(images):
        place = made if i < 400 else made / "more"
        Image.fromarray(image.numpy()).save(place / f"{i:04d}.png")
    (made / "notes.txt").write_text("not an image")
    return made


def same(a: Reference, b: Reference) -> bool:
    pairs = ((a.mean, b.mean), (a.covariance, b.covariance), (a.spatial_mean, b.spatial_mean), (a.sample, b.sample))
    return all(torch.allclose(x.double(), y.double(), atol=1e-3) for x, y in pairs)


def test_a_folder_of_images_is_a_reference_and_is_kept_by_content(
    images: torch.Tensor, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    want = Reference.of(extract(Colours(), images))
    first = load_reference(folder, Colours(), cache)
    assert same(first, want)
    assert first.count == 600

    def unexpected(*args: Any) -> None:
        raise AssertionError("extracted again")

    with monkeypatch.context() as patched:
        patched.setattr("ptqd.metrics.references.extract", unexpected)
        again = load_reference(folder, Colours(), cache)
        assert same(again, want)
        assert torch.equal(again.sample, first.sample)
        assert again.key == first.key
        with pytest.raises(AssertionError):
            load_reference(folder, Colours("another"), cache)
    Image.fromarray(255 - images[0].numpy()).save(folder / "0000.png")
    changed = load_reference(folder, Colours(), cache)
    assert changed.key != first.key
    assert not torch.equal(changed.mean.float(), first.mean.float())
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_what_is_kept_is_evenly_spaced() -> None:
    features = Features(torch.arange(3999.0)[:, None], torch.zeros(3999, 1), torch.zeros(3999, 0))
    kept = Reference.of(features, sample=2000).sample.flatten()
    assert len(kept) == 2000
    assert kept[0] == 0
    assert kept[-1] >= 3997
    assert kept.diff().max() <= 2


def test_broken_images_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    for name in ("0003.png", "0300.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    with pytest.raises(InputError, match=r"2 of 600 images in .*images \(0003\.png, 0300\.png\) cannot be read"):
        load_reference(folder, Colours(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    for name in ("0003.png", "0300.png"):
        (folder / name).unlink()
    for i in range(5):
        Image.new("RGB", (9, 9)).save(folder / f"{i + 10:04d}.png")
    with pytest.raises(
        InputError, match=r"5 of 598 images in .*images \(0010\.png, 0011\.png, 0012\.png, \.\.\.\) are not 5 x 6"
    ):
        load_reference(folder, Colours(), tmp_path / "cache")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds 0 images"):
        load_reference(empty, Colours())


def test_adms_files(images: torch.Tensor, tmp_path: Path) -> None:
    want = Reference.of(extract(Colours(), images))
    np.savez(tmp_path / "images.npz", images.numpy())
    assert same(load_reference(tmp_path / "images.npz", Colours()), want)
    features = extract(Colours(), images)
    pooled, spatial = Moments.of(features.pooled), Moments.of(features.spatial)
    mu, sigma, mu_s, sigma_s = (m.numpy() for m in (pooled.mean, pooled.covariance, spatial.mean, spatial.covariance))
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found = evaluate(images, Evaluator(Colours(), load_reference(tmp_path / "moments.npz", Colours())))
    assert found["frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert found["spatial_frechet_distance"].value == pytest.approx(0, abs=1e-6)
    assert "kernel_distance" not in found
    np.savez(tmp_path / "both.npz", arr_0=images.numpy(), mu=np.zeros(2048), sigma=np.eye(2048))
    assert same(load_reference(tmp_path / "both.npz", Colours()), want)
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    assert "spatial_frechet_distance" not in evaluate(
        images, Evaluator(Colours(), load_reference(tmp_path / "plain.npz", Colours()))
    )


def test_what_is_no_reference_is_named(images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give a folder"):
        load_reference(tmp_path / "nothing", Colours())
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="holds neither mu and sigma nor arr_0"):
        load_reference(tmp_path / "other.npz", Colours())
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_reference(tmp_path / "broken.npz", Colours())
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        load_reference(tmp_path / "pickle.npz", Colours())
    for name, content in (("empty.npz", b""), ("array.npz", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as \.npz"):
            load_reference(tmp_path / name, Colours())
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(InputError, match="sigma is no square matrix as wide as mu"):
        load_reference(tmp_path / "odd.npz", Colours())
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(InputError, match="of 7 features, the extractor gives 3"):
        evaluate(images, Evaluator(Colours(), load_reference(tmp_path / "wide.npz", Colours())))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder: Path = tmp_path_factory.mktemp("encoders") / "dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    Dinov2Model(config).save_pretrained(folder)
    processor: Any = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder


def test_an_image_encoder_of_transformers_judges(
    encoder: Path, images: torch.Tensor, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = ImageEncoder.from_pretrained(encoder).features(images[:4].permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert found.pooled.shape == (4, 16)
    assert found.pooled.std() > 0
    write_tensors(tmp_path / "samples.safetensors", {"images": images[:300]}, {"ptqd.samples": "300"})
    command = ["evaluate", tmp_path, "--judge", encoder, "--reference", folder, "--classes", 0]
    assert main([str(word) for word in command]) == 0
    shown = capsys.readouterr()
    assert '"frechet_distance"' in shown.out
    assert "no more than" not in shown.err
    write_tensors(tmp_path / "few.safetensors", {"images": images[:12]}, {"ptqd.samples": "12"})
    assert main([str(word) for word in ["evaluate", tmp_path / "few.safetensors", *command[2:]]]) == 0
    assert "12 samples are no more than the 16 features" in capsys.readouterr().err
    assert list((tmp_path / "cache" / "ptqd" / "references").iterdir())
    assert main(["evaluate", str(tmp_path), "--judge", str(encoder)]) == 2
    assert "needs --reference" in capsys.readouterr().err
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert main(["evaluate", str(tmp_path), "--judge", str(folder), "--reference", str(folder)]) == 2
    assert "is no image encoder of transformers" in capsys.readouterr().err


def test_clips_projected_embedding_is_used() -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    grey = torch.zeros(2, 1, 8, 8)
    assert ImageEncoder(CLIPModel(config), processor).features(grey).pooled.shape == (2, 12)
