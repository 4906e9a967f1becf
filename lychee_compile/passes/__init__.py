"""FX graph to FX graph: finding attention, and putting the sparse operators in its place."""
