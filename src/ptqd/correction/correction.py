"""A Correction: for every step a linear map of what the step knows, and how much noise it draws."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from ptqd.diffusion.pipeline_parts import channel_axis
from ptqd.errors import InputError
from ptqd.noise.second_moments import CROSS

Rows = tuple[tuple[float, ...], ...]
Matrix = tuple[Rows, ...]


@dataclass(frozen=True)
class Correction:
    """What the sampler does about quantization noise, step by step; plain numbers, so that it saves as JSON.

        eps_c = eps_q - D_q eps_q - D_x x_t - b

    Attributes:
        methods: what it was made by.
        timesteps: the schedule it was measured on (T,).
        output: ``D_q``, one number a channel (T, C), a map across channels (T, C, C), one across channels and the four
            neighbours of a pixel (T, C, 5 C), or of each channel and its neighbours (T, C, 5); empty where there is
            none. The order of neighbours is that of :data:`ptqd.noise.second_moments.CROSS`.
        sample: ``D_x``, likewise.
        bias: ``b`` (T, C); empty where there is none.
        noise: share of the drawn noise's standard deviation that is left to draw (T,); empty for all of it.
        network: timesteps that the network is told (T,); empty for the schedule's own.
        eta: DDIM's noise it was measured at.
        source: what the statistics were measured on.
    """

    methods: tuple[str, ...]
    timesteps: tuple[float, ...]
    output: Rows | Matrix
    sample: Rows | Matrix
    bias: Rows
    noise: tuple[float, ...]
    network: tuple[float, ...]
    eta: float
    source: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a scheduler's configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Correction":
        """The inverse of :meth:`to_dict`, also after JSON made lists of its tuples.

        Raises:
            InputError: it was written by another version.
        """
        if set(values) != {f.name for f in fields(cls)}:
            raise InputError("the correction was written by another version of ptqd; fit it again with 'ptqd correct'")
        plain = {name: _tuples(value) for name, value in values.items() if name != "source"}
        return cls(**plain, source=dict(values["source"]))

    def axis(self, sample: torch.Tensor) -> int:
        """Where a step's channels are: as measured, else where they usually are."""
        return int(self.source.get("channel_axis", channel_axis(sample)))

    def correct(self, eps_q: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """One step's output (N, C, ...) or (N, L, C), corrected.

        Args:
            eps_q: the quantized denoiser's output.
            x: the sample it was asked about, of the same shape.
            step: index into ``timesteps``.
        """
        axis = self.axis(eps_q)
        dtype = torch.promote_types(eps_q.dtype, torch.float32)  # half precision is too coarse for small corrections
        noise: torch.Tensor | None = None  # what is taken for quantization noise
        for table, known in ((self.output, eps_q), (self.sample, x)):
            if table:
                part = _apply(eps_q.new_tensor(table[step], dtype=dtype), known.to(dtype), axis)
                noise = part if noise is None else noise + part
        if self.bias:
            bias = _along(eps_q.new_tensor(self.bias[step], dtype=dtype), eps_q.ndim, axis)
            noise = bias if noise is None else noise + bias
        return eps_q if noise is None else (eps_q.to(dtype) - noise).to(eps_q.dtype)


def _apply(weights: torch.Tensor, known: torch.Tensor, axis: int) -> torch.Tensor:
    """One number a channel (C,), a 1 x 1 convolution (C, C), or one with neighbours (C, 5 C) or (C, 5)."""
    channels = known.shape[axis]
    if weights.ndim == 1:
        return _along(weights, known.ndim, axis) * known
    if weights.shape[1] == channels:
        mixed: torch.Tensor = torch.tensordot(known, weights, dims=([axis], [1]))
        return mixed.movedim(-1, axis)
    groups = 1 if weights.shape[1] == len(CROSS) * channels else channels
    taps = weights.view(channels, len(CROSS), channels // groups)
    kernel = weights.new_zeros(channels, channels // groups, 3, 3)
    for n, (i, j) in enumerate(CROSS):
        kernel[:, :, i, j] = taps[:, n]
    pictures = known.movedim(axis, -3)  # of a video, one a frame
    flat = F.conv2d(pictures.reshape(-1, *pictures.shape[-3:]), kernel, padding=1, groups=groups)
    return flat.view(pictures.shape).movedim(-3, axis)


def _along(values: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    shape = [1] * ndim
    shape[axis] = len(values)
    return values.view(shape)


def rows(values: torch.Tensor) -> Any:
    """A tensor as nested tuples, to the nine digits that single precision has."""
    return _tuples(values.tolist(), digits=9)


def _tuples(value: Any, digits: int | None = None) -> Any:
    """Nested lists as tuples; numbers as they are (a schedule's timesteps are compared), or to some digits."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v, digits) for v in value)
    return value if digits is None else float(f"{value:.{digits}g}")
