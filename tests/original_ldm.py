"""What CompVis' latent diffusion computes, by its parameters' names: the definition that conversions are held to.

Written from the papers (Rombach et al., arXiv 2112.10752; Dhariwal and Nichol, arXiv 2105.05233) and the names alone,
with nothing of diffusers; bench/convert.py holds conversions to outputs of the original code.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

State = Mapping[str, torch.Tensor]


def small_state(
    shapes: Mapping[str, list[int]], base: int, betas: torch.Tensor, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A random checkpoint of the same names with fewer channels: 32 where the UNet has ``base`` and the stage 128."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        if name.startswith("first_stage_model"):
            dims = [64 if d == 8192 else d // 4 if d >= 128 else d for d in shape]
        elif name.startswith(("model", "cond")):
            dims = [11 if d == 1001 else 16 if d == 512 else d * 32 // base if d >= base else d for d in shape]
        else:
            dims = list(shape)
        width = math.prod(dims[1:]) or 1
        value = torch.randn(dims, generator=random) / width**0.5
        found[name] = 1 + 0.1 * value if "norm" in name or name.endswith(("layers.0.weight", "out.0.weight")) else value
    found["betas"] = betas
    if "scale_factor" in found:
        found["scale_factor"] = torch.tensor(0.22765929)
    return found


class Part:
    """Some of a state dict's layers."""

    def __init__(self, state: State, prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def at(self, name: str) -> "Part":
        return Part(self.state, f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.state)

    def weight(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.state[f"{self.prefix}{name}.weight"], self.state.get(f"{self.prefix}{name}.bias")

    def norm(self, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return F.group_norm(x, 32, *self.weight(name), eps=eps)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.weight(name))

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, padding: int | None = None) -> torch.Tensor:
        weight, bias = self.weight(name)
        weight = weight.view(*weight.shape[:2], *(weight.shape[2:] if weight.ndim == 4 else (1, 1)))
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2 if padding is None else padding)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of (n, heads, tokens, width)."""
    mixed: torch.Tensor = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return mixed


def resblock(part: Part, x: torch.Tensor, emb: torch.Tensor, scale_shift: bool, resample: str = "") -> torch.Tensor:
    h = F.silu(part.norm("in_layers.0", x))
    if resample == "down":
        h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
    elif resample == "up":
        h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))
    h = part.conv("in_layers.2", h)
    shift = part.linear("emb_layers.1", F.silu(emb))[:, :, None, None]
    if scale_shift:
        scale, shift = shift.chunk(2, 1)
        h = part.norm("out_layers.0", h) * (1 + scale) + shift
    else:
        h = part.norm("out_layers.0", h + shift)
    h = part.conv("out_layers.3", F.silu(h))
    return h + (part.conv("skip_connection", x) if part.has("skip_connection") else x)


def attention(part: Part, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries, keys and values head by head, as published checkpoints have them."""
    n, c, height, width = x.shape
    qkv = part.conv("qkv", part.norm("norm", x)).view(n, heads, 3, c // heads, height * width).transpose(-1, -2)
    h = attend(*qkv.unbind(2)).transpose(-1, -2).reshape(x.shape)
    return x + part.conv("proj_out", h)


def transformer(part: Part, x: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    c = x.shape[1]
    h = part.conv("proj_in", part.norm("norm", x, 1e-6)).flatten(2).transpose(1, 2)
    block = part.at("transformer_blocks.0")

    def attn(name: str, y: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            block.linear(f"{name}.to_{letter}", z).unflatten(-1, (heads, -1)).transpose(1, 2)
            for letter, z in (("q", y), ("k", other), ("v", other))
        )
        return block.linear(f"{name}.to_out.0", attend(q, k, v).transpose(1, 2).flatten(2))

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, (c,), *block.weight(name))

    y = norm("norm1", h)
    h = h + attn("attn1", y, y)
    h = h + attn("attn2", norm("norm2", h), context)
    value, gate = block.linear("ff.net.0.proj", norm("norm3", h)).chunk(2, -1)
    h = h + block.linear("ff.net.2", value * F.gelu(gate))
    return x + part.conv("proj_out", h.transpose(1, 2).reshape(x.shape))


def unet(
    state: State, x: torch.Tensor, t: torch.Tensor, *, context: torch.Tensor | None, heads: int, head_width: int,
    scale_shift: bool, updown: bool, blocks: int,
) -> torch.Tensor:  # fmt: skip
    """The denoiser's output (n, C, H, W); ``state`` without ``model.diffusion_model.``."""
    net = Part(state, "")
    half = net.weight("time_embed.0")[0].shape[1] // 2
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = torch.cat([angle.cos(), angle.sin()], 1)
    emb = net.linear("time_embed.2", F.silu(net.linear("time_embed.0", emb)))

    def middle(part: Part, h: torch.Tensor) -> torch.Tensor:
        n = heads if heads > 0 else h.shape[1] // head_width
        return attention(part, h, n) if context is None else transformer(part, h, context, n)

    h, kept, i = x, [], 0
    while net.has(f"input_blocks.{i}"):
        block = net.at(f"input_blocks.{i}")
        down = i > 0 and i % (blocks + 1) == 0
        if i == 0:
            h = block.conv("0", h)
        elif block.has("0.op"):
            h = block.conv("0.op", h, stride=2)
        else:
            h = resblock(block.at("0"), h, emb, scale_shift, "down" if down else "")
        h = middle(block.at("1"), h) if block.has("1") else h
        kept.append(h)
        i += 1
    h = resblock(net.at("middle_block.0"), h, emb, scale_shift)
    h = resblock(net.at("middle_block.2"), middle(net.at("middle_block.1"), h), emb, scale_shift)
    i = 0
    while net.has(f"output_blocks.{i}"):
        block = net.at(f"output_blocks.{i}")
        h = resblock(block.at("0"), torch.cat([h, kept.pop()], 1), emb, scale_shift)
        for j in ("1", "2"):
            if block.has(f"{j}.conv"):
                h = block.conv(f"{j}.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
            elif block.has(f"{j}.in_layers.0"):
                h = resblock(block.at(j), h, emb, scale_shift, "up")
            elif block.has(j):
                h = middle(block.at(j), h)
        i += 1
    return net.conv("out.2", F.silu(net.norm("out.0", h)))


def stage_block(part: Part, x: torch.Tensor) -> torch.Tensor:
    h = part.conv("conv1", F.silu(part.norm("norm1", x, 1e-6)))
    h = part.conv("conv2", F.silu(part.norm("norm2", h, 1e-6)))
    return h + (part.conv("nin_shortcut", x) if part.has("nin_shortcut") else x)


def stage_middle(part: Part, x: torch.Tensor) -> torch.Tensor:
    x = stage_block(part.at("block_1"), x)
    attn = part.at("attn_1")
    h = attn.norm("norm", x, 1e-6)
    q, k, v = (attn.conv(letter, h).flatten(2).transpose(1, 2) for letter in "qkv")
    h = attend(q[:, None], k[:, None], v[:, None])[:, 0].transpose(1, 2).reshape(x.shape)
    return stage_block(part.at("block_2"), x + attn.conv("proj_out", h))


def _all(part: Part, name: str, x: torch.Tensor) -> torch.Tensor:
    j = 0
    while part.has(f"{name}.block.{j}"):
        x = stage_block(part.at(f"{name}.block.{j}"), x)
        j += 1
    return x


def encode(state: State, images: torch.Tensor) -> torch.Tensor:
    """Before quantization, or mean and log variance; ``state`` without ``first_stage_model.``."""
    net = Part(state, "encoder.")
    h, i = net.conv("conv_in", images), 0
    while net.has(f"down.{i}"):
        h = _all(net, f"down.{i}", h)
        if net.has(f"down.{i}.downsample"):
            h = net.conv(f"down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        i += 1
    h = net.conv("conv_out", F.silu(net.norm("norm_out", stage_middle(net.at("mid"), h), 1e-6)))
    return Part(state, "").conv("quant_conv", h)


def decode(state: State, latents: torch.Tensor) -> torch.Tensor:
    """Images, of latents that are not scaled any more; with a codebook its nearest code is taken first."""
    if "quantize.embedding.weight" in state:
        codes = state["quantize.embedding.weight"]
        rows = latents.permute(0, 2, 3, 1)
        latents = codes[torch.cdist(rows.flatten(0, 2), codes).argmin(1)].view(rows.shape).permute(0, 3, 1, 2)
    net = Part(state, "decoder.")
    h = stage_middle(net.at("mid"), net.conv("conv_in", Part(state, "").conv("post_quant_conv", latents)))
    i = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up."))
    for level in range(i, -1, -1):
        h = _all(net, f"up.{level}", h)
        if net.has(f"up.{level}.upsample"):
            h = net.conv(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return net.conv("conv_out", F.silu(net.norm("norm_out", h, 1e-6)))
