"""Benchmarks of one decode attention: on a GPU against the strongest baselines, and on a CPU."""
