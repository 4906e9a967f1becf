"""Methods that choose the keys that a tile of queries reads."""
