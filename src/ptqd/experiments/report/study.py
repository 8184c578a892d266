"""What a study will take, and its figures beside the published ones, as tables."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from ptqd.experiments.report.rendering import FOLDED, KEPT, cell, number
from ptqd.experiments.report.table import metric_title
from ptqd.experiments.results import Interval, PublishedRow
from ptqd.experiments.study import REACHED, Estimate, Study


def estimate_table(study: Study, estimate: Estimate, gpu: str) -> Group:
    """Denoiser calls, operations, memory, files and an estimate of the time on a named GPU."""
    calls = Table(title=cell(study.title))
    calls.add_column("what")
    calls.add_column("denoiser calls", justify="right")
    calls.add_column("TFLOP", justify="right")
    for what, count in estimate.calls.items():
        calls.add_row(what, f"{count:,}", f"{estimate.flops[what] / 1e12:,.1f}")
    calls.add_section()
    calls.add_row("all", f"{sum(estimate.calls.values()):,}", f"{sum(estimate.flops.values()) / 1e12:,.1f}")
    models = Table()
    for name in ("recipe", "GBOPs an image", "fewer", "denoiser MB"):
        models.add_column(name, justify="left" if name == "recipe" else "right")
    for name, bops in estimate.bops.items():
        size = f"{estimate.disk[name] / 1e6:,.1f}"
        label = f"{name}, at its widest" if study.plan and name != "fp32" else name
        models.add_row(cell(label), f"{bops / 1e9:,.0f}", f"{estimate.bops['fp32'] / bops:.1f}x", size)
    hours = estimate.hours(gpu)
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    lines = [
        f"denoiser: {estimate.parameters:,} parameters; both in memory while measuring: "
        f"{estimate.memory / 1e9:.2f} GB, and activations of a batch of {study.sampling.batch}",
        f"time on {gpu}: about {time} at {REACHED:.0%} of its float32 rate; learning and looking at images come on top",
        "written into the run folder: "
        + ", ".join(f"{what} {size / 1e9:,.2f} GB" for what, size in estimate.files.items())
        + ", report.json, report.html, manifest.json",
    ]
    return Group(calls, models, *lines)


def published_table(rows: Sequence[PublishedRow]) -> Table:
    """Each published figure beside ours."""
    table = Table(title="beside what was published")
    for name in ("recipe", "correction", "metric", "published", "here", "95 % interval", "source"):
        table.add_column(name, **(KEPT if name in ("published", "here") else FOLDED))
    for row in rows:
        ours = row.ours or Interval(None, None, None)
        here = number(ours.value, ".3f")
        interval = "" if ours.low is None else f"{number(ours.low, '.3f')} to {number(ours.high, '.3f')}"
        name = metric_title(row.metric, inception=row.inception)
        table.add_row(*map(cell, (row.recipe, row.correction, name, f"{row.published:g}", here, interval, row.source)))
    return table
