"""Distances between sets of images, from features; nothing here knows of quantization, or of an extractor.

Pure functions give values; those that end in ``_statistic`` give the influence of each sample too, from which
:mod:`ptqd.evaluate.intervals` makes intervals and paired differences. In features other than Inception's the Frechet
distance (Heusel et al., arXiv 1706.08500), the same of spatial features (Nash et al., arXiv 2103.03841) and the kernel
distance (Binkowski et al., arXiv 1801.01401) are not FID, sFID or KID, and are never called so.
"""

import math
from collections.abc import Iterator

import torch
from scipy import stats as scipy_stats

from ptqd.errors import InputError
from ptqd.evaluate.intervals import Metric, Statistic
from ptqd.evaluate.moments import ROWS, Moments

WINDOW = 11  # of structural similarity
_DISTANCES = 4_000_000  # in memory at once
_SINGULAR = 1e-10  # an eigenvalue this far below the largest is 0


def frechet_distance(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson and Landau 1982).

    The square root is taken of a symmetric matrix, by its eigenvalues: exact where a covariance is singular.

    Args:
        mean_a: (D,), float64.
        cov_a: (D, D), float64, positive semidefinite up to rounding.
        mean_b: like ``mean_a``.
        cov_b: like ``cov_a``.
    """
    root = square_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    difference = mean_a - mean_b
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * cross)


def square_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root: torch.Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_statistic(features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> Statistic:
    """Frechet distance of features (N, D) to a reference's mean (D,) and covariance (D, D).

    A sample's influence is ``2 (m - m_r).(x - m) + (x - m)^T G (x - m) - tr(G C)`` with
    ``G = 1 - C_r^1/2 (C_r^1/2 C C_r^1/2)^-1/2 C_r^1/2``, the derivative by the covariance C.

    Raises:
        InputError: fewer than four samples, or features that are not finite.
    """
    own = _moments(features)
    return _frechet(own, mean.double(), covariance.double(), features)


def paired_frechet_statistic(features: torch.Tensor, reference: torch.Tensor) -> Statistic:
    """Frechet distance of features (N, D) to those of other images of the same seeds (N, D), drawn together."""
    a, b = _moments(features), _moments(reference)
    mine = _frechet(a, b.mean, b.covariance, features)
    theirs = _frechet(b, a.mean, a.covariance, reference)
    return Statistic(mine.value, mine.influence + theirs.influence)


def extrapolated_frechet(
    found: Statistic, features: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
) -> Statistic:
    """A Frechet distance without its bias of order 1/N (Chong and Forsyth, arXiv 1911.07023).

    The line through the distances of all N samples and of either half, at infinitely many. Halves are first and last
    samples, so that classes that take turns are in both. To first order samples do to it what they do to the distance.

    Args:
        found: by :func:`frechet_statistic` from the other arguments.
        features: (N, D).
        mean: the reference's (D,).
        covariance: the reference's (D, D).
    """
    middle = len(features) // 2
    parts = [Moments.of(part) for part in (features[:middle], features[middle:])]
    halves = [frechet_distance(mean.double(), covariance.double(), own.mean, own.covariance) for own in parts]
    return Statistic(2 * found.value - sum(halves) / 2, found.influence)


def _moments(features: torch.Tensor) -> Moments:
    if len(features) < 4:
        raise InputError(f"a distance between sets needs at least four samples; got {len(features)}")
    found = Moments.of(features)
    if not bool(torch.isfinite(found.total).all()):
        broken = sum(int((~torch.isfinite(part).all(1)).sum()) for part in features.split(ROWS))
        raise InputError(f"the features of {broken} of {len(features)} images are not finite; look at these images")
    return found


def _frechet(own: Moments, mean: torch.Tensor, covariance: torch.Tensor, features: torch.Tensor) -> Statistic:
    root, mine = square_root(covariance), own.covariance
    values, vectors = torch.linalg.eigh(root @ mine @ root)
    values = values.clamp(min=0)
    shift = own.mean - mean
    value = float(shift @ shift + mine.trace() + covariance.trace() - 2 * values.sqrt().sum())
    kept = values > _SINGULAR * values.max()
    across = root @ vectors[:, kept]  # D,K
    inverse = values[kept].rsqrt()

    def parts() -> Iterator[torch.Tensor]:
        for part in features.split(ROWS):
            x = part.double() - own.mean
            yield 2 * (x @ shift) + x.square().sum(1) - (x @ across).square() @ inverse

    influence = torch.cat(list(parts()))
    return Statistic(value, influence - influence.mean())


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401, eq. 4).

    Args:
        features: (n, D), n at least 2.
        reference: (m, D), m at least 2.
    """
    return kernel_statistic(features, reference).value


