"""Small denoisers that are no models of diffusers, in the manners of three code bases: calls, attention, own layers."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class GuidedAttention(nn.Module):
    """As guided-diffusion's: one convolution for all, the products by einsum in a module of their own."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(4, channels), heads
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)
        self.attention = GuidedProducts(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        result: torch.Tensor = flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))
        return result.view(x.shape)


class GuidedProducts(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        n, width, length = qkv.shape
        channels = width // (3 * self.heads)
        q, k, v = qkv.reshape(n * self.heads, 3 * channels, length).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


class GuidedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        self.out_layers = nn.Sequential(nn.GroupNorm(4, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[..., None, None]
        result: torch.Tensor = self.skip_connection(x) + self.out_layers(h)
        return result


class GuidedNetwork(nn.Module):
    """``model(x, t, y=classes)`` gives the noise and, in further channels, a variance."""

    def __init__(self, channels: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, 32), nn.SiLU(), nn.Linear(32, 32))
        self.label_emb = nn.Embedding(classes, 32)
        self.input = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.mid = GuidedBlock(channels, channels, 32), GuidedBlock(channels, channels, 32)
        self.attention = GuidedAttention(channels, 2)
        self.up = GuidedBlock(2 * channels, channels, 32)
        self.out = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        half = self.channels // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        args = timesteps[:, None].float() * freqs
        emb = self.time_embed(torch.cat([args.cos(), args.sin()], -1)) + self.label_emb(y)
        first = self.down(self.input(x), emb)
        h = self.attention(self.mid(F.avg_pool2d(first, 2), emb))
        h = torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), first], dim=1)
        result: torch.Tensor = self.out(self.up(h, emb))
        return result


class MagnitudePreserving(nn.Module):
    """A convolution or a linear layer as EDM2's, whose weight is normalized whenever it is called."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        w = self.weight.float()
        norm = torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True)
        w = w / (1e-4 + norm * math.sqrt(norm.numel() / w.numel())) * (gain / math.sqrt(w[0].numel()))
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w.to(x.dtype), padding=w.shape[-1] // 2)


class Edm2Network(nn.Module):
    """``net(x, sigma, class_labels)`` gives the clean sample; attention by einsum inside a block, layers of its own."""

    def __init__(self, channels: int = 16, classes: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.sigma_data = heads, 0.5
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels), persistent=False)
        self.emb_noise = MagnitudePreserving(channels, 32)
        self.emb_label = nn.Linear(classes, 32, bias=False)
        self.conv_in, self.conv_res = (
            MagnitudePreserving(3, channels, (3, 3)),
            MagnitudePreserving(channels, channels, (3, 3)),
        )
        self.emb_linear = nn.Linear(32, channels)
        self.attn_qkv, self.attn_proj = (MagnitudePreserving(channels, w, (1, 1)) for w in (3 * channels, channels))
        self.conv_skip, self.conv_out = (
            MagnitudePreserving(2 * channels, channels, (1, 1)),
            nn.Conv2d(channels, 3, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_noise = (sigma.flatten().log() / 4)[:, None] * self.freqs  # type: ignore[operator]
        emb = F.silu(self.emb_noise(c_noise.cos()) + self.emb_label(class_labels))
        first = self.conv_in(x / (sigma**2 + self.sigma_data**2).sqrt())
        h = self.conv_res(F.silu(first * (1 + self.emb_linear(emb)[..., None, None])))
        n, c, height, width = h.shape
        q, k, v = self.attn_qkv(h).reshape(n, self.heads, -1, 3, height * width).unbind(3)
        w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        y = torch.einsum("nhqk,nhck->nhcq", w, v).reshape(n, c, height, width)
        h = self.conv_skip(torch.cat([h + self.attn_proj(y), first], dim=1))
        denoised: torch.Tensor = skip * x + out * self.conv_out(F.silu(h))
        return denoised


class KDiffusionNetwork(nn.Module):
    """``model(x, sigma, aug_cond=...)``, a denoiser of k-diffusion: a transformer of pixels, torch's own attention."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch_in, self.patch_out = nn.Linear(12, width), nn.Linear(width, 12, bias=False)
        self.time, self.cond = nn.Linear(1, width), nn.Linear(3, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, aug_cond: torch.Tensor | None = None) -> Any:
        n, _, height, width = x.shape
        sigma = sigma.reshape(-1, 1, 1, 1)
        tokens = F.pixel_unshuffle(x / (sigma**2 + 1).sqrt(), 2).flatten(2).transpose(1, 2)
        h = self.patch_in(tokens) + self.time(sigma.flatten()[:, None].log())[:, None] + self.cond(aug_cond)[:, None]
        q, k, v = (self.qkv(self.norm(h))[:, None]).chunk(3, dim=-1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        pixels = self.patch_out(h).transpose(1, 2).reshape(n, 12, height // 2, width // 2)
        return x / (sigma**2 + 1) + F.pixel_shuffle(pixels, 2) * sigma / (sigma**2 + 1).sqrt()
