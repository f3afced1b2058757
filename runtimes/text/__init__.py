"""From text to tokens, to a choice among them, and back."""
