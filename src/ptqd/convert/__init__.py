"""Checkpoints of CompVis' latent diffusion as pipelines of diffusers."""
