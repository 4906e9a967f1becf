"""Benchmark of the time per token of whole models."""
