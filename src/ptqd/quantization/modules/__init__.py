"""The modules that take the place of a denoiser's layers."""
