"""Models of guided-diffusion and consistency_models as diffusers pipelines."""

from ptqd.diffusion.guided_diffusion.pipeline import pipeline_from

__all__ = [
    "pipeline_from",
]
