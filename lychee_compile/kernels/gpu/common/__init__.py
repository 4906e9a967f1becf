"""What the GPU methods share: the base of an index, launches, tile sizes, generated modules."""
