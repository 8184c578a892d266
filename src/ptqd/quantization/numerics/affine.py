"""Uniform affine quantization, as pure tensor functions (Nagel et al., arXiv 2106.08295, eq. 4 to 7).

    q     = clamp(round(x / s) + z, qmin, qmax)
    x_hat = s (q - z)

A symmetric grid is signed with z = 0; an affine grid is unsigned with a zero point. Zero is always on the grid.
Codes are packed into bytes at their true width: n codes of b bits take ceil(n b / 8) bytes.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ptqd.errors import InputError

MIN_BITS, MAX_BITS = 2, 8  # of weights, whose codes are packed
_BYTE = 8
WIDE = 16  # of activations, at most


@dataclass(frozen=True)
class Grid:
    """The integers a tensor is rounded to.

    Attributes:
        bits: 2 to 16.
        symmetric: signed and centred (z = 0) or unsigned with a zero point.

    Raises:
        InputError: other ``bits``.

    >>> Grid(4, symmetric=True).qmin, Grid(4, symmetric=True).qmax
    (-8, 7)
    >>> Grid(4, symmetric=False).qmin, Grid(4, symmetric=False).qmax
    (0, 15)
    """

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= WIDE:
            raise InputError(f"bits must be {MIN_BITS} to {WIDE}; got {self.bits}")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - (1 if self.symmetric else 0))) - 1


def check_weight_bits(bits: int) -> None:
    """Refuse a number of bits that weights cannot have.

    Raises:
        InputError: it is not 2 to 8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"weights' bits must be {MIN_BITS} to {MAX_BITS}; got {bits}")


def affine_parameters(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a range that is first widened to hold zero.

    Args:
        low: least values, any shape.
        high: largest values, of the same shape.
        grid: the integers to map to.

    Returns:
        Scale (float32, > 0) and zero point (int32), of ``low``'s shape. The scale of an empty range (only zero) is 1.

    Raises:
        InputError: a range that is NaN or infinite.

    >>> s, z = affine_parameters(torch.tensor(-1.0), torch.tensor(2.0), Grid(2, symmetric=False))
    >>> s.item(), z.item()
    (1.0, 1)
    """
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise InputError("a range to quantize is NaN or infinite; look for NaN or infinite weights or activations")
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.qmax
    else:
        scale = (high - low) / (grid.qmax - grid.qmin)
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=tiny)).float()
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero = (grid.qmin - low / scale.double()).round().clamp(grid.qmin, grid.qmax)
    return scale, zero.to(torch.int32)


def quantize_affine(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes (int16) of ``x``; ``scale`` and ``zero`` broadcast against it.

    Raises:
        InputError: ``x`` holds a NaN, which has no code.
    """
    if bool(torch.isnan(x).any()):
        raise InputError("a tensor to quantize holds NaN; repair the model's weights")
    return ((x / scale).round() + zero).clamp(grid.qmin, grid.qmax).to(torch.int16)


def dequantize_affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """``s (q - z)`` in the scale's dtype."""
    return (codes - zero).to(scale.dtype) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor | float, zero: torch.Tensor | float, grid: Grid) -> torch.Tensor:
    """Quantize and dequantize, in ``x``'s dtype, with one allocation; NaN stays NaN.

    Args:
        x: any shape and floating dtype.
        scale: a number, or a tensor that broadcasts against ``x``.
        zero: a number, or a tensor that broadcasts against ``x``.
        grid: the integers in between.
    """
    low: Any = grid.qmin - zero  # clamp_ takes numbers and tensors alike; its stub knows one at a time
    high: Any = grid.qmax - zero
    return (x / scale).round_().clamp_(low, high).mul_(scale)


def pack(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Pack codes at their true width: eight codes of b bits fill b bytes, least significant bits first.

    Args:
        codes: integers in ``grid.qmin .. grid.qmax``, any shape.
        grid: says how many bits.

    Returns:
        uint8 (ceil(n b / 8),).

    >>> pack(torch.tensor([1, 2, 3, 0]), Grid(2, symmetric=False)).tolist()
    [57]
    """
    flat = codes.reshape(-1).to(torch.int64) - grid.qmin  # n
    count = flat.numel()
    flat = torch.nn.functional.pad(flat, (0, -count % 8)).view(-1, 8)  # n/8,8
    words = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    for i in range(8):
        words |= flat[:, i] << (grid.bits * i)
    octets = torch.stack([(words >> (8 * j)) & 0xFF for j in range(grid.bits)], dim=1)  # n/8,b
    return octets.to(torch.uint8).reshape(-1)[: packed_size(count, grid.bits)].contiguous()


def unpack(packed: torch.Tensor, grid: Grid, count: int) -> torch.Tensor:
    """The inverse of :func:`pack`: int16 codes (count,).

    Raises:
        InputError: ``packed`` is not the size that ``count`` codes take.
    """
    return unpack_unsigned(packed, grid.bits, count).to(torch.int16) + grid.qmin


def unpack_unsigned(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """How far codes of 8 bits or fewer, packed by :func:`pack`, lie above the least one: uint8 (count,).

    Raises:
        InputError: ``packed`` is not the size that ``count`` codes take.
    """
    if packed.numel() != packed_size(count, bits):
        need = packed_size(count, bits)
        raise InputError(f"{count} codes of {bits} bits take {need} bytes; the file holds {packed.numel()}")
    packed, mask = packed.reshape(-1), 2**bits - 1
    if bits == _BYTE:
        return packed
    if _BYTE % bits == 0:  # none lies in two bytes
        return torch.stack([(packed >> shift) & mask for shift in range(0, _BYTE, bits)], dim=1).reshape(-1)[:count]
    octets = packed.to(torch.int64)
    octets = torch.nn.functional.pad(octets, (0, -octets.numel() % bits)).view(-1, bits)  # n/8,b
    words = torch.zeros(len(octets), dtype=torch.int64, device=octets.device)
    for j in range(bits):
        words |= octets[:, j] << (8 * j)
    flat = torch.stack([(words >> (bits * i)) & mask for i in range(8)], dim=1)  # n/8,8
    return flat.reshape(-1)[:count].to(torch.uint8)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    >>> packed_size(3, 3)
    2
    """
    return -(-count * bits // 8)
