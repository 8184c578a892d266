"""What converters of checkpoints share: options that are asked for once, tensors that are taken once."""
