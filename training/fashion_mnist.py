"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747) from its original idx files."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ptqd.errors import InputError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(path: Path) -> torch.Tensor:
    """Read one gzipped idx file of unsigned bytes.

    Args:
        path: a file such as ``train-images-idx3-ubyte.gz``.

    Returns:
        A uint8 tensor of the shape the file states.

    Raises:
        InputError: the file is missing, or is not an idx file of unsigned bytes.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing; put the four original Fashion-MNIST idx files into {path.parent} "
            "(github.com/zalandoresearch/fashion-mnist, or Debian's dataset-fashion-mnist)"
        )
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise InputError(f"{path} is not an idx file of unsigned bytes; download it again")
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise InputError(f"{path} is truncated; download it again")
    return torch.from_numpy(values.reshape(tuple(shape)).copy())


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of one split.

    Args:
        folder: holds the four original files.
        split: ``"train"`` or ``"t10k"``.

    Returns:
        Images (N, 1, 32, 32) in [-1, 1], padded with black from 28 x 28, and labels (N,) in 0..9.
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    padded = F.pad(images[:, None], (2, 2, 2, 2))  # N,1,32,32
    return padded.float() / 127.5 - 1.0, labels.long()
