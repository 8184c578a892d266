"""What a study will take, and its figures beside the published ones, as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from ptqd.experiments.report.table import metric_title
from ptqd.experiments.study import REACHED, Outlook, Study


def outlook_table(study: Study, found: Outlook, gpu: str) -> Group:
    """Denoiser calls, operations, memory, files and an estimate of the time on a named GPU."""
    calls = Table(title=study.title)
    calls.add_column("what")
    calls.add_column("denoiser calls", justify="right")
    calls.add_column("TFLOP", justify="right")
    for what, count in found.calls.items():
        calls.add_row(what, f"{count:,}", f"{found.flops[what] / 1e12:,.1f}")
    calls.add_section()
    calls.add_row("all", f"{sum(found.calls.values()):,}", f"{sum(found.flops.values()) / 1e12:,.1f}")
    models = Table()
    for name in ("recipe", "GBOPs an image", "fewer", "denoiser MB"):
        models.add_column(name, justify="left" if name == "recipe" else "right")
    for name, bops in found.bops.items():
        size = f"{found.disk[name] / 1e6:,.1f}"
        label = f"{name}, at its widest" if study.plan and name != "fp32" else name
        models.add_row(label, f"{bops / 1e9:,.0f}", f"{found.bops['fp32'] / bops:.1f}x", size)
    hours = found.hours(gpu)
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    lines = [
        f"denoiser: {found.parameters:,} parameters; both in memory while measuring: {found.memory / 1e9:.2f} GB, and "
        f"activations of a batch of {study.sampling.batch}",
        f"time on {gpu}: about {time} at {REACHED:.0%} of its float32 rate; learning and looking at images come on top",
        "written into the run folder: "
        + ", ".join(f"{what} {size / 1e9:,.2f} GB" for what, size in found.files.items())
        + ", report.json, report.html, manifest.json",
    ]
    return Group(calls, models, *lines)


def published_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Each published figure beside ours."""
    table = Table(title="beside what was published")
    for name in ("recipe", "correction", "metric", "published", "here", "95 % interval", "source"):
        table.add_column(name)
    for line in lines:
        ours = line["ours"]
        here = "-" if ours is None else f"{ours['value']:.3f}"
        interval = "" if ours is None or ours["low"] is None else f"{ours['low']:.3f} to {ours['high']:.3f}"
        name = metric_title([line], line["metric"])
        cells = (line["recipe"], line["correction"], name, f"{line['published']:g}", here, interval, line["source"])
        table.add_row(*cells)
    return table
