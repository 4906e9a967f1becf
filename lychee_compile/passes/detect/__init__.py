"""Detection: each softmax of a graph leads to a description of the attention around it."""
