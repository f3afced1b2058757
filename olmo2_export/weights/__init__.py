"""Where a checkpoint is, what its files hold, and its tensors, read one at a time under the names it gives them."""
