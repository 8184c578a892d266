"""Folders with a mark: what may be written, what is replaced, and what a kill leaves."""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ptqd import InputError
from ptqd.files import is_temporary, write_json
from ptqd.outputs import MARK, READY, Mark, OutputFolder, check_file, check_output, claim, finish, is_json_of, lock


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MARK
    }


def write(folder: Path, files: dict[str, str]) -> None:
    with OutputFolder(folder).replacing() as temporary:
        for name, text in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text)


def test_a_folder_of_ptqds_is_replaced_and_what_others_put_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "q"
    write(out, {"a.json": "1", "unet/w": "1", "old/x": "1"})
    (out / "notes.txt").write_text("mine")
    (out / "old" / "mine").write_text("mine")
    inode = out.stat().st_ino
    write(out, {"a.json": "2", "unet/w": "2"})
    assert tree(out) == {"a.json": "2", "unet/w": "2", "notes.txt": "mine", "old/mine": "mine"}
    assert out.stat().st_ino == inode
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("what", ["model", "notes"])
def test_a_folder_without_the_mark_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / ("model_index.json" if what == "model" else "thesis.txt")).write_text("{}")
    for kind in ("pipeline", "run", "samples", "engines"):
        with pytest.raises(InputError, match="holds what ptqd did not write"):
            claim(tmp_path, kind)
    assert not (tmp_path / MARK).exists()


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "q", {"a": "1"})
    with pytest.raises(InputError, match="holds a pipeline"):
        claim(tmp_path / "q", "run")


def test_a_file_in_the_way_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    write(tmp_path / "q", {"a": "1"})
    (tmp_path / "q" / "b").write_text("mine")
    with pytest.raises(InputError, match="is not ptqd's and would be replaced"):
        write(tmp_path / "q", {"a": "2", "b": "2"})
    assert tree(tmp_path / "q") == {"a": "1", "b": "mine"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "q" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not inside"):
        write(tmp_path / "q", {"unet/w": "2"})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_output_is_no_input_and_holds_none(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for out in (tmp_path / "a", tmp_path / "link", tmp_path, tmp_path / "a" / "b" / ".."):
        with pytest.raises(InputError, match=r"is what is read|which is read"):
            check_output(out, [tmp_path / "a", None, "org/model"])
    check_output(tmp_path / "a" / "new", [tmp_path / "a", "fashion-ldm"])


def test_a_process_killed_while_it_moved_files_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    write(out, {"a": "1", "b": "1", "gone": "1"})
    real, moved = Path.replace, [0]
    for stop in range(1, 6):
        moved[0] = 0

        def killed(self: Path, target: Any, stop: int = stop) -> Path:
            moved[0] += 1
            if moved[0] > stop:
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(Path, "replace", killed)
        with contextlib.suppress(KeyboardInterrupt):
            write(out, {"a": str(stop), "b": str(stop), "c": str(stop)})
        monkeypatch.setattr(Path, "replace", real)
        finish(out)
        values = tree(out)
        assert set(values) in ({"a", "b", "gone"}, {"a", "b", "c"})
        assert len(set(values.values())) == 1, "a mixture of old and new"
        assert not (out / READY).exists()
    claim(out, "pipeline")
    assert not [p for p in out.iterdir() if is_temporary(p.name)]


def test_a_working_folder_a_link_and_an_empty_folder_are_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    write(Path(), {"a": "1"})
    write(tmp_path / "link", {"a": "2"})
    assert (tmp_path / "link").is_symlink()
    assert Path("a").read_text() == "2"


def test_a_device_or_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (Path("/dev/null"), tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is no folder"):
            claim(path, "run")
    assert not Path("/dev/null").is_file()


def test_a_damaged_mark_and_a_newer_one_are_named(tmp_path: Path) -> None:
    write(tmp_path / "q", {"a": "1"})
    for text, why in (("", "is damaged"), ("[]", "is damaged"), ('{"kind": "run", "version": 99}', "newer ptqd")):
        (tmp_path / "q" / MARK).write_text(text)
        with pytest.raises(InputError, match=why):
            claim(tmp_path / "q", "pipeline")
    Mark("pipeline", ("../../victim",)).save(tmp_path / "q")
    (tmp_path / "victim").write_text("x")
    (tmp_path.parent / "victim").write_text("x")
    with pytest.raises(InputError, match="not inside"):
        write(tmp_path / "q", {"b": "1"})
    assert (tmp_path.parent / "victim").exists()


def test_a_file_is_written_over_only_where_it_is_ptqds(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"hidden_size": 3})
    ours = is_json_of("value", "low", each=True)
    with pytest.raises(InputError, match="is there already and is no result"):
        check_file(path, ours, "result")
    write_json(path, {"psnr": {"value": 1, "low": 0, "high": 2}})
    check_file(path, ours, "result")
    check_file(Path("/dev/stdout"), ours, "result")
    with pytest.raises(InputError, match="is a folder"):
        check_file(tmp_path, ours, "result")


def test_who_waits_for_a_lock_is_told_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptqd.outputs.PATIENCE", 0.1)
    code = f"""
import sys, time
from pathlib import Path
from ptqd.outputs import lock
with lock(Path({str(tmp_path / "x.lock")!r}), "x"):
    print("held", flush=True)
    time.sleep(1.2)
"""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = time.monotonic()
        with lock(tmp_path / "x.lock", "the stage x"):
            assert time.monotonic() - before > 0.3
    said = capsys.readouterr().err
    assert f"the stage x: waiting for process {holder.pid} on" in said
    assert f"remove {tmp_path / 'x.lock'}" in said


def test_a_disk_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(os.strerror(95) and 95, "Operation not supported")

    monkeypatch.setattr("ptqd.outputs.PATIENCE", 0.1)
    monkeypatch.setattr(fcntl, "flock", none)
    with lock(tmp_path / "x.lock", "the stage x"):
        pass
    assert "this disk has no locks" in capsys.readouterr().err


def test_what_is_ready_in_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / READY / "mine").mkdir(parents=True)
    (folder / READY / "mine" / "x").write_text("mine")
    finish(folder)
    with pytest.raises(InputError, match="holds what ptqd did not write"):
        claim(folder, "pipeline")
    assert (folder / READY / "mine" / "x").read_text() == "mine"
    (folder / "thesis").write_text("mine")
    (folder / READY / "thesis").write_text("hostile")
    Mark("pipeline", ("thesis",)).save(folder / READY)
    with pytest.raises(InputError, match="thesis is not ptqd's"):
        claim(folder, "pipeline")
    assert (folder / "thesis").read_text() == "mine"


def test_an_empty_folder_of_stages_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / ".stages").mkdir()
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(InputError, match="holds what ptqd did not write"):
        claim(tmp_path, "run")


def test_a_report_is_no_result_of_bench(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"rows": [], "speed": {"title": "", "rows": [], "without": {}}})
    with pytest.raises(InputError, match="is no result"):
        check_file(tmp_path / "report.json", is_json_of("title", "rows", "without"), "result")
