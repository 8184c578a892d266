"""Places and streams as they are: devices, pipes, links, hub caches, other accounts, terminals, launchers."""

import contextlib
import errno
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_pipeline
from ptqd import InputError, Sampling, export, load, processes
from ptqd.diffusion import run_batch
from ptqd.engines.export import for_engine
from ptqd.outputs import cache_folder
from ptqd_cli.main import BROKEN_PIPE, main

SMALL = ["--steps", "2", "--batch", "2"]
GUIDED = [*SMALL, "--guidance", "2"]
QUICK = 'calibration_samples = 2\n[weights]\nbits = 8\nrange = "minmax"\n[activations]\nrange = "minmax"\n'
QUICK += "symmetric = false\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("places")
    tiny_pipeline().save_pretrained(folder / "model")
    (folder / "quick.toml").write_text(QUICK)
    words = ["quantize", folder / "model", "--recipe", folder / "quick.toml", *SMALL, "--out", folder / "q"]
    assert main([*map(str, words)]) == 0
    for name, model in (("full", "model"), ("mine", "q")):
        words = ["sample", folder / model, *SMALL, "--samples", "4", "--out", folder / name]
        assert main([*map(str, words)]) == 0
    return folder


def process(*words: object, **options: Any) -> "subprocess.Popen[bytes]":
    """The command line in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "ptqd", *map(str, words)]
    return subprocess.Popen(command, **options)


def said(text: bytes) -> list[str]:
    return [line for line in text.decode(errors="replace").splitlines() if line.startswith("ptqd: ")]


def all_of_terminal(leader: int) -> str:
    """All that was written to a pseudo-terminal whose other end is closed; one read may return a part of it."""
    parts = []
    with os.fdopen(leader, "rb", buffering=0) as stream, contextlib.suppress(OSError):  # Linux: EIO at the end
        while part := stream.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


# D5


def test_streams_are_written_to(place: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(place / "mine"), "--against", str(place / "full"), "--judge", "none", "--out"]
    assert main([*words, "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE)
    assert main([*words, str(fifo)]) == 0
    assert "psnr" in json.loads(reader.communicate()[0])
    assert fifo.is_fifo()
    with (tmp_path / "log").open("w") as log, process(*words, "/dev/stdout", stdout=log) as writer:
        log.write("precious\n")
        log.flush()
        assert writer.wait() == 0
    assert (tmp_path / "log").read_text().count("psnr") == 2
    assert "precious" in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to("real.json")
    assert main([*words, str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "psnr" in (tmp_path / "real.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link.json", "real.json"]


# D6


def hub(folder: Path, name: str, cache: Path) -> None:
    """A folder as a hub cache has it: links into blobs."""
    root = cache / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for i, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
        shutil.copy(path, root / "blobs" / str(i))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / str(i), link.parent))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("huggingface_hub", "diffusers")) and "HF_HUB_CACHE" in vars(
            module
        ):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    return tmp_path / "cache"


RUN = Sampling(steps=2, samples=2, batch=2, call={"class_labels": [0, 1], "guidance_scale": 2.0})


def test_ptqds_own_pipelines_load_by_hub_id(place: Path, hub_cache: Path) -> None:
    hub(place / "q", "org/quantized", hub_cache)
    again = load("org/quantized")
    assert torch.equal(run_batch(again, RUN, range(2), "latent"), run_batch(load(place / "q"), RUN, range(2), "latent"))


@pytest.mark.slow
def test_exported_pipelines_load_from_links_and_backups(place: Path, tmp_path: Path, hub_cache: Path) -> None:
    """A graph for one engine, and the same for the other, which reads it in its own way."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    export(load(place / "q"), RUN, "onnxruntime", tmp_path / "onnxruntime")
    for_engine(tmp_path / "onnxruntime", "openvino", tmp_path / "openvino")
    for engine in ("onnxruntime", "openvino"):
        want = run_batch(load(tmp_path / engine), RUN, range(2))
        hub(tmp_path / engine, f"org/{engine}", hub_cache)
        shutil.copytree(tmp_path / engine, tmp_path / f"{engine}-backup", copy_function=os.link)
        for model in (f"org/{engine}", tmp_path / f"{engine}-backup"):
            assert (run_batch(load(model), RUN, range(2)) == want).all()


def test_a_quantized_dit_keeps_its_labels(tmp_path: Path) -> None:
    (tmp_path / "quick.toml").write_text(QUICK)
    words = ["quantize", "fashion-dit", "--recipe", str(tmp_path / "quick.toml"), *SMALL, "--out", str(tmp_path / "q")]
    assert main(words) == 0
    assert main(["sample", str(tmp_path / "q"), *SMALL, "--samples", "2", "--out", str(tmp_path / "s")]) == 0
    assert main(["cost", str(tmp_path / "q"), "--steps", "2"]) == 0
    load(tmp_path / "q").save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").labels == load("fashion-dit").labels


