"""Second moments of all that a step knows: one table from which every linear correction follows.

With ``u = (1, eps_q, x_t, eps)``, all channels at one pixel, the table is ``E[u u^T]`` over pixels, summed over the
samples of a fold. Folds are what intervals and held-out halves are made of: a sample's fold follows from its index,
whatever the batch or process that measured it, so tables add up, and their size does not grow with the number of
samples.

Beyond 16 channels a table across channels would outgrow the samples it is made from; there is then one small table a
channel.
"""

from dataclasses import astuple, dataclass

import torch
from scipy import stats as scipy_stats

from ptqd.errors import InputError

FOLDS = 16
MAX_CHANNELS = 16


def joint_moments(x: torch.Tensor, eps: torch.Tensor, eps_q: torch.Tensor, axis: int) -> torch.Tensor:
    """Tables of one step.

    Args:
        x: the sample (N, C, ...), or (N, L, C).
        eps: full-precision output, like ``x``.
        eps_q: quantized output, like ``x``.
        axis: of the channels.

    Returns:
        ``E[u u^T]`` over pixels (N, G, K, K), float64: one group of K = 1 + 3 C, or C groups of K = 4.
    """
    parts = [t.detach().cpu().movedim(axis, 1).flatten(2).double() for t in (eps_q, x, eps)]  # N,C,M
    channels, pixels = parts[0].shape[1:]
    if channels <= MAX_CHANNELS:
        u = torch.cat(parts, dim=1)[:, None]  # N,1,3C,M
    else:
        u = torch.stack(parts, dim=2)  # N,C,3,M
    u = torch.cat([torch.ones_like(u[:, :, :1]), u], dim=2)  # N,G,K,M
    return u @ u.transpose(2, 3) / pixels


def fold_of(indices: torch.Tensor) -> torch.Tensor:
    """The fold of each sample (N,), of their indices (N,): every 16 in a row fill all folds once.

    Each sixteen is rotated by a hash of its number: classes and prompts that are taken in turn must not end up in folds
    of their own.
    """
    return (indices + (indices // FOLDS * 2654435761 >> 15)) % FOLDS


def fold_sums(moments: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Sums over the samples of each fold (16, ...), of samples' moments (N, ...) and their indices (N,)."""
    sums = torch.zeros(FOLDS, *moments.shape[1:], dtype=moments.dtype)
    return sums.index_add_(0, fold_of(indices), moments)


@dataclass(frozen=True)
class OutputEstimate:
    """``eps_c = eps_q - D_q eps_q - D_x x_t - b``, the estimate of eps from what a step knows.

    Attributes:
        output: ``D_q`` (..., C, C), rows are outputs.
        sample: ``D_x`` (..., C, C).
        bias: ``b`` (..., C).
        excess: variance that eps_c has and eps has not, mean over channels (...); negative where more was withheld than
            noise was let through.
    """

    output: torch.Tensor
    sample: torch.Tensor
    bias: torch.Tensor
    excess: torch.Tensor


def estimate_output(table: torch.Tensor, coherence: float) -> OutputEstimate:
    """The best linear estimate of eps for a whole run, not for one step of it.

    What x_t says of both outputs is known exactly; the rest of eps_q is signal and noise:

        eps = G x + e,    eps_q = G_q x + K e + r,    e and r uncorrelated with x, r with e;    means left out.

    An estimate ``G x + T (eps_q - G_q x)`` of eps is wrong by ``(1 - T K) e - T r``. Least squares weighs both alike,
    and shrinks. But over the steps of a run e hardly changes, so that what is withheld of it is withheld again and
    again and adds up, while r is drawn anew, at least in part. If the first adds up over L times as many steps as the
    second,

        T = Cov(e) K^T (K Cov(e) K^T + Cov(r) / L)^-1,

    least squares for L = 1, unbiased (``T K = 1``) for L without bound.

    Args:
        table: mean moments (..., K, K).
        coherence: L, at least 1.

    Raises:
        InputError: L below 1.
    """
    if coherence < 1:
        raise InputError(f"the weight of withheld signal must be at least 1; got {coherence:g}")
    channels = (table.shape[-1] - 1) // 3
    q, x, e = (slice(i * channels, (i + 1) * channels) for i in range(3))
    mean = table[..., 0, 1:]
    cov = table[..., 1:, 1:] - mean[..., :, None] * mean[..., None, :]
    by_x = _inverse(cov[..., x, x])
    g, g_q = cov[..., e, x] @ by_x, cov[..., q, x] @ by_x
    cov_e = cov[..., e, e] - g @ cov[..., x, e]
    cov_q = cov[..., q, q] - g_q @ cov[..., x, q]
    cross = cov[..., e, q] - g @ cov[..., x, q]  # Cov(e, K e + r) = Cov(e) K^T
    cov_r = cov_q - cross.transpose(-1, -2) @ _inverse(cov_e) @ cross
    t = cross @ _inverse(cov_q - (1 - 1 / coherence) * cov_r)
    output = torch.eye(channels, dtype=table.dtype) - t
    sample = t @ g_q - g
    known = output @ mean[..., q, None] + sample @ mean[..., x, None]
    excess = (t @ cov_q @ t.transpose(-1, -2) - cov_e).diagonal(dim1=-2, dim2=-1).mean(-1)
    return OutputEstimate(output, sample, mean[..., q] - mean[..., e] - known[..., 0], excess)


def output_error(table: torch.Tensor, estimate: OutputEstimate) -> torch.Tensor:
    """``E|eps_c - eps|^2``, mean over channels (...), of an estimate on the samples of a table (..., K, K)."""
    unit = torch.eye(estimate.output.shape[-1], dtype=table.dtype).expand_as(estimate.output)
    error = torch.cat([-estimate.bias[..., None], unit - estimate.output, -estimate.sample, -unit], dim=-1)  # C,K
    return (error @ table @ error.transpose(-1, -2)).diagonal(dim1=-2, dim2=-1).mean(-1)


def held_out_gain(folds: torch.Tensor, samples: torch.Tensor, coherence: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much the estimate lowers each step's error on samples it was not fitted on.

    Fitted on the even folds it is judged on the odd ones, and the other way round. In the next sample the error is
    ``O_ii^2`` times that of the output (:mod:`ptqd.response`), with and without correction: the sign is the same.

    Args:
        folds: sums of tables (F, T, G, K, K).
        samples: how many each fold holds (F,).
        coherence: L.

    Returns:
        Gain (T,), and half the width of its 95 % interval over folds.
    """
    gains = []
    for half in (0, 1):
        fitted, judged = folds[half::2].sum(0) / samples[half::2].sum(), slice(1 - half, None, 2)
        estimate = estimate_output(fitted, coherence)
        nothing = OutputEstimate(*(torch.zeros_like(part) for part in astuple(estimate)))
        for fold, n in zip(folds[judged], samples[judged], strict=True):
            if n > 0:
                gains.append(output_error(fold / n, nothing).mean(-1) - output_error(fold / n, estimate).mean(-1))
    each = torch.stack(gains)  # folds that hold samples, T
    quantile = float(scipy_stats.t.ppf(0.975, len(each) - 1))
    return each.mean(0), quantile * each.std(0) / len(each) ** 0.5


def _inverse(covariance: torch.Tensor) -> torch.Tensor:
    """Pseudo-inverse: a channel that is constant, or a copy of others, is left out."""
    inverse: torch.Tensor = torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True)
    return inverse
