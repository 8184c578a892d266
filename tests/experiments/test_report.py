import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from ptqd import InputError
from ptqd.correction import StepGate
from ptqd.experiments import ChoiceRow, Interval, Report, Row, RowKey, SamplerSettings, StepRow
from ptqd.experiments.report.grids import grid, png
from ptqd.experiments.report.page import summary
from ptqd.experiments.report.pictures import choice_plots, quality_against_cost, step_plots
from ptqd.experiments.report.table import terminal_table
from ptqd.experiments.results import PlanRow
from ptqd.experiments.stages import plan_outcome
from ptqd.files import write_json

SETTINGS = SamplerSettings("DDIMScheduler", 20, 0.0, 3.0)


def row(recipe: str, methods: tuple[str, ...] = (), **metrics: float) -> Row:
    return Row(
        model="m", settings=SETTINGS, key=RowKey(recipe, None, methods), sampling={}, samples=10,
        metrics={k: Interval(v, v - 0.1, v + 0.1) for k, v in metrics.items()}, inception=False,
        bops=2_000_000_000, bops_ratio=19.94, bytes=1_500_000, seconds=3.2, images="", observed="",
    )  # fmt: skip


def test_the_terminal_table_says_what_the_rows_say() -> None:
    rows = [row("fp32", frechet_distance=1.0), row("w4a8", ("cnc", "bc"), frechet_distance=2.5, psnr=20.0)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal_table(rows, wide=True))
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


def test_the_narrow_table_fits_100_columns() -> None:
    metrics = dict.fromkeys(("psnr", "frechet_distance_to_full_precision", "frechet_distance", "recall", "ssim"), 20.0)
    rows = [row("fp32", (), **metrics), row("w4a8-smooth-gptq-distill", ("cnc", "bc", "vsc"), **metrics)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(rows))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(lines)
    for part in ("w4a8-smooth-gptq-distill", "+CNC +BC +VSC", "PSNR to FP dB", "Frechet to FP", "19.9x", "1,500"):
        assert part in text


def test_plots_take_steps_of_two_recipes() -> None:
    some, one = Interval(0.1, -0.1, 0.2), Interval(None, None, None)
    steps = [
        StepRow(SETTINGS, r, 4, i, 9.0 - i, some, some, some, some, some, some, (some,), 0.5, one if i == 0 else some)
        for r in ("w4a8", "w4a4")
        for i in range(3)
    ]
    ((title, picture),) = step_plots(steps)
    assert title == "DDIM, 20 steps, eta 0, guidance 3"
    assert Image.open(io.BytesIO(picture)).width > 1000


def test_what_every_step_keeps_is_drawn() -> None:
    steps = tuple(StepGate(kept, 0.3, 0.1, 4) for kept in ("joint L=1", "nothing"))
    choices = [ChoiceRow(SETTINGS, r, "joint", (), s, 8) for r, s in (("w4a8", steps), ("w4a4", ()))]
    ((title, picture),) = choice_plots(choices)
    assert title == "DDIM, 20 steps, eta 0, guidance 3"
    assert Image.open(io.BytesIO(picture)).width > 1000
    assert len(choice_plots([choices[1]])) == 1


def test_quality_is_drawn_against_cost() -> None:
    rows = [row("fp32", psnr=40.0), row("w4a8", psnr=20.0), row("w4a8", ("auto",), psnr=25.0)]
    picture = quality_against_cost(rows)
    assert picture is not None
    assert Image.open(io.BytesIO(picture)).width > 500
    assert quality_against_cost([row("w4a8")]) is None
    assert summary(rows) == [
        "DDIM, 20 steps, eta 0, guidance 3: w4a8 takes 19.9 times fewer bit operations than FP32; PSNR to FP dB "
        "25.00 ±0.10 with the correction (auto), 20.00 without."
    ]


def test_what_came_of_a_plan_stands_beside_what_was_expected() -> None:
    errors = torch.tensor([*[0.009, 0.011] * 9, 5.0, 5.0], dtype=torch.float64)
    reached = plan_outcome(1.0, errors)
    assert reached.nearest_db.value == pytest.approx(20.0)
    assert reached.all_db == pytest.approx(-10 * math.log10(0.509))
    figures: dict[str, Any] = dict.fromkeys(("timesteps", "widths", "groups", "bits", "share", "pareto", "uniform"), ())
    figures |= {"made": {}, "snr": {}, "forward_snr": None, "weights": {}, "ratio": 20.0, "paper": None}
    plan = PlanRow(**figures, settings=SETTINGS, recipe="w4a4+8 20x", pictures="", expected_db=19.0, reached=reached)
    assert (
        "expects an SNR of 19.0 dB of samples that CNC and BC correct; it is 20.0 dB (19.8 to 20.2) of" in plan.outcome
    )
    assert plan.outcome.endswith("samples, those that stay nearest, and 2.9 dB of all.")
    assert dataclasses.replace(plan, reached=None).outcome.endswith("the plan expects an SNR of 19.0 dB.")
    assert dataclasses.replace(plan, expected_db=None).outcome == ""


def test_a_file_that_is_no_report_is_named(tmp_path: Any) -> None:
    write_json(tmp_path / "report.json", {"rows": []})
    with pytest.raises(InputError, match="is no report"):
        Report.load(tmp_path)
