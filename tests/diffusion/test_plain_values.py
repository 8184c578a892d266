"""Arguments of calls in files."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptqd.diffusion.call_rows import plain_rows
from ptqd.diffusion.plain_values import NotPlainError, as_plain, from_plain
from ptqd.files import read_pickle


def test_rows_are_read_as_they_were(tmp_path: Path) -> None:
    rows = plain_rows(torch.randn(3, 2, 4), torch.arange(3))
    tree = (rows, {"size": torch.Size([2]), "kind": torch.float16, "none": None, "names": ["a", 1, 2.5, True]})
    torch.save(as_plain(tree), tmp_path / "rows.pt")
    again, rest = from_plain(read_pickle(tmp_path / "rows.pt"))
    assert rest == tree[1]
    for row, other in zip(rows, again, strict=True):
        assert row.kind == other.kind
        assert torch.equal(row.tree[0][0].value, other.tree[0][0].value)


def test_what_rows_share_is_kept_once_and_no_more_of_it(tmp_path: Path) -> None:
    whole = torch.randn(100_000)
    part = whole[:10]
    moved: dict[int, Any] = {}
    torch.save([as_plain({"x": part}, moved) for _ in range(3)], tmp_path / "rows.pt")
    assert (tmp_path / "rows.pt").stat().st_size < 10_000
    moved = {}
    again = [from_plain(item, "cpu", moved)["x"] for item in read_pickle(tmp_path / "rows.pt")]
    assert again[0] is again[1] is again[2]
    assert torch.equal(again[0], part)


def test_tensors_of_a_device_go_to_the_one_of_the_model() -> None:
    plain = as_plain([torch.zeros(2), torch.zeros(2)])
    elsewhere = ("list", [("tensor", False, plain[1][0][2]), plain[1][1]])
    assert [x.device.type for x in from_plain(elsewhere, "meta")] == ["meta", "cpu"]


class _Word(StrEnum):
    ONE = "one"


@pytest.mark.parametrize("value", [np.float64(1.5), _Word.ONE, {1.5: 0}, object(), {"x": [{2}]}])
def test_what_a_file_would_not_be_read_with_is_named(value: Any) -> None:
    with pytest.raises(NotPlainError):
        as_plain(value)
