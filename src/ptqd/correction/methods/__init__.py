"""The correction methods, one a file."""
