"""Scores of a set of images by itself or by its prompts: the Inception score and the CLIP score."""

import torch

from ptqd.errors import InputError
from ptqd.metrics.bootstrap import Statistic


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
    result = torch.stack(scores)
    return result.mean().item(), result.std(correction=0).item()


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
