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
