"""Sparse prefill on a GPU."""
