"""A small Fashion-MNIST classifier: the feature extractor of the evaluation, never shown to the generator."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ptqd.metrics.features.extractor import Features
from ptqd.metrics.features.weights import weights_key


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


class _Down(nn.Sequential):
    def __init__(self, channels: int, out_channels: int) -> None:
        conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class FashionClassifier(ModelMixin, ConfigMixin):
    """A three-stage residual network on 32 x 32 grey images in [-1, 1].

    ``features`` gives what the metrics need: ``pooled`` (N, D), the globally pooled last stage, in the
    role of Inception's pool3 in FID; ``spatial`` (N, 7 * 8 * 8), the first seven channels of the middle stage's
    map, the construction of sFID (Nash et al., arXiv 2103.03841); and the class ``logits``.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, int, int] = (24, 48, 96), classes: int = 10) -> None:
        super().__init__()
        a, b, c = channels
        self.down1 = _Down(1, a)
        self.stage1 = _Residual(a)
        self.down2 = _Down(a, b)
        self.stage2 = _Residual(b)
        self.down3 = _Down(b, c)
        self.stage3 = _Residual(c)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(c, classes)

    image_shape = (32, 32, 1)
    classifies = True
    inception = False

    @property
    def key(self) -> str:
        """Changes with the weights."""
        return weights_key(self)

    def features(self, images: torch.Tensor) -> Features:
        """Features of images (N, 1, 32, 32) in [-1, 1]."""
        middle = self.stage2(self.down2(self.stage1(self.down1(images))))  # N,b,8,8
        pooled = self.stage3(self.down3(middle)).mean(dim=(2, 3))  # N,c
        logits = self.head(self.dropout(pooled))
        return Features(pooled, middle[:, :7].flatten(1), logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits (N, classes) of images (N, 1, 32, 32) in [-1, 1]."""
        return self.features(images).logits
