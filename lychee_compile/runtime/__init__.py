"""What happens at each call: which index belongs to the caches that a graph is given."""
