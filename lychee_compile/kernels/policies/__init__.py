"""How tokens are chosen: one method a file, for decoding and for prefill."""
