import contextlib
import errno
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ptqd import InputError
from ptqd.files import read_json, replacing, temporary_name, write_json, write_tensors, write_text
from ptqd.outputs import MARK
from ptqd.run_folder import RunFolder


def left(path: Path, pid: int, suffix: str = ".tmp") -> Path:
    """The name of what a process of this machine would write before it becomes ``path``."""
    mine = temporary_name(path, suffix)
    return mine.with_name(re.sub(rf"-{os.getpid()}\.[0-9]+\.", f"-{pid}.{started(pid)}.", mine.name))


def started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "1"


def count_builds(folder: RunFolder, inputs: dict[str, Any], calls: list[str], text: str = "x") -> Path:
    def build(path: Path, scratch: Path) -> None:
        calls.append(text)
        path.write_text(text)

    return folder.stage("a/result.txt", inputs, build)


def test_a_stage_is_made_once_and_again_when_its_inputs_change(tmp_path: Path) -> None:
    folder, calls = RunFolder(tmp_path / "run"), []  # type: ignore[var-annotated]
    path = count_builds(folder, {"x": 1}, calls, "one")
    count_builds(folder, {"x": 1}, calls, "again")
    assert path.read_text() == "one"
    count_builds(RunFolder(tmp_path / "run"), {"x": 2}, calls, "two")
    assert path.read_text() == "two"
    assert calls == ["one", "two"]
    path.unlink()
    count_builds(folder, {"x": 2}, calls, "three")
    assert path.read_text() == "three"
    assert folder.seconds("a/result.txt") >= 0
    assert folder.seconds("never") == 0


def test_a_killed_stage_leaves_no_result_and_resumes_from_its_scratch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    made: list[int] = []
    killed: list[bool] = []

    def build(path: Path, scratch: Path) -> None:
        for i in range(4):
            shard = scratch / f"{i}.json"
            if not shard.exists():
                made.append(i)
                write_json(shard, i)
            if i == 1 and not killed:
                killed.append(True)
                raise KeyboardInterrupt
        path.write_text(str([read_json(scratch / f"{i}.json") for i in range(4)]))

    with pytest.raises(KeyboardInterrupt):
        folder.stage("result", {}, build)
    assert not (tmp_path / "result").exists()
    path = folder.stage("result", {}, build)
    assert path.read_text() == "[0, 1, 2, 3]"
    assert made == [0, 1, 2, 3]
    assert not list((tmp_path / ".partial").iterdir())


