"""A Correction: for every step a linear map of what the step knows, and how much noise it draws."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from ptqd.diffusion.pipeline_parts import channel_axis
from ptqd.errors import ArtifactError, MismatchError
from ptqd.noise.measured_on import MeasuredOn
from ptqd.noise.second_moments import CROSS, Layout, OutputEstimate
from ptqd.schema import numbers, shape_of, typed

Rows = tuple[tuple[float, ...], ...]
Matrix = tuple[Rows, ...]

_STORED = {
    "model_timesteps": "network",
    "measured_on": "source",
}  # names in scheduler_config.json that are other than the fields'
_TABLES = {name: name for name in ("timesteps", "output", "sample", "bias", "noise", "eta")} | {
    "network": "model_timesteps"
}
_AGAIN = "fit it again with 'ptqd correct'"


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
        model_timesteps: timesteps that the denoiser gets (T,); empty for the schedule's own.
        eta: DDIM's noise it was measured at.
        measured_on: what the statistics were measured on.
    """

    methods: tuple[str, ...]
    timesteps: tuple[float, ...]
    output: Rows | Matrix
    sample: Rows | Matrix
    bias: Rows
    noise: tuple[float, ...]
    model_timesteps: tuple[float, ...]
    eta: float
    measured_on: MeasuredOn

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a scheduler's configuration; ``network`` and ``source`` are the
        stored names of ``model_timesteps`` and ``measured_on``.
        """
        plain = {_STORED.get(name, name): value for name, value in asdict(self).items()}
        return plain | {"source": self.measured_on.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Correction":
        """The inverse of :meth:`to_dict`, also after JSON made lists of its tuples.

        Raises:
            ArtifactError: it was written by another version.
        """
        names = {_STORED.get(f.name, f.name): f.name for f in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ArtifactError(
                "the correction was written by another version of ptqd; fit it again with 'ptqd correct'"
            )
        where = "the correction"
        methods = typed(values["methods"], tuple[str, ...], where, _AGAIN)
        tables = {names[key]: numbers(values[key], f"{where}'s {key}") for key in _TABLES}
        correction = cls(methods, **tables, measured_on=MeasuredOn.from_dict(values["source"]))
        correction._check()
        return correction

    def _check(self) -> None:
        """Refuse numbers of other shapes than the attributes say."""
        steps = shape_of(self.timesteps)
        shapes = {name: shape_of(getattr(self, name)) for name in (*_TABLES.values(), "timesteps")}
        per_step = ("output", "sample", "bias", "noise", "model_timesteps")
        ranks = {"output": (2, 3), "sample": (2, 3), "bias": (2,)}
        fits = len(shapes["timesteps"]) == 1 and steps != (0,) and shapes["eta"] == () and self.eta >= 0
        fits &= all(len(shapes[name]) in ranks.get(name, (1,)) for name in per_step if shapes[name] != (0,))
        fits &= all(shapes[name][:1] == steps for name in per_step if shapes[name] != (0,))
        channels = {shapes[name][1] for name in ("output", "sample", "bias") if len(shapes[name]) > 1}
        if not fits or len(channels) > 1 or not all(0 <= share <= 1e3 for share in self.noise):
            raise ArtifactError(f"the correction's numbers do not fit its {(*steps, 0)[0]} steps; {_AGAIN}")

    def axis(self, sample: torch.Tensor) -> int:
        """Where a step's channels are: as measured, else where they usually are."""
        axis = self.measured_on.channel_axis
        return channel_axis(sample) if axis is None else axis

    def corrector(self) -> "StepCorrector":
        """What applies it; made once for a scheduler."""
        return StepCorrector(self)


