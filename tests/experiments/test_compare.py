import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from conftest import tiny_pipeline
from ptqd import InputError, Sampling
from ptqd.experiments import Interval, load_images, named_recipes
from ptqd.experiments.compare import compare_runs
from ptqd.experiments.experiment import Experiment, run_experiment
from ptqd.experiments.report import comparison
from ptqd.metrics import Features, Reference, extract
from ptqd.metrics.evaluator import Evaluator
from ptqd_cli.main import main

CALL = {"class_labels": [0, 1], "guidance_scale": 2.0}


class Corners:
    """An extractor whose features are a few pixels."""

    image_shape = (16, 16, 1)
    classifies = False
    inception = False
    key = "corners"

    def features(self, images: torch.Tensor) -> Features:
        flat = images.flatten(1)
        return Features(flat[:, :4], flat[:, 40:43], flat[:, :2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for name, bits in (("first", 8), ("second", 3)):
        folder: Path = tmp_path_factory.mktemp("runs") / name
        recipe = folder.with_suffix(".toml")
        recipe.write_text(f'calibration_samples = 2\n[weights]\nbits = {bits}\nrange = "minmax"\n')
        run = Sampling(steps=2, samples=8, batch=4, call=CALL)
        rows = Experiment("tiny", (run,), named_recipes([str(recipe)]), measured=4, corrections=((), ("bc",)))
        run_experiment(tiny_pipeline(), rows, folder, None, progress=False)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def judge(folders: list[Path]) -> Evaluator:
    images = load_images(next(folders[0].rglob("samples.safetensors")))
    assert images.shape[1:] == Corners.image_shape
    reference = Reference.of(extract(Corners(), images))
    return Evaluator(Corners(), reference, "corners")


def value(interval: Interval) -> float:
    assert interval.value is not None
    return interval.value


def test_rows_are_paired_with_one_of_them(folders: list[Path], judge: Evaluator) -> None:
    rows = compare_runs(folders, judge)
    assert [(row.run, row.row.key.quantized, row.row.key.correction) for row in rows] == [
        ("first", "fp32", "none"),
        ("first", "first", "none"),
        ("first", "first", "bc"),
        ("second", "fp32", "none"),
        ("second", "second", "none"),
        ("second", "second", "bc"),
    ]
    assert {row.against for row in rows} == {"first first none"}
    assert rows[1].differences == {}
    worse = rows[4].differences["psnr"]
    assert worse.value == pytest.approx(value(rows[4].row.metrics["psnr"]) - value(rows[1].row.metrics["psnr"]))
    assert worse.high is not None
    assert worse.high < 0
    assert "psnr" not in rows[0].differences
    frechet = [value(rows[i].row.metrics["frechet_distance"]) for i in (0, 3)]
    assert frechet[0] == frechet[1]  # the same pipeline and seeds
    other = compare_runs(folders, judge, "second second bc")
    assert other[5].differences == {}
    assert (other[1].differences["psnr"].low or 0) > 0
    plain = compare_runs(folders, None)
    assert [row.chosen for row in plain] == [False, True, False, False, False, False]
    assert comparison.markdown(plain).count("[none]") == 1


def test_the_table_in_every_format(folders: list[Path], judge: Evaluator) -> None:
    rows = compare_runs(folders, judge)
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(*comparison.terminal(rows))
    texts = [console.export_text(), comparison.markdown(rows), comparison.page(rows), comparison.latex(rows)]
    for text in texts:
        for part in ("PSNR to FP dB (higher)", "second", "[none]", "]*"):
            assert part in text.replace(r"\*", "*")
    heads = [line for line in texts[1].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in heads}) == 1
    assert 'class="worse"' in texts[2]
    assert texts[3].count(r"\\") > 6
    assert r"\textit{-" in texts[3]


def test_what_cannot_be_compared_is_named(folders: list[Path], judge: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row 'w4a8 none'; there are fp32 none, first none, first bc"):
        compare_runs(folders[:1], judge, "w4a8 none")
    with pytest.raises(InputError, match="'first fp32 none' is judged by nothing"):
        compare_runs(folders, None, "first fp32 none")
    with pytest.raises(InputError, match="two run folders are called 'first'"):
        compare_runs([folders[0], folders[0]], None)
    with pytest.raises(InputError, match=r"report\.json cannot be read"):
        compare_runs([tmp_path], judge)
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    report = json.loads((other / "report.json").read_text())
    for row in report["rows"]:
        row["sampling"]["seed"] = 7
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match=r"cannot be paired: seed is 7 in one and 0 in the other"):
        compare_runs([folders[0], other], judge)
    next(other.rglob("samples.safetensors")).unlink()
    with pytest.raises(InputError, match=r"samples\.safetensors does not exist"):
        compare_runs([other], judge)


def test_the_verb(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: Any) -> str:
        assert main(["compare", *map(str, folders), "--judge", "none", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert "PSNR to FP dB" in call()
    for wrong in (["--out", "x.txt"], ["--reference", "x"]):
        assert main(["compare", *map(str, folders), "--judge", "none", *wrong]) == 2
        assert " goes with " in capsys.readouterr().err
    assert call("--format", "latex").startswith(r"\begin{tabular}")
    call("--format", "html", "--out", tmp_path / "page.html", "--json", tmp_path / "rows.json")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert set(json.loads((tmp_path / "rows.json").read_text())[1]["row"]["metrics"]) == {
        "psnr",
        "ssim",
        "latent_distance",
    }
