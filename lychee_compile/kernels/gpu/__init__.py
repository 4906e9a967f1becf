"""Indexes and launches of generated kernels on a GPU."""