class StepCorrector:
    """Applies a correction, its numbers as tensors that are made once, for the device and the precision of the samples.

    Args:
        correction: what to do at each step.
    """

    def __init__(self, correction: Correction) -> None:
        self.correction = correction
        self._maps: tuple[_StepMap, ...] = ()
        self._bias: torch.Tensor | None = None
        self._kernels: torch.Tensor | None = (
            None  # of maps across channels and neighbours, all in one (T, C, 2 C, 3, 3)
        )
        self._made_for: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, eps_q: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """One step's output (N, C, ...) or (N, L, C), corrected.

        Args:
            eps_q: the quantized denoiser's output.
            x: the sample it was asked about, of the same shape.
            step: index into the correction's timesteps.
        """
        with _one_thread(eps_q):
            return self._corrected(eps_q, x, step)

    def _corrected(self, eps_q: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        axis = self.correction.axis(eps_q)
        dtype = torch.promote_types(eps_q.dtype, torch.float32)  # half precision is too coarse for small corrections
        if self._made_for != (eps_q.device, dtype):
            self._make(eps_q.device, dtype, eps_q.shape[axis])
        if self._kernels is not None:
            bias, output = None if self._bias is None else self._bias[step], eps_q.to(dtype)
            known = torch.cat([output, x.to(dtype)], dim=axis)
            return (output - _convolved(known, self._kernels[step], bias, axis, 1)).to(eps_q.dtype)
        noise: torch.Tensor | None = None  # what is taken for quantization noise
        for step_map in self._maps:
            part = step_map(eps_q.to(dtype) if step_map.of_output else x.to(dtype), step, axis)
            noise = part if noise is None else noise + part
        if self._bias is not None:
            bias = _along(self._bias[step], eps_q.ndim, axis)
            noise = bias if noise is None else noise + bias
        return eps_q if noise is None else (eps_q.to(dtype) - noise).to(eps_q.dtype)

    def _make(self, device: torch.device, dtype: torch.dtype, channels: int) -> None:
        """Tensors of the correction's numbers."""
        given = ((self.correction.output, True), (self.correction.sample, False))
        tables = [(torch.tensor(table, dtype=dtype, device=device), of_output) for table, of_output in given if table]
        known = {table.shape[1] for table, _ in tables} | {len(row) for row in self.correction.bias[:1]}
        if known - {channels}:
            raise MismatchError(
                f"the correction is for {min(known)} channels, and the pipeline's samples have {channels} there; "
                "measure this pipeline, and correct it"
            )
        self._maps = tuple(_StepMap(table, channels, of_output) for table, of_output in tables)
        bias = self.correction.bias
        self._bias = torch.tensor(bias, dtype=dtype, device=device) if bias else None
        self._kernels = None
        if any(table.shape[2:] == (len(CROSS) * channels,) for table, _ in tables):
            kernels = torch.zeros(len(tables[0][0]), channels, 2 * channels, 3, 3, dtype=dtype, device=device)
            for table, of_output in tables:
                first = 0 if of_output else channels
                kernels[:, :, first : first + channels] += _kernels(table, channels)
            self._kernels = kernels
        self._made_for = (device, dtype)


class _StepMap:
    """A linear map for each step: one number a channel (T, C), a 1 x 1 convolution (T, C, C), or one with neighbours
    (T, C, 5 C) or (T, C, 5).
    """

    def __init__(self, weights: torch.Tensor, channels: int, of_output: bool) -> None:
        self.weights, self.of_output = weights, of_output
        self.groups = 0  # of a convolution with neighbours
        if weights.ndim == 3 and weights.shape[2] != channels:
            self.groups = 1 if weights.shape[2] == len(CROSS) * channels else channels
            self.weights = _kernels(weights, channels, apart=self.groups > 1)

    def __call__(self, known: torch.Tensor, step: int, axis: int) -> torch.Tensor:
        """The map of a step, applied to what is known there."""
        weights = self.weights[step]
        if weights.ndim == 1:
            return _along(weights, known.ndim, axis) * known
        if not self.groups:
            mixed: torch.Tensor = torch.tensordot(known, weights, dims=([axis], [1]))
            return mixed.movedim(-1, axis)
        return _convolved(known, weights, None, axis, self.groups)


def _kernels(table: torch.Tensor, channels: int, *, apart: bool = False) -> torch.Tensor:
    """A table of maps as kernels (T, C, C, 3, 3), or (T, C, 1, 3, 3) where every channel has neighbours apart."""
    if table.ndim == 2:
        table = torch.diag_embed(table)
    inputs = 1 if apart else channels
    kernels = table.new_zeros(len(table), channels, inputs, 3, 3)
    taps = table.view(len(table), channels, -1, inputs)
    for n, (i, j) in enumerate(CROSS[: taps.shape[2]]):
        kernels[..., i, j] = taps[:, :, n]
    return kernels


def _convolved(
    known: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, axis: int, groups: int
) -> torch.Tensor:
    """A 3 x 3 convolution over the last two axes; of a video, of each frame."""
    pictures = known.movedim(axis, -3)
    flat = F.conv2d(pictures.reshape(-1, *pictures.shape[-3:]), kernel, bias, padding=1, groups=groups)
    return flat.view(*pictures.shape[:-3], *flat.shape[1:]).movedim(-3, axis)


def corrected_output(
    estimate: OutputEstimate, layout: Layout, eps_q: torch.Tensor, x: torch.Tensor, axis: int
) -> torch.Tensor:
    """An estimate of one step's eps (G, C, taps C), applied to outputs and samples (N, C, ...)."""
    dtype = torch.promote_types(eps_q.dtype, torch.float32)
    result = eps_q.to(dtype)
    for maps, known in ((estimate.output, eps_q), (estimate.sample, x)):
        table = smallest_form(maps[None], layout)
        if table is not None:
            step_map = _StepMap(table.to(known.device, dtype), eps_q.shape[axis], of_output=known is eps_q)
            result = result - step_map(known.to(dtype), 0, axis)
    bias = estimate.bias.flatten().to(eps_q.device, dtype)
    return (result - _along(bias, eps_q.ndim, axis)).to(eps_q.dtype)


def smallest_form(maps: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """Maps (T, G, C, taps C) as a correction holds them: in the smallest form that says the same; None for zero."""
    if not bool(maps.any()):
        return None
    if layout.groups > 1:  # G groups of one channel
        return maps[:, :, 0] if layout.taps > 1 else maps[:, :, 0, 0]
    whole = maps[:, 0]
    across = whole[..., : layout.channels]
    if layout.taps > 1 and bool(whole[..., layout.channels :].any()):
        return whole
    diagonal = across.diagonal(dim1=1, dim2=2)
    return diagonal if torch.equal(torch.diag_embed(diagonal), across) else across


@contextmanager
def _one_thread(like: torch.Tensor) -> Iterator[None]:
    """Inside the block torch computes on one thread of a CPU: a step's maps are too small for more, and threads that go
    on spinning afterwards would hold those of an engine up.
    """
    threads = torch.get_num_threads()
    if threads == 1 or like.device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _along(values: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    shape = [1] * ndim
    shape[axis] = len(values)
    return values.view(shape)


def rows(values: torch.Tensor) -> Any:
    """A tensor as nested tuples, to the nine digits that single precision has."""
    return _tuples(values.tolist(), digits=9)


def _tuples(value: object, digits: int | None = None) -> Any:
    """Nested lists as tuples; numbers as they are (a schedule's timesteps are compared), or to some digits."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v, digits) for v in value)
    return value if digits is None else float(f"{value:.{digits}g}")
