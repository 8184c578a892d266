"""Studies: published rows as files, what they will take, and their twins."""

import json
from pathlib import Path
from typing import Any

import pytest

from ptqd import InputError
from ptqd.experiments import Study, compare_with_published, estimate
from ptqd_cli.main import main

FOLDER = Path(__file__).parent.parent.parent / "reproduce"
STUDIES = sorted(FOLDER.glob("*.toml"))

SMALL = """
title = "a small one"
architecture = "ldm8-churches"
recipes = ["w4a8"]
corrections = ["none", "cnc,bc"]
measured = 8

[sampling]
steps = 2
eta = 0.0
classes = 0
samples = 12
batch = 4

[judge]
features = "inception"
reference = "nowhere"
published_at = "https://example.org/nowhere"

[twin]
model = "fashion-ldm"
steps = 1
samples = 6
measured = 4

[[published]]
recipe = "w4a8"
correction = "cnc+bc"
metric = "psnr"
value = 21.5
source = "nobody"
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_there_is_a_study_for_each_published_row() -> None:
    assert len(STUDIES) == 12
    for path in STUDIES:
        study = Study.load(path)
        experiment = study.experiment("model")
        assert experiment.corrections[0] == ()
        assert ("auto",) in experiment.corrections
        assert (study.plan == "paper") == path.stem.endswith("mix")
        assert len(experiment.recipes) == 2
        assert all(figure.recipe in (*experiment.recipes, "fp32") for figure in study.published)
        twin = study.as_twin()
        assert twin.sampling.eta == study.sampling.eta
        assert twin.experiment("fashion-ldm").settings[0].call["guidance_scale"] == (study.sampling.guidance or 1.0)


def test_a_dry_run_counts_everything_at_full_size(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study.load(small)
    found = estimate(study, None)
    assert found.parameters == 294_966_916
    # 2 steps: full precision and two rows of 12; 32 calibration samples; 8 measured with and without; no auto
    assert found.calls == {"sampling": 72, "calibrating": 64, "measuring": 32, "choosing corrections": 0}
    assert found.bops["fp32"] / found.bops["w4a8"] > 25
    assert found.disk["w4a8"] < 0.135 * found.disk["fp32"]
    assert found.files["images"] == 3 * 12 * 256 * 256 * 3
    assert found.files["latents"] == 3 * 12 * 4 * 32 * 32 * 4
    assert found.files["features"] == 3 * 12 * 4 * 5079
    assert estimate(study, None, images=False).files["images"] == 0
    assert found.files["quantized pipelines"] > found.disk["w4a8"]
    assert found.hours("a100") > found.hours("h100")
    with pytest.raises(InputError, match="rate of 'abacus' is not known; known are a100"):
        found.hours("abacus")
    assert main(["run", str(small), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "294,966,916 parameters" in shown
    assert "time on rtx3090" in shown


def test_a_twin_runs_here(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text(SMALL.replace('"w4a8"', '"tiny"'))
    (tmp_path / "tiny.toml").write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n')
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        small.write_text(SMALL.replace('recipes = ["w4a8"]', 'recipes = ["tiny.toml"]'))
        assert main(["run", str(small), "--twin", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert [row["key"]["methods"] for row in rows] == [[], [], ["cnc", "bc"]]
    assert {row["samples"] for row in rows} == {6}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["published"] == []
    assert "fashion-ldm" in capsys.readouterr().out


def test_a_studys_figures_stand_beside_the_published_ones(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w4a8.toml").write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n')
    small.write_text(
        SMALL.replace('recipes = ["w4a8"]', f'recipes = ["{tmp_path / "w4a8.toml"}"]').replace(
            "classes = 0", "classes = 10"
        )
    )
    asked = ["run", str(small), "--model", "fashion-ldm", "--out", str(tmp_path / "run"), "--samples", "6"]
    assert main(asked) == 2
    assert "nowhere is not here; get https://example.org/nowhere" in capsys.readouterr().err
    from ptqd.zoo import REFERENCE

    assert main([*asked, "--judge", "fashion", "--reference", str(REFERENCE)]) == 0
    shown = capsys.readouterr().out
    assert "beside what was published" in shown
    line = json.loads((tmp_path / "run" / "report.json").read_text())["published"][0]
    assert line["published"] == 21.5
    assert line["ours"]["low"] < line["ours"]["value"] < line["ours"]["high"]
    assert "Beside what was published" in (tmp_path / "run" / "report.html").read_text()
    study = Study.load(small)
    assert compare_with_published(study, [])[0].ours is None


def test_what_does_not_go_together_is_said(small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def said(*words: Any) -> str:
        assert main(["run", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "give --model, the folder of ldm8-churches" in said(small, "--out", tmp_path / "x")
    assert "says what is run; leave out --recipe" in said(small, "--recipe", "w8a8", "--dry-run")
    assert "give --out" in said(small, "--twin")
    assert "go with a study" in said("fashion-ldm", "--recipe", "w8a8", "--out", tmp_path / "x", "--twin")
    assert "give --out" in said("fashion-ldm", "--recipe", "w8a8")
    small.write_text(SMALL.replace("measured = 8", "measure = 8"))
    assert "unknown key 'measure'" in said(small, "--dry-run")
    assert "leave out --steps, --methods" in said(small, "--dry-run", "--steps", "5", "--methods", "bc")
    assert "leave out --model" in said(small, "--twin", "--model", "x", "--out", tmp_path / "x")
    small.write_text(SMALL.replace('"cnc,bc"', '"cnc, bcc"'))
    assert "unknown correction 'bcc'" in said(small, "--dry-run")
    small.write_text("title = ")
    assert "cannot be read as TOML" in said(small, "--dry-run")
    small.write_text(SMALL.replace('recipes = ["w4a8"]', 'recipes = ["w4a"]'))
    assert "w4a" in said(small, "--dry-run")
    assert not (tmp_path / "x").exists()
