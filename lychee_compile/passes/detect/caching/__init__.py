"""The key cache that attention reads: its binding, and the writes of a call."""
