"""Reports of runs, for terminals and browsers."""
