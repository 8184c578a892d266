"""What a kill, a full disk and a loss of power do to every verb that writes: the same figures after the same command.

python bench/faults.py              # all of it; half an hour on two cores
python bench/faults.py kills        # SIGKILL at random moments of every verb
python bench/faults.py disk         # full disks of ten sizes for every verb; needs root, to mount them
python bench/faults.py truncation   # every file of a finished and an unfinished run folder, cut in half and to nothing

Every command runs in a process of its own that is forked from one that has imported torch. After each fault the same
command runs again; all that its output holds, but for the seconds it took, is compared with an undisturbed run, byte by
byte where it is tensors; nothing may be left over, and a tree beside the output must be as it was.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "diffusion"))

import ptqd_cli.verbs  # noqa: F401
from conftest import tiny_pipeline
from ptqd.files import is_temporary
from ptqd_cli.main import VERBS, application, main

KILLS = 10  # of each verb
SIZES = 10  # of disks
FEW = 2  # of slow verbs: demo is run on a larger model, bench starts processes
SMALL = ["--steps", "2", "--batch", "4", "--guidance", "2"]
LEARNED = """calibration_samples = 4
[weights]
bits = 4
range = "minmax"
[activations]
symmetric = false
range = "minmax"
[[methods]]
name = "brecq"
iterations = 30
inputs = 8
batch = 4
"""
WIDE = """calibration_samples = 2
step_bits = [4]
[weights]
bits = 8
range = "minmax"
[activations]
symmetric = false
range = "minmax"
"""
VOLATILE = (
    "seconds",
    "all_seconds",
    "stages",
    "versions",
    "hardware",
    "speed",
    "made",
    "peak",
    "of_torch",
    "of_fastest",
)  # differ from run to run


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        name: of the verb.
        command: with ``OUT`` for the output.
        output: its name.
        prepared: a folder that the output is a copy of before, for verbs that write into one that is there.
        slow: tried twice instead of ten times.
    """

    name: str
    command: tuple[str, ...]
    output: str
    prepared: Path | None = None
    slow: bool = False

    def words(self, out: Path) -> list[str]:
        return [word.replace("OUT", str(out)) for word in self.command]


def cases(folder: Path) -> list[Case]:
    """Every verb that writes, on a tiny pipeline; what they need is made here."""
    from test_compvis import small, write

    model, learned, wide = folder / "model", folder / "learned.toml", folder / "wide.toml"
    tiny_pipeline().save_pretrained(model)
    learned.write_text(LEARNED)
    wide.write_text(WIDE)
    checkpoint, config = write(folder, *small("ldm8-churches"))
    run = ["run", str(model), "--recipe", str(learned), *SMALL, "--samples", "8", "--measured", "16"]
    q, noise, finished = folder / "q", folder / "noise.safetensors", folder / "run"
    for words in (
        ["quantize", str(model), "--recipe", str(wide), *SMALL, "--out", str(q)],
        ["measure", str(model), str(q), *SMALL, "--samples", "16", "--out", str(noise)],
        ["sample", str(model), *SMALL, "--samples", "8", "--out", str(folder / "full")],
        ["sample", str(q), *SMALL, "--samples", "8", "--out", str(folder / "quantized")],
        [*run, "--out", str(finished)],
    ):
        assert forked(words, folder / "log").wait() == 0, (folder / "log").read_text()
    timed = ("bench", str(q), "--model", str(model), *SMALL, "--engine", "torch", "--repeats", "1")
    full, quantized = str(folder / "full"), str(folder / "quantized")
    return [
        Case("run", (*run, "--out", "OUT"), "run"),
        Case("reproduce", ("reproduce", str(finished), "--out", "OUT"), "again"),
        Case("report", ("report", "OUT"), "run", finished),
        Case("sample", ("sample", str(model), *SMALL, "--samples", "16", "--png", "--npz", "--out", "OUT"), "samples"),
        Case("quantize", ("quantize", str(model), "--recipe", str(learned), *SMALL, "--out", "OUT"), "q"),
        Case("measure", ("measure", str(model), str(q), *SMALL, "--samples", "16", "--out", "OUT"), "s.safetensors"),
        Case("correct", ("correct", str(q), str(noise), "--batch", "4", "--out", "OUT"), "c"),
        Case("plan", ("plan", str(model), str(q), *SMALL, "--samples", "8", "--budget", "20x", "--out", "OUT"), "p"),
        Case("export", ("export", str(q), *SMALL, "--others", "none", "--out", "OUT"), "e"),
        Case("convert", ("convert", str(checkpoint), str(config), "OUT"), "converted"),
        Case("evaluate", ("evaluate", quantized, "--against", full, "--judge", "none", "--out", "OUT"), "m.json"),
        Case("compare", ("compare", str(finished), "--judge", "none", "--format", "html", "--out", "OUT"), "t.html"),
        Case(
            "demo", ("demo", "--quick", "--samples", "8", "--recipe", str(learned), "--out", "OUT"), "demo", slow=True
        ),
        Case("bench", (*timed, "--json", "OUT"), "b.json", slow=True),
    ]