@pytest.mark.parametrize("kill_at", range(1, 7))
def test_a_kill_at_any_write_never_leaves_a_stale_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Made from 1; remade from 2 and killed at the n-th rename; asked for 1 again: never the result of 2."""
    calls: list[str] = []
    count_builds(RunFolder(tmp_path), {"x": 1}, calls, "one")
    plain, left = Path.replace, [kill_at]

    def killed(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        count_builds(RunFolder(tmp_path), {"x": 2}, calls, "two")
    monkeypatch.undo()
    assert count_builds(RunFolder(tmp_path), {"x": 1}, calls, "one").read_text() == "one"
    assert count_builds(RunFolder(tmp_path), {"x": 2}, calls, "two").read_text() == "two"


def test_what_a_hard_kill_left_is_swept(tmp_path: Path) -> None:
    RunFolder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / ".notes.tmp").write_text("the user's")
    left(tmp_path / "a" / "result.txt", 999999999).write_text("half")
    left(tmp_path / "quantized", 999999999, ".old.tmp").mkdir()
    RunFolder(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".notes.tmp", ".ptqd.json", "a"]


def test_an_unreadable_note_of_seconds_blocks_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def fail(path: Path, scratch: Path) -> None:
        (scratch / "seconds.json").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.stage("a/result.txt", {}, fail)
    next((tmp_path / ".partial").iterdir()).joinpath("seconds.json").write_text("")
    assert count_builds(folder, {}, []).exists()


def test_folders_replace_folders(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing(tmp_path / "out") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ptqd.files.save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*x\.safetensors: No space left on device; free some space"):
        write_tensors(path, {"x": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failing_block_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"x\.json cannot be read"):
        read_json(path)
    write_text(path, "{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_json(path)
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"is no folder, so .* cannot be made"):
        RunFolder(tmp_path / "file" / "run")


def test_two_runs_in_one_folder_make_a_stage_once(tmp_path: Path) -> None:
    made: list[str] = []
    started = threading.Event()

    def slow(path: Path, scratch: Path) -> None:
        started.set()
        time.sleep(0.3)
        made.append("slow")
        path.write_text("slow")

    def other(path: Path, scratch: Path) -> None:
        made.append("other")
        path.write_text("other")

    first = threading.Thread(target=lambda: RunFolder(tmp_path).stage("result", {}, slow))
    first.start()
    started.wait()
    assert RunFolder(tmp_path).stage("result", {}, other).read_text() == "slow"
    first.join()
    assert made == ["slow"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path)
    living, dead = left(tmp_path / "x", os.getppid()), left(tmp_path / "y", 999999999)
    elsewhere = tmp_path / ".z.ptqd-00000000-999999999.1.1-0.tmp"  # of another machine on the same disk
    for path in (living, dead, elsewhere):
        path.write_text("")
    RunFolder(tmp_path)
    assert living.exists()
    assert elsewhere.exists()
    assert not dead.exists()


def test_folders_of_earlier_versions_go_on(tmp_path: Path) -> None:
    for kind in ("run", "cache", "engines"):
        folder = RunFolder(tmp_path / kind, kind)
        calls: list[str] = []
        count_builds(folder, {}, calls)
        (tmp_path / kind / MARK).unlink()
        (tmp_path / kind / "report.html").write_text("a page")
        again = RunFolder(tmp_path / kind, kind)
        count_builds(again, {}, calls)
        assert len(calls) == 1
        again.own(["report.html"])
        (tmp_path / kind / "mine.png").write_text("mine")
        with pytest.raises(InputError, match="is not ptqd's"):
            again.own(["mine.png"])


def test_many_files_in_a_folder_are_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, real = [0], os.scandir

    def counted(path: Any) -> Any:
        looked[0] += 1
        return real(path)

    monkeypatch.setattr(os, "scandir", counted)
    for i in range(20):
        write_text(tmp_path / f"{i}.txt", "x")
    assert looked[0] == 1


def test_what_others_put_into_a_result_stays_and_starts_nothing(tmp_path: Path) -> None:
    folder, calls = RunFolder(tmp_path), list[int]()

    def build(path: Path, scratch: Path) -> None:
        calls.append(1)
        (path / "deep").mkdir(parents=True)
        (path / "deep" / "ours").write_text("ours")

    made = folder.stage("a/q", {"x": 1}, build)
    (made / "deep" / "mine").write_text("mine")
    folder.stage("a/q", {"x": 1}, build)
    assert len(calls) == 1
    folder.stage("a/q", {"x": 2}, build)
    assert len(calls) == 2
    assert (made / "deep" / "mine").read_text() == "mine"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "q").write_text("mine")
    with pytest.raises(InputError, match="is not ptqd's and would be replaced"):
        folder.stage("b/q", {"x": 1}, build)
    assert (tmp_path / "b" / "q").read_text() == "mine"


def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, calls = RunFolder(tmp_path), list[int]()

    def build(path: Path, scratch: Path) -> int:
        calls.append(1)
        write_json(path, 7)
        return 7

    path = tmp_path / "value.json"
    assert folder.value("value.json", {}, build, read_json) == 7
    path.write_bytes(b"\0" * path.stat().st_size)  # of the right size
    assert folder.value("value.json", {}, build, read_json) == 7
    assert len(calls) == 2
    assert "it is made again" in capsys.readouterr().err
