"""Lead from a traced graph to one that attends sparsely."""
