"""The model in PyTorch, written to be exported: keys and values go in and come out."""
