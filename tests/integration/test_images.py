"""Images, labels and captions as other people have them: a figure is right, or refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ptqd import InputError
from ptqd.files import read_tensors, write_tensors
from ptqd.metrics.images import Pixels, check_paired, open_images, suffixes, write_npz
from ptqd_cli.main import main

WIDE = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
GREY = WIDE[..., :1]


def save(folder: Path, images: np.ndarray, names: list[str] | None = None, **options: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for i, image in enumerate(images):
        name = names[i] if names else f"{i}.png"
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / name, **options)
    return folder


def pixels(path: Path, *, grey: bool = False) -> np.ndarray:
    images = open_images(path, grey=grey)
    return np.asarray(images.part(range(len(images))))


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# D1


def test_labels_are_kept_with_samples_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "fashion-ldm", "--steps", "2", "--samples", "8", "--batch", "4", "--call", "class_labels=[3]"]
    assert main([*words, "--npz", "--out", str(tmp_path / "s")]) == 0
    assert read_tensors(tmp_path / "s" / "samples.safetensors")[0]["labels"].tolist() == [3] * 8
    kept = evaluated(capsys, tmp_path / "s")
    assert "class_agreement" in kept
    assert evaluated(capsys, tmp_path / "s" / "samples.npz") == kept  # ptqd's own grey images, as RGB
    assert "class_agreement" not in evaluated(capsys, tmp_path / "s", "--classes", "0")
    assert main(["evaluate", str(tmp_path / "s"), "--classes", "10"]) == 2
    assert "asked for other classes than --classes says" in capsys.readouterr().err
    np.savez(tmp_path / "plain.npz", np.load(tmp_path / "s" / "samples.npz")["arr_0"])
    assert "class_agreement" not in evaluated(capsys, tmp_path / "plain.npz")
    agree = evaluated(capsys, tmp_path / "plain.npz", "--classes", "10")["class_agreement"]["value"]
    assert agree <= kept["class_agreement"]["value"]


@pytest.mark.parametrize("labels", [np.zeros(3, np.int64), np.zeros(8), np.zeros((8, 2), np.int64), np.zeros(8, bool)])
def test_labels_that_do_not_fit_are_refused(labels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", WIDE, labels)
    with pytest.raises(InputError, match="its labels must be 8 whole numbers"):
        open_images(tmp_path / "x.npz", grey=False)


# D2


def test_images_are_in_natural_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3), np.uint8)
    save(tmp_path / "a", images)
    write_npz(tmp_path / "a.npz", torch.from_numpy(images), None)
    assert (pixels(tmp_path / "a") == images).all()
    metrics = evaluated(capsys, tmp_path / "a", "--against", tmp_path / "a.npz", "--judge", "none")
    assert metrics["psnr"]["value"] == 100


def test_pairs_have_the_same_names_and_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = open_images(save(tmp_path / "a", WIDE), grey=False)
    b = open_images(save(tmp_path / "b", WIDE, [f"{i}.bmp" for i in range(8)]), grey=False)
    check_paired(a, b)  # suffixes may differ
    shifted = open_images(save(tmp_path / "c", WIDE, [f"{i + 1}.png" for i in range(8)]), grey=False)
    with pytest.raises(InputError, match="'0' stands where the other folder has '1'"):
        check_paired(a, shifted)
    with pytest.raises(InputError, match="8 against 7"):
        check_paired(a, Pixels(torch.from_numpy(WIDE[:7])))


def test_what_is_passed_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a", WIDE[:2], ["1.png", "2.tif"])
    save(tmp_path / "elsewhere", WIDE[2:4], ["3.ppm", "4.webp"], lossless=True)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a")
    save(tmp_path / "a" / ".hidden", WIDE[4:5])
    save(tmp_path / "a", WIDE[5:6], [".5.png"])
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert (pixels(tmp_path / "a") == WIDE[:4]).all()
    said = capsys.readouterr().err
    for part in (
        "1 hidden folders",
        "1 hidden files",
        "1 files of type .txt",
        "1 pipes, devices and links that lead nowhere",
    ):
        assert part in said
    assert {".png", ".jpg", ".tif", ".ppm", ".webp", ".bmp", ".jp2", ".gif", ".tga"} <= suffixes()


def test_a_grid_is_no_image_of_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s"
    words = ["sample", "fashion-ldm", "--steps", "1", "--samples", "12", "--batch", "12", "--png", "--out", str(out)]
    assert main(words) == 0
    want = pixels(out)
    (out / "samples.safetensors").unlink()
    assert (pixels(out, grey=True) == want).all()
    assert "ptqd's grid.png" in capsys.readouterr().err


# D3


@given(st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_a_deep_grey_reads_as_its_8_bits(value: int) -> None:
    from ptqd.metrics.images import _in_8_bits

    deep = Image.fromarray(np.full((4, 4), value * 257, np.uint16))
    assert np.asarray(_in_8_bits(deep)).tolist() == [[value] * 4] * 4


def test_pictures_of_every_mode_read_as_they_look(tmp_path: Path) -> None:
    grey, rgb = Image.fromarray(WIDE[0, ..., 0]), Image.fromarray(WIDE[0])
    deep = Image.fromarray(WIDE[0, ..., 0].astype(np.uint16) * 257)
    for name, picture in {
        "16.png": deep, "16.tif": deep, "l.png": grey, "la.png": grey.convert("LA"), "1.png": grey,
    }.items():  # fmt: skip
        picture.save(tmp_path / name)
    assert all((image == WIDE[0, ..., :1]).all() for image in pixels(tmp_path))
    (tmp_path / "rgb").mkdir()
    for name, picture in {
        "rgb.png": rgb, "rgba.png": rgb.convert("RGBA"), "p.gif": rgb.quantize(256), "cmyk.tif": rgb.convert("CMYK"),
    }.items():  # fmt: skip
        picture.save(tmp_path / "rgb" / name)
    cmyk, _, plain, transparent = pixels(tmp_path / "rgb")
    assert (plain == WIDE[0]).all()
    assert (transparent == WIDE[0]).all()
    assert (cmyk == WIDE[0]).all()


@pytest.mark.parametrize(("kind", "said"), [
    ("transparent", "have transparent pixels"), ("frames", r"have several frames \(2\)"),
    ("floats", "have numbers of 32 bits"), ("broken", "cannot be read"), ("other", "are not 32 x 32"),
])  # fmt: skip
def test_pictures_that_cannot_be_right_are_refused(kind: str, said: str, tmp_path: Path) -> None:
    save(tmp_path, WIDE[:2])
    path = tmp_path / "bad.png"
    if kind == "transparent":
        Image.fromarray(WIDE[0]).convert("RGBA").resize((32, 32)).rotate(45).save(path)
    elif kind == "frames":
        Image.fromarray(WIDE[0]).save(path, save_all=True, append_images=[Image.fromarray(WIDE[1])])
    elif kind == "floats":
        path = tmp_path / "bad.tif"
        Image.fromarray(WIDE[0, ..., 0].astype(np.float32)).save(path)
    elif kind == "broken":
        path.write_bytes((tmp_path / "0.png").read_bytes()[:100])
    else:
        Image.fromarray(WIDE[0]).resize((16, 16)).save(path)
    with pytest.raises(InputError, match=rf"1 of 3 images in .* \({path.name}\) {said}"):
        pixels(tmp_path)


@pytest.mark.parametrize(("array", "said"), [
    (WIDE.transpose(0, 3, 1, 2), r"channels first \(NCHW\): write np.transpose"),
    (np.concatenate([WIDE, GREY], -1), r"alpha channel \(RGBA\)"),
    (WIDE / 255, "it is float64"), (WIDE.astype(np.uint16), "it is uint16"), (WIDE[..., :2], "it is uint8 of shape"),
    (WIDE[0, 0], "it is uint8 of shape"),
])  # fmt: skip
def test_arrays_that_are_no_images_are_named(array: np.ndarray, said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(InputError, match=said):
        open_images(tmp_path / "x.npz", grey=False)


def test_grey_arrays_and_colours_for_a_grey_judge(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", WIDE[..., 0])
    assert (pixels(tmp_path / "grey.npz") == GREY).all()
    write_npz(tmp_path / "as_rgb.npz", torch.from_numpy(GREY), None)
    assert (pixels(tmp_path / "as_rgb.npz", grey=True) == GREY).all()
    np.savez(tmp_path / "colour.npz", WIDE)
    save(tmp_path / "pictures", WIDE)
    assert (pixels(tmp_path / "colour.npz", grey=True) == pixels(tmp_path / "pictures", grey=True)).all()


# D4


def test_captions_are_lines_and_nothing_else(tmp_path: Path) -> None:
    from ptqd_cli.verbs.evaluate import _lines

    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa\u2028b\u0085c\x0bd\x1ce\r\nsecond\nthird\rfourth\n\n".encode())
    assert _lines(path) == ["a\u2028b\u0085c\x0bd\x1ce", "second", "third", "fourth"]
    path.write_text("a\n\nb\n")
    with pytest.raises(InputError, match="no prompt on line 2"):
        _lines(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        _lines(path)


# where images are kept


@pytest.mark.parametrize("metadata", [{}, {"ptqd.samples": "x"}, {"ptqd.samples": "9" * 30}, {"ptqd.samples": "3"}])
def test_files_that_are_no_samples_are_named(metadata: dict[str, str], tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"images": torch.zeros(2, 4, 4, 1, dtype=torch.uint8)}, metadata)
    with pytest.raises(InputError, match=r"holds no samples|kept no images"):
        open_images(tmp_path / "x.safetensors", grey=False)


def test_a_picture_of_another_user_is_not_called_broken(tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may read everything")
    save(tmp_path, WIDE[:2])
    (tmp_path / "1.png").chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        pixels(tmp_path)
