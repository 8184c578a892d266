import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from conftest import tiny_pipeline
from ptqd import InputError, Sampling
from ptqd.experiments import Manifest, PlanRequest, named_recipes, reproduce, run_with_manifest
from ptqd.experiments.experiment import Experiment
from ptqd.experiments.manifest import JudgeFacts, SettingFacts
from ptqd.files import read_json
from ptqd.loading import with_scheduler
from ptqd_cli.main import main

RUN = Sampling(steps=2, samples=6, batch=3, call={"class_labels": [0, 1], "guidance_scale": 2.0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("runs")
    recipe = folder / "small.toml"
    recipe.write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n')
    rows = Experiment(str(model), (RUN,), named_recipes([str(recipe)]), measured=4, corrections=((), ("bc",)))
    run_with_manifest(tiny_pipeline(), rows, folder / "run", None, progress=False)
    return folder / "run"


def test_a_manifest_names_all_that_figures_follow_from(written: Path) -> None:
    manifest = Manifest.load(written)
    assert manifest == Manifest.load(written / "manifest.json")
    assert manifest.recipes["small"]["weights"]["bits"] == 4
    assert manifest.settings[0].run["seed"] == 0
    assert manifest.scheduler.kind == "DDIMScheduler"
    assert manifest.packages["torch"] == torch.__version__
    assert manifest.hardware["device"] == "cpu"
    assert len(manifest.code) == 64
    assert [len(value) for value in manifest.statistics.values()] == [64]
    assert [row.correction for row in manifest.figures] == ["none", "none", "bc"]


def test_figures_come_out_again(written: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(written)
    found = reproduce(manifest, tiny_pipeline(), tmp_path / "again", None, progress=False)
    assert [figure.verdict for figure in found.figures] == ["the same"] * 6
    assert found.changed == ()
    assert Manifest.load(tmp_path / "again").statistics == manifest.statistics


def test_what_differs_is_said(written: Path, tmp_path: Path) -> None:
    manifest = read_json(written / "manifest.json")
    psnr = manifest["figures"][1]["metrics"]["psnr"]
    psnr["value"] += (psnr["high"] - psnr["value"]) / 2
    other = manifest["figures"][2]["metrics"]["psnr"]
    other |= {"value": other["value"] + 20, "low": other["low"] + 20, "high": other["high"] + 20}
    manifest["packages"]["torch"], manifest["code"] = "2.0.0", "0"
    manifest["hardware"]["threads"] = 999
    found = reproduce(msgspec.convert(manifest, Manifest), tiny_pipeline(), tmp_path / "again", None, progress=False)
    assert [figure.verdict for figure in found.figures if figure.metric == "psnr"] == ["agrees", "DIFFERS"]
    assert len(found.changed) == 3
    assert any("instead of 2.0.0" in change for change in found.changed)


def test_another_pipeline_is_refused(written: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(written)
    with pytest.raises(InputError, match=r"weights: .* instead of the manifest's"):
        reproduce(manifest, tiny_pipeline(seed=1), tmp_path, None, progress=False)
    other: Any = with_scheduler(tiny_pipeline(), "DDPMScheduler")
    with pytest.raises(InputError, match="run it with --scheduler DDIMScheduler"):
        reproduce(manifest, other, tmp_path, None, progress=False)
    judged = dataclasses.replace(manifest, judge=JudgeFacts("x", "x", {}))
    with pytest.raises(InputError, match="judge: None instead of"):
        reproduce(judged, tiny_pipeline(), tmp_path, None, progress=False)


def test_arguments_for_all_samples_stay_so_and_pictures_are_refused(written: Path, tmp_path: Path) -> None:
    shared = Sampling(call={"sigmas": (1.0, 0.5), "class_labels": [0, 1]}, shared={"timesteps": [9, 5], "size": (8, 8)})
    facts = msgspec.convert(json.loads(msgspec.json.encode(SettingFacts.of(shared))), SettingFacts)
    assert facts.sampling() == shared
    for given in (Sampling(call={"image": np.zeros((4, 4))}), Sampling(shared={"image": np.zeros((4, 4))})):
        with pytest.raises(InputError, match="cannot hold image"):
            SettingFacts.of(given).sampling()


def test_plans_are_kept_whole() -> None:
    request = PlanRequest("auto", budget=19.9, weight_bits=(4, 8))
    assert PlanRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="is no manifest"):
        Manifest.load(path)
    path.write_text('{"figures": [], "format": 99}')
    with pytest.raises(InputError, match="format 99"):
        Manifest.load(path)


def test_the_verb_says_it_by_its_status(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(written), "--out", str(tmp_path / "again")]) == 0
    assert "6 of 6 figures agree" in capsys.readouterr().out
    manifest = read_json(written / "manifest.json")
    metric = manifest["figures"][1]["metrics"]["psnr"]
    metric |= {"value": metric["value"] + 20, "low": metric["low"] + 20}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(manifest))
    assert main(["reproduce", str(written), "--out", str(written)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert main(["reproduce", str(path), "--out", str(tmp_path / "again")]) == 1
    assert "DIFFERS" in capsys.readouterr().out
