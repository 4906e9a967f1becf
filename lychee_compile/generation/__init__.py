"""`prepare` and `restore`: transformers' `generate()` through the backend, by one line."""
