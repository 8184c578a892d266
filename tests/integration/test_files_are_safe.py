"""Nothing is lost and nothing is wrong: what clumsy and hostile commands do to files."""

import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny_pipeline
from ptqd import Experiment, InputError, NoiseStats, Recipe, Sampling, run_experiment
from ptqd.experiments import Report
from ptqd.files import read_json, write_json
from ptqd.outputs import MARK
from ptqd_cli.main import main

QUICK = 'calibration_samples = 2\n[weights]\nbits = {bits}\nrange = "minmax"\n[activations]\nrange = "minmax"\n'
QUICK += "symmetric = false\n"
SMALL = ["--steps", "2", "--batch", "4"]
GUIDED = [*SMALL, "--guidance", "2"]

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must be refused in one line; returns the line."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ptqd: ")]
        assert len(lines) == 1
        assert "a bug in ptqd" not in lines[0]
        return lines[0]

    return run


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, recipes, a quantized pipeline, statistics and a finished run."""
    folder: Path = tmp_path_factory.mktemp("safe")
    tiny_pipeline().save_pretrained(folder / "model")
    for name, bits in (("small", 4), ("a b", 4), ("a-b", 8)):
        (folder / f"{name}.toml").write_text(QUICK.format(bits=bits))
    model, q = folder / "model", folder / "q"
    for words in (
        ["quantize", model, "--recipe", folder / "small.toml", *GUIDED, "--out", q],
        ["measure", model, q, *GUIDED, "--samples", "8", "--out", folder / "noise.safetensors"],
        [*run_words(folder), "--out", folder / "run"],
    ):
        assert main([*map(str, words)]) == 0
    return folder


def run_words(folder: Path, *recipes: str) -> list[object]:
    chosen = [word for name in recipes or ("small",) for word in ("--recipe", folder / f"{name}.toml")]
    return ["run", folder / "model", *chosen, *GUIDED, "--samples", "8", "--measured", "4", "--methods", "bc"]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A tree beside the outputs that stays as it is."""
    (tmp_path / "victim" / "deep").mkdir(parents=True)
    for name in ("model_index.json", "thesis.txt", ".x.tmp", "deep/grid.png"):
        (tmp_path / "victim" / name).write_text("mine")
    before = bytes_of(tmp_path / "victim")
    yield tmp_path / "victim"
    assert bytes_of(tmp_path / "victim") == before


# A1


@pytest.mark.parametrize("label", ["../../victim", "/tmp/x", "..", ".git", "a\nb"])
def test_a_foreign_manifests_names_write_nowhere_else(
    label: str, place: Path, tmp_path: Path, canary: Path, fails: Fails
) -> None:
    manifest = read_json(place / "run" / "manifest.json")
    manifest["recipes"] = {label: manifest["recipes"]["small"]}
    write_json(tmp_path / "m.json", manifest)
    assert "is no name" in fails("reproduce", tmp_path / "m.json", "--out", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "victim"]


@pytest.mark.parametrize("key", ["images", "observed", "pictures"])
def test_a_foreign_reports_paths_are_not_followed(
    key: str, place: Path, tmp_path: Path, canary: Path, fails: Fails
) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    report = read_json(tmp_path / "run" / "report.json")
    if key == "pictures":
        figures: dict[str, Any] = {
            "made": {},
            "timesteps": [1.0],
            "widths": [8],
            "snr": {"8": [1.0]},
            "forward_snr": None,
        }
        figures |= {"groups": ["all"], "bits": [[8]], "weights": {}, "share": [1.0], "ratio": 2.0, "pareto": []}
        figures |= {"uniform": [], "paper": None, "settings": report["rows"][0]["settings"], "recipe": "small"}
        report["plans"] = [figures | {"pictures": "../victim/x.safetensors"}]
    else:
        report["rows"][1][key] = "../victim/x.safetensors"
    write_json(tmp_path / "run" / "report.json", report)
    for verb in (["report"], ["compare", "--judge", "none"], ["bench", "--engine", "torch"]):
        assert "is not inside" in fails(verb[0], tmp_path / "run", *verb[1:])


# A2


