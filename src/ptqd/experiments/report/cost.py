"""What a model costs, as a table."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from ptqd.diffusion.macs import FULL_BITS, PRODUCTS
from ptqd.experiments.report.rendering import FOLDED, KEPT, cell
from ptqd.quantization.bops import Cost

logger = logging.getLogger(__name__)


def block_of(layer: str) -> str:
    """The part of a network that a layer is in: its name up to the first number.

    >>> block_of("down_blocks.1.resnets.0.conv1"), block_of("conv_in")
    ('down_blocks.1', 'conv_in')
    """
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def cost_json(cost: Cost) -> dict[str, Any]:
    """A cost as plain values, by layer and by step."""
    by_layer = zip(cost.macs.layers, cost.macs.counts.sum(0).tolist(), cost.bops.sum(0).tolist(), strict=True)
    return {
        "macs": cost.macs.total,
        "bit_operations": cost.total,
        "fewer_than_fp32": cost.ratio,
        "parameters": cost.parameters,
        "disk_bytes": cost.memory.disk,
        "resident_bytes": cost.memory.resident,
        "calling_bytes": cost.memory.calling,
        "quantizing_bytes": cost.memory.quantizing,
        "steps": [
            {"macs": int(m), "bit_operations": int(b)}
            for m, b in zip(cost.macs.counts.sum(1).tolist(), cost.bops.sum(1).tolist(), strict=True)
        ],
        "layers": {name: {"macs": int(m), "bit_operations": int(b)} for name, m, b in by_layer},
    }


def cost_table(name: str, cost: Cost, *, layers: bool = False) -> Iterator[Any]:
    """Totals, then a table by block, or by layer, of a run's costs."""
    steps = len(cost.macs.counts)
    products = [i for i, layer in enumerate(cost.macs.layers) if layer.endswith((*PRODUCTS, ".matmul"))]
    share = float(cost.macs.counts[:, products].sum()) / cost.macs.total
    macs, bops, full = cost.macs.total, cost.total, cost.macs.total * FULL_BITS**2
    yield cell(f"{name}: {cost.parameters / 1e6:,.1f} M parameters, {steps} steps")
    yield f"  {_si(macs / steps)}MACs a step, {_si(macs)}MACs an image; {share:.1%} of them in attention products"
    yield f"  {_si(bops / steps)}BOPs a step, {_si(bops)}BOPs an image"
    yield f"  {cost.ratio:.2f}x fewer than FP32: {_si(full / steps)}BOPs a step, {_si(full)}BOPs an image"
    memory = cost.memory
    calling = "what a call takes is not counted, it looks at numbers"
    if memory.calling:
        calling = f"{memory.calling / 1e6:,.1f} MB more while it is called with one sample"
    yield f"  {memory.disk / 1e6:,.1f} MB on disk, {memory.resident / 1e6:,.1f} MB in memory; {calling}"
    if memory.quantizing:
        yield f"  {memory.quantizing / 1e6:,.1f} MB at most while it is quantized, full precision's weights included"
    yield "  memory and disk are the denoiser's; text encoders and decoders come on top"
    table = Table()
    table.add_column("layer" if layers else "block", **FOLDED)
    for title in ("MACs a step", "share", "bits", "BOPs a step", "share"):
        table.add_column(title, justify="right", **KEPT)
    rows: dict[str, list[int]] = {}
    for i, layer in enumerate(cost.macs.layers):
        rows.setdefault(layer if layers else block_of(layer), []).append(i)
    for title, own in rows.items():
        mine, taken = float(cost.macs.counts[:, own].sum()), float(cost.bops[:, own].sum())
        bits = [_span(side[:, own]) for side in (cost.bits.left, cost.bits.right)]
        cells = (_si(mine / steps), f"{mine / macs:.1%}", " x ".join(bits))
        table.add_row(cell(title), *cells, _si(taken / steps), f"{taken / bops:.1%}")
    yield table


def _span(bits: torch.Tensor) -> str:
    low, high = int(bits.min()), int(bits.max())
    return str(low) if low == high else f"{low}-{high}"


def _si(value: float) -> str:
    """A number with its unit's prefix.

    >>> _si(102.2e12), _si(5.0)
    ('102.20 T', '5.00 ')
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.2f} "
