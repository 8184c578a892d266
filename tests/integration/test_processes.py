import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_pipeline
from ptqd import processes
from ptqd.experiments import Manifest
from ptqd_cli.main import main

SAMPLE = ["--steps", "3", "--samples", "24", "--batch", "2", "--guidance", "2"]


def launched(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "ptqd"]


SHARED_WORK = str(Path(__file__).parent.parent / "shared_work.py")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number


def test_one_process_waits_for_nobody() -> None:
    assert processes.is_main()
    assert processes.count() == 1
    assert processes.device() is None
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    processes.wait()


def test_what_sharing_is_made_of(tmp_path: Path) -> None:
    command = [*launched("--nproc_per_node", "2")[:-2], SHARED_WORK, str(tmp_path / "done"), "primitives"]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert made.returncode == 0, made.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.0", "done.1"]


@pytest.mark.slow
def test_work_that_is_shared_gives_what_one_process_gives(tmp_path: Path) -> None:
    one = [sys.executable, SHARED_WORK, str(tmp_path / "one")]
    for command in (one, [*launched("--nproc_per_node", "3")[:-2], SHARED_WORK, str(tmp_path / "many")]):
        made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        assert made.returncode == 0, made.stderr[-2000:]
    want, *found = (
        json.loads((tmp_path / name).read_text())
        for name in ("one.0.json", "many.0.json", "many.1.json", "many.2.json")
    )
    assert len(want) == 7
    assert found == [want] * 3


@pytest.mark.slow
def test_commands_that_quantize_plan_and_correct_write_what_one_process_writes(tmp_path: Path) -> None:
    model, recipe = tmp_path / "model", tmp_path / "small.toml"
    tiny_pipeline().save_pretrained(model)
    text = 'calibration_samples = 6\nstep_bits = [4]\n[weights]\nbits = 4\nrange = "minmax"\n[activations]\nbits = 8\n'
    recipe.write_text(text + '[[methods]]\nname = "distill"\niterations = 2\nbatch = 20\ninputs = 20\n')
    run = ["--steps", "2", "--eta", "1", "--batch", "2", "--guidance", "2"]
    written = []
    for name, launch in (("one", [sys.executable, "-m", "ptqd"]), ("two", launched("--nproc_per_node", "2"))):
        q, p, c, noise = (str(tmp_path / name / part) for part in ("q", "p", "c", "noise.safetensors"))
        commands = (
            ["quantize", str(model), "--recipe", str(recipe), *run, "--out", q],
            ["measure", str(model), q, *run, "--samples", "16", "--out", noise],
            ["correct", q, noise, "--batch", "2", "--call", "class_labels=[0,1,2,3,4,5,6,7,8,9]", "--out", c],
            ["plan", str(model), q, *run, "--samples", "6", "--budget", "40x", "--out", p],
        )
        for command in commands:
            made = subprocess.run([*launch, *command], capture_output=True, text=True, check=False, env=environment())
            assert made.returncode == 0, made.stderr[-2000:]
            assert made.stdout.count(command[-1]) <= 1  # the main process alone
        folder = tmp_path / name
        assert not list(folder.glob(".*"))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        own = str(folder).encode()  # where a pipeline was loaded from is written down
        read = {path.relative_to(folder).as_posix(): path.read_bytes().replace(own, b"") for path in files}
        written.append(read)
    assert len(written[0]) > 20
    assert written[0] == written[1]


@pytest.mark.slow
def test_quantizing_goes_on_with_as_many_processes_as_there_are(tmp_path: Path) -> None:
    model, recipe = tmp_path / "model", tmp_path / "long.toml"
    tiny_pipeline().save_pretrained(model)
    text = 'calibration_samples = 6\n[weights]\nbits = 4\nrange = "minmax"\n'
    recipe.write_text(text + '[[methods]]\nname = "distill"\niterations = 120\nbatch = 20\ninputs = 20\n')
    command = ["quantize", str(model), "--recipe", str(recipe), *SAMPLE[4:], "--steps", "2", "--out"]
    subprocess.run([sys.executable, "-m", "ptqd", *command, str(tmp_path / "one")], check=True, env=environment())
    want = load_file(tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, launch in (("two", launched("--nproc_per_node", "2")), ("alone", [sys.executable, "-m", "ptqd"])):
        shared = [*launched("--nproc_per_node", "2"), *command, str(tmp_path / name)]
        running = subprocess.Popen(shared, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        while running.poll() is None and not list(tmp_path.glob(f".{name}.ptqd-*/*/distill/*.ckpt")):
            time.sleep(0.05)
        assert running.poll() is None
        workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
        for worker in workers.stdout.split():
            os.kill(int(worker), signal.SIGKILL)
        assert running.wait() != 0
        assert not (tmp_path / name).exists()
        again = [*launch, *command, str(tmp_path / name)]
        made = subprocess.run(again, capture_output=True, text=True, check=False, env=environment())
        assert made.returncode == 0, made.stderr[-2000:]
        found = load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], want[key]) for key in want)
        assert not list(tmp_path.glob(f".{name}*"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_one_goes_on_for_two(tmp_path: Path) -> None:
    model, recipe = tmp_path / "model", tmp_path / "small.toml"
    tiny_pipeline().save_pretrained(model)
    recipe.write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n')
    command = ["run", str(model), "--recipe", str(recipe), "--steps", "2", "--samples", "10", "--batch", "2"]
    command += ["--measured", "6", "--methods", "bc", "--guidance", "2"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    shared = [*launched("--nproc_per_node", "2"), *command, "--out", str(tmp_path / "two")]
    made = subprocess.run(shared, capture_output=True, text=True, check=False, env=environment())
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.count("report.json") == 1  # the main process alone
    one, two = (Manifest.load(tmp_path / name) for name in ("one", "two"))
    assert two.hardware["processes"] == 2
    assert two.figures == one.figures
    assert two.statistics == one.statistics
    samples = [sorted((tmp_path / name).rglob("samples.safetensors")) for name in ("one", "two")]
    assert len(samples[0]) == 3
    for a, b in zip(*samples, strict=True):
        assert torch.equal(load_file(a)["images"], load_file(b)["images"])
    assert not list((tmp_path / "two" / ".partial").iterdir())
    for found in samples[1]:  # what two have left undone, one finishes
        found.unlink()
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert Manifest.load(tmp_path / "two").figures == one.figures


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 8], ids=["a batch does not fit", "the whole does not fit"])
def test_a_full_disk_is_said_and_what_was_made_is_kept(tmp_path: Path, kilobytes: int) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_pipeline().save_pretrained(model)
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({1024 * kilobytes},) * 2); "
    code = limit + "from ptqd_cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = ["sample", str(model), *SAMPLE, "--out", str(out)]
    made = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "cannot write" in made.stderr.splitlines()[-1]
    assert "free some space" in made.stderr
    assert not (out / "samples.safetensors").exists()
    assert not list(out.rglob("*.tmp"))
    assert len(list(out.rglob("0*.safetensors"))) == (0 if kilobytes == 1 else 12)
    assert main(command) == 0
    assert main([*command[:-1], str(tmp_path / "undisturbed")]) == 0
    found, want = (load_file(folder / "samples.safetensors") for folder in (out, tmp_path / "undisturbed"))
    assert torch.equal(found["images"], want["images"])


