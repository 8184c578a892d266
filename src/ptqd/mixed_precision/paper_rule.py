"""The paper's rule: the fewest bits whose SNR stays above the forward process's (He et al., arXiv 2305.10657)."""

from collections.abc import Mapping, Sequence

import torch

from ptqd.diffusion.noise_schedule import clean_sample
from ptqd.errors import InputError
from ptqd.noise.second_moments import mean_table
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
    """``E|eps|^2 / E|delta|^2`` at each step (T,), of the predicted noise whatever the network predicts.

    With ``x_0 = P out + R x`` the noise is ``eps = (x - alpha (P out + R x)) / sigma``, and its error ``-alpha P /
    sigma`` times the output's. Where the noise is known without the network (v-prediction at pure noise) it is
    infinite.

    Raises:
        InputError: the noise schedule or the prediction type is not known.
    """
    levels = stats.levels
    if levels is None:
        raise InputError(f"the noise schedule is not known of {stats.measured_on.scheduler}; plan by a budget instead")
    p, r = clean_sample(stats.measured_on.config, levels)
    by_output, by_sample = -levels.alpha * p / levels.sigma, (1 - levels.alpha * r) / levels.sigma
    own, layout = torch.arange(stats.layout.channels), stats.layout
    q, x, e = (block.start + own for block in layout.blocks)
    table = mean_table(stats.joint, stats.fold_samples)

    def energy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return table[..., a, b].mean((1, 2))  # T

    signal = by_output**2 * energy(e, e) + 2 * by_output * by_sample * energy(e, x) + by_sample**2 * energy(x, x)
    noise = by_output**2 * (energy(q, q) - 2 * energy(q, e) + energy(e, e))
    return torch.where(noise > 0, signal / torch.where(noise > 0, noise, 1.0), torch.inf)


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
