"""Checkpoints of CompVis' latent diffusion as diffusers pipelines."""
