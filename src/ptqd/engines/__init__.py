"""Engines that multiply integers: graphs, sessions, and what stands for a network in a pipeline."""
