"""Meaning of a mask: the range of keys that it shows, its words, and levels of hiding."""