def kernel_statistic(features: torch.Tensor, reference: torch.Tensor) -> Statistic:
    """Kernel distance of features (N, D) to a reference set's (M, D), in parts: memory grows with N + M.

    Its influence is twice the first-order part of the U-statistic (Hoeffding 1948).
    """
    n, m = len(features), len(reference)
    if min(n, m) < 2:
        raise InputError(f"a kernel distance needs at least two samples on either side; got {n} and {m}")
    within, across = _kernel_sums(features, features), _kernel_sums(features, reference)
    own = within - _diagonal(features)  # N, sums over the others
    theirs = (_kernel_sums(reference, reference) - _diagonal(reference)).sum().item() / (m * (m - 1))
    value = own.sum().item() / (n * (n - 1)) + theirs - 2 * across.sum().item() / (n * m)
    influence = 2 * (own / (n - 1) - across / m)
    return Statistic(value, influence - influence.mean())


def _kernel_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sums of the kernel over ``y``, for each of ``x`` (N,)."""

    def sums() -> Iterator[torch.Tensor]:
        for part in x.split(ROWS):
            total = torch.zeros(len(part), dtype=torch.float64, device=x.device)
            for other in y.split(ROWS):
                total += _kernel(part.double() @ other.double().T, x.shape[1]).sum(1)
            yield total

    return torch.cat(list(sums()))


def _diagonal(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([_kernel(part.double().square().sum(1), x.shape[1]) for part in x.split(ROWS)])


def _kernel(product: torch.Tensor, width: int) -> torch.Tensor:
    return (product / width + 1) ** 3


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of ``exp(E KL(p(y|x) || p(y)))`` (Salimans et al., arXiv 1606.03498).

    Args:
        logits: of a classifier (N, classes); an Inception score only in Inception's.
        splits: consecutive parts, whose classes' shares are taken by themselves.
    """
    n = len(logits)
    if n < splits:
        raise InputError(f"{splits} splits need as many images; got {n}")
    scores = []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(correction=0).item()


def inception_statistic(logits: torch.Tensor, size: int = 5000) -> Statistic:
    """Inception score of logits (N, classes), the mean over consecutive parts, as ADM's evaluation has it.

    A sample's influence is the score of its part times ``KL(p(y|x) || p(y)) - E KL``.

    Args:
        logits: of a classifier; an Inception score only in Inception's.
        size: of a part.
    """
    parts = logits.split(size)
    scores, influences = [], []
    for part in parts:
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = torch.special.xlogy(p, p / p.mean(0)).sum(1)
        scores.append(divergence.mean().exp().item())
        share = len(logits) / (len(part) * len(parts))
        influences.append(share * scores[-1] * (divergence - divergence.mean()))
    return Statistic(sum(scores) / len(parts), torch.cat(influences))


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3
) -> tuple[Statistic, Statistic]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of generated samples within the ball around some reference sample that reaches its k-th
    neighbour; recall, the other way round. A generated sample's influence on recall is that of leaving it out: the
    reference samples that are within its ball alone (Efron and Stein, Ann. Statist. 9, 1981).

    Args:
        features: generated (N, D).
        reference: real (M, D).
        neighbours: k.
    """
    radii = _radii(reference, neighbours)
    precision = torch.cat([(distances <= radii).any(1) for _, distances in _distances(features, reference)])
    radii = _radii(features, neighbours)
    recall = _held((distances <= radii for _, distances in _distances(reference, features)), len(reference))
    return mean_statistic(precision), recall


def density_coverage(
    features: torch.Tensor, reference: torch.Tensor, neighbours: int = 5
) -> tuple[Statistic, Statistic]:
    """Density and coverage (Naeem et al., arXiv 2002.09797, eq. 3 and 4).

    Density: how many balls around reference samples hold a generated one, over k; coverage: the share of these balls
    that hold any. A generated sample's influence on coverage is that of leaving it out.

    Args:
        features: generated (N, D).
        reference: real (M, D).
        neighbours: k.
    """
    radii = _radii(reference, neighbours)
    counts = [(distances < radii).double().sum(1) for _, distances in _distances(features, reference)]
    inside = (distances < radii[rows, None] for rows, distances in _distances(reference, features))
    return mean_statistic(torch.cat(counts) / neighbours), _held(inside, len(reference))


def _held(parts: Iterator[torch.Tensor], count: int) -> Statistic:
    """Share of a reference's samples that generated ones hold, from whether each (m, N) does, part by part."""
    held, alone = 0, torch.zeros(0, dtype=torch.float64)
    for inside in parts:
        holders = inside.sum(1)
        held += int((holders > 0).sum())
        mine = inside[holders == 1].double().sum(0)
        alone = mine if not len(alone) else alone + mine
    influence = len(alone) * alone / count
    return Statistic(held / count, influence - influence.mean())


