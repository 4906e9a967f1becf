"""The specification of every operator, in plain PyTorch, vectorised over batch and heads."""
