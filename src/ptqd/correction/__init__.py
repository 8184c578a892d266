"""What the sampler does about quantization noise."""

from ptqd.correction.correction import rows
from ptqd.correction.fit import compose
from ptqd.correction.gate import StepGate, gated, gated_cnc_bc
from ptqd.correction.methods.cnc_bc import cnc_bc
from ptqd.correction.methods.d2 import d2
from ptqd.correction.methods.dns import dns, overshoot
from ptqd.correction.methods.joint import joint
from ptqd.correction.methods.qdrift import qdrift
from ptqd.correction.methods.stepbaq import stepbaq
from ptqd.correction.methods.tac import tac
from ptqd.correction.registry import VARIANCE_METHODS
from ptqd.correction.sample_features import distribution_distance, features
from ptqd.correction.scheduler import corrected_class
from ptqd.correction.search import describe
from ptqd.correction.trajectory import TrajectoryFit, fit_trajectory
from ptqd.correction.variance import ResidualNoise

__all__ = [
    "VARIANCE_METHODS",
    "ResidualNoise",
    "StepGate",
    "TrajectoryFit",
    "cnc_bc",
    "compose",
    "corrected_class",
    "d2",
    "describe",
    "distribution_distance",
    "dns",
    "features",
    "fit_trajectory",
    "gated",
    "gated_cnc_bc",
    "joint",
    "overshoot",
    "qdrift",
    "rows",
    "stepbaq",
    "tac",
]
