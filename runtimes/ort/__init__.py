"""Graphs on onnxruntime: a file per cache form."""
