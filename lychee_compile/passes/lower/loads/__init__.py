"""Keys and values of an attention that are computed from what is stored, for generated kernels."""
