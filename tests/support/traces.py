"""The traced graph of each shape, made by one process of a run for all: PyTorch's exporter takes 4 to 12 seconds."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import pytest
from support.workers import Shared
from torch.onnx._internal.exporter._registration import ONNXRegistry

from olmo2_export.config import ModelConfig
from olmo2_export.graphs import trace


def share(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `trace` read what another process has traced; it holds no weights."""
    make = trace._traced.__wrapped__

    def traced(config: ModelConfig) -> ir.Model:
        def write(out: Path) -> None:
            with _deep():
                out.write_bytes(pickle.dumps(make(config).clone()))

        name = hashlib.sha256(repr(config).encode()).hexdigest()
        model: ir.Model = pickle.loads(shared.made("trace", name, write).read_bytes())
        return model

    monkeypatch.setattr(trace, "_traced", lru_cache(maxsize=8)(traced))
    # PyTorch reads the sources of 497 translations anew for each trace, a second in ten.
    read_once = staticmethod(lru_cache(ONNXRegistry.from_torchlib))
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", read_once)


@contextmanager
def _deep() -> Iterator[None]:
    """A node knows its neighbours, which pickle follows one into another."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 20_000))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
