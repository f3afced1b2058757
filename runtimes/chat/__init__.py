"""Messages in, an answer out: the model's own chat template, conversations, thoughts and calls of tools."""
