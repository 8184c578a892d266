"""The paper's rule: the fewest bits whose SNR stays above the forward process's (He et al., arXiv 2305.10657)."""

from collections.abc import Mapping, Sequence

import torch

from ptqd.errors import InputError
from ptqd.noise.regression import regression
from ptqd.noise.stats import NoiseStats
from ptqd.quantization.plan import PrecisionPlan


def paper_plan(stats: Mapping[int, NoiseStats]) -> PrecisionPlan:
    """The paper's rule; see the module's docstring.

    Args:
        stats: by width, as :func:`ptqd.measure_widths` gives them.

    Raises:
        InputError: the scheduler's noise schedule is not known.
    """
    widths, timesteps = sorted(stats), model_timesteps(stats)
    forward = forward_snr(stats[widths[0]])
    snr = torch.stack([quantized_snr(stats[b]) for b in widths])  # W,T
    bits = []
    for t, limit in enumerate(forward.tolist()):
        above = [b for b, value in zip(widths, snr[:, t].tolist(), strict=True) if value > limit]
        bits.append((above[0] if above else widths[-1],))
    return PrecisionPlan(timesteps, tied(timesteps, bits), made={"rule": "paper", "widths": widths})


def forward_snr(stats: NoiseStats) -> torch.Tensor:
    """The forward process's signal-to-noise ratio ``alpha^2 / sigma^2`` at each step (T,).

    Raises:
        InputError: the scheduler's noise schedule is not known.
    """
    if stats.levels is None:
        raise InputError(
            f"the paper's rule compares with the noise schedule, which is not known of {stats.measured_on.scheduler}; "
            "plan by a budget instead"
        )
    return stats.levels.log_snr.exp()


def quantized_snr(stats: NoiseStats) -> torch.Tensor:
    """``E|eps|^2 / E|delta|^2`` at each step (T,)."""
    return regression(stats.moments.mean(0), slope=False)["snr"]


def model_timesteps(stats: Mapping[int, NoiseStats]) -> tuple[float, ...]:
    """The timestep that the denoiser got at each step, which is what its plan will be looked up by.

    Raises:
        InputError: it takes no timestep, or the statistics are of another schedule.
    """
    first = next(iter(stats.values()))
    timesteps = first.measured_on.model_timesteps
    if len(timesteps) != len(first.timesteps):
        raise InputError("what the denoiser is told at each step was not measured; measure this schedule itself")
    return timesteps


def tied(timesteps: Sequence[float], bits: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Steps that a schedule takes at the same timestep have the same bits: the most of theirs."""
    most: dict[float, tuple[int, ...]] = {}
    for t, row in zip(timesteps, bits, strict=True):
        most[t] = tuple(map(max, most[t], row)) if t in most else row
    return tuple(most[t] for t in timesteps)
