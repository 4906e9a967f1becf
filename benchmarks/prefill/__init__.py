"""Sparse prefill: time, error, and choices of tiles."""
