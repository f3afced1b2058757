"""Engines on TensorRT and TensorRT for RTX, and CUDA's memory."""
