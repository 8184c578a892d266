"""A report's rows as text: for the terminal, and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

METRICS = {
    "frechet_distance": ("Frechet", "lower"),
    "extrapolated_frechet_distance": ("Frechet, N to infinity", "lower"),
    "spatial_frechet_distance": ("spatial Frechet", "lower"),
    "kernel_distance": ("kernel x 1000", "lower"),
    "frechet_distance_to_full_precision": ("Frechet to FP", "lower"),
    "class_agreement": ("class agreement %", "higher"),
    "psnr": ("PSNR to FP dB", "higher"),
    "ssim": ("SSIM to FP", "higher"),
    "lpips": ("LPIPS to FP", "lower"),
    "latent_distance": ("latents to FP", "lower"),
    "inception_score": ("classes' score", "higher"),
    "precision": ("precision %", "higher"),
    "recall": ("recall %", "higher"),
    "density": ("density", "higher"),
    "coverage": ("coverage %", "higher"),
    "clip_score": ("CLIP score", "higher"),
}
DETAILS = ("inception_score", "precision", "recall", "density", "coverage")  # in pages and JSON, where there is room
INCEPTION = {  # names that only distances in Inception's features have
    "frechet_distance": "FID",
    "extrapolated_frechet_distance": "FID, N to infinity",
    "spatial_frechet_distance": "sFID",
    "kernel_distance": "KID x 1000",
    "frechet_distance_to_full_precision": "FID to FP",
    "inception_score": "Inception score",
}
_FACTOR = {"kernel_distance": 1000.0, "class_agreement": 100.0, "precision": 100.0, "recall": 100.0, "coverage": 100.0}
_DIGITS = {"class_agreement": 1, "frechet_distance_to_full_precision": 3, "ssim": 3, "lpips": 3, "latent_distance": 4}
_DIGITS |= {"precision": 1, "recall": 1, "coverage": 1}


def heading(setting: Mapping[str, Any]) -> str:
    """A setting in words.

    >>> heading({"scheduler": "DDIMScheduler", "steps": 20, "eta": 0.0, "guidance": 3.0})
    'DDIM, 20 steps, eta 0, guidance 3'
    """
    scheduler = setting["scheduler"].removesuffix("Scheduler")
    guidance = "" if setting["guidance"] is None else f", guidance {setting['guidance']:g}"
    return f"{scheduler}, {setting['steps']} steps, eta {setting['eta']:g}{guidance}"


def by_setting(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Rows grouped by setting, in order."""
    headings = list(dict.fromkeys(heading(row["setting"]) for row in rows))
    for text in headings:
        yield text, [row for row in rows if heading(row["setting"]) == text]


def correction_label(correction: str) -> str:
    """``+CNC +BC`` of ``"cnc+bc"``.

    >>> correction_label("cnc+bc"), correction_label("none"), correction_label("auto")
    ('+CNC +BC', 'none', 'auto')
    """
    return correction if correction in ("none", "auto") else " ".join(f"+{m.upper()}" for m in correction.split("+"))


def metric_columns(rows: Sequence[Mapping[str, Any]], *, details: bool = False) -> list[str]:
    """The metrics that at least one row has, in the table's order; :data:`DETAILS` only if wanted."""
    shown = [name for name in METRICS if details or name not in DETAILS or any(row.get("inception") for row in rows)]
    return [name for name in shown if any(name in row["metrics"] for row in rows)]


def metric_title(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """A column's title: FID, sFID and KID only where every row is of Inception's features."""
    title = METRICS[name][0]
    return INCEPTION.get(name, title) if all(row.get("inception") for row in rows) else title


def metric_cell(row: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A metric's value and the half width of its 95 % interval, as text."""
    metric = row["metrics"].get(name)
    if metric is None:
        return "-", ""
    factor = _FACTOR.get(name, 1.0)
    digits = _DIGITS.get(name, 2)
    value = f"{metric['value'] * factor:.{digits}f}"
    if metric["low"] is None or metric["high"] is None:
        return value, ""
    return value, f"±{(metric['high'] - metric['low']) / 2 * factor:.{digits}f}"


def cost_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Bit operations (G an image), their ratio to FP32, weights on disk (KB), seconds."""
    return (
        f"{row['bops'] / 1e9:,.0f}",
        f"{row['bops_ratio']:.1f}x",
        f"{row['bytes'] / 1e3:,.0f}",
        f"{row['seconds']:.0f}",
    )


COST_COLUMNS = ("GBOPs an image", "fewer", "denoiser KB", "s")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table of all settings."""
    metrics = metric_columns(rows)
    head = ["recipe", "correction", *(metric_title(rows, m) for m in metrics), *COST_COLUMNS]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for text, group in by_setting(rows):
        lines.append([f"**{text}**", *[""] * (len(head) - 1)])
        for row in group:
            cells = [" ".join(metric_cell(row, m)).strip() for m in metrics]
            lines.append([row["recipe"], correction_label(row["correction"]), *cells, *cost_cells(row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One table of all settings."""
    samples = sorted({row["samples"] for row in rows})
    table = Table(title=f"{rows[0]['model']}: {'/'.join(map(str, samples))} samples a row, 95 % intervals")
    table.add_column("recipe")
    table.add_column("correction", no_wrap=True)
    metrics = metric_columns(rows)
    for name in [*(metric_title(rows, m) for m in metrics), *COST_COLUMNS]:
        table.add_column(name, justify="right")
    for text, group in by_setting(rows):
        table.add_section()
        table.add_row(f"[bold]{text}")
        for row in group:
            cells = [" ".join(metric_cell(row, m)).strip() for m in metrics]
            table.add_row(row["recipe"], correction_label(row["correction"]), *cells, *cost_cells(row))
    return table
