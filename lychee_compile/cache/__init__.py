"""`LycheeCache`, a transformers cache that grows in place and looks static to compiled graphs."""
