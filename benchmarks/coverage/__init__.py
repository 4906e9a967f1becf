"""Benchmark of coverage: attentions that are found in transformers' architectures."""
