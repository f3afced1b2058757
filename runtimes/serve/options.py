"""What an engine is opened with: plain values, for its process."""

from __future__ import annotations

from dataclasses import dataclass

from runtimes import Backend, Device


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is opened with; as of `open_runner` and `Engine`."""

    package: str
    variant: str | None = None
    backend: Backend = "ort"
    device: Device | None = None
    check_hashes: bool = True
    threads: int | None = None
    max_slots: int | None = None
    exact: bool = False
    kv_tokens: int | None = None
    kept_rows: int | None = None
