"""A run folder from end to end."""
