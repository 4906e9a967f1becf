"""Keys that all rows of a batch share, read once for all of them."""
