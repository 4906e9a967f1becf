"""What a choice of tokens costs: certificates, summaries, look-ups."""
