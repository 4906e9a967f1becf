"""Which attentions are found in transformers' architectures."""
