"""Graphs as they are built: traced, for onnxruntime, for devices, for TensorRT, and their files."""