def _radii(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Distance of each of ``x`` to its k-th neighbour (N,)."""
    if len(x) <= neighbours:
        raise InputError(f"the {neighbours}-th neighbour needs more samples than {len(x)}")
    return torch.cat([distances.kthvalue(neighbours + 1, 1).values for _, distances in _distances(x, x)])


def _distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Distances (n, M) of parts of ``x`` to ``y``, with which rows they are."""
    at_once = max(1, _DISTANCES // len(y))
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        yield rows, torch.cat([torch.cdist(x[rows].double(), part.double()) for part in y.split(ROWS)], 1)


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """``max(100 cos, 0)`` of each image's and its text's embedding (Hessel et al., arXiv 2104.08718).

    Scaled to 100, as text-to-image models are published; Hessel's own weight is 2.5.

    Args:
        images: CLIP's (N, D).
        texts: of the same samples (N, D).

    Returns:
        (N,), float64; their mean is the CLIP score.
    """
    return (100 * torch.cosine_similarity(images.double(), texts.double())).clamp(min=0)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image, in dB, capped at 100 for identical ones.

    Args:
        images: (N, ...) in [0, 1].
        reference: like ``images``.

    Returns:
        (N,), float64.
    """
    mse = (images.double() - reference.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al., IEEE TIP 13, 2004, eq. 13), with its Gaussian window.

    Args:
        images: (N, C, H, W) in [0, 1], at least 11 x 11.
        reference: like ``images``.

    Returns:
        (N,), float64: the mean over channels and the places where the window of 11 fits.
    """
    size, sigma, c1, c2 = WINDOW, 1.5, 0.01**2, 0.03**2
    if min(images.shape[-2:]) < size:
        raise InputError(f"structural similarity needs images of {size} x {size} or more; got {tuple(images.shape)}")
    window = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / sigma) ** 2)
    window = (window / window.sum()).to(images.device)

    def blurred(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)[:, None]  # N*C,1,H,W
        rows = torch.nn.functional.conv2d(rows, window.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, window.view(1, 1, 1, -1)).view(*x.shape[:2], -1)

    x, y = images.double(), reference.double()
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (light * structure).flatten(1).mean(1)


def mean_statistic(values: torch.Tensor) -> Statistic:
    """Mean of one value a sample (N,)."""
    values = values.double()
    return Statistic(values.mean().item(), values - values.mean())


def mean_metric(values: torch.Tensor) -> Metric:
    """Mean of one value a sample (N,), with Student's interval."""
    n = len(values)
    mean = values.double().mean().item()
    if n < 2:
        return Metric(mean, -math.inf, math.inf)
    half = float(scipy_stats.t.ppf(0.975, n - 1)) * values.double().std().item() / math.sqrt(n)
    return Metric(mean, mean - half, mean + half)


def share_metric(hits: int, count: int) -> Metric:
    """Share of hits, with Wilson's interval."""
    test = scipy_stats.binomtest(hits, count)
    interval = test.proportion_ci(method="wilson")
    return Metric(float(test.statistic), float(interval.low), float(interval.high))
