"""Lead from a softmax to a description of the attention that it belongs to."""
