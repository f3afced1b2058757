"""Checkpoints whose linears are stored in few bits: each library's format to integers, scales and zero points."""
