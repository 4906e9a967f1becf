"""Methods that choose the tokens that one decoding step reads."""
