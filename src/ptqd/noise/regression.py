"""Regression of noise on the full-precision output, and a test of normality, from sums of powers."""

import math
from dataclasses import dataclass

import torch
from scipy import stats as scipy_stats

POWERS = tuple((i, j) for order in range(1, 5) for i in range(order, -1, -1) for j in (order - i,))


ROUNDING = 1e-12  # share of the outputs' energy below which a variance is single precision's rounding
_COLUMN = {power: n for n, power in enumerate(POWERS)}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; tensors of one shape."""

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def regression(m: torch.Tensor, *, slope: bool) -> dict[str, torch.Tensor]:
    """Slope, intercept and residual from moments (..., T, C, 14); see the module's docstring."""

    def moment(i: int, j: int) -> torch.Tensor:
        return m[..., _COLUMN[i, j]]  # ...,T,C

    var_eps = (moment(2, 0) - moment(1, 0) ** 2).clamp(min=0)
    var_delta = (moment(0, 2) - moment(0, 1) ** 2).clamp(min=0)
    cov = moment(1, 1) - moment(1, 0) * moment(0, 1)
    total = var_eps.sum(-1)  # ...,T
    k = _ratio(cov.sum(-1), total) if slope else torch.zeros_like(total)
    kc = k[..., None]
    bias = moment(0, 1) - kc * moment(1, 0)
    # raw moments of delta - k eps, then central ones, of which the mean over channels is taken
    raw2 = moment(0, 2) - 2 * kc * moment(1, 1) + kc**2 * moment(2, 0)
    raw3 = moment(0, 3) - 3 * kc * moment(1, 2) + 3 * kc**2 * moment(2, 1) - kc**3 * moment(3, 0)
    raw4 = moment(0, 4) - 4 * kc * moment(1, 3) + 6 * kc**2 * moment(2, 2) - 4 * kc**3 * moment(3, 1)
    raw4 = raw4 + kc**4 * moment(4, 0)
    central2 = (raw2 - bias**2).clamp(min=0).mean(-1)
    size = (moment(2, 0) + moment(0, 2)).mean(-1)
    shaped = torch.where(central2 > ROUNDING * size, central2, 0.0)  # less than that has no shape
    central3 = (raw3 - 3 * bias * raw2 + 2 * bias**3).mean(-1)
    central4 = (raw4 - 4 * bias * raw3 + 6 * bias**2 * raw2 - 3 * bias**4).mean(-1)
    return {
        "k": k,
        "bias": bias,
        "variance": central2,
        "r2": 1 - _ratio(central2, var_delta.mean(-1), empty=1.0),
        "snr": _ratio(moment(2, 0).mean(-1), moment(0, 2).mean(-1), empty=math.inf),
        "skewness": _ratio(central3, shaped**1.5),
        "kurtosis": _ratio(central4, shaped**2, empty=3.0) - 3.0,
    }


def _ratio(a: torch.Tensor, b: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
    return torch.where(b == 0, empty, a / torch.where(b == 0, 1.0, b))


def normality_p_value(skewness: float, kurtosis: float, n: int) -> float:
    """D'Agostino and Pearson's omnibus test from the sample's moments (Biometrika 60, 1973; Anscombe and Glynn 1983).

    Args:
        skewness: of the sample.
        kurtosis: excess, of the sample.
        n: values, at least 8.

    Returns:
        The p-value of normality.
    """
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6 * (n - 2)))
    beta2 = 3 * (n * n + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    w2 = -1 + math.sqrt(2 * (beta2 - 1))
    z1 = math.asinh(y / math.sqrt(2 / (w2 - 1))) / math.sqrt(0.5 * math.log(w2))

    mean = 3 * (n - 1) / (n + 1)
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis + 3 - mean) / math.sqrt(variance)
    root = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / root * (2 / root + math.sqrt(1 + 4 / root**2))
    inner = (1 - 2 / a) / (1 + x * math.sqrt(2 / (a - 4)))
    z2 = (1 - 2 / (9 * a) - math.copysign(abs(inner) ** (1 / 3), inner)) / math.sqrt(2 / (9 * a))
    return float(scipy_stats.chi2.sf(z1 * z1 + z2 * z2, 2))
