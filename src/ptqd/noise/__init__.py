"""What quantization did to each step of a sampler, measured."""
