"""Operators that rewritten graphs call."""
