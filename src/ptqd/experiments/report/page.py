"""The report as one self-contained HTML page."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ptqd.errors import InputError
from ptqd.experiments.report.pictures import choice_plots, overview, plan_plots, setting_strips, step_plots
from ptqd.experiments.report.speed import COLUMNS as SPEED_COLUMNS
from ptqd.experiments.report.speed import speed_cells
from ptqd.experiments.report.table import (
    COST_COLUMNS,
    METRICS,
    by_setting,
    correction_label,
    cost_cells,
    heading,
    metric_cell,
    metric_columns,
    metric_title,
)
from ptqd.experiments.sharding import load_images
from ptqd.files import read_json, replacing, write_text


def write_page(folder: Path) -> Path:
    """Write ``report.html`` from a run folder's ``report.json`` and samples; its strips and plans as PNG files too.

    Returns:
        The page's path.

    Raises:
        InputError: ``report.json`` is missing or not a report.
    """
    report: Mapping[str, Any] = read_json(folder / "report.json")
    needed = {"rows", "steps", "choices", "plans", "stages", "versions"}
    if not isinstance(report, dict) or not needed <= set(report) or not report["rows"]:
        raise InputError(f"{folder / 'report.json'} is no report; make one with 'ptqd run'")
    rows = report["rows"]
    metrics = metric_columns(rows, details=True)
    environment = Environment(
        loader=PackageLoader("ptqd.experiments.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    strips, plans = setting_strips(rows, load_images, folder), plan_plots(report["plans"], folder)
    page = environment.get_template("page.html").render(
        model=rows[0]["model"],
        samples=sorted({row["samples"] for row in rows}),
        judge=report.get("judge"),
        inception=all(row.get("inception") for row in rows),
        groups=[(text, _lines(group, metrics)) for text, group in by_setting(rows)],
        columns=[(metric_title(rows, name), METRICS[name][1]) for name in metrics],
        published=[{**line, "metric": metric_title([line], line["metric"])} for line in report.get("published", [])],
        notes=report.get("notes", []),
        speed=report.get("speed"),
        speed_columns=SPEED_COLUMNS,
        speed_cells=speed_cells,
        cost_columns=COST_COLUMNS,
        strips=strips,
        plots=step_plots(report["steps"]),
        choices=[
            (text, picture, [choice for choice in report["choices"] if heading(choice["setting"]) == text])
            for text, picture in choice_plots(report["choices"])
        ],
        plans=plans,
        stages=_stage_seconds(report["stages"]),
        versions=report["versions"],
    )
    path = folder / "report.html"
    write_text(path, page)
    with replacing(folder / "strips.png") as temporary:
        temporary.write_bytes(overview(strips))
    for plan, (_, name, picture) in zip(report["plans"], plans, strict=True):
        with replacing(folder / Path(plan["pictures"]).parent / name.replace(" ", "-") / "plan.png") as temporary:
            temporary.write_bytes(picture)
    return path


def _lines(group: list[Mapping[str, Any]], metrics: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "recipe": row["recipe"],
            "correction": correction_label(row["correction"]),
            "metrics": [metric_cell(row, name) for name in metrics],
            "cost": cost_cells(row),
            "first": row["correction"] == "none",
        }
        for row in group
    ]


def _stage_seconds(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind of stage."""
    kinds = {
        "quantized": "quantize",
        "noise.safetensors": "measure",
        "widths": "measure widths",
        "planned": "plan",
        "steps.safetensors": "plan",
        "auto.json": "choose",
        "samples.safetensors": "sample",
        "observed.safetensors": "evaluate",
        "metrics.json": "evaluate",
    }
    totals = dict.fromkeys(kinds.values(), 0.0)
    for name, seconds in stages.items():
        totals[kinds[name.rsplit("/", 1)[-1]]] += seconds
    return totals
