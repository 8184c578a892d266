"""Learned perceptual image patch similarity (Zhang et al., arXiv 1801.03924), of VGG16's features."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ptqd.errors import InputError
from ptqd.metrics.features.weights import hub_file, load_weights, weights_key

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth"
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of VGG16
SMALLEST = 16  # pixels, so that the last stage has one
_MEAN, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS' scaling layer, for images in [-1, 1]


class _Linear(nn.Module):
    """One stage's weights, named as in the published file."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.ModuleList([nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False)])


class _Vgg(nn.Module):
    """VGG16's convolutions, named as torchvision does."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for outputs, convolutions in _STAGES:
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.ModuleList(layers[:-1])

    def stages(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The outputs of each stage, before it is pooled."""
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x


class Lpips(nn.Module):
    """LPIPS, version 0.1, with VGG16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Vgg()
        for i, (channels, _) in enumerate(_STAGES):
            setattr(self, f"lin{i}", _Linear(channels))

    @classmethod
    def from_pretrained(cls, folder: Path | None = None) -> "Lpips":
        """With the published weights, ``weights-vgg16-lpips.pth`` and ``vgg16-397923af.pth``.

        Args:
            folder: that holds both files; by default torch hub's, to which they are downloaded if they are not there.

        Raises:
            InputError: they are neither here nor can be downloaded, or are another network's.
        """
        network = cls()
        linear = nn.Module()
        for i in range(len(_STAGES)):
            setattr(linear, f"lin{i}", getattr(network, f"lin{i}"))
        paths = [None if folder is None else folder / hub_file(url).name for url in (URL, VGG_URL)]
        load_weights(linear, paths[0], URL, "LPIPS' weights")
        load_weights(network.net, paths[1], VGG_URL, "VGG16's weights", only="features.")
        return network.eval().requires_grad_(False)

    @property
    def key(self) -> str:
        """Changes with the weights."""
        return weights_key(self)

    @torch.no_grad()
    def distances(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Of each image to its like (N,): images (N, C, H, W) in [-1, 1], 16 x 16 or larger; grey ones shown as RGB."""
        if min(images.shape[-2:]) < SMALLEST:
            raise InputError(f"LPIPS needs images of {SMALLEST} x {SMALLEST} or more; got {tuple(images.shape)}")
        total = torch.zeros(len(images), device=self.device)
        for i, (mine, theirs) in enumerate(zip(self._stages(images), self._stages(reference), strict=True)):
            weights = getattr(self, f"lin{i}").model[1]
            total += weights((mine - theirs).square()).mean((1, 2, 3))
        return total

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    def _stages(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Features of unit length at each place."""
        mean, spread = (torch.tensor(values, device=self.device)[:, None, None] for values in (_MEAN, _SPREAD))
        for features in self.net.stages((images.to(self.device).expand(-1, 3, -1, -1) - mean) / spread):
            yield features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