@pytest.mark.parametrize("verb", ["run", "sample", "quantize", "demo", "export"])
def test_an_empty_output_is_refused(
    verb: str, tmp_path: Path, canary: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(canary)
    assert "is empty; is a variable unset?" in fails(verb, "fashion-ldm", "--out", "")
    assert "is empty; is a variable unset?" in fails(verb, "fashion-ldm", "--out=")


def test_links_in_a_run_folder_are_not_followed(place: Path, tmp_path: Path, canary: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    (out / "link").symlink_to(canary)
    (out / ".result.ptqd-00000000-1.1.1-0.tmp").symlink_to(canary)
    assert main([*map(str, run_words(place)), "--out", str(out)]) == 0
    for name in ("manifest.json", "report.json", "report.html", ".partial", ".locks", ".stages"):
        (out / name).rename(out / "kept")
        (out / name).symlink_to(canary / "thesis.txt" if "." in name[1:] else canary)
        assert main([*map(str, run_words(place)), "--out", str(out)]) == 2
        (out / name).unlink()
        (out / "kept").rename(out / name)


# A3


def test_an_output_is_never_an_input(place: Path, tmp_path: Path, canary: Path, fails: Fails) -> None:
    own, q, noise = tmp_path / "own", tmp_path / "q", tmp_path / "noise.safetensors"
    shutil.copytree(place / "model", own)
    shutil.copytree(place / "q", q)
    shutil.copy(place / "noise.safetensors", noise)
    (own / "README.md").write_text("mine")
    before = bytes_of(tmp_path)
    recipe = place / "small.toml"
    for words in (
        ["quantize", own, "--recipe", recipe, "--out", own],
        ["quantize", own, "--recipe", recipe, "--out", tmp_path],
        ["quantize", q, "--recipe", recipe, "--out", q],
        ["correct", q, noise, "--out", q],
        ["correct", q, noise, "--out", noise],
        ["plan", own, q, "--budget", "20x", "--out", q],
        ["plan", own, q, "--budget", "20x", "--out", own],
        ["export", q, "--out", q],
        ["sample", own, "--out", own],
        ["run", own, "--recipe", recipe, "--out", own],
        ["measure", own, q, "--out", q / "unet" / "diffusion_pytorch_model.safetensors"],
        ["measure", own, q, "--out", recipe],
        ["convert", own / "model.ckpt", own / "x.yaml", own],
        ["reproduce", place / "run", "--out", own],
        ["bench", q, "--model", own, "--out", own, "--engine", "torch"],
        ["evaluate", own, "--judge", "none", "--against", own, "--out", own / "model_index.json"],
        ["compare", place / "run", "--judge", "none", "--json", own / "model_index.json"],
        ["compare", place / "run", "--judge", "none", "--format", "markdown", "--out", own / "README.md"],
    ):
        fails(*words)
        assert bytes_of(tmp_path) == before, words


def test_somebody_elses_files_are_not_written_over(place: Path, tmp_path: Path, canary: Path, fails: Fails) -> None:
    for name, words in (("manifest.json", run_words(place)), ("grid.png", ["sample", place / "model", *SMALL])):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
        assert "holds what ptqd did not write" in fails(*words, "--out", tmp_path / "out")
        assert (tmp_path / "out" / name).read_text() == "mine"
        (tmp_path / "out" / name).unlink()
    assert "holds what ptqd did not write" in fails("demo", "--quick", "--out", canary)


def test_other_samples_in_the_same_folder_are_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(place / "model"), *SMALL, "--out", str(tmp_path / "s"), "--png", "--npz", "--samples"]
    assert main([*words, "6"]) == 0
    capsys.readouterr()
    assert main([*words[:-2], "--samples", "3", "--seed", "1"]) == 0
    assert "seed 0 before, 1 now" in capsys.readouterr().err
    names = {p.name for p in (tmp_path / "s").iterdir() if not p.name.startswith(".")}
    assert names == {"samples.safetensors", "grid.png", "000000.png", "000001.png", "000002.png"}


# A4


def test_a_refused_run_leaves_the_manifest(place: Path, tmp_path: Path, fails: Fails) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    before = bytes_of(tmp_path)
    fails(*run_words(place), "--methods", "vsc,dns", "--out", tmp_path / "run")
    fails(*run_words(place), "--no-images", "--judge", "none", "--out", tmp_path / "run")
    assert bytes_of(tmp_path) == before


# A5


def test_names_that_look_alike_do_not_share_images(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main([*map(str, run_words(place, "a b", "a-b")), "--out", str(out)]) == 0
    rows = Report.load(out).rows
    assert len({row.images for row in rows}) == len(rows)
    assert main(["compare", str(out), "--judge", "none", "--json", str(tmp_path / "c.json")]) == 0
    compared = read_json(tmp_path / "c.json")
    for row, again in zip(rows, compared, strict=True):
        value = None if "psnr" not in row.metrics else row.metrics["psnr"].value
        assert value == (again["row"]["metrics"].get("psnr") or {}).get("value")
    values = [row.metrics["psnr"].value for row in rows if "psnr" in row.metrics]
    assert len(set(values)) == len(values)


def test_recipes_and_settings_that_would_share_a_folder_are_refused(pipe: Any, run: Sampling, tmp_path: Path) -> None:
    recipe = Recipe.parse("w8a8")
    for runs, recipes in (((run,), {"x": recipe, "X": recipe}), ((run, run.replace(seed=1)), {"x": recipe})):
        with pytest.raises(InputError, match=r"called|share the folder"):
            run_experiment(pipe, Experiment("tiny", runs, recipes, corrections=((),)), tmp_path / "run")


# A6, A8, A12: values


WORDS = [
    "w0a8",
    "w4a0",
    "w0a0",
    "w1a8",
    "w9a8",
    "w4a4+4",
    "w٤a8",
    "w4a8-g٤",
    "w4a8-steps99",
    "w4a8-svd0",
    "w4a8-svd4x0",
    "w4a8-rotate0",
    "w4a999999",
]


@pytest.mark.parametrize("recipe", WORDS)
def test_recipes_that_are_none_are_refused_before_anything_is_loaded(
    recipe: str, place: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    fails("quantize", place / "model", "--recipe", recipe, *SMALL, "--out", tmp_path / "q")
    fails("run", place / "model", "--recipe", recipe, *SMALL, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    ["p = nan", "p = inf", "percentile = nan", "bits = 0", "bits = true", "bits = 4.0", "group = -1", "bits = 99"],
)
def test_values_of_recipe_files_are_checked(text: str, tmp_path: Path, place: Path, fails: Fails) -> None:
    (tmp_path / "x.toml").write_text(f"[weights]\n{text}\n")
    fails("quantize", place / "model", "--recipe", tmp_path / "x.toml", *SMALL, "--out", tmp_path / "q")


@pytest.mark.parametrize(
    "method", ["name = 'gptq'\ndamping = nan", "name = 'brecq'\nrate = inf", "name = 'smooth'\nalpha = nan"]
)
def test_values_of_methods_are_checked(method: str, tmp_path: Path, place: Path, fails: Fails) -> None:
    (tmp_path / "x.toml").write_text(f"[[methods]]\n{method}\n")
    fails("quantize", place / "model", "--recipe", tmp_path / "x.toml", *SMALL, "--out", tmp_path / "q")


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded before the options were checked")

    monkeypatch.setattr("ptqd.loading.load", load)


LATE: list[list[str]] = [
    ["--guidance", "nan"], ["--guidance", "inf"], ["--eta", "nan"], ["--eta", "inf"], ["--eta", "-1"],
    ["--steps", "0"], ["--steps", "999999999"], ["--samples", "0"], ["--samples", "99999999999"], ["--batch", "0"],
    ["--seed", "-1"], ["--seed", "99999999999999999999"], ["--scheduler", "NoScheduler"], ["--device", "nowhere"],
    ["--device", "meta"], ["--call", "num_inference_steps=7"], ["--call", "generator=null"], ["--call", "eta=1"],
    ["--call", "batch_size=2"], ["--call", "output_type=\"pil\""], ["--call", "x"], ["--call", "x={"],
    ["--call", "x=NaN"], ["--call", "a=1", "--call", "a=2"], ["--guidance", "2", "--call", "guidance_scale=3"],
    ["--steps", "two"], ["--judge", "none", "--reference", "nowhere"],
]  # fmt: skip


@pytest.mark.parametrize("words", LATE, ids=" ".join)
def test_options_are_checked_before_a_model_is_loaded(
    words: list[str], place: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    fails("sample", place / "model", "--out", tmp_path / "s", *words)
    assert not (tmp_path / "s").exists()
    fails(*run_words(place)[:2], "--recipe", "w8a8", "--out", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


RUNS: list[list[str]] = [
    ["--measured", "2"], ["--measured", "0"], ["--methods", "tac,d2"], ["--methods", "vsc,dns"],
    ["--methods", "nothing"], ["--recipe", "w8a8", "--recipe", "w8a8"], ["--recipe", "w8a8", "--plan", "paper"],
    ["--budget", "2x"], ["--plan", "auto"], ["--plan", "auto", "--budget", "nan"],
    ["--plan", "auto", "--budget", "-1x"], ["--out", "/dev/null"], ["--out", "/proc/x"],
]  # fmt: skip


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_run_is_checked_before_a_model_is_loaded(
    words: list[str], place: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_loading(monkeypatch)
    recipe = [] if "--recipe" in words else ["--recipe", "w8a8"]
    out = [] if "--out" in words else ["--out", tmp_path / "run"]
    fails("run", place / "model", *recipe, *SMALL, *out, *words)


def test_nan_weights_make_no_black_images(tmp_path: Path, fails: Fails) -> None:
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.weight.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    assert "hold NaN or infinite values" in fails("sample", tmp_path / "nan", *SMALL, "--out", tmp_path / "s")
    assert not (tmp_path / "s" / "samples.safetensors").exists()


# A10


DAMAGED = (MARK, "report.json", "none/metrics.json", "noise.safetensors", ".json", "unet/config.json")


@pytest.mark.parametrize("ending", DAMAGED)
def test_what_a_loss_of_power_damaged_is_made_again(place: Path, tmp_path: Path, ending: str) -> None:
    """One file of each kind; bench/faults.py cuts every one."""
    files = sorted(str(p.relative_to(place / "run")) for p in (place / "run").rglob("*") if p.is_file())
    name = next(n for n in files if n.endswith(ending))
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    os.truncate(out / name, (out / name).stat().st_size // 2)
    assert main([*map(str, run_words(place)), "--out", str(out)]) == 0, name
    assert [row.metrics for row in Report.load(out).rows] == [row.metrics for row in Report.load(place / "run").rows]


# A7, A12


def test_a_full_disk_while_rounding_is_learned_is_said(
    place: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = QUICK.format(bits=4) + '[[methods]]\nname = "brecq"\niterations = 2\ninputs = 4\nbatch = 2\n'
    (tmp_path / "learned.toml").write_text(text)
    words = ["quantize", place / "model", "--recipe", tmp_path / "learned.toml", *GUIDED, "--out", tmp_path / "q"]
    with monkeypatch.context() as full:

        def fallocate(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(os, "posix_fallocate", fallocate)
        assert "No space left on device; free some space" in fails(*words)
    assert not (tmp_path / "q").exists()
    assert main([*map(str, words)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learned.toml", "q"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory; lower --batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory; lower --batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory; lower --batch"),
        (OSError(errno.EMFILE, "Too many open files"), "too many open files; raise the limit"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (KeyError("x"), "a bug in ptqd, or in a library it calls: KeyError: 'x'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("ptqd.experiments.sharding.run_batch", fail)
    assert main(["sample", str(place / "model"), *SMALL, "--out", str(tmp_path / "s")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if said in line]
    assert "Traceback" not in "".join(lines)
    assert main(["sample", str(place / "model"), *SMALL, "--out", str(tmp_path / "s"), "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_is_written_has_the_umasks_rights(place: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for folder in (place / "q", place / "run"):
        for path in folder.rglob("*"):
            if ".locks" not in path.parts:
                want = (0o777 if path.is_dir() else 0o666) & ~mask
                assert stat.S_IMODE(path.stat().st_mode) == want, path
    assert stat.S_IMODE((place / "noise.safetensors").stat().st_mode) == 0o666 & ~mask


# A11


def test_names_of_people_are_data_on_every_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "[bold]$m_\x1b[31m"
    shutil.copytree(place / "model", model)
    words = ["run", str(model), *SMALL, "--samples", "4", "--measured", "4", "--methods", "bc"]
    for name in ("[", "$x_1^", "a\u202eb\x1b[31m\n", "<i>|`*", "_模型 é " + "x" * 200):
        recipe = tmp_path / f"{name}.toml"
        shutil.copy(place / "small.toml", recipe)
        words += ["--recipe", str(recipe)]
    out = tmp_path / "run"
    assert main([*words, "--out", str(out)]) == 0
    compare = ["compare", str(out), "--judge", "none", "--format"]
    verbs = [[*compare, form] for form in ("terminal", "markdown", "html", "latex")]
    for verb in (["report", str(out), "--wide"], ["report", str(out), "--markdown"], *verbs):
        assert main(verb) == 0
    captured = capsys.readouterr()
    for text in (captured.out, captured.err, (out / "report.html").read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "<i>" not in (out / "report.html").read_text()


def test_evaluate_prints_json_whatever_is_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptqd.metrics.bootstrap import Metric

    metrics = {"psnr": Metric(float("nan"), float("inf"), float("-inf"))}
    monkeypatch.setattr("ptqd.experiments.sharding.observed_samples", lambda *a, **k: (2, metrics))
    (tmp_path / "s").mkdir()
    assert main(["evaluate", str(tmp_path / "s"), "--judge", "none", "--against", str(tmp_path / "s")]) == 0

    def no_number(text: str) -> None:
        raise AssertionError(text)

    printed = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert printed == {"psnr": {"value": None, "low": None, "high": None}}


def test_statistics_are_replaced_by_statistics_alone(place: Path, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "noise.safetensors"
    shutil.copy(place / "noise.safetensors", out)
    words = ["measure", place / "model", place / "q", *GUIDED, "--samples", "4", "--out", out]
    assert main([*map(str, words)]) == 0
    assert NoiseStats.load(out).samples == 4
    out.write_text("mine")
    assert "is there already and is no statistics" in fails(*words)
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["noise.safetensors"]


def test_engines_do_not_call_home() -> None:
    pytest.importorskip("openvino")
    from ptqd.engines.sessions import required

    known = "openvino_telemetry" in sys.modules
    required("openvino")
    assert ("openvino_telemetry" in sys.modules) == known
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


VALUES = ["nan", "inf", "-inf", "-1", "0", "1e400", "", " ", "x", "null", "[]", "٣", "9" * 30, "--", "../x"]
VALUES += ["/dev/null", "[/]", "\x1b[31m", "a,b", "1,2", "{}", "1.5", "True"]
OPTIONS = {  # what a verb is given besides, and some of its options
    "sample": ("m", "steps eta guidance samples batch seed scheduler device call judge reference lpips"),
    "run": ("m --recipe=w8a8", "measured methods plan budget samples steps recipe"),
    "quantize": ("m", "recipe steps batch seed"),
    "measure": ("m q", "samples steps eta"),
    "correct": ("q n", "methods steps scheduler batch seed call device"),
    "plan": ("m q", "plan budget floor weights groups samples"),
    "export": ("q", "engine provider layout others samples"),
    "bench": ("q", "engine repeats threads batch row model"),
    "evaluate": ("s", "classes batch judge prompts against device"),
    "cost": ("m", "recipe plan steps eta guidance call"),
    "compare": ("r", "against format judge"),
    "reproduce": ("r", "model scheduler device judge"),
}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_any_value_of_any_option_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Nothing but a result or one line with status 2; no model is there to be loaded."""
    verb = data.draw(st.sampled_from(sorted(OPTIONS)))
    words, options = OPTIONS[verb]
    option = data.draw(st.sampled_from(options.split()))
    value = data.draw(st.sampled_from(VALUES) | st.text(max_size=20))
    folder = tmp_path_factory.mktemp("options")
    out = [] if verb in ("cost", "compare", "bench", "evaluate") else ["--out", str(folder / "out")]
    paths = [str(folder / word) if len(word) == 1 else word for word in words.split()]
    with (folder / "said").open("w", errors="replace") as stream, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", stream)
        patched.setattr("sys.stdout", stream)
        status = main([verb, *paths, f"--{option}={value}", *out])
    text = (folder / "said").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("ptqd: ")]
    assert status == 2, text
    assert len(lines) == 1, text
    assert "a bug in ptqd" not in text
    assert not (folder / "out").exists()
