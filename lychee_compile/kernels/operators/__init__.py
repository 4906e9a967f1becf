"""The operators that rewritten graphs call."""
