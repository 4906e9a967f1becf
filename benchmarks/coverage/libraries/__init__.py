"""Benchmark of coverage: attentions that are found in model classes of many libraries."""
