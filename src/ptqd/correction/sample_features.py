"""What sets of samples are compared by, beside their distance: means and energy by channel and band of frequency."""

import itertools

import torch
from scipy import stats as scipy_stats

BANDS = 4


def jackknife_error(without: torch.Tensor) -> float:
    """Standard error of an estimate, from its values with each of n samples left out (n,)."""
    return float(((len(without) - 1) * without.double().var(unbiased=False)).sqrt())


def features(samples: torch.Tensor, axis: int, like: torch.Tensor) -> torch.Tensor:
    """What a distribution of samples is judged by: each channel's mean, and its log energy in bands of frequency.

    Args:
        samples: (N, C, ...) or (N, L, C); bands where the last two axes are a picture's, else one.
        axis: of the channels.
        like: samples whose deviation in a channel is the unit of means there.

    Returns:
        (N, F), float64.
    """
    x = samples.double().movedim(axis, 1)
    flat = x.flatten(2)
    mean = flat.mean(2) / like.double().movedim(axis, 1).flatten(2).std((0, 2)).clamp(min=1e-9)
    if x.ndim < 4:
        return torch.cat([mean, (flat.var(2) + 1e-12).log()], dim=1)
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x, norm="forward").abs().square()
    ky, kx = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    radius = (ky[:, None] ** 2 + kx[None, :] ** 2).sqrt()
    parts = [mean]
    for low, high in itertools.pairwise(torch.linspace(0, float(radius.max()) + 1e-6, BANDS + 1)):
        inside = (radius >= low) & (radius < high) & (radius > 0)
        if bool(inside.any()):
            parts.append((power[..., inside].flatten(2).mean(2) + 1e-12).log())
    return torch.cat(parts, dim=1)


def distribution_distance(shifts: torch.Tensor) -> float:
    """By how much a distribution is off, from the shifts of features (N, F) against those of the same seeds.

    The mean square over features of each one's shift, its mean over samples without the tenth at either end: what
    happens to most samples, not what a single one that went astray does. A correction that smooths shows as lost
    energy, whatever it does to the error.
    """
    return float((scipy_stats.trim_mean(shifts.numpy(), 0.1, axis=0) ** 2).mean())


def by_chance(shifts: torch.Tensor) -> float:
    """What :func:`distribution_distance` of such shifts (N, F) comes to where none is systematic."""
    return float(scipy_stats.trim_mean((shifts**2).numpy(), 0.1, axis=0).mean()) / len(shifts)
