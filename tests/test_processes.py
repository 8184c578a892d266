import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import tiny_pipeline
from ptqd import processes
from ptqd.cli import main
from ptqd.manifest import load_manifest


def test_one_process_waits_for_nobody() -> None:
    assert processes.is_main()
    assert processes.count() == 1
    assert processes.device() is None
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    processes.wait()


def test_two_processes_give_what_one_gives_and_one_goes_on_for_two(tmp_path: Path) -> None:
    model, recipe = tmp_path / "model", tmp_path / "small.toml"
    tiny_pipeline().save_pretrained(model)
    recipe.write_text('calibration_samples = 2\n[weights]\nbits = 4\nrange = "minmax"\n')
    command = ["run", str(model), "--recipe", str(recipe), "--steps", "2", "--samples", "10", "--batch", "2"]
    command += ["--measured", "6", "--methods", "bc", "--guidance", "2"]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ptqd"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number
    shared = [*launch, *command, "--out", str(tmp_path / "two")]
    made = subprocess.run(shared, capture_output=True, text=True, check=False, env=threads)
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.count("report.json") == 1  # the main process alone
    one, two = (load_manifest(tmp_path / name) for name in ("one", "two"))
    assert two["hardware"]["processes"] == 2
    assert two["figures"] == one["figures"]
    assert two["statistics"] == one["statistics"]
    samples = [sorted((tmp_path / name).rglob("samples.safetensors")) for name in ("one", "two")]
    assert len(samples[0]) == 3
    for a, b in zip(*samples, strict=True):
        assert torch.equal(load_file(a)["images"], load_file(b)["images"])
    assert not list((tmp_path / "two" / ".partial").iterdir())
    for found in samples[1]:  # what two have left undone, one finishes
        found.unlink()
    assert main([*command, "--out", str(tmp_path / "two")]) == 0
    assert load_manifest(tmp_path / "two")["figures"] == one["figures"]
