"""Quantize any diffusion model after training, and put the lost quality back at the sampler.

Three nouns: a Recipe (how many bits, where), NoiseStats (what quantization did to every step), a Correction (what the
sampler does about it).
"""

from ptqd.correction.correction import Correction
from ptqd.correction.fit import fit_correction
from ptqd.correction.scheduler import correct
from ptqd.correction.search import Choice, fit_auto
from ptqd.diffusion.sampling import Sampling, sample
from ptqd.errors import InputError, MismatchError, PtqdError
from ptqd.loading import load
from ptqd.mixed_precision.measure_widths import measure_widths
from ptqd.mixed_precision.paper_rule import paper_rule
from ptqd.mixed_precision.solver import plan_steps
from ptqd.noise.measure import measure
from ptqd.noise.stats import NoiseStats
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.plan import StepPlan
from ptqd.quantization.quantize import quantize
from ptqd.quantization.recipe import Quantizer, Recipe, Rule

__all__ = [
    "Choice",
    "Correction",
    "InputError",
    "LatentClassPipeline",
    "LatentPipeline",
    "MismatchError",
    "NoiseStats",
    "PtqdError",
    "Quantizer",
    "Recipe",
    "Rule",
    "Sampling",
    "StepPlan",
    "apply_plan",
    "correct",
    "fit_auto",
    "fit_correction",
    "load",
    "measure",
    "measure_widths",
    "paper_rule",
    "plan_steps",
    "quantize",
    "sample",
]
