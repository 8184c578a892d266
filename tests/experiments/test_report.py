import io
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from ptqd import InputError
from ptqd.experiments.report.page import write_page
from ptqd.experiments.report.pictures import choice_plots, grid, png, step_plots
from ptqd.experiments.report.table import terminal_table
from ptqd.files import write_json

SETTING = {"steps": 20, "eta": 0.0, "guidance": 3.0, "scheduler": "DDIMScheduler"}


def row(recipe: str, correction: str, **metrics: float) -> dict[str, Any]:
    return {
        "model": "m", "setting": SETTING, "recipe": recipe, "correction": correction, "samples": 10,
        "metrics": {k: {"value": v, "low": v - 0.1, "high": v + 0.1} for k, v in metrics.items()},
        "bops": 2e9, "bops_ratio": 19.94, "bytes": 1_500_000, "seconds": 3.2,
    }  # fmt: skip


def test_the_terminal_table_says_what_the_rows_say() -> None:
    rows = [row("fp32", "none", frechet_distance=1.0), row("w4a8", "cnc+bc", frechet_distance=2.5, psnr=20.0)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal_table(rows))
    text = console.export_text()
    for part in ("DDIM, 20 steps, eta 0, guidance 3", "2.50 ±0.10", "+CNC +BC", "19.9x", "1,500", "20.00 ±0.10"):
        assert part in text
    assert "kernel" not in text


def test_a_grid_has_its_images_in_their_places() -> None:
    a, b = torch.zeros(2, 3, 4, 1, dtype=torch.uint8), torch.full((2, 3, 4, 1), 100, dtype=torch.uint8)
    picture = grid([a, b], scale=1, gap=2)
    assert picture.size == (4 + 2 + 4, 3 + 2 + 3)
    assert picture.getpixel((0, 0)) == 0
    assert picture.getpixel((4, 0)) == 255
    assert picture.getpixel((9, 7)) == 100
    assert grid([a.expand(-1, -1, -1, 3)], scale=3).mode == "RGB"
    assert Image.open(io.BytesIO(png(picture))).size == picture.size


def test_plots_take_steps_of_two_recipes() -> None:
    names = ("k", "r2", "variance", "snr", "autocorrelation", "kurtosis")
    steps = [
        {"setting": SETTING, "recipe": r, "step": i, **{n: {"value": 0.1, "low": -0.1, "high": 0.2} for n in names}}
        for r in ("w4a8", "w4a4")
        for i in range(3)
    ]
    ((title, picture),) = step_plots(steps)
    assert title == "DDIM, 20 steps, eta 0, guidance 3"
    assert Image.open(io.BytesIO(picture)).width > 1000


def test_what_every_step_keeps_is_drawn() -> None:
    steps = [{"kept": kept, "gain": 0.3, "half_width": 0.1, "channels": 4} for kept in ("joint L=1", "nothing")]
    choices = [{"setting": SETTING, "recipe": r, "steps": s} for r, s in (("w4a8", steps), ("w4a4", []))]
    ((title, picture),) = choice_plots(choices)
    assert title == "DDIM, 20 steps, eta 0, guidance 3"
    assert Image.open(io.BytesIO(picture)).width > 1000
    assert len(choice_plots([choices[1]])) == 1


def test_a_file_that_is_no_report_is_named(tmp_path: Any) -> None:
    write_json(tmp_path / "report.json", {"rows": []})
    with pytest.raises(InputError, match="is no report"):
        write_page(tmp_path)
