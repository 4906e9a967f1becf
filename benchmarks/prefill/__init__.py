"""Benchmarks of prefill: time and error on a GPU, choices of tiles, attention by hand."""
