"""The method "lychee" on a GPU: sketches of keys, and pages of them in long contexts."""
