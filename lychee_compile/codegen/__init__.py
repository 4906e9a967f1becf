"""Generation of a self-contained Triton module from the specification of an attention site."""
