"""Parts that the GPU methods share: base of an index, launches, tunings, generated modules."""
