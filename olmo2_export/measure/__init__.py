"""Numbers from logits: parity, quality, and how far a mean can be trusted."""
