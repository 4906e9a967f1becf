"""Decode policies as stacks of levels: declared once for the plain form and for kernels."""
