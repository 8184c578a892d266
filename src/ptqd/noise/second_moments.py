"""Second moments of all that a step knows: one table from which every linear correction follows.

With ``u = (1, eps_q, x_t, eps)``, all channels at one pixel, the table is ``E[u u^T]`` over pixels, summed over the
samples of a fold. Of ``eps_q`` and ``x_t`` the four neighbours of the pixel are known too: quantization noise has a
spatial spectrum, and what is known of the neighbourhood tells signal from noise. Folds are what intervals and held-out
halves are made of: a sample's fold follows from its index, whatever the batch or process that measured it, so tables
add up, and their size does not grow with the number of samples.

A table across channels grows with their square. Up to 8 channels it spans channels and neighbours, up to 16 channels
the channels alone; beyond that there is one small table a channel.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from scipy import stats as scipy_stats

FOLDS = 16
MAX_CHANNELS = 16
MAX_NEIGHBOUR_CHANNELS = 8
CHUNK = 2**24  # float64 numbers held at once
CROSS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))  # the pixel, above, below, left, right: places in a 3 x 3 kernel


@dataclass(frozen=True)
class Layout:
    """What one row of a table holds: 1, then ``taps`` blocks of eps_q, as many of x_t, one of eps.

    Attributes:
        groups: tables a step (G); 1, or one a channel.
        channels: of one group (C / G).
        taps: 1, or 5 with the neighbours.
    """

    groups: int
    channels: int
    taps: int

    @classmethod
    def of(cls, channels: int, spatial: bool) -> "Layout":
        """The layout for so many channels; ``spatial`` where the last two axes are a picture's."""
        groups = 1 if channels <= MAX_CHANNELS else channels
        near = spatial and (channels <= MAX_NEIGHBOUR_CHANNELS or groups > 1)
        return cls(groups, channels // groups, 5 if near else 1)

    @classmethod
    def read(cls, table: torch.Tensor, channels: int) -> "Layout":
        """The layout of a table (..., G, K, K) of so many channels."""
        groups, size = table.shape[-3], table.shape[-1]
        mine = channels // groups
        return cls(groups, mine, ((size - 1) // mine - 1) // 2)

    @property
    def blocks(self) -> tuple[slice, slice, slice]:
        """Where eps_q, x_t and eps stand in a row."""
        known = self.taps * self.channels
        return slice(1, 1 + known), slice(1 + known, 1 + 2 * known), slice(1 + 2 * known, 1 + 2 * known + self.channels)


def neighbours(x: torch.Tensor) -> list[torch.Tensor]:
    """The pixel above, below, left and right of each (..., H, W); 0 beyond the border."""
    padded = F.pad(x, (1, 1, 1, 1))
    return [
        padded[..., i : i + x.shape[-2], j : j + x.shape[-1]]  # as a 3 x 3 kernel sees them
        for i, j in CROSS[1:]
    ]


def joint_moments(x: torch.Tensor, eps: torch.Tensor, eps_q: torch.Tensor, axis: int) -> torch.Tensor:
    """Tables of one step.

    Args:
        x: the sample (N, C, ...), or (N, L, C).
        eps: full-precision output, like ``x``.
        eps_q: quantized output, like ``x``.
        axis: of the channels.

    Returns:
        ``E[u u^T]`` over pixels (N, G, K, K), float64.
    """
    layout = Layout.of(x.shape[axis], spatial=x.ndim >= 4)
    rows = max(1, CHUNK // ((1 + 3 * layout.taps) * x[0].numel()))
    chunks = zip(x.split(rows), eps.split(rows), eps_q.split(rows), strict=True)
    return torch.cat([_tables(*chunk, axis, layout) for chunk in chunks])


def _tables(x: torch.Tensor, eps: torch.Tensor, eps_q: torch.Tensor, axis: int, layout: Layout) -> torch.Tensor:
    parts = []
    for known, taps in ((eps_q, layout.taps), (x, layout.taps), (eps, 1)):
        one = known.detach().cpu().movedim(axis, 1).double()
        parts += [one, *neighbours(one)] if taps > 1 else [one]
    flat = [part.flatten(2) for part in parts]  # N,C,M
    if layout.groups == 1:
        u = torch.cat(flat, dim=1)[:, None]  # N,1,K-1,M
    else:
        u = torch.stack(flat, dim=2)  # N,C,K-1,M
    u = torch.cat([torch.ones_like(u[:, :, :1]), u], dim=2)  # N,G,K,M
    return u @ u.transpose(2, 3) / u.shape[3]


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
    """``eps_c = eps_q - D_q eps_q - D_x x_t - b``, an estimate of eps from what a step knows.

    Attributes:
        output: ``D_q`` (..., G, C, taps C), rows are outputs; eps_q itself, then its neighbours.
        sample: ``D_x``, likewise.
        bias: ``b`` (..., G, C).
    """

    output: torch.Tensor
    sample: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def nothing(cls, table: torch.Tensor, layout: Layout) -> "OutputEstimate":
        """The estimate that leaves eps_q as it is."""
        zero = table.new_zeros(*table.shape[:-2], layout.channels, layout.taps * layout.channels)
        return cls(zero, zero.clone(), table.new_zeros(*table.shape[:-2], layout.channels))

    @classmethod
    def stack(cls, estimates: "Sequence[OutputEstimate]") -> "OutputEstimate":
        """Several estimates as one with a further axis in front."""
        outputs, samples, biases = zip(*((e.output, e.sample, e.bias) for e in estimates), strict=True)
        return cls(torch.stack(outputs), torch.stack(samples), torch.stack(biases))

    def at(self, n: int) -> "OutputEstimate":
        """The nth along the first axis."""
        return OutputEstimate(self.output[n], self.sample[n], self.bias[n])

    def copy(self) -> "OutputEstimate":
        """The same in tensors of its own."""
        return OutputEstimate(self.output.clone(), self.sample.clone(), self.bias.clone())

    def where(self, chosen: torch.Tensor, other: "OutputEstimate") -> "OutputEstimate":
        """This one for the chosen outputs (..., G, C), the other for the rest."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        masks = (chosen[..., None], chosen[..., None], chosen)
        return OutputEstimate(*(torch.where(m, a, b) for m, (a, b) in zip(masks, pairs, strict=True)))


Estimator = Callable[[torch.Tensor, Layout], OutputEstimate]


def covariance(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (..., K) and covariance (..., K, K) of a row of a mean table; the constant's are 1 and 0."""
    mean = table[..., 0, :]
    return mean, table - mean[..., :, None] * mean[..., None, :]


def ridge(table: torch.Tensor, layout: Layout, base: OutputEstimate, penalty: torch.Tensor) -> OutputEstimate:
    """Regression of eps on all that a step knows, shrunk towards another estimate.

    What ``base`` leaves of eps is regressed on x_t and on what x_t does not say of eps_q, each with its neighbours;
    the squared coefficients count ``penalty`` times the variance of what they belong to. At 0 that is least squares,
    and without bound it is the base. The means are left to the intercept, without penalty.

    Args:
        table: mean tables (..., G, K, K).
        layout: of the tables.
        base: for each table (..., G, C, taps C).
        penalty: at least 0 (..., G), of further axes too: P penalties for J tables each are (P, 1, 1).
    """
    q, x, e = layout.blocks
    weights = _weights(base)
    change = torch.eye(table.shape[-1], dtype=table.dtype).expand(*weights.shape[:-2], -1, -1).clone()
    change[..., e, :] -= weights
    mean, cov = covariance(change @ table @ change.transpose(-1, -2))
    by_x = cov[..., q, x] @ inverse(cov[..., x, x])
    var_q = cov[..., q, q] - by_x @ cov[..., x, q]
    with_x, with_q = cov[..., e, x], cov[..., e, q] - cov[..., e, x] @ by_x.transpose(-1, -2)
    output, sample = _shrunk(var_q, with_q, penalty), _shrunk(cov[..., x, x], with_x, penalty)
    sample = sample - output @ by_x
    left = mean[..., e] - (output @ mean[..., q, None] + sample @ mean[..., x, None])[..., 0]
    return OutputEstimate(base.output - output, base.sample - sample, base.bias - left)


def _shrunk(variance: torch.Tensor, covariance: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Coefficients ``S (V + penalty diag V)^-1``, from ``S`` (..., C, M) and ``V`` (..., M, M)."""
    size = variance.diagonal(dim1=-2, dim2=-1)
    least = 1e-9 * size.amax(-1, keepdim=True) + 1e-300
    system = variance + torch.diag_embed((penalty[..., None] + 1e-9) * size + least)
    solved: torch.Tensor = torch.linalg.solve(system, covariance.transpose(-1, -2))
    return solved.transpose(-1, -2)


def _weights(estimate: OutputEstimate) -> torch.Tensor:
    """The estimate's weights on (1, eps_q, x_t, 0) (..., C, K)."""
    channels = estimate.output.shape[-2]
    q = -estimate.output.clone()
    q[..., range(channels), range(channels)] += 1
    return torch.cat([-estimate.bias[..., None], q, -estimate.sample, torch.zeros_like(q[..., :channels])], dim=-1)


def output_errors(table: torch.Tensor, estimate: OutputEstimate) -> torch.Tensor:
    """``E|eps_c - eps|^2`` of each output (..., G, C), of an estimate on the samples of a mean table (..., G, K, K)."""
    error = _weights(estimate)
    channels = error.shape[-2]
    error[..., range(channels), range(-channels, 0)] -= 1
    return ((error @ table) * error).sum(-1)


def excess_variance(table: torch.Tensor, estimate: OutputEstimate) -> torch.Tensor:
    """Variance that eps_c has and eps has not (..., G, C); negative where more is withheld than noise let through."""
    weights = _weights(estimate)
    channels = weights.shape[-2]
    _, cov = covariance(table)
    mine = ((weights @ cov) * weights).sum(-1)
    return mine - cov.diagonal(dim1=-2, dim2=-1)[..., -channels:]


@dataclass(frozen=True)
class Gain:
    """By how much an estimate lowers the mean squared error on samples it was not fitted on.

    Attributes:
        steps: mean over outputs (T,).
        half_width: of its 95 % interval over folds (T,).
        outputs: of each output (T, G, C).
        before: the error without correction (T,).
    """

    steps: torch.Tensor
    half_width: torch.Tensor
    outputs: torch.Tensor
    before: torch.Tensor

    @property
    def helps(self) -> torch.Tensor:
        """The steps it helps beyond the interval (T,)."""
        return self.steps > self.half_width


def held_out_gain(
    folds: torch.Tensor, samples: torch.Tensor, layout: Layout, estimator: Estimator, coherence: float = 1.0
) -> Gain:
    """Each step's gain, fitted on the even folds and judged on the odd ones, and the other way round.

    In the next sample the error is ``O_ii^2`` times that of the output (:mod:`ptqd.diffusion.scheduler_response`),
    with and without correction: the sign is the same, and so is the share.

    Args:
        folds: sums of tables (F, T, G, K, K).
        samples: how many each fold holds (F,).
        layout: of the tables.
        estimator: what is judged.
        coherence: L; the residual r of ``eps_q = G_q x + K eps + r`` counts by 1 / L, since it is drawn anew while what
            an estimate withholds is withheld at every step.
    """
    gains, before = [], []
    own = range(layout.channels)
    for half in (0, 1):
        judged = slice(1 - half, None, 2)
        estimate = estimator(mean_table(folds[half::2], samples[half::2]), layout)
        fresh, fresh_kept = torch.zeros(()), torch.zeros(())  # what of the residual does not count
        if coherence > 1:
            residual = (1 - 1 / coherence) * _residual(mean_table(folds[judged], samples[judged]), layout)
            kept = -estimate.output
            kept[..., own, own] += 1
            fresh = residual.diagonal(dim1=-2, dim2=-1)[..., own]  # T,G,C, of eps_q as it is
            fresh_kept = ((kept @ residual) * kept).sum(-1)
        for fold, n in zip(folds[judged], samples[judged], strict=True):
            if n > 0:
                table = fold / n
                before.append(output_errors(table, OutputEstimate.nothing(table, layout)) - fresh)
                gains.append(before[-1] - (output_errors(table, estimate) - fresh_kept))
    each = torch.stack(gains)  # folds that hold samples, T, G, C
    steps = each.mean((2, 3))
    quantile = float(scipy_stats.t.ppf(0.975, len(each) - 1))
    half_width = quantile * steps.std(0) / len(each) ** 0.5
    return Gain(steps.mean(0), half_width, each.mean(0), torch.stack(before).mean((0, 2, 3)))


def _residual(table: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Covariance of what neither x_t nor eps say of eps_q (..., G, taps C, taps C)."""
    q, x, e = layout.blocks
    _, cov = covariance(table)
    known = torch.tensor([*range(x.start, x.stop), *range(e.start, e.stop)])
    with_q = cov[..., q, :][..., known]
    inside = cov[..., known, :][..., known]
    return cov[..., q, q] - with_q @ inverse(inside) @ with_q.transpose(-1, -2)


def left_out_tables(folds: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Mean tables without each fold that holds samples (F', ...), of folds (F, ...) that hold so many each (F,)."""
    total, count = folds.sum(0), samples.sum()
    pairs = zip(folds, samples, strict=True)
    return torch.stack([(total - fold) / (count - n) for fold, n in pairs if 0 < n < count])


def mean_table(folds: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """The mean over the samples of folds (F, T, G, K, K) that hold so many each (F,)."""
    return folds.sum(0) / samples.sum()


def smoothed(table: torch.Tensor, layout: Layout, weight: float) -> torch.Tensor:
    """A table (T, G, K, K) with some of each step's neighbours in time mixed in.

    Coefficients change slowly over the steps, so with few samples a step's neighbours tell more than they distort.
    The neighbours' eps_q, x_t and eps are first brought to this step's size: some schedulers change it on the way.

    Args:
        table: mean moments.
        layout: of the table.
        weight: of either neighbour, against 1 for the step itself.
    """
    total, count = table.clone(), torch.ones(len(table), dtype=table.dtype)
    for mine, other in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        total[mine] += weight * resized(table[other], table[mine], layout)
        count[mine] += weight
    return total / count.view(-1, 1, 1, 1)


def between_tables(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Tables between two others (F, T, G, K, K): both are brought to a size between theirs, then averaged.

    Args:
        left: of the step before.
        right: of the step after.
        weight: of the latter (T,); sizes are averaged in the logarithm.
        layout: of the tables.
    """
    w = weight.view(-1, 1, 1, 1)
    scale = _sizes(left, right, layout) ** w[..., 0]
    there = left * scale[..., :, None] * scale[..., None, :]
    return (1 - w) * there + w * resized(right, there, layout)


def resized(table: torch.Tensor, like: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A table whose eps_q, x_t and eps are brought to the root mean square they have in another."""
    scale = _sizes(table, like, layout)
    return table * scale[..., :, None] * scale[..., None, :]


def _sizes(table: torch.Tensor, like: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Root mean square of a row's eps_q, x_t and eps in one table over that in another (..., K)."""
    scale = torch.ones_like(table[..., 0])
    for block in layout.blocks:
        theirs, ours = (t[..., block, block].diagonal(dim1=-2, dim2=-1).mean(-1) for t in (table, like))
        ratio = torch.where((theirs > 0) & (ours > 0), ours / theirs.clamp(min=1e-300), 1.0)
        scale[..., block] = ratio.sqrt()[..., None]
    return scale


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Pseudo-inverse of a covariance: a channel that is constant, or a copy of others, is left out."""
    result: torch.Tensor = torch.linalg.pinv(matrix, rtol=1e-9, hermitian=True)
    return result
