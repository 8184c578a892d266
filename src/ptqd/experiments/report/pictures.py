"""Sample grids and plots, as PNG bytes."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from ptqd.errors import ArtifactError
from ptqd.experiments.report.grids import grid, png
from ptqd.experiments.report.rendering import plot_text
from ptqd.experiments.report.table import correction_label
from ptqd.experiments.results import ChoiceRow, PlanPoint, PlanRow, Row, StepRow, by_settings
from ptqd.files import read_tensors
from ptqd.metrics.images import is_picture
from ptqd.metrics.registry import METRICS
from ptqd.names import inside, short
from ptqd.quantization.plan import HOLD

QUANTITIES = {
    "k": ("k (correlated part)", "linear"),
    "r2": ("R²", "linear"),
    "variance": ("residual variance", "log"),
    "snr": ("SNR of the quantized output", "log"),
    "autocorrelation": ("residual's correlation with the step before", "linear"),
    "kurtosis": ("residual's excess kurtosis", "symlog"),
}


def setting_strips(
    rows: Sequence[Row], load: Any, folder: Path, columns: int = 20
) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """For each setting, one strip of the same seeds for each row: title, then (label, PNG)."""
    strips = []
    for text, group in by_settings(rows):
        labelled = []
        for row in group:
            images = load(inside(folder, row.images, "the report"))[:columns]
            if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
                continue  # neither grey nor RGB
            correction = f" {correction_label(row.key.correction)}" if row.key.methods else ""
            labelled.append((row.key.quantized + correction, png(grid([images], 2))))
        strips.append((text, labelled))
    return strips


def overview(strips: Sequence[tuple[str, list[tuple[str, bytes]]]]) -> bytes:
    """All strips with their labels on one sheet, as a PNG."""
    font, line = ImageFont.load_default(15), 22
    strips = [(short(title), [(short(label), data) for label, data in rows]) for title, rows in strips]
    margin = 20 + max((int(font.getlength(label)) for _, rows in strips for label, _ in rows), default=0)
    pictures = [Image.open(io.BytesIO(data)) for _, rows in strips for _, data in rows]
    width = margin + max((picture.width for picture in pictures), default=400)
    height = sum(picture.height + 3 for picture in pictures) + 2 * line * len(strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = 0
    for title, rows in strips:
        draw.text((margin, y + line // 2), title, "black", font)
        y += 2 * line
        for (label, _), picture in zip(rows, pictures, strict=False):
            draw.text((margin - 10, y + picture.height // 2), label, "black", font, anchor="rm")
            sheet.paste(picture, (margin, y))
            y += picture.height + 3
        pictures = pictures[len(rows) :]
    return png(sheet)


def quality_against_cost(rows: Sequence[Row]) -> bytes | None:
    """One figure, an axis for each way of sampling: quality against bit operations, before and after correction.

    None where no row has a PSNR or a distance of latents.
    """
    name = next((name for name in ("psnr", "latent_distance") if any(name in row.metrics for row in rows)), None)
    if name is None:
        return None
    groups = list(by_settings(rows))
    figure, axes = plt.subplots(1, len(groups), figsize=(7 * len(groups), 3.8), layout="constrained", squeeze=False)
    for axis, (heading, group) in zip(axes[0], groups, strict=True):
        quantized = [row for row in group if name in row.metrics and not row.key.is_full_precision]
        for marker, label, corrected in (("o", "uncorrected", False), ("D", "corrected", True)):
            latest = {row.key.quantized: row for row in quantized if bool(row.key.methods) == corrected}
            points = [(row.bops_ratio, row.metrics[name]) for row in latest.values()]
            values = np.array([[m.value, m.low, m.high] for _, m in points], dtype=float).reshape(-1, 3)
            if len(values):
                errors = np.nan_to_num([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
                axis.errorbar([x for x, _ in points], values[:, 0], errors, fmt=marker, label=label, capsize=3)
        for key in dict.fromkeys(row.key.quantized for row in quantized):
            mine = [row for row in quantized if row.key.quantized == key]
            heights = [row.metrics[name].value or 0.0 for row in mine]
            axis.annotate(
                plot_text(key),
                (mine[0].bops_ratio, max(heights)),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=9,
            )
        axis.set_title(plot_text(heading), fontsize=10)
        axis.set_xlabel("times fewer bit operations than FP32")
        axis.set_ylabel(METRICS[name].title)
        axis.margins(x=0.15, y=0.2)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    return _figure_png(figure)


def step_plots(steps: Sequence[StepRow]) -> list[tuple[str, bytes]]:
    """For each setting, one figure of what was measured by step, with 95 % bands: title and PNG."""
    figures = []
    for text, group in by_settings(steps):
        figure, grid_of_axes = plt.subplots(2, len(QUANTITIES) // 2, figsize=(14, 6.4), layout="constrained")
        axes = grid_of_axes.ravel()
        for axis, (name, (label, scale)) in zip(axes, QUANTITIES.items(), strict=True):
            for recipe in dict.fromkeys(step.recipe for step in group):
                mine = [step for step in group if step.recipe == recipe]
                x = [step.step for step in mine]
                parts = {
                    part: np.array([getattr(getattr(step, name), part) for step in mine], dtype=float)
                    for part in ("value", "low", "high")
                }
                (line,) = axis.plot(
                    x, parts["value"], label=plot_text(recipe), marker="o" if len(x) <= 50 else None, markersize=2.5
                )
                floor = 1e-12 if scale == "log" else -np.inf
                axis.fill_between(x, np.maximum(parts["low"], floor), parts["high"], color=line.get_color(), alpha=0.2)
            axis.set_yscale(scale)
            if scale == "log":
                values = [getattr(step, name).value for step in group if (getattr(step, name).value or 0) > 0]
                if values:
                    axis.set_ylim(min(values) / 2, max(values) * 2)
            axis.set_xlabel("sampling step")
            axis.set_title(label, fontsize=10)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figures.append((text, _figure_png(figure)))
    return figures


def choice_plots(choices: Sequence[ChoiceRow]) -> list[tuple[str, bytes]]:
    """For each setting, what every step keeps and what that brings on samples it was not fitted on: title and PNG."""
    figures = []
    for text, group in by_settings(choices):
        figure, (gains, remaining) = plt.subplots(1, 2, figsize=(14, 3.4), layout="constrained")
        names = list(dict.fromkeys(step.kept for choice in group for step in choice.steps))
        names.sort(key=_strength)
        for choice in (choice for choice in group if choice.steps):
            x = np.arange(len(choice.steps))
            gain, half = (
                100 * np.array([getattr(step, key) for step in choice.steps], dtype=float)
                for key in ("gain", "half_width")
            )
            (line,) = gains.plot(
                x, gain, label=plot_text(choice.recipe), marker="o" if len(x) <= 50 else None, markersize=2.5
            )
            gains.fill_between(x, gain - half, gain + half, color=line.get_color(), alpha=0.2)
            remaining.plot(x, [names.index(step.kept) for step in choice.steps], drawstyle="steps-mid")
        gains.set_title("error of the next sample that is taken away, %", fontsize=10)
        remaining.set_title("what the step keeps", fontsize=10)
        remaining.set_yticks(range(len(names)), [*map(plot_text, names)])
        for axis in (gains, remaining):
            axis.set_xlabel("sampling step")
            axis.grid(alpha=0.3)
        if gains.has_data():
            gains.legend(fontsize=8)
        figures.append((text, _figure_png(figure)))
    return figures


def plan_plots(plans: Sequence[PlanRow], folder: Path) -> list[tuple[str, str, bytes]]:
    """For each plan its setting, its name, and one figure: bits by step under the sample, SNR, cost and quality."""
    return [(plan.settings.heading, plan.recipe, _plan_plot(plan, folder)) for plan in plans]


def _plan_plot(plan: PlanRow, folder: Path) -> bytes:
    bits = np.array(plan.bits).T  # G,T
    steps, colours = bits.shape[1], plt.get_cmap("viridis", len(plan.widths))
    figure = plt.figure(figsize=(14, 7.2), layout="constrained")
    rows = figure.add_gridspec(3, 3, height_ratios=[0.9, 0.35 + 0.16 * len(bits), 3.6])

    path = inside(folder, plan.pictures, "the report")
    pictures = read_tensors(path)[0].get("images")
    if pictures is not None and not (is_picture(pictures) and pictures.ndim == 4 and pictures.shape[-1] in (1, 3)):
        raise ArtifactError(f"{path} holds no images of 8 bits (N, H, W, C); run 'ptqd run' again")
    top = figure.add_subplot(rows[0, :])
    if pictures is not None:
        sheet = np.concatenate(list(pictures.numpy()), axis=1)
        sheet = sheet[..., 0] if sheet.shape[-1] == 1 else sheet
        top.imshow(sheet, cmap="gray", aspect="auto", extent=(-0.5, steps - 0.5, 0, 1))
    top.set_axis_off()
    held = " (grey: not computed)" if (bits == HOLD).any() else ""
    held += " (hatched: the deep part is held)" if plan.shallow else ""
    top.set_title(f"the sample before each step, and the bits of the activations there{held}", fontsize=10)
    strip = figure.add_subplot(rows[1, :])
    places = np.ma.masked_array(np.searchsorted(plan.widths, bits), bits == HOLD)
    strip.set_facecolor("lightgrey")
    image = strip.imshow(places, cmap=colours, aspect="auto", vmin=-0.5, vmax=len(plan.widths) - 0.5)
    for step in plan.shallow:
        strip.axvspan(step - 0.5, step + 0.5, fill=False, hatch="///", edgecolor="white", linewidth=0)
    strip.set_yticks(range(len(bits)), [*map(plot_text, plan.groups)], fontsize=7)
    strip.set_xlabel("sampling step")
    bar = figure.colorbar(image, ax=[top, strip], ticks=range(len(plan.widths)), pad=0.01)
    bar.ax.set_yticklabels([str(width) for width in plan.widths])
    bar.set_label("bits")

    snr = figure.add_subplot(rows[2, 0])
    x = np.arange(steps)
    for i, width in enumerate(plan.widths):
        snr.plot(x, np.array(plan.snr[str(width)], dtype=float), color=colours(i), label=f"{width} bits")
    if plan.forward_snr is not None:
        snr.plot(x, np.array(plan.forward_snr, dtype=float), "k--", label="forward process")
    snr.set_yscale("log")
    snr.set_title("SNR of the quantized denoiser, and of the forward process", fontsize=10)
    share = figure.add_subplot(rows[2, 1])
    share.bar(x, 100 * np.array(plan.share), width=1.0)
    share.set_title("share of the bit operations, %", fontsize=10)
    for axis in (snr, share):
        axis.set_xlabel("sampling step")
    for axis in (strip, snr, share):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))

    quality = figure.add_subplot(rows[2, 2])
    _plan_quality(quality, plan)
    for axis in (snr, quality):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return _figure_png(figure)


def _plan_quality(axis: Any, plan: PlanRow) -> None:
    """What is expected of plans by what they cost, and what came of this one."""
    axis.plot(*_points(plan.pareto), "o-", markersize=3, label="budgeted plans")
    axis.plot(*_points(plan.uniform), "s", color="tab:gray", label="uniform widths")
    for point in plan.uniform:
        at = (point.ratio, point.db)
        axis.annotate(f"{point.bits}", at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    if plan.paper is not None:
        axis.plot(*_points([plan.paper]), "^", color="tab:red", label="the paper's rule")
    axis.axvline(plan.ratio, color="tab:green", linestyle=":", label="this plan")
    came = None if plan.reached is None else plan.reached.nearest_db
    if came is not None and came.value is not None:
        bounds = [[0.0 if end is None else abs(came.value - end)] for end in (came.low, came.high)]
        axis.errorbar([plan.ratio], [came.value], bounds, fmt="o", color="tab:green", capsize=3, label="what came")
    axis.set_xlabel("times fewer bit operations than FP32")
    axis.set_title("SNR of the final sample, dB: expected, and what came", fontsize=10)


def _points(points: Sequence[PlanPoint]) -> tuple[list[float], list[float]]:
    return [p.ratio for p in points], [np.nan if p.db is None else p.db for p in points]


def _strength(kept: str) -> tuple[bool, float]:
    """By what a step's estimate is sorted: nothing, those without a weight, then by weight L."""
    _, weighted, weight = kept.rpartition("L=")
    return kept != "nothing", float(weight) if weighted else 0.0


def _figure_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of a script that the plots' font has not
        figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
