"""Everything that knows diffusers: running, recording and replaying pipelines, their parts, schedules and cost."""

from ptqd.diffusion.fingerprints import fingerprint, pipeline_fingerprint
from ptqd.diffusion.macs import PRODUCTS, Macs, call_macs, from_configuration, on_meta, run_macs
from ptqd.diffusion.noise_schedule import Levels, noise_levels, timesteps_at, x0_coefficients
from ptqd.diffusion.pipeline_parts import denoiser_name, find_channel_axis, with_components
from ptqd.diffusion.sampling import run_batch, sample_generator
from ptqd.diffusion.scheduler_response import Response, added_variance, linear_response, noise_scales
from ptqd.diffusion.step_state import StepIndex, StepState
from ptqd.diffusion.trajectory import final_samples, record, replay

__all__ = [
    "PRODUCTS",
    "Levels",
    "Macs",
    "Response",
    "StepIndex",
    "StepState",
    "added_variance",
    "call_macs",
    "denoiser_name",
    "final_samples",
    "find_channel_axis",
    "fingerprint",
    "from_configuration",
    "linear_response",
    "noise_levels",
    "noise_scales",
    "on_meta",
    "pipeline_fingerprint",
    "record",
    "replay",
    "run_batch",
    "run_macs",
    "sample_generator",
    "timesteps_at",
    "with_components",
    "x0_coefficients",
]
