"""Killed at any moment, shared among processes and hosts: the same numbers, and what sharing costs.

python bench/processes.py kills         # 20 runs killed (SIGKILL) at random moments; ten minutes
python bench/processes.py throughput    # two processes of one thread against one of two; two cores
python bench/processes.py hosts         # two hosts in network namespaces; needs root and iproute2
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import equal

from ptqd.experiments import Manifest

RUN = ["run", "fashion-ldm", "--recipe", "w4a8", "--steps", "4", "--samples", "24", "--batch", "4", "--measured", "8"]
RUN += ["--methods", "bc", "--guidance", "1.5"]
SAMPLE = ["sample", "fashion-ldm", "--steps", "20", "--batch", "32", "--guidance", "1.5"]
SHARED = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ptqd"]
ALONE = [sys.executable, "-m", "ptqd"]
KILLS = 20


def start(command: list[str], threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload, no-any-return]


def finish(command: list[str], threads: int) -> float:
    """Run to the end; seconds."""
    before = time.monotonic()
    if status := start(command, threads).wait():
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return time.monotonic() - before


def agree(folder: Path, other: Path) -> bool:
    """Whether two run folders hold the same numbers, samples and statistics, and nothing half-written."""
    a, b = Manifest.load(folder), Manifest.load(other)
    same = a.figures == b.figures and a.statistics == b.statistics
    for path in other.rglob("samples.safetensors"):
        same &= equal(load_file(path)["images"], load_file(folder / path.relative_to(other))["images"])
    return same and not list(folder.rglob("*.tmp")) and not list((folder / ".partial").iterdir())


def kills(folder: Path) -> None:
    chance = random.Random(0)
    whole = finish([*ALONE, *RUN, "--out", str(folder / "undisturbed")], 1)
    good = 0
    for i in range(KILLS):
        launch, out = (SHARED if i % 2 else ALONE), folder / str(i)
        process = start([*launch, *RUN, "--out", str(out)], 1)
        time.sleep(chance.uniform(0.2, 0.95) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        for child in subprocess.run(
            ["pgrep", "-f", str(out)], capture_output=True, text=True, check=False
        ).stdout.split():
            os.kill(int(child), signal.SIGKILL)  # the launcher's workers have sessions of their own
        process.wait()
        left = len(list(out.rglob("*.safetensors"))) if out.exists() else 0
        finish([*(ALONE if i % 4 < 2 else SHARED), *RUN, "--out", str(out)], 1)
        same = agree(out, folder / "undisturbed")
        good += same
        workers = "two processes" if launch is SHARED else "one process"
        print(f"  run {i + 1}: {workers} killed with {left} files written: {'same' if same else 'DIFFERS'}", flush=True)
    print(f"{good} of {KILLS} runs killed at random moments ended with the numbers of the undisturbed run")


def throughput(folder: Path) -> None:
    few, many = 64, 448
    seconds = {}
    for name, launch, threads in (("one process of two threads", ALONE, 2), ("two of one thread", SHARED, 1)):
        times = []
        for samples in (few, many):  # the difference leaves starting out
            out = folder / f"{threads}-{samples}"
            times.append(finish([*launch, *SAMPLE, "--samples", str(samples), "--out", str(out)], threads))
        seconds[name] = times[1] - times[0]
        print(
            f"{name}: {(many - few) / seconds[name]:.1f} samples/s, {times[0]:.1f} s until {few} are there", flush=True
        )
    one, two = seconds.values()
    same = equal(*(load_file(folder / f"{t}-{many}" / "samples.safetensors")["images"] for t in (2, 1)))
    print(f"two processes have {one / two:.2f} x the throughput of one; images {'identical' if same else 'DIFFER'}")


def hosts(folder: Path) -> None:
    names, addresses = ("ptqd-a", "ptqd-b"), ("10.77.0.1", "10.77.0.2")

    def run(*words: str) -> None:
        subprocess.run(words, check=True)

    finish([*ALONE, *RUN, "--out", str(folder / "one")], 1)
    for name in names:
        run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", "ptqd-va", "netns", names[0], "type", "veth", "peer", "ptqd-vb", "netns", names[1])
        for name, link, address in zip(names, ("ptqd-va", "ptqd-vb"), addresses, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            run("ip", "-n", name, "link", "set", link, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        started = []
        for rank, (name, link) in enumerate(zip(names, ("ptqd-va", "ptqd-vb"), strict=True)):
            command = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}", sys.executable]
            command += [
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--nproc_per_node",
                "1",
                "--node_rank",
                str(rank),
            ]
            command += ["--master_addr", addresses[0], "--master_port", "29511", "-m", "ptqd", *RUN]
            started.append(start([*command, "--out", str(folder / "two")], 1))
        statuses = [process.wait() for process in started]
    finally:
        for name in names:
            run("ip", "netns", "delete", name)
    same = not any(statuses) and agree(folder / "two", folder / "one")
    print(f"two hosts in network namespaces: {'the same numbers as one process' if same else f'DIFFERS, {statuses}'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "throughput", "hosts"))
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        {"kills": kills, "throughput": throughput, "hosts": hosts}[args.what](Path(folder))


if __name__ == "__main__":
    main()
