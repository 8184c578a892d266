"""The Inception network of the FID literature, and its spatial features as ADM's evaluation takes them.

Inception v3 of TensorFlow's 2015-12-05 graph (Szegedy et al., arXiv 1512.00567), which Heusel et al. (arXiv 1706.08500)
and all after them use. It differs from other Inception v3 in its average pooling, which leaves padding out, in the max
pooling of its last block, and in 1008 classes; images are resized as TensorFlow 1 does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ptqd.metrics.features.extractor import Features
from ptqd.metrics.features.weights import load_weights, weights_key

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SIZE = 299
SPATIAL = 7  # channels of ADM's spatial features


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _down(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2)


class _A(nn.Module):
    """35 x 35."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _B(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, 2, same=False)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2, same=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, _down(x)], 1)


class _C(nn.Module):
    """17 x 17."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1 = _Conv(inputs, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, (1, 7))
        self.branch7x7_3 = _Conv(inner, 192, (7, 1))
        self.branch7x7dbl_1 = _Conv(inputs, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_3 = _Conv(inner, inner, (1, 7))
        self.branch7x7dbl_4 = _Conv(inner, inner, (7, 1))
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], 1)


class _D(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, 3, 2, same=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), _down(x)], 1)


class _E(nn.Module):
    """8 x 8; the last one's pooling takes the largest."""

    def __init__(self, inputs: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.last else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """The feature extractor of FID, sFID, KID and the Inception score; parameters are named as in published files.

    ``features`` gives ``pooled`` (N, 2048), the pool3 of FID; ``spatial`` (N, 17 * 17 * 7), the first seven channels of
    the 1 x 1 branch of the third 17 x 17 block (``mixed_6/conv`` in TensorFlow's graph), as ADM's evaluation takes them
    for sFID (arXiv 2105.05233; Nash et al., arXiv 2103.03841), in its order; and ``logits`` (N, 1008) without the bias,
    as ADM's and torch-fidelity's Inception score take them.
    """

    image_shape = None
    classifies = False  # its 1008 classes are not those that a run asks for
    inception = True

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c = _C(768, 128), _C(768, 160)
        self.Mixed_6d, self.Mixed_6e = _C(768, 160), _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, last=False), _E(2048, last=True)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_pretrained(cls, path: Path | None = None) -> "Inception":
        """With the published weights.

        Args:
            path: ``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid, torch-fidelity's file of the same weights, or
                either as safetensors; by default torch hub's copy, downloaded if it is not there.

        Raises:
            InputError: they are neither here nor can be downloaded, or are another network's.
        """
        network = cls()
        load_weights(network, path, URL, "Inception's weights")
        return network.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Changes with the weights."""
        return weights_key(self)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Features:
        """Features of images (N, C, H, W) in [-1, 1]; grey ones are shown as RGB."""
        device = self.fc.weight.device
        pixels = ((images.to(device).expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255)
        x = (resized(pixels, (SIZE, SIZE)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _down(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_down(x))))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :SPATIAL]  # its 1 x 1 branch comes first
        pooled = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean((2, 3))
        return Features(pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.fc.weight.T)


def resized(images: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Images (N, C, H, W) as TensorFlow 1's bilinear interpolation makes them: corner to corner, no half pixels."""
    for axis, required in ((3, size[1]), (2, size[0])):
        have = images.shape[axis]
        place = torch.arange(required, device=images.device, dtype=torch.float32) * torch.tensor(have / required)
        low = place.long()
        high = (low + 1).clamp(max=have - 1)
        weight = (place - low).view(-1, *[1] * (3 - axis))
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * weight
    return images
