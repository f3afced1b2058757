"""The contenders, each in a process and an interpreter of its own; see `common.py`."""