def test_a_shard_of_another_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    command = ["sample", str(model), *SAMPLE[2:], "--out", str(tmp_path / "out"), "--steps"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ptqd.experiments.sharding.join_tensors", lambda *_: sys.exit(1))
        for steps in ("1", "2"):
            with pytest.raises(SystemExit):
                main([*command, steps])
    first, second = sorted((tmp_path / "out" / ".partial").iterdir())
    (first / "00000004.safetensors").replace(second / "00000004.safetensors")
    (first / "00000004.safetensors").write_bytes((first / "00000002.safetensors").read_bytes())
    codes = [main([*command, steps]) for steps in ("1", "2")]
    assert sorted(codes) == [0, 2]
    said = capsys.readouterr().err
    assert "00000004.safetensors was written by another configuration" in said
    assert "remove it" in said


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_batch(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    command = ["sample", str(model), *SAMPLE, "--steps", "60", "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    shared = [*launched("--nproc_per_node", "2", "--max-restarts", "1"), *command, str(tmp_path / "two")]
    running = subprocess.Popen(shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)
    while running.poll() is None and not list((tmp_path / "two").rglob("0*.safetensors")):
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, said = running.communicate()
    assert running.returncode == 0, said[-2000:]
    assert "Signal 9" in said or "SIGKILL" in said or "exitcode: -9" in said
    found, want = (load_file(tmp_path / name / "samples.safetensors") for name in ("two", "one"))
    assert torch.equal(found["images"], want["images"])


@pytest.mark.slow
def test_a_late_worker_is_waited_for_and_one_of_another_kind_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_pipeline().save_pretrained(model)
    command = ["sample", str(model), *SAMPLE, "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0

    def hosts(port: int, *commands: list[str]) -> list[tuple[int, str]]:
        started = []
        for rank, words in enumerate(commands):
            where = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
            where += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*launched(*where), *words], env=environment(), **pipes))
            time.sleep(6 * (1 - rank))
        said = [process.communicate() for process in started]
        return [(process.returncode, text) for process, (_, text) in zip(started, said, strict=True)]

    late = hosts(29517, *[[*command, str(tmp_path / "late")]] * 2)
    assert [code for code, _ in late] == [0, 0], late
    found, want = (load_file(tmp_path / name / "samples.safetensors") for name in ("late", "one"))
    assert torch.equal(found["images"], want["images"])
    other = [*command, str(tmp_path / "other")]
    different = hosts(29518, other, [*other, "--seed", "3"])
    assert all(code != 0 for code, _ in different)
    assert any("was started with other arguments than the main one" in said for _, said in different)
    assert not (tmp_path / "other" / "samples.safetensors").exists()


@pytest.mark.slow
def test_two_processes_see_in_images_what_one_sees(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    random = torch.Generator().manual_seed(0)
    for name in ("real", "made"):
        pixels = torch.randint(0, 256, (40, 32, 32, 1), generator=random, dtype=torch.uint8)
        np.savez(tmp_path / f"{name}.npz", pixels.numpy())
    command = ["evaluate", str(tmp_path / "made.npz"), "--reference", str(tmp_path / "real.npz"), "--batch", "8"]
    found = []
    for name, launch in (("one", [sys.executable, "-m", "ptqd"]), ("two", launched("--nproc_per_node", "2"))):
        cache = environment() | {"XDG_CACHE_HOME": str(tmp_path / name)}
        subprocess.run([*launch, *command, "--out", str(tmp_path / f"{name}.json")], env=cache, check=True)
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert len(list((tmp_path / name / "ptqd").rglob("*.safetensors"))) == 2  # the reference, and what was seen
    assert found[0] == found[1]
    assert "frechet_distance" in found[0]
    assert capfd.readouterr().out.count('"frechet_distance"') == 2  # the main process alone
