"""PTQD's three corrections (He et al., arXiv 2305.10657, section 4.2), from one regression per step.

    CNC   divide by 1 + k              the part of the noise that is correlated with the output
    BC    subtract b                   the bias, per channel
    VSC   draw less noise              the residual's variance takes the place of drawn variance

Together ``eps_c = (eps_q - b) / (1 + k) = eps + r / (1 + k)``. Without CNC the slope is not part of the fit: the bias
is then the noise's mean and the residual all the rest.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ptqd.errors import InputError
from ptqd.noise import NoiseStats, channel_axis
from ptqd.response import noise_scales

logger = logging.getLogger(__name__)

Method = Literal["cnc", "bc", "vsc"]
METHODS: tuple[Method, ...] = ("cnc", "bc", "vsc")


@dataclass(frozen=True)
class Correction:
    """What the sampler does about quantization noise, step by step; plain numbers, so that it saves as JSON.

    Attributes:
        methods: of ``"cnc"``, ``"bc"`` and ``"vsc"``.
        timesteps: the schedule it was measured on (T,).
        k: correlated part (T,); 0 without CNC.
        bias: per channel (T, C); 0 without BC.
        noise: share of the drawn noise's standard deviation that is left to draw (T,); 1 without VSC.
        eta: DDIM's noise it was measured at.
        source: what the statistics were measured on.
    """

    methods: tuple[Method, ...]
    timesteps: tuple[float, ...]
    k: tuple[float, ...]
    bias: tuple[tuple[float, ...], ...]
    noise: tuple[float, ...]
    eta: float
    source: Mapping[str, Any]

    @classmethod
    def fit(cls, stats: NoiseStats, methods: Sequence[Method] = METHODS) -> "Correction":
        """The corrections that follow from statistics.

        Args:
            stats: measured on the pipeline to correct.
            methods: any of ``"cnc"``, ``"bc"``, ``"vsc"``; none gives the empty correction.

        Raises:
            InputError: an unknown method, or a step where ``1 + k`` is not positive (the output is anti-correlated
                with the full-precision one: more bits are needed, not a correction).
        """
        for method in methods:
            if method not in METHODS:
                raise InputError(f"unknown correction {method!r}; known are {', '.join(METHODS)}")
        fit = stats.fit(slope="cnc" in methods)
        k = fit.k.value
        if bool((1 + k <= 0).any()):
            t = stats.timesteps[int((1 + k).argmin())].item()
            raise InputError(f"at timestep {t:g} the noise undoes the output (1 + k <= 0); quantize with more bits")
        bias = fit.bias.value if "bc" in methods else torch.zeros_like(fit.bias.value)
        noise = [1.0] * len(k)
        if "vsc" in methods:
            name = stats.source.get("scheduler", "the scheduler")
            if not stats.response.exact:
                logger.warning("vsc is left out: how %s draws its noise is not known; its mean is corrected", name)
            elif not stats.response.draws:
                logger.warning("vsc changes nothing here: %s draws no noise", name)
            else:
                noise = noise_scales(stats.response, fit.variance.value / (1 + k) ** 2)
        return cls(
            methods=tuple(m for m in METHODS if m in methods),
            timesteps=tuple(stats.timesteps.tolist()),
            k=tuple(k.tolist()),
            bias=tuple(map(tuple, bias.tolist())),
            noise=tuple(noise),
            eta=float(stats.source.get("eta", 0.0)),
            source=dict(stats.source),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a scheduler's configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Correction":
        """The inverse of :meth:`to_dict`, also after JSON made lists of its tuples."""
        plain = dict(values)
        for name in ("methods", "timesteps", "k", "noise"):
            plain[name] = tuple(plain[name])
        plain["bias"] = tuple(map(tuple, plain["bias"]))
        return cls(**plain)

    def correct(self, eps_q: torch.Tensor, step: int) -> torch.Tensor:
        """``(eps_q - b) / (1 + k)`` of one step's output (N, C, ...) or (N, L, C)."""
        k, bias = self.k[step], self.bias[step]
        if any(bias):
            shape = [1] * eps_q.ndim
            shape[channel_axis(eps_q)] = len(bias)
            eps_q = eps_q - eps_q.new_tensor(bias).view(shape)
        return eps_q / (1 + k) if k else eps_q
