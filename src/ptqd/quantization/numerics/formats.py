"""Floating-point number formats of 8 and 4 bits, as pure tensor functions.

``e4m3`` and ``e5m2`` are the OCP 8-bit formats (Micikevicius et al., arXiv 2209.05433), with one scale a row or a
tensor. ``mxfp4`` (OCP Microscaling 1.0, arXiv 2310.10537, section 3) and ``nvfp4`` hold E2M1 numbers (0, 0.5, 1, 1.5,
2, 3, 4, 6 and their negatives) in blocks that share a scale: 32 of them a power of two, or 16 of them an E4M3 number
times one float32 number a tensor. A last block may be short.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Format = Literal["int", "e4m3", "e5m2", "mxfp4", "nvfp4"]
FORMAT_BITS: dict[Format, int] = {"e4m3": 8, "e5m2": 8, "mxfp4": 4, "nvfp4": 4}
BLOCKS: dict[Format, int] = {"mxfp4": 32, "nvfp4": 16}
LARGEST: dict[Format, float] = {"e4m3": 448.0, "e5m2": 57344.0, "mxfp4": 6.0, "nvfp4": 6.0}

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENTS = (-127, 127)  # of E8M0


def round_float(x: torch.Tensor, kind: Format) -> torch.Tensor:
    """The nearest number of a format, ties to even, saturating; NaN stays NaN.

    >>> round_float(torch.tensor([0.3, 2.5, -5.0, 9.0]), "mxfp4").tolist()
    [0.5, 2.0, -4.0, 6.0]
    """
    x = x.clamp(-LARGEST[kind], LARGEST[kind])
    if kind in BLOCKS:
        size = x.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
        return (x / step).round() * step
    return x.to(_eight_bits(kind)).to(x.dtype)


def float_codes(x: torch.Tensor, kind: Format) -> torch.Tensor:
    """Bit patterns (int16, unsigned) of numbers that a format holds."""
    if kind in BLOCKS:
        codes = torch.bucketize(x.abs(), torch.tensor(_E2M1, device=x.device, dtype=x.dtype))
        return (codes + 8 * torch.signbit(x)).to(torch.int16)
    return x.to(_eight_bits(kind)).view(torch.uint8).to(torch.int16)


def float_values(codes: torch.Tensor, kind: Format) -> torch.Tensor:
    """The inverse of :func:`float_codes`: float32."""
    if kind in BLOCKS:
        table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=codes.device)
        return table[codes.long()]
    return codes.to(torch.uint8).view(_eight_bits(kind)).float()


def block_codes(
    largest: torch.Tensor, kind: Format, whole: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shared scales of blocks of E2M1 numbers.

    Args:
        largest: largest magnitude of each block, any shape.
        kind: ``"mxfp4"`` or ``"nvfp4"``.
        whole: the largest magnitude of all that shares a float32 number; by default that of all blocks.

    Returns:
        The scales' bit patterns (uint8, E8M0 or E4M3), and the float32 number that ``nvfp4`` shares (of ``whole``'s
        shape; 1 for ``mxfp4``).
    """
    largest = largest.float()
    one = torch.ones((), device=largest.device)
    if kind == "mxfp4":  # the block's largest exponent, less that of E2M1 (Microscaling 1.0, section 6.3)
        _, exponent = torch.frexp(largest)
        exponent = torch.where(largest > 0, exponent - 3, 0).clamp(*_EXPONENTS)
        return (exponent + 127).to(torch.uint8), one
    whole = largest.max() if whole is None else whole.float()
    shared = torch.where(whole > 0, whole / (LARGEST["e4m3"] * LARGEST["nvfp4"]), one)
    scale = (largest / LARGEST["nvfp4"] / shared).clamp(2.0**-9, LARGEST["e4m3"])  # never 0
    return scale.to(torch.float8_e4m3fn).view(torch.uint8), shared


def block_scales(codes: torch.Tensor, shared: torch.Tensor, kind: Format) -> torch.Tensor:
    """Scales (float32) of the bit patterns that :func:`block_codes` gave."""
    if kind == "mxfp4":
        exponent = codes.int() - 127
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return codes.view(torch.float8_e4m3fn).float() * shared


def fake_blocks(x: torch.Tensor, kind: Format, axis: int) -> torch.Tensor:
    """Round to E2M1 in blocks along an axis, whose scales come from the values themselves.

    >>> fake_blocks(torch.tensor([[0.1, 1.0, 8.0, 20.0]]), "mxfp4", 1).tolist()
    [[0.0, 0.0, 8.0, 16.0]]
    """
    moved = x.movedim(axis, -1)
    count, size = moved.shape[-1], BLOCKS[kind]
    blocks = F.pad(moved, (0, -count % size)).unflatten(-1, (-1, size)).float()  # ...,G,B
    largest = blocks.abs().amax(-1)  # ...,G
    whole = largest.flatten(1).amax(1).view(-1, *[1] * (largest.ndim - 1))  # of each sample, whoever is with it
    scale = block_scales(*block_codes(largest, kind, whole), kind)[..., None]
    rounded = (round_float(blocks / scale, kind) * scale).flatten(-2)[..., :count]
    return rounded.movedim(-1, axis).to(x.dtype)


def _eight_bits(kind: Format) -> torch.dtype:
    return torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
