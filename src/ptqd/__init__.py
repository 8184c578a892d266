"""Quantize any diffusion model after training, and put the lost quality back at the sampler.

Three nouns: a Recipe (how many bits, where), NoiseStats (what quantization did to every step), a Correction (what the
sampler does about it).
"""

from importlib.metadata import version as _version

from ptqd.correction.correct import correct
from ptqd.correction.correction import Correction
from ptqd.correction.fit import fit_correction
from ptqd.correction.search import CorrectionSearch, search_correction
from ptqd.diffusion.from_module import from_module
from ptqd.diffusion.sampling import Sampling, sample
from ptqd.engines.checkpoints import export_checkpoint
from ptqd.engines.export import export
from ptqd.errors import (
    ArtifactError,
    InputError,
    MismatchError,
    MissingDependencyError,
    PtqdError,
    ResourceError,
    UnsupportedError,
)
from ptqd.experiments.compare import compare_runs
from ptqd.experiments.count_cost import count_cost
from ptqd.experiments.experiment import Experiment, run_experiment
from ptqd.experiments.push_to_hub import push_to_hub
from ptqd.loading import load
from ptqd.metrics.evaluator import Evaluator, evaluate
from ptqd.metrics.load_evaluator import load_evaluator
from ptqd.mixed_precision.measure_widths import measure_widths
from ptqd.mixed_precision.paper_rule import paper_plan
from ptqd.mixed_precision.solver import search_plan
from ptqd.noise.measure import measure
from ptqd.noise.stats import NoiseStats
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline
from ptqd.pipelines.pixel import PixelPipeline
from ptqd.quantization.apply_plan import apply_plan
from ptqd.quantization.budget import Budget
from ptqd.quantization.explain import explain
from ptqd.quantization.hf_quantizer import PtqdConfig
from ptqd.quantization.plan import PrecisionPlan
from ptqd.quantization.quantize import quantize
from ptqd.quantization.recipe import QuantSpec, Recipe, Rule
from ptqd.quantization.weights_in_memory import keep_weights

__version__ = _version("ptqd")

__all__ = [
    "ArtifactError",
    "Budget",
    "Correction",
    "CorrectionSearch",
    "Evaluator",
    "Experiment",
    "InputError",
    "LatentClassPipeline",
    "LatentPipeline",
    "MismatchError",
    "MissingDependencyError",
    "NoiseStats",
    "PixelPipeline",
    "PrecisionPlan",
    "PtqdConfig",
    "PtqdError",
    "QuantSpec",
    "Recipe",
    "ResourceError",
    "Rule",
    "Sampling",
    "UnsupportedError",
    "apply_plan",
    "compare_runs",
    "correct",
    "count_cost",
    "evaluate",
    "explain",
    "export",
    "export_checkpoint",
    "fit_correction",
    "from_module",
    "keep_weights",
    "load",
    "load_evaluator",
    "measure",
    "measure_widths",
    "paper_plan",
    "push_to_hub",
    "quantize",
    "run_experiment",
    "sample",
    "search_correction",
    "search_plan",
]
