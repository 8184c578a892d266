"""The table of ``ptqd bench``, and of the report's seconds an image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from ptqd.diffusion.sampling import Sampling
from ptqd.experiments.benchmark import FULL, Timing
from ptqd.export.cpu import processor_name

COLUMNS = (
    "engine",
    "numbers",
    "s/image",
    "range",
    "x torch FP32",
    "x fastest FP32",
    "peak MB",
    "denoiser MB",
    "of FP32",
    "PSNR to FP dB",
)


def speed_facts(
    timings: Sequence[Timing], without: Mapping[str, str], run: Sampling, threads: int, device: str
) -> dict[str, Any]:
    """Plain values of what was measured, ratios included: how many times as fast."""
    first = timings[0]
    fastest = min(timing.median for timing in timings if timing.contestant.numbers == FULL)
    rows = []
    for timing in timings:
        facts = asdict(timing.contestant)
        rows.append(
            {
                "engine": facts["engine"],
                "numbers": facts["numbers"],
                "seconds": timing.median,
                "all_seconds": list(timing.seconds),
                "of_torch": first.median / timing.median,
                "of_fastest": fastest / timing.median,
                "peak": timing.peak,
                "bytes": facts["bytes"],
                "bytes_of_full": facts["bytes"] / first.contestant.bytes,
                "psnr": timing.psnr,
            }
        )
    shown = f"{threads or torch.get_num_threads()} threads" if device == "cpu" else device
    title = f"the whole pipeline, {run.steps} steps, batch {run.batch}, {shown}, {processor_name()}"
    return {"title": title, "rows": rows, "without": dict(without)}


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells, in the columns' order."""
    psnr = row["psnr"]
    return [
        row["engine"],
        row["numbers"],
        f"{row['seconds']:.4f}",
        f"{min(row['all_seconds']):.4f} to {max(row['all_seconds']):.4f}",
        f"{row['of_torch']:.2f}",
        f"{row['of_fastest']:.2f}",
        f"{row['peak'] / 1e6:.0f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['bytes_of_full']:.1%}",
        "" if psnr is None else f"{psnr:.1f}",
    ]


def speed_table(facts: Mapping[str, Any]) -> Table:
    """A line for each engine and kind of numbers."""
    table = Table(title=facts["title"])
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in facts["rows"]:
        table.add_row(*speed_cells(row))
    return table
