"""From the specification of an attention site to a self-contained Triton module."""
