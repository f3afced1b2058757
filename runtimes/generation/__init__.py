"""Text in, text out: the loop that turns logits into words, step by step."""
