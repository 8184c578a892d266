import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_pipeline
from ptqd_cli.main import main
from ptqd_cli.options import SamplingOptions
from ptqd_cli.quantized_rows import quantized_rows

QUANTIZE = ["--steps", "3", "--batch", "2", "--guidance", "2"]
SMALL = [*QUANTIZE, "--samples", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n[activations]\nrange = "minmax"\n')
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line on stderr of a call that must end with status 2."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ptqd: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_each_verb_in_turn(model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized, noise, corrected = tmp_path / "q", tmp_path / "noise.safetensors", tmp_path / "c"
    stochastic = [*SMALL, "--eta", "1"]

    def call(*arguments: Any) -> str:
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    assert "layers and attention products quantized" in call(
        "quantize", model, "--recipe", recipe, "--out", quantized, *QUANTIZE, "--eta", "1"
    )
    assert "4 samples, 3 steps" in call("measure", model, quantized, "--out", noise, *stochastic)
    assert "corrects cnc,bc,vsc" in call("correct", quantized, noise, "--out", corrected, "--methods", "cnc,bc,vsc")
    call("sample", model, "--out", tmp_path / "full", *stochastic)
    call("sample", corrected, "--out", tmp_path / "corrected", "--png", *stochastic)
    assert len(list((tmp_path / "corrected").glob("0*.png"))) == 4
    assert (tmp_path / "corrected" / "grid.png").exists()
    out = tmp_path / "metrics.json"
    call("evaluate", tmp_path / "corrected", "--against", tmp_path / "full", "--judge", "none", "--out", out)
    assert set(json.loads(out.read_text())["psnr"]) == {"value", "low", "high"}


def test_a_correction_along_the_trajectory_by_name(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, and run again from what is kept; in a folder, with statistics of its own; alone, and of enough samples."""
    command = ["run", str(model), "--recipe", str(recipe), "--out", str(tmp_path / "run"), "--measured", "8", *SMALL]
    command += ["--methods", "trajectory"]
    for _ in range(2):
        assert main(command) == 0
        rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
        assert [row["key"]["methods"] for row in rows] == [[], [], ["trajectory"]]
    (quantized,) = (tmp_path / "run").glob("*/small/quantized")
    noise = quantized.parent / "noise.safetensors"
    given = ["correct", str(quantized), str(noise), "--out", str(tmp_path / "corrected"), "--methods"]
    assert main([*given, "trajectory"]) == 0
    assert "corrects trajectory" in capsys.readouterr().out
    assert main([*given, "trajectory,vsc"]) == 2
    assert "trajectory answers for the whole of a step, vsc too; give it alone" in capsys.readouterr().err
    assert main([*command[:-4], "--measured", "4", "--methods", "trajectory", *SMALL]) == 2
    assert "are too few; measure at least 8" in capsys.readouterr().err


def test_run_writes_a_report_and_skips_what_is_done(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run", str(model), "--recipe", str(recipe), "--out", str(tmp_path), "--measured", "16", *SMALL]
    command.append("--ablation")
    assert main([*command, "--eta", "1"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["key"]["recipe"], row["key"]["plan"], "+".join(row["key"]["methods"])) for row in report["rows"]] == [
        ("fp32", None, ""),
        ("small", None, ""),
        ("small", None, "cnc"),
        ("small", None, "cnc+bc"),
        ("small", None, "cnc+bc+vsc"),
        ("small", None, "auto"),
    ]
    (choice,) = report["choices"]
    assert choice["taken"] in [trial["name"] for trial in choice["trials"] if trial["kept"]]
    assert choice["checked"] == 16
    row = report["rows"][1]
    assert set(row) >= {
        "model", "settings", "key", "sampling", "samples", "metrics", "bops", "bops_ratio", "bytes", "seconds"
    }  # fmt: skip
    assert row["settings"] == {"steps": 3, "eta": 1.0, "guidance": 2.0, "scheduler": "DDIMScheduler"}
    assert row["bops_ratio"] == pytest.approx(report["rows"][0]["bops"] / row["bops"])
    assert len(report["steps"]) == 3
    assert set(report["steps"][0]["k"]) == {"value", "low", "high"}
    assert "torch" in report["versions"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 6 + 1 + 1 + 1
    assert "What auto kept, and why" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "+CNC +BC +VSC" in capsys.readouterr().out

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished stage ran again")

    for name in ("quantize", "measure_shards", "search_correction", "sample_images", "observe_images", "judged"):
        monkeypatch.setattr(f"ptqd.experiments.stages.{name}", never)
    assert main([*command, "--eta", "1"]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again == report


def test_a_killed_run_resumes_with_the_same_images(
    model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ptqd.diffusion.sampling
    from ptqd.experiments import load_images

    command = ["run", str(model), "--recipe", str(recipe), "--measured", "16", *SMALL, "--ablation", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    plain, left = ptqd.diffusion.sampling.run_batch, [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr("ptqd.experiments.sharding.run_batch", killed)
    monkeypatch.setattr("ptqd.noise.measure.run_batch", killed)
    for kill_at in (2, 4, 6, 3):
        left[0] = kill_at
        assert main([*command, str(tmp_path / "killed")]) == 130
        assert "resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*command, str(tmp_path / "killed")]) == 0
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("samples.safetensors"))
    assert len(files) == 5  # full precision, none, cnc, cnc+bc, auto; nothing is drawn, so vsc shares the third
    for file in files:
        assert torch.equal(load_images(tmp_path / "whole" / file), load_images(tmp_path / "killed" / file))


def test_another_scheduler(model: Path, recipe: Path, tmp_path: Path) -> None:
    command = ["run", str(model), "--recipe", str(recipe), "--out", str(tmp_path), "--measured", "2", *SMALL]
    command += ["--methods", "cnc,bc,vsc"]
    assert main([*command, "--scheduler", "DDPMScheduler"]) == 0
    row = json.loads((tmp_path / "report.json").read_text())["rows"][-1]
    assert row["settings"]["scheduler"] == "DDPMScheduler"
    assert row["key"]["methods"] == ["cnc", "bc", "vsc"]
    assert row["metrics"]["psnr"]["value"] < 100


def test_a_pixel_space_pipeline_without_guidance(pixel_pipe: Any, recipe: Path, tmp_path: Path) -> None:
    pixel_pipe.save_pretrained(tmp_path / "pixel")
    command = ["run", str(tmp_path / "pixel"), "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "2", "--samples", "3", "--measured", "8", "--eta", "0.5"]) == 0
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert rows[0]["settings"] == {"steps": 2, "eta": 0.5, "guidance": None, "scheduler": "DDIMScheduler"}
    assert "DDIM, 2 steps, eta 0.5<" in (tmp_path / "run" / "report.html").read_text()


def test_bad_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--recipe", "w8a8", "--out", tmp_path / "out", *QUANTIZE]
    assert "is no folder; give a diffusers pipeline's folder" in fails(capsys, "quantize", "/nowhere", *out)
    assert "no model_index.json" in fails(capsys, "quantize", tmp_path, *out)
    (tmp_path / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in fails(capsys, "quantize", tmp_path, *out)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    assert "cannot be loaded as a pipeline" in fails(capsys, "quantize", tmp_path, *out)
    broken = tiny_pipeline()
    broken.unet.conv_in.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    assert "conv_in.weight holds NaN" in fails(capsys, "quantize", tmp_path / "nan", *out)
    truncated = tmp_path / "truncated"
    tiny_pipeline().save_pretrained(truncated)
    weights = truncated / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded as a pipeline" in fails(capsys, "quantize", truncated, *out)
    assert not (tmp_path / "out").exists()


def test_bad_recipes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text("bitz = 4")
    out = ["--out", tmp_path / "out", *QUANTIZE]
    assert "unknown key 'bitz'" in fails(capsys, "quantize", model, "--recipe", path, *out)
    path.write_text('[[rules]]\nmatch = "nowhere"')
    assert "match='nowhere' matches no layer" in fails(capsys, "quantize", model, "--recipe", path, *out)
    assert "bits must be 2 to 8; got 9" in fails(capsys, "quantize", model, "--recipe", "w9a8", *out)
    assert not (tmp_path / "out").exists()


def test_mismatched_statistics(model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized, noise, corrected = tmp_path / "q", tmp_path / "noise.safetensors", tmp_path / "c"
    assert main(["quantize", str(model), "--recipe", str(recipe), "--out", str(quantized), *QUANTIZE]) == 0
    assert main(["measure", str(model), str(quantized), "--out", str(noise), *SMALL]) == 0
    capsys.readouterr()
    assert "another unet" in fails(capsys, "correct", model, noise, "--out", corrected)
    other = ["--scheduler", "DDPMScheduler"]
    assert "another scheduler" in fails(capsys, "correct", quantized, noise, "--out", corrected, *other)
    assert "unknown correction" in fails(capsys, "correct", quantized, noise, "--out", corrected, "--methods", "x")
    noise.write_bytes(noise.read_bytes()[:-8])
    assert "no whole safetensors file" in fails(capsys, "correct", quantized, noise, "--out", corrected)
    assert not corrected.exists()


def test_bad_arguments(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out"]
    assert "steps must be at least 1" in fails(capsys, "sample", model, *out, "--steps", 0)
    assert "has no scheduler 'Nope'" in fails(capsys, "sample", model, *out, "--scheduler", "Nope")
    assert "must be NAME=VALUE" in fails(capsys, "sample", model, *out, "--call", "x")
    assert "is not JSON" in fails(capsys, "sample", model, *out, "--call", "prompt=a cat")
    assert "takes no argument 'prompt'" in fails(capsys, "sample", model, *out, "--call", 'prompt=["a"]')
    assert "does not exist" in fails(capsys, "evaluate", tmp_path / "none", "--against", model)
    assert "cannot be read as JSON" in fails(capsys, "report", tmp_path / "none")
    assert "seed must be at least 0" in fails(capsys, "sample", model, *out, "--seed", -1)
    assert "refuses its arguments" in fails(capsys, "sample", model, *out, "--steps", 2000)
    assert "refuses its arguments" in fails(capsys, "sample", model, *out, "--call", 'guidance_scale="a"')
    assert "gave 1 results for 2 samples" in fails(
        capsys, "sample", model, *out, "--steps", 1, "--samples", 2, "--call", "class_labels=3"
    )
    assert "has no scheduler 'UNet2DModel'" in fails(capsys, "sample", model, *out, "--scheduler", "UNet2DModel")
    assert "the device 'nowhere' cannot be used" in fails(capsys, "sample", model, *out, "--device", "nowhere")
    assert "unknown correction 'x'" in fails(
        capsys, "run", model, *out, "--recipe", "w8a8", "--methods", "x", "--samples", 2
    )


def test_files_that_are_something_else(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    assert "holds no samples" in fails(capsys, "evaluate", foreign, "--against", foreign)
    assert "holds no noise statistics" in fails(capsys, "correct", model, foreign, "--out", tmp_path / "out")
    for name, count in (("a", 2), ("b", 3)):
        assert main(["sample", str(model), "--out", str(tmp_path / name), "--samples", str(count), "--steps", "1"]) == 0
    capsys.readouterr()
    assert "differ in number: 2 against 3" in fails(
        capsys, "evaluate", tmp_path / "a", "--against", tmp_path / "b", "--judge", "none"
    )
    assert "takes images of shape (32, 32, 1)" in fails(capsys, "evaluate", tmp_path / "a", "--judge", "fashion")
    assert "nothing judges these images; give --judge" in fails(capsys, "evaluate", tmp_path / "a")
    (tmp_path / "report.json").write_text('{"rows": []}')
    assert "is no report" in fails(capsys, "report", tmp_path)
    swapped = tmp_path / "swapped"
    tiny_pipeline().save_pretrained(swapped)
    save_file({"x": torch.zeros(1)}, swapped / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert "the file of unet lacks" in fails(capsys, "sample", swapped, "--out", tmp_path / "c")


def test_a_folder_of_other_things_is_never_written_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    command = ("quantize", model, "--recipe", "w8a8", "--out", tmp_path, *QUANTIZE)
    assert "holds what ptqd did not write" in fails(capsys, *command)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_methods_of_one_row(model: Path, recipe: Path, tmp_path: Path) -> None:
    """At eta 0 the one corrected row is corrected, though vsc has nothing to shrink."""
    command = ["run", str(model), "--recipe", str(recipe), "--out", str(tmp_path), "--measured", "4", *SMALL]
    assert main([*command, "--methods", "vsc,bc,cnc"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["key"]["methods"] for row in rows] == [[], [], ["cnc", "bc", "vsc"]]
    assert rows[1]["images"] != rows[2]["images"]
    assert rows[1]["metrics"]["psnr"]["value"] != rows[2]["metrics"]["psnr"]["value"]


def test_two_recipes_of_one_name_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("run", model, "--recipe", "w8a8", "--recipe", "w8a8", "--out", tmp_path / "out", *SMALL)
    assert "two recipes are called 'w8a8'" in fails(capsys, *command)


def test_a_full_disk(
    model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptqd.files.save_file", full)
    out = tmp_path / "out"
    assert "No space left on device; free some space" in fails(capsys, "sample", model, "--out", out, *SMALL)
    assert not (out / "samples.safetensors").exists()
    monkeypatch.undo()
    assert main(["sample", str(model), "--out", str(out), *SMALL]) == 0


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from ptqd_cli.main import main; main(['run', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_whole_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("quantize", "measure", "correct", "plan", "cost", "sample", "evaluate", "report", "run", "demo"):
        assert verb in text


def test_auto_from_the_shell(model: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized, noise, corrected = tmp_path / "q", tmp_path / "noise.safetensors", tmp_path / "c"
    assert main(["quantize", str(model), "--recipe", str(recipe), "--out", str(quantized), *QUANTIZE]) == 0
    assert main(["measure", str(model), str(quantized), "--out", str(noise), *QUANTIZE, "--samples", "16"]) == 0
    assert main(["correct", str(quantized), str(noise), "--out", str(corrected)]) == 0
    assert "* " in capsys.readouterr().out
    assert (corrected / "scheduler" / "scheduler_config.json").exists()
    correct = ["correct", str(quantized), str(noise), "--out", str(tmp_path / "other")]
    assert main([*correct, "--steps", "5"]) == 2
    assert "auto runs the 3 steps that were measured" in capsys.readouterr().err
    assert main([*correct, "--steps", "5", "--methods", "cnc,bc"]) == 0
    assert main([*correct, "--seed", "3"]) == 2
    assert "measured with another seed" in capsys.readouterr().err


def test_measuring_resumes_after_a_kill(
    model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ptqd.diffusion.sampling

    quantized = tmp_path / "q"
    assert main(["quantize", str(model), "--recipe", str(recipe), "--out", str(quantized), *QUANTIZE]) == 0
    measure = ["measure", str(model), str(quantized), *QUANTIZE, "--samples", "12", "--batch", "4", "--out"]
    assert main([*measure, str(tmp_path / "whole.safetensors")]) == 0
    plain, calls = ptqd.diffusion.sampling.run_batch, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # in the second batch
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr("ptqd.noise.measure.run_batch", counted)
    assert main([*measure, str(tmp_path / "cut.safetensors")]) == 130
    assert not (tmp_path / "cut.safetensors").exists()
    assert main([*measure, str(tmp_path / "cut.safetensors")]) == 0
    assert calls[0] == 4 + 4  # the first batch was kept
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "q", "whole.safetensors"]
    assert "repeats" in capsys.readouterr().out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A recipe with ranges for 4, 6 and 8 bits."""
    path: Path = tmp_path_factory.mktemp("recipes") / "wide.toml"
    path.write_text("step_bits = [4, 6]\n" + recipe.read_text())
    return path


def test_a_plan_from_the_shell(
    model: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ptqd.diffusion.sampling
    from ptqd import PrecisionPlan, load
    from ptqd.quantization import plan_of

    quantized, planned = tmp_path / "q", tmp_path / "planned"
    assert main(["quantize", str(model), "--recipe", str(wide), "--out", str(quantized), *QUANTIZE]) == 0
    plan = ["plan", str(model), str(quantized), *SMALL, "--out", str(planned)]
    plain, calls = ptqd.diffusion.sampling.run_batch, [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:  # in the second batch
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("ptqd.noise.measure.run_batch", killed)
        assert main([*plan, "--budget", "40x"]) == 130
        assert not planned.exists()
        assert main([*plan, "--budget", "40x"]) == 0
        assert calls[0] == 6 + 4  # the first batch was kept
    out = capsys.readouterr().out
    assert "3 steps" in out
    assert "fewer bit operations: 40" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["planned", "q"]
    made = PrecisionPlan.load(planned / "plan.toml")
    assert plan_of(load(planned)) == made
    edited = tmp_path / "mine.toml"
    text = (planned / "plan.toml").read_text().splitlines()
    first = next(i for i, line in enumerate(text) if line.startswith('  "1: t'))
    edited.write_text("\n".join(text[:first] + text[first + 1 :]))
    files = ["--plan", str(edited)]
    assert "lacks step 1" in fails(capsys, *plan, *files)
    text[first] = text[first].replace("bits 4", "bits 8").replace("bits 6", "bits 8")
    edited.write_text("\n".join(text))
    assert main([*plan, *files]) == 0
    assert plan_of(load(planned)) == PrecisionPlan.load(edited)
    assert main([*plan, "--plan", "paper"]) == 0
    assert plan_of(load(planned)).made["rule"] == "paper"
    assert main([*plan, "--floor", "1dB", "--weights", "4,8", "--groups", "1"]) == 0
    assert set(plan_of(load(planned)).weights.values()) <= {4, 8}
    assert len(plan_of(load(planned)).groups) == 1
    (planned / "plan.toml").write_text(edited.read_text())
    assert "is not the plan of the pipeline; apply it with" in fails(capsys, "sample", planned, "--out", tmp_path / "s")
    assert main([*plan, "--plan", "paper"]) == 0

    assert "no plan meets a budget of 500x; the nearest is" in fails(capsys, *plan, "--budget", "500x")
    assert "needs --budget, such as 19.9x" in fails(capsys, *plan)
    for bad in ("many", "nan", "0x"):
        assert "is no number above 0; give it like 19.9x" in fails(capsys, *plan, "--budget", bad)
    assert "whole numbers of bits" in fails(capsys, *plan, "--budget", "20x", "--weights", "4.5")
    assert "bits must be 2 to 8; got 9" in fails(capsys, *plan, "--budget", "20x", "--weights", "4,9")
    assert "--groups must be at least 1" in fails(capsys, *plan, "--budget", "20x", "--groups", "0")
    assert "go with --plan auto" in fails(capsys, *plan, "--plan", "paper", "--budget", "20x")
    assert "cannot be read" in fails(capsys, *plan, "--plan", tmp_path / "none.toml")
    other = ["sample", planned, "--out", tmp_path / "s", "--steps", 5, "--samples", 2, "--guidance", 2]
    assert "it was made for 3 steps" in fails(capsys, *other)
    assert main([str(a) for a in ["sample", planned, "--out", tmp_path / "s", *SMALL]]) == 0


def test_the_type_of_weights_is_kept_from_folder_to_folder(model: Path, wide: Path, tmp_path: Path) -> None:
    """What was quantized in bfloat16 is measured, planned, corrected and loaded so; other pipelines in float32."""
    from ptqd import load

    noise, folders = str(tmp_path / "noise.safetensors"), [str(tmp_path / name) for name in ("q", "p", "c")]
    quantized, planned, corrected = folders
    assert main(["quantize", str(model), "--recipe", str(wide), "--out", quantized, *QUANTIZE, "--dtype=bfloat16"]) == 0
    assert main(["plan", str(model), quantized, *SMALL, "--plan", "paper", "--out", planned]) == 0
    assert main(["measure", str(model), planned, "--out", noise, *SMALL]) == 0
    assert main(["correct", planned, noise, "--out", corrected, "--methods", "cnc,bc"]) == 0
    for folder in folders:
        assert {load(folder).unet.dtype, load(folder).vae.dtype} == {torch.bfloat16}
        assert load(folder, dtype=torch.float32).unet.dtype == torch.float32
    for_engines = quantized_rows(Path(quantized), None, SamplingOptions(dtype="float32"), 4)  # which take no other
    assert for_engines.pipes["q"].unet.dtype == torch.float32
    tiny_pipeline().to(torch.bfloat16).save_pretrained(tmp_path / "full")
    assert load(tmp_path / "full").unet.dtype == torch.float32


def test_what_a_model_costs(model: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = ["cost", str(model), "--steps", "3", "--guidance", "2"]
    assert main([*cost, "--json"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert full["bit_operations"] == 1024 * full["macs"]
    assert len(full["steps"]) == 3
    assert main([*cost, "--recipe", str(wide), "--layers"]) == 0
    out = capsys.readouterr().out
    assert "down_blocks.0.resnets.0.conv1" in out
    assert "x fewer than FP32" in out
    assert main(["cost", "ldm4-imagenet", "--steps", "1"]) == 0
    assert "400.9 M parameters, 1 steps" in capsys.readouterr().out
    assert "give the whole pipeline's folder" in fails(capsys, "cost", model / "unet", "--steps", "1")
    assert main([*cost, "--scheduler", "HeunDiscreteScheduler", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["steps"]) == 5
    assert "has no scheduler 'Nope'" in fails(capsys, *cost, "--scheduler", "Nope")
    assert "matches no layer" in fails(capsys, *cost, "--recipe", _rule(tmp_path))
    assert "is no pipeline whose cost can be counted" in fails(capsys, "cost", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in fails(capsys, "cost", tmp_path / "config.json")


def _rule(folder: Path) -> Path:
    path = folder / "rule.toml"
    path.write_text('[[rules]]\nmatch = "nowhere"')
    return path


def test_a_run_with_plans(
    model: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", str(model), "--recipe", str(wide), "--out", str(tmp_path), "--measured", "16", *SMALL]
    assert main([*run, "--plan", "auto", "--budget", "40x", "--eta", "1"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["key"]["recipe"], row["key"]["plan"], "+".join(row["key"]["methods"])) for row in report["rows"]] == [
        ("fp32", None, ""),
        ("wide", "40x", ""),
        ("wide", "40x", "auto"),
    ]
    assert report["rows"][1]["bops_ratio"] >= 40
    (plan,) = report["plans"]
    assert plan["widths"] == [4, 6, 8]
    assert len(plan["bits"]) == len(plan["share"]) == len(plan["snr"]["4"]) == len(plan["forward_snr"]) == 3
    assert sum(plan["share"]) == pytest.approx(1)
    assert [point["bits"] for point in plan["uniform"]] == [4, 6, 8]
    assert len(plan["pareto"]) > 5
    assert plan["expected_db"] == pytest.approx(plan["made"]["expected_snr_db"], abs=0.01)
    assert plan["reached"]["samples"] == 16
    interval = plan["reached"]["nearest_db"]
    assert interval["low"] < interval["value"]
    assert plan["reached"]["all_db"] <= interval["value"]
    assert f"the plan expects an SNR of {plan['expected_db']:.1f} dB" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "Bits by step: wide 40x" in page

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished stage ran again")

    for name in (
        "quantize",
        "measure_width_shards",
        "make_plan",
        "measure_shards",
        "final_samples",
        "search_correction",
        "sample_images",
    ):
        monkeypatch.setattr(f"ptqd.experiments.stages.{name}", never)
    assert main([*run, "--plan", "auto", "--budget", "40x", "--eta", "1"]) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    monkeypatch.undo()
    capsys.readouterr()
    assert "give a --recipe, such as w4a8, or a --plan" in fails(capsys, "run", model, "--out", tmp_path)
    assert "go with --plan auto; give that too" in fails(capsys, *run, "--budget", "20x")
    one = ["run", model, "--out", tmp_path / "one", *SMALL, "--measured", "2", "--methods", "bc", "--recipe"]
    assert "w8a8 has ranges for 8-bit activations only" in fails(capsys, *one, "w8a8", "--plan", "paper")
    toml = next((tmp_path).rglob("plan.toml"))
    assert "has no ranges; give a recipe such as w4a4+6+8" in fails(capsys, *one, "w4a4+8", "--plan", toml)
    assert "is for 3 steps, the run takes 4" in fails(capsys, *one, wide, "--plan", toml, "--steps", "4")
    assert "cannot be read" in fails(capsys, *one, "w4a4+8", "--plan", "papper")
    assert not (tmp_path / "one" / "report.json").exists()
