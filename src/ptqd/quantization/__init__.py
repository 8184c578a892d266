"""Recipe and plan in, quantized denoiser out."""
