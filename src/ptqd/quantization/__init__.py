"""Recipe and plan in, quantized denoiser out."""

from ptqd.quantization.apply_plan import at_width, plan_of
from ptqd.quantization.blocks import SKIPS, concatenations, find_units
from ptqd.quantization.bops import Bits, Cost, cost_of, disk_bytes, layer_bits, run_cost
from ptqd.quantization.calibration import CalibrationInputs, draw_inputs, step_weights
from ptqd.quantization.hf_quantizer import coverage_of
from ptqd.quantization.memory import Memory, memory_bytes
from ptqd.quantization.methods import Brecq
from ptqd.quantization.plan_steps import PlanSteps
from ptqd.quantization.rounding.adaround_brecq import learn
from ptqd.quantization.rounding.gptq import gptq, hessian_inputs
from ptqd.quantization.rounding.learned_parameters import LearnedScale, Soft, Straight, annealed
from ptqd.quantization.rounding.smoothquant import search_smoothing, smoothing
from ptqd.quantization.rounding.svdquant import split_low_rank
from ptqd.quantization.rounding.time_embedding import fit_exactly
from ptqd.quantization.sites import layer_quantizers, quantized_sites
from ptqd.quantization.step_ranges import RangeSteps, StepRanges, group_steps, range_steps_of
from ptqd.quantization.swap import insert_quantizers

__all__ = [
    "SKIPS",
    "Bits",
    "Brecq",
    "CalibrationInputs",
    "Cost",
    "LearnedScale",
    "Memory",
    "PlanSteps",
    "RangeSteps",
    "Soft",
    "StepRanges",
    "Straight",
    "annealed",
    "at_width",
    "concatenations",
    "cost_of",
    "coverage_of",
    "disk_bytes",
    "draw_inputs",
    "find_units",
    "fit_exactly",
    "gptq",
    "group_steps",
    "hessian_inputs",
    "insert_quantizers",
    "layer_bits",
    "layer_quantizers",
    "learn",
    "memory_bytes",
    "plan_of",
    "quantized_sites",
    "range_steps_of",
    "run_cost",
    "search_smoothing",
    "smoothing",
    "split_low_rank",
    "step_weights",
]
