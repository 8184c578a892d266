"""A weight's rows on the numbers that a quantizer allows: scales found, rounded, coded, and decoded."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ptqd.errors import InputError
from ptqd.quantization.numerics.affine import affine_parameters, dequantize_affine, fake_quantize, quantize_affine
from ptqd.quantization.numerics.formats import (
    BLOCKS,
    LARGEST,
    block_codes,
    block_scales,
    float_codes,
    float_values,
    round_float,
)
from ptqd.quantization.numerics.range_search import find_range
from ptqd.quantization.recipe import QuantSpec


def groups_of(columns: int, spec: QuantSpec) -> tuple[int, int]:
    """How many groups of inputs have scales of their own, and how many inputs a group has.

    Raises:
        InputError: the recipe's group does not divide the inputs.
    """
    if spec.format in BLOCKS:
        size = BLOCKS[spec.format]
        return -(-columns // size), size
    if spec.group in (0, columns):
        return 1, columns
    if spec.group > columns or columns % spec.group:
        divisors = [d for d in range(2, columns + 1) if columns % d == 0]
        raise InputError(
            f"groups of {spec.group} do not divide its {columns} inputs; choose one of "
            f"{', '.join(map(str, divisors))}, or 0 for whole rows, with a rule for this layer"
        )
    return columns // spec.group, spec.group


@dataclass(frozen=True)
class WeightGrid:
    """The numbers that each row of a weight is rounded to.

    Attributes:
        spec: format, bits and groups.
        scale: of each row and group (O, G), float32.
        zero: zero points (O, G), int32; zeros but for affine integers.
        columns: I, inputs of a row.
        stored: the scales' own bit patterns (O, G) and the number they share, of the block formats.
    """

    spec: QuantSpec
    scale: torch.Tensor
    zero: torch.Tensor
    columns: int
    stored: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def find(cls, rows: torch.Tensor, spec: QuantSpec) -> "WeightGrid":
        """The grid for rows (O, I) of a weight, float32."""
        count, size = groups_of(rows.shape[1], spec)
        padded = F.pad(rows, (0, count * size - rows.shape[1]))
        blocks = padded.reshape(-1, size)  # O*G,B
        shape = (len(rows), count)
        zero = torch.zeros(shape, dtype=torch.int32, device=rows.device)
        if spec.format in BLOCKS:
            if not bool(torch.isfinite(rows).all()):
                raise InputError("a weight to quantize is NaN or infinite; the checkpoint is damaged, get it again")
            stored = block_codes(blocks.abs().amax(1).view(shape), spec.format)
            return cls(spec, block_scales(*stored, spec.format), zero, rows.shape[1], stored)
        if spec.format != "int":
            low, high = find_range(blocks, spec.grid, "minmax")
            largest = torch.maximum(-low, high).view(shape)
            return cls(spec, torch.where(largest > 0, largest / LARGEST[spec.format], 1.0), zero, rows.shape[1])
        low, high = find_range(blocks, spec.grid, spec.range, percentile=spec.percentile, p=spec.p)
        scale, zero = affine_parameters(low, high, spec.grid)
        return cls(spec, scale.view(shape), zero.view(shape), rows.shape[1])

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each element (O, I)."""
        size = groups_of(self.columns, self.spec)[1]
        scale, zero = (t.repeat_interleave(size, 1)[:, : self.columns] for t in (self.scale, self.zero))
        return scale, zero

    def rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (O, I) as their codes give them back."""
        return round_to(rows, *self.expanded(), self.spec)

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """The codes (O, I), int16, of rows; of floating-point formats their bit patterns."""
        scale, zero = self.expanded()
        if self.spec.format == "int":
            return quantize_affine(rows, scale, zero, self.spec.grid)
        return float_codes(round_float(rows / scale, self.spec.format), self.spec.format)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows (O, I) that codes stand for, float32."""
        scale, zero = self.expanded()
        if self.spec.format == "int":
            return dequantize_affine(codes, scale, zero)
        return float_values(codes, self.spec.format) * scale


def round_to(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Numbers rounded to a format, under scales and zero points of their shape."""
    if spec.format == "int":
        return fake_quantize(x, scale, zero, spec.grid)
    return round_float(x / scale, spec.format) * scale


def rounded_weight(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A weight as its codes would give it back, rounded to nearest."""
    rows = weight.detach().cpu().float().flatten(1)  # O,I; not every device has float64
    return WeightGrid.find(rows, spec).rounded(rows).view(weight.shape).to(weight)
