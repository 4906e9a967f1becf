"""Time per token of whole models."""
