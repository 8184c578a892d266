"""Quantize any diffusion model after training, and put the lost quality back at the sampler.

Three nouns: a Recipe (how many bits, where), NoiseStats (what quantization did to every step), a Correction (what the
sampler does about it).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Choice": "ptqd.correction.search",
    "Correction": "ptqd.correction.correction",
    "InputError": "ptqd.errors",
    "LatentClassPipeline": "ptqd.pipelines.latent_class",
    "LatentPipeline": "ptqd.pipelines.latent",
    "MismatchError": "ptqd.errors",
    "NoiseStats": "ptqd.noise.stats",
    "PtqdError": "ptqd.errors",
    "Quantizer": "ptqd.quantization.recipe",
    "Recipe": "ptqd.quantization.recipe",
    "Rule": "ptqd.quantization.recipe",
    "Sampling": "ptqd.diffusion.sampling",
    "StepPlan": "ptqd.quantization.plan",
    "apply_plan": "ptqd.quantization.apply_plan",
    "correct": "ptqd.correction.scheduler",
    "fit_auto": "ptqd.correction.search",
    "fit_correction": "ptqd.correction.fit",
    "load": "ptqd.loading",
    "measure": "ptqd.noise.measure",
    "measure_widths": "ptqd.noise.measure",
    "paper_rule": "ptqd.mixed_precision.paper_rule",
    "plan_steps": "ptqd.mixed_precision.solver",
    "quantize": "ptqd.quantization.quantize",
    "sample": "ptqd.diffusion.sampling",
}

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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``ptqd --help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ptqd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
