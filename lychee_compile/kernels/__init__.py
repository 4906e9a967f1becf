"""Operator semantics: the plain PyTorch reference and the registered operators."""
