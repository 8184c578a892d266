"""The networks of EDM (Karras et al., arXiv 2206.00364), of diffusers' blocks; a saved pipeline names this module.

``training/networks.py`` of the original: ``SongUNet``, which is DDPM++ and NCSN++ of Song et al. (arXiv 2011.13456),
and ``DhariwalUNet``, which is ADM (arXiv 2105.05233). They say what ``UNet2DModel`` does not: residual sums that are
scaled, norms whose groups follow their width, attention behind some blocks of a level, labels that are left out.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


def _groups(channels: int) -> int:
    """As many groups of a norm as the original takes, of four channels at least."""
    return min(32, channels // 4)


class _Parts:
    """Makes the layers of a network, all of its kind."""

    def __init__(self, song: bool, embedding: int, head_width: int, fir: bool, dropout: float) -> None:
        self.song, self.embedding, self.head_width, self.fir, self.dropout = song, embedding, head_width, fir, dropout
        self.eps, self.divisor = (1e-6, math.sqrt(2)) if song else (1e-5, 1.0)

    def resnet(self, inputs: int, outputs: int, *, up: bool = False, down: bool = False) -> ResnetBlock2D:
        """A residual block; the time embedding reaches it after its activation."""
        return ResnetBlock2D(
            in_channels=inputs,
            out_channels=outputs,
            temb_channels=self.embedding,
            groups=_groups(inputs),
            groups_out=_groups(outputs),
            eps=self.eps,
            dropout=self.dropout,
            skip_time_act=True,
            time_embedding_norm="default" if self.song else "scale_shift",
            kernel="fir" if self.fir and (up or down) else None,
            output_scale_factor=self.divisor,
            use_in_shortcut=inputs != outputs or (self.song and (up or down)),
            up=up,
            down=down,
        )

    def attention(self, width: int) -> Attention:
        """Attention of one head in SongUNet, else of heads of a fixed width."""
        heads = 1 if self.song else width // self.head_width
        if heads < 1 or width % heads:
            raise ValueError(f"attention over {width} channels cannot have heads of {self.head_width}")
        return Attention(
            width,
            heads=heads,
            dim_head=width // heads,
            rescale_output_factor=self.divisor,
            eps=self.eps,
            norm_num_groups=_groups(width),
            residual_connection=True,
            bias=True,
            upcast_softmax=True,
            _from_deprecated_attn_block=True,
        )


class EDMResidual(nn.Module):
    """NCSN++'s second path down: the input, convolved and halved at each level, joins the first path."""

    def __init__(self, inputs: int, outputs: int, fir: bool) -> None:
        super().__init__()
        self.fir = fir
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=2 if fir else 1)  # the filter has none then

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Features (N, C', H / 2, W / 2) of ones (N, C, H, W)."""
        x: torch.Tensor = self.conv(hidden_states)
        if not self.fir:
            return nn.functional.avg_pool2d(x, 2)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        return nn.functional.conv2d(x, kernel, stride=2, groups=x.shape[1])


class EDMDownBlock(nn.Module):
    """A level on the way down, and the step to the next one.

    Args:
        parts: what layers are made of.
        inputs: channels that come in.
        outputs: channels of the level.
        layers: residual blocks.
        attention: whether each of them is followed by attention.
        down: whether another level follows.
        residual: channels of NCSN++'s second path; 0: there is none.
    """

    def __init__(
        self, parts: _Parts, inputs: int, outputs: int, layers: int, *, attention: bool, down: bool, residual: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([parts.resnet(outputs if j else inputs, outputs) for j in range(layers)])
        self.attentions = nn.ModuleList([parts.attention(outputs) for _ in range(layers)] if attention else [])
        self.downsamplers = nn.ModuleList([parts.resnet(outputs, outputs, down=True)] if down else [])
        self.residuals = nn.ModuleList([EDMResidual(residual, outputs, parts.fir)] if down and residual else [])

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
        """What comes out, the states that the way up sees again, and the second path.

        Args:
            hidden_states: (N, C, H, W).
            temb: the embedding after its activation (N, E).
            residual: NCSN++'s second path (N, C'', H, W), where there is one.
        """
        x, states = hidden_states, []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[j](x)
            states.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, temb)
            for path in self.residuals:
                x = residual = (x + path(residual)) / math.sqrt(2)
            states.append(x)
        return x, tuple(states), residual


class EDMMidBlock(nn.Module):
    """Two residual blocks, attention behind the first."""

    def __init__(self, parts: _Parts, channels: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([parts.resnet(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([parts.attention(channels)])

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """States (N, C, H, W)."""
        x = self.attentions[0](self.resnets[0](hidden_states, temb))
        output: torch.Tensor = self.resnets[1](x, temb)
        return output


class EDMUpBlock(nn.Module):
    """A level on the way up, and the step to the next one.

    Args:
        parts: what layers are made of.
        inputs: channels that come from below.
        skips: channels of the states from the way down, in the order in which they are seen.
        outputs: channels of the level.
        attention: the residual blocks that attention follows.
        up: whether another level follows.
    """

    def __init__(
        self, parts: _Parts, inputs: int, skips: list[int], outputs: int, *, attention: tuple[int, ...], up: bool
    ) -> None:
        super().__init__()
        before = [inputs, *[outputs] * (len(skips) - 1)]
        self.resnets = nn.ModuleList([parts.resnet(b + s, outputs) for b, s in zip(before, skips, strict=True)])
        self.attentions = nn.ModuleDict({str(j): parts.attention(outputs) for j in attention})
        self.upsamplers = nn.ModuleList([parts.resnet(outputs, outputs, up=True)] if up else [])

    def forward(
        self, hidden_states: torch.Tensor, res_hidden_states_tuple: tuple[torch.Tensor, ...], temb: torch.Tensor
    ) -> torch.Tensor:
        """What comes out (N, C, H, W).

        Args:
            hidden_states: from below.
            res_hidden_states_tuple: from the way down, one for each residual block, the last of them seen first.
            temb: the embedding after its activation (N, E).
        """
        x = hidden_states
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, res_hidden_states_tuple[-1 - j]], dim=1), temb)
            if str(j) in self.attentions:
                x = self.attentions[str(j)](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, temb)
        return x


class EDMFourier(nn.Module):
    """Fourier features of NCSN++, sines first: random frequencies, stored with the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)
        self.freqs: torch.Tensor

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Features (N, width) of timesteps (N,)."""
        x = torch.outer(timesteps.float(), 2 * math.pi * self.freqs.float())
        return torch.cat([x.sin(), x.cos()], dim=1)


class EDMUNet2DModel(ModelMixin, ConfigMixin):
    """A network of EDM without its preconditioning, which diffusers' EDM schedulers have.

    Its timestep is ln(sigma) / 4, its sample already scaled.

    Args:
        model_type: ``"SongUNet"`` or ``"DhariwalUNet"``.
        sample_size: height and width of images.
        in_channels: of images.
        out_channels: of images.
        num_class_embeds: how many classes there are; None: no labels.
        model_channels: width that the levels' are multiples of.
        channel_mult: each level's.
        channel_mult_emb: width of the embedding, as a multiple.
        channel_mult_noise: width of the noise level's features, as a multiple.
        num_blocks: residual blocks of a level.
        attn_resolutions: pixels of the levels that attend.
        channels_per_head: of DhariwalUNet's attention; SongUNet's has one head.
        embedding_type: ``"positional"`` or ``"fourier"``.
        encoder_type: ``"standard"`` or ``"residual"``.
        resample_filter: ``[1, 1]`` or ``[1, 3, 3, 1]``.
        augment_dim: labels of augmentations that training had; their weights are kept and not used.
        dropout: of residual blocks, in training.
    """

    takes_no_labels = True  # as a class of their own

    @register_to_config
    def __init__(
        self,
        model_type: str = "SongUNet",
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        channels_per_head: int = 64,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
        augment_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        song = model_type == "SongUNet"
        self.song = song
        noise, embedding = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        widths = [model_channels * m for m in channel_mult]
        attends = [(sample_size >> level) in attn_resolutions for level in range(len(widths))]
        last = len(widths) - 1
        parts = _Parts(song, embedding, channels_per_head, tuple(resample_filter) == (1, 3, 3, 1), dropout)

        self.time_proj = (
            EDMFourier(noise)
            if embedding_type == "fourier"
            else Timesteps(noise, flip_sin_to_cos=not song, downscale_freq_shift=1 if song else 0)
        )
        self.time_embedding = TimestepEmbedding(noise, embedding)
        self.class_embedding: Any = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, noise if song else embedding)
        self.class_bias = nn.Parameter(torch.zeros(noise)) if song and num_class_embeds is not None else None
        self.augment_weight = nn.Parameter(torch.zeros(noise, augment_dim)) if augment_dim else None

        first = model_channels if song else widths[0]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        skips, before, path = [first], first, in_channels
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            residual = path if encoder_type == "residual" else 0
            down = level < last
            self.down_blocks.append(
                EDMDownBlock(parts, before, width, num_blocks, attention=attends[level], down=down, residual=residual)
            )
            skips += [width] * (num_blocks + down)
            before = path = width
        self.mid_block = EDMMidBlock(parts, before)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            seen = [skips.pop() for _ in range(num_blocks + 1)]
            every = tuple(range(num_blocks + 1))
            attention = () if not attends[level] else every[-1:] if song else every
            self.up_blocks.append(EDMUpBlock(parts, before, seen, widths[level], attention=attention, up=level > 0))
            before = widths[level]
        self.conv_norm_out = nn.GroupNorm(_groups(before), before, eps=parts.eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(before, out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The network's output (N, C, H, W), which the scheduler mixes with the sample.

        Args:
            sample: (N, C, H, W), scaled by the scheduler.
            timestep: ln(sigma) / 4, one number or one for each sample (N,).
            class_labels: class numbers (N,); None: none, as the original's vector of zeros.
            return_dict: a tuple when False.
        """
        steps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        features = self.time_proj(steps).to(self.dtype)
        labels = None if self.class_embedding is None or class_labels is None else self.class_embedding(class_labels)
        if self.song:
            if labels is not None:
                features = features + labels * math.sqrt(self.class_embedding.num_embeddings)
            if self.class_bias is not None:
                features = features + self.class_bias
            labels = None
        temb = self.time_embedding(features)
        temb = self.conv_act(temb if labels is None else temb + labels)

        x, residual = self.conv_in(sample), sample
        states = (x,)
        for block in self.down_blocks:
            x, more, residual = block(x, temb, residual)
            states += more
        x = self.mid_block(x, temb)
        count = self.config.num_blocks + 1
        for block in self.up_blocks:
            x = block(x, states[-count:], temb)
            states = states[:-count]
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)
