"""Passes that turn a traced graph into one that attends sparsely."""
