"""Lowering: operands and kernels take the place of a described attention."""
