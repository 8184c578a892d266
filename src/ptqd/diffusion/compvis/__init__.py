"""Checkpoints of CompVis' latent diffusion as diffusers pipelines."""

from ptqd.diffusion.compvis.pipeline import convert, save_converted

__all__ = [
    "convert",
    "save_converted",
]
