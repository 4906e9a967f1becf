"""Methods of choosing tokens, one a file, for decoding and for prefill; and their registry."""
