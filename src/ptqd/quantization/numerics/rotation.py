"""Hadamard rotations of groups of channels, which spread an outlier over its group (QuaRot, arXiv 2404.00456)."""

import math

import torch

MOST_CHANNELS = 256  # of a group


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix over the root of its size, float32: orthogonal, symmetric, its own inverse.

    >>> hadamard(2).mul(2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).float()


def regular_hadamard(size: int) -> torch.Tensor:
    """The Hadamard matrix whose rows have equal sums, over the root of its size, a power of 4; see :func:`hadamard`.

    A channel's mean goes into all channels of its group, where Sylvester's matrix puts it into one (ConvRot, arXiv
    2512.03673, section 3.2).

    >>> regular_hadamard(4).mul(2).tolist()[0]
    [1.0, 1.0, 1.0, -1.0]
    """
    four = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(1)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return (matrix / math.sqrt(size)).float()


def rotation_of(group: int) -> torch.Tensor | None:
    """The matrix of a group as layers store it: of so many channels, Sylvester's; regular where it is negative."""
    if abs(group) <= 1:
        return None
    return hadamard(group) if group > 0 else regular_hadamard(-group)


def largest_group(channels: int, most: int) -> int:
    """The largest power of two that divides the channels, at most ``most``; 1 where none does.

    >>> largest_group(96, 64), largest_group(63, 64)
    (32, 1)
    """
    return math.gcd(channels, 1 << (most.bit_length() - 1))


def rotate(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """``x`` with each group of neighbouring channels times a matrix.

    Args:
        x: any shape and floating dtype.
        matrix: (G, G); G divides the channels.
        axis: where the channels are.
    """
    moved = x.movedim(axis, -1)
    rotated: torch.Tensor = moved.unflatten(-1, (-1, len(matrix))) @ matrix.to(x)  # ..., C/G, G
    return rotated.flatten(-2).movedim(-1, axis)