@dataclass
class Child:
    pid: int

    def wait(self) -> int:
        """Its exit status; less than 0 of one that was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)


def forked(words: list[str], log: Path, temporary: Path | None = None) -> Child:
    """A command in a process of its own, whose output is kept."""
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)
        return Child(pid)
    status = 70
    try:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if temporary is not None:
            tempfile.tempdir = str(temporary)
        status = main(words)
        sys.stdout.flush()
    finally:
        os._exit(status)


def facts(out: Path) -> dict[str, str]:
    """All that an output holds, by its files' names: hashes, without the seconds that things took."""
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): fact(path) for path in files if path.suffix not in (".lock", ".holder")}


def fact(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(_steady(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".html" and path.name == "report.html":
        return "a page" if b"</html>" in data else "no page"  # it has seconds in it
    return sha256(data).hexdigest()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in VOLATILE}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def leftovers(place: Path, out: Path) -> list[str]:
    """What no finished command leaves."""
    beside = [p.name for p in place.iterdir() if p != out and p.name not in ("canary", "lost+found", "tmp", "cache")]
    inside = [str(p) for p in place.rglob("*") if is_temporary(p.name) or p.name == ".ptqd-ready"]
    partial = [str(p) for p in place.rglob(".partial/*")]
    return beside + inside + partial


@contextmanager
def canary(place: Path) -> Iterator[None]:
    """A tree beside the output that must stay as it is."""
    tree = place / "canary"
    (tree / "deep").mkdir(parents=True)
    for name in ("thesis.txt", ".hidden.tmp", "deep/grid.png", "deep/.q.123.tmp", "deep/model_index.json"):
        (tree / name).write_text(f"not ptqd's: {name}")
    before = facts_of_tree(tree)
    yield
    assert facts_of_tree(tree) == before, "the canary tree was touched"


def facts_of_tree(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases = cases(folder)
        self.want: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}
        for case in self.cases:
            out = self.place("want", case)
            before = time.monotonic()
            assert forked(case.words(out), folder / "log").wait() == 0, (case.name, (folder / "log").read_text())
            self.seconds[case.name] = time.monotonic() - before
            self.want[case.name] = facts(out)
            self.bytes[case.name] = sum(p.stat().st_size for p in out.parent.rglob("*") if p.is_file())
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(text, file=sys.stderr, flush=True)

    def place(self, what: str, case: Case) -> Path:
        """Where a case's output goes, in a folder of its own."""
        place = self.folder / what / case.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        out = place / case.output
        if case.prepared is not None:
            shutil.copytree(case.prepared, out)
        return out

    def again(self, case: Case, out: Path, what: str, temporary: Path | None = None) -> bool:
        """Run the same command again, and compare."""
        log = self.folder / "log"
        status = forked(case.words(out), log, temporary).wait()
        reasons = []
        if status:
            reasons.append(f"status {status}: {log.read_text()[-300:]}")
        elif (got := facts(out)) != (want := self.want[case.name]):
            names = sorted({*got, *want})
            reasons.append(f"differs in {[name for name in names if got.get(name) != want.get(name)][:4]}")
        if status == 0 and (left := leftovers(out.parent, out)):
            reasons.append(f"left over: {left[:4]}")
        if reasons:
            self.problem(f"{case.name}, {what}: {'; '.join(reasons)}")
        return not reasons

    def kills(self) -> None:
        """SIGKILL at random moments."""
        chance, good, all_of_them = random.Random(0), 0, 0
        counts = []
        for case in self.cases:
            mine = 0
            for _ in range(FEW if case.slow else KILLS):
                out = self.place("kills", case)
                with canary(out.parent):
                    child = forked(case.words(out), self.folder / "log")
                    moment = chance.uniform(0, self.seconds[case.name])
                    time.sleep(moment)
                    child.kill()
                    killed = child.wait() < 0
                    fine = self.again(case, out, f"killed after {moment:.2f} s")
                mine += killed
                good += fine
                all_of_them += 1
            counts.append(f"{case.name} {mine}")
        print(f"Kills: {all_of_them} commands at random moments, these still running: {', '.join(counts)}")
        print(f"  {good} of {all_of_them} as undisturbed, nothing left over, nothing beside touched")

    def disk(self) -> None:
        """Full disks: one line and status 2, or all of it; then, with room, the same command again."""
        good, refused, all_of_them = 0, 0, 0
        for case in self.cases:
            prepared = 0
            if case.prepared is not None:
                prepared = sum(p.stat().st_size for p in case.prepared.rglob("*") if p.is_file())
            sizes = FEW if case.slow else SIZES
            for i in range(sizes):
                size = 65536 + int(prepared * 1.4) + int((self.bytes[case.name] * 2.5 - prepared) * (i + 0.5) / sizes)
                place = self.folder / "disk"
                place.mkdir(exist_ok=True)
                mount(place, size)
                try:
                    out = place / case.output
                    if case.prepared is not None:
                        shutil.copytree(case.prepared, out)
                    with canary(place):
                        (place / "tmp").mkdir()
                        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
                        log = self.folder / "log"
                        status = forked(case.words(out), log, place / "tmp").wait()
                        said = [line for line in log.read_text().splitlines() if line.startswith("ptqd: ")]
                        bad = status not in (0, 2) or (
                            status == 2 and (len(said) != 1 or "Traceback" in log.read_text())
                        )
                        if bad or "bug in ptqd" in " ".join(said):
                            self.problem(f"{case.name}, disk of {size}: {status} {log.read_text()[-300:]}")
                        subprocess.run(["mount", "-o", "remount,size=2g", str(place)], check=True)
                        fine = self.again(case, out, f"disk of {size} bytes", place / "tmp") and not bad
                    refused += status == 2
                    good += fine
                    all_of_them += 1
                finally:
                    gc.collect()
                    subprocess.run(["umount", str(place)], check=True)
        print(f"Full disks: {all_of_them} commands, {SIZES} sizes each, {FEW} of slow verbs; {refused} were too small")
        print("  each of these ended in one line and with status 2, the others with all of their output")
        print(
            f"  {good} of {all_of_them} as undisturbed once there was room, nothing left over, nothing beside touched"
        )

    def truncation(self) -> None:
        """Every file of a run folder cut, then the same command."""
        case = self.cases[0]
        finished = self.place("truncation", case)
        assert forked(case.words(finished), self.folder / "log").wait() == 0
        for what, source in (("finished", finished), ("unfinished", self.unfinished(case))):
            good, all_of_them = 0, 0
            files = [p.relative_to(source) for p in sorted(source.rglob("*")) if p.is_file()]
            for name in files:
                for share in (0.0, 0.5):
                    out = self.place("cut", case)
                    with canary(out.parent):
                        shutil.copytree(source, out)
                        os.truncate(out / name, int((out / name).stat().st_size * share))
                        good += self.again(case, out, f"{what}, {name} cut to {share:.0%}")
                    all_of_them += 1
            print(f"Loss of power, {what} run folder: {len(files)} files, each cut to nothing and in half")
            print(f"  {good} of {all_of_them} as undisturbed, nothing left over, nothing beside touched")

    def unfinished(self, case: Case) -> Path:
        """A run folder whose process was killed while it learned, samples and statistics of others done."""
        for share in (0.5, 0.4, 0.6, 0.3, 0.7):
            out = self.place(f"unfinished-{share}", case)
            child = forked(case.words(out), self.folder / "log")
            time.sleep(self.seconds[case.name] * share)
            child.kill()
            if child.wait() < 0 and list(out.glob(".partial/*/*")):
                return out
        raise SystemExit("no run was killed at work; try again")


def mount(place: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["kills", "disk", "truncation"])
    part = parser.parse_args().part
    torch.set_num_threads(1)
    application(VERBS)  # imports all verbs, before there are processes of them
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = f"{temporary}/cache"
        bench = Bench(Path(temporary))
        parts: dict[str, Callable[[], None]] = {
            "kills": bench.kills,
            "disk": bench.disk,
            "truncation": bench.truncation,
        }
        for name, run_part in parts.items():
            if part in (None, name):
                run_part()
        print("\n".join(bench.problems) or "no problems")
