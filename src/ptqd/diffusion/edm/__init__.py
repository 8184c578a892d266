"""Networks of EDM as diffusers pipelines."""

from ptqd.diffusion.edm.pipeline import pipeline_from

__all__ = [
    "pipeline_from",
]
