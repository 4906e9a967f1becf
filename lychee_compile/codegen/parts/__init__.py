"""Emitters of the parts of a module: each says which templates are filled, with which values."""
