"""The report as one self-contained HTML page."""

import base64
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ptqd.errors import MissingDependencyError
from ptqd.experiments.report.rendering import environment, number
from ptqd.experiments.report.speed import COLUMNS as SPEED_COLUMNS
from ptqd.experiments.report.speed import speed_cells
from ptqd.experiments.report.table import (
    COST_COLUMNS,
    correction_label,
    cost_cells,
    metric_cell,
    metric_columns,
    metric_title,
)
from ptqd.experiments.results import PAGE, Report, Row, by_settings
from ptqd.experiments.sharding import load_images
from ptqd.files import replacing
from ptqd.metrics.registry import METRICS
from ptqd.names import inside
from ptqd.run_folder import RunFolder

STRIPS = "strips.png"


def write_page(report: Report, folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from its report and its samples; strips and plans as PNG files too.

    Returns:
        The page's path.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        InputError: samples that the report names are gone, or the folder is not ptqd's or not writable.
    """
    templates = environment()
    try:
        from ptqd.experiments.report import pictures
    except ImportError as error:
        raise MissingDependencyError(
            f"plots need {error.name}, which is not installed: pip install 'ptqd[report]'"
        ) from error
    rows = report.rows
    metrics, inception = metric_columns(rows, details=True), all(row.inception for row in rows)
    templates.filters["data"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    strips, plans = pictures.setting_strips(rows, load_images, folder), pictures.plan_plots(report.plans, folder)
    page = templates.get_template("page.html").render(
        model=rows[0].model,
        sentences=summary(rows),
        overview=pictures.quality_against_cost(rows),
        samples=sorted({row.samples for row in rows}),
        judge=report.judge,
        inception=inception,
        groups=[(text, _lines(group, metrics)) for text, group in by_settings(rows)],
        columns=[(metric_title(name, inception=inception), METRICS[name].better) for name in metrics],
        published=[(line, metric_title(line.metric, inception=line.inception)) for line in report.published],
        notes=report.notes,
        speed=report.speed,
        speed_columns=SPEED_COLUMNS,
        speed_cells=speed_cells,
        cost_columns=COST_COLUMNS,
        strips=strips,
        plots=pictures.step_plots(report.steps),
        choices=[
            (text, picture, [choice for choice in report.choices if choice.settings.heading == text])
            for text, picture in pictures.choice_plots(report.choices)
        ],
        plans=[(*shown, plan.outcome) for shown, plan in zip(plans, report.plans, strict=True)],
        stages=_stage_seconds(report.stages),
        versions=report.versions,
        number=number,
    )
    run = RunFolder(folder, shared=False)
    made: dict[str, bytes] = {PAGE: page.encode(errors="backslashreplace"), STRIPS: pictures.overview(strips)}
    for plan, (_, name, picture) in zip(report.plans, plans, strict=True):
        of = next((row for row in rows if row.key.quantized == name and row.settings == plan.settings), None)
        if of is not None:
            made[str(PurePosixPath(of.images).parent.parent / "plan.png")] = picture
    run.own(list(made))
    for name, data in made.items():
        with replacing(inside(folder, name, str(folder))) as temporary:
            temporary.write_bytes(data)
    return folder / PAGE


def summary(rows: list[Row]) -> list[str]:
    """What matters, one sentence for each way of sampling: the last recipe's quality before and after correction."""
    sentences = []
    for heading, group in by_settings(rows):
        quantized = [row for row in group if not row.key.is_full_precision]
        if not quantized:
            continue
        best = quantized[-1]
        plain = next(row for row in quantized if row.key.quantized == best.key.quantized)
        name = next((n for n in ("psnr", "latent_distance", "frechet_distance") if n in best.metrics), None)
        if name is None:
            continue
        title = metric_title(name, inception=best.inception)
        value = " ".join(metric_cell(best.metrics[name], name)).strip()
        sentence = f"{heading}: {best.key.quantized} takes {best.bops_ratio:.1f} times fewer bit operations than FP32"
        if best.key.methods:
            before = metric_cell(plain.metrics.get(name), name)[0]
            sentence += f"; {title} {value} with the correction ({best.key.correction}), {before} without"
        else:
            sentence += f"; {title} {value}"
        sentences.append(f"{sentence}.")
    return sentences


def _lines(group: list[Row], metrics: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "recipe": row.key.quantized,
            "correction": correction_label(row.key.correction),
            "metrics": [metric_cell(row.metrics.get(name), name) for name in metrics],
            "cost": cost_cells(row),
            "first": not row.key.methods,
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
        "trajectory.json": "choose",
        "samples.safetensors": "sample",
        "observed.safetensors": "evaluate",
        "metrics.json": "evaluate",
    }
    totals = dict.fromkeys(kinds.values(), 0.0)
    for name, seconds in stages.items():
        kind = kinds.get(name.rsplit("/", 1)[-1], "other")
        totals[kind] = totals.get(kind, 0.0) + seconds
    return totals
