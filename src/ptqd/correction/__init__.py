"""What the sampler does about quantization noise."""
