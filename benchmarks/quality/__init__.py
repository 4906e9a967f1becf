"""Benchmarks of quality: certificates, summaries of keys, answers of a real model."""
