"""What quantization did to each step of a sampler, measured."""

from ptqd.noise.measured_on import MeasuredOn
from ptqd.noise.regression import POWERS, normality_p_value
from ptqd.noise.second_moments import (
    FOLDS,
    MAX_CHANNELS,
    MAX_NEIGHBOUR_CHANNELS,
    Estimator,
    Layout,
    OutputEstimate,
    covariance,
    excess_variance,
    fold_of,
    fold_sums,
    held_out_gain,
    inverse,
    joint_moments,
    mean_table,
    output_errors,
    smoothed,
)
from ptqd.noise.stats import cross_moments, paired_moments, per_sample

__all__ = [
    "FOLDS",
    "MAX_CHANNELS",
    "MAX_NEIGHBOUR_CHANNELS",
    "POWERS",
    "Estimator",
    "Layout",
    "MeasuredOn",
    "OutputEstimate",
    "covariance",
    "cross_moments",
    "excess_variance",
    "fold_of",
    "fold_sums",
    "held_out_gain",
    "inverse",
    "joint_moments",
    "mean_table",
    "normality_p_value",
    "output_errors",
    "paired_moments",
    "per_sample",
    "smoothed",
]
