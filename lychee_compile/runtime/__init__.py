"""The layer that runs at each call of a compiled graph and finds the indexes of its caches."""
