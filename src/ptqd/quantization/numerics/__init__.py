"""The arithmetic of quantizers: plain functions of tensors."""
