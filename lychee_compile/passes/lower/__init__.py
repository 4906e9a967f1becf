"""Lead from a described attention to the operands and the kernels that take its place."""