# D7


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root, to be another account")
def test_another_account_reads_what_one_wrote(place: Path, tmp_path: Path) -> None:
    for folder in (place, *place.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o777)
    run = ["run", place / "model", "--recipe", place / "quick.toml", *GUIDED, "--samples", "4", "--measured", "4"]
    run += ["--methods", "bc", "--out", place / "run"]
    noise = place / "run" / "ddim2-eta0-g2" / "quick" / "noise.safetensors"
    correct = ["correct", noise.with_name("quantized"), noise, "--methods", "bc", "--out", tmp_path / "c"]
    lists = [[*map(str, words)] for words in (run, ["report", place / "run"], correct)]
    code = f"""
import os, sys
from ptqd_cli.main import main
run, report, correct = {lists}
main(run), main(report), main(correct)
os.chmod(correct[2], 0o600)
correct[-1] += "2"
print("other account", flush=True)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(main(report), main(correct), flush=True)
"""
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"} | {"HOME": "/nonexistent"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    as_other = made.stdout.partition("other account")[2]
    assert as_other.splitlines()[-1] == "0 2", made.stderr[-500:]
    assert "no page: " in as_other
    assert f"ptqd: {noise} cannot be read: Permission denied; ask who owns it" in made.stderr.splitlines()


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert cache_folder("x").is_absolute()
    assert "~" not in str(cache_folder("x"))


@pytest.mark.parametrize(("variables", "what"), [
    ({"WORLD_SIZE": ""}, None), ({"WORLD_SIZE": "", "RANK": ""}, None), ({"WORLD_SIZE": "1"}, None),
    ({"WORLD_SIZE": "2"}, "a launcher's, but RANK is missing"), ({"WORLD_SIZE": "x"}, "is no number"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "but LOCAL_RANK is missing"),
    ({"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "cannot be"),
])  # fmt: skip
def test_left_over_launcher_variables(
    variables: dict[str, str], what: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in processes.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if what is None:
        assert processes.check_launcher() == 1
        return
    with pytest.raises(InputError, match=what):
        processes.check_launcher()
    assert main(["cost", "fashion-ldm"]) == 2
    assert what in capsys.readouterr().err


# D8 and A12: streams


def test_a_reader_that_has_enough_is_no_error(place: Path) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process("cost", place / "q", "--layers", "--steps", "2", **pipes) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.close()
        errors = writer.stderr.read()
    assert writer.returncode == BROKEN_PIPE
    assert b"Error" not in errors
    assert not said(errors)


@pytest.mark.slow
def test_an_ascii_stream_gets_what_it_can_show(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "größe 模型")
    words = ["cost", tmp_path / "größe 模型", "--steps", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    with process(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as writer:
        out, err = writer.communicate()
    assert writer.returncode == 0, err[-500:]
    assert out.isascii()


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_shows_every_figure(
    columns: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pseudo-terminal of so many columns: no figure is cut."""
    from rich.table import Table

    from ptqd.experiments.report.rendering import FOLDED, KEPT, cell
    from ptqd_cli.options import show

    table = Table(title=cell("[x] a title"))
    table.add_column("recipe", **FOLDED)
    for _ in range(5):
        table.add_column("a figure", justify="right", **KEPT)
    table.add_row(cell("ldm[ema]-" + "x" * 60), *(f"{i}234.5678 ±0.0123" for i in range(5)))
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        patched.setenv("COLUMNS", str(columns))
        show(table)
    text = all_of_terminal(leader)
    for i in range(5):
        assert f"{i}234.5678 ±0.0123" in text
    assert "…" not in text
    assert "ldm[ema]" in text.replace("\r\n", "").replace(" ", "") or "ldm[ema" in text
    assert "[x] a title" in text


# A12: two processes, and one that is interrupted


@pytest.mark.slow
def test_two_processes_write_one_output_one_after_the_other(place: Path, tmp_path: Path) -> None:
    words = ["quantize", place / "model", "--recipe", place / "quick.toml", *SMALL, "--out", tmp_path / "q"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [process(*words, **pipes) for _ in range(2)]
    ended = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [0, 0], ended
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert load(tmp_path / "q") is not None


def test_no_file_handles_left_is_said(place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def none(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x")

    monkeypatch.setattr("ptqd.files.safe_open", none)
    assert (
        main(["correct", str(place / "q"), str(place / "mine" / "samples.safetensors"), "--out", str(tmp_path / "c")])
        == 2
    )
    assert "too many open files; raise the limit" in capsys.readouterr().err
