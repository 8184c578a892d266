import itertools
import time

import pytest

from ptqd import progress


def test_a_log_gets_a_line_a_minute_not_a_line_an_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, 25)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(7), "sampling")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sampling: 2 of 7", "sampling: 5 of 7"]


def test_nothing_is_shown_without_a_title(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = itertools.count(0, 25)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(7), None)) == list(range(7))
    assert capsys.readouterr().err == ""
