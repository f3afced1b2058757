"""What this machine is, and what its memory gives."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from olmo2_export.bench.processes import worker

BANDWIDTH = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "A100-SXM4-80GB": 2.04e12, "L40S": 0.864e12, "L4": 0.3e12}
"""part of a GPU's name -> bytes per second of its data sheet"""

_CPUINFO = Path("/proc/cpuinfo")


def device_limits(device: str, threads: int) -> dict[str, Any]:
    """Measure what a device does at most, in a process of its own; see `workers/device.py`."""
    return worker(sys.executable, "device", [device, str(threads)])


def memory_bandwidth(limits: dict[str, Any]) -> tuple[float, str]:
    """Return bytes per second that decoding could read, and where that is from.

    Args:
        limits: as from `device_limits`.
    """
    name = str(limits["device"])
    for part, rate in BANDWIDTH.items():
        if part in name:
            return rate, f"data sheet of {part}"
    rates = {"a copy": limits["copied_bytes_per_second"], "a sum": limits["read_bytes_per_second"]}
    best = max(rates, key=lambda how: rates[how])
    return rates[best], f"measured: {best} of {limits['array_bytes'] / 1e6:.0f} MB by PyTorch"


def processor() -> str:
    """Return the CPU's name."""
    names = (line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(names, platform.processor() or "unknown processor")


def multiplies_bfloat16() -> bool:
    """Tell whether the CPU has instructions for bfloat16; without them PyTorch computes in it ten times slower."""
    flags = set(_cpuinfo().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def multiplies_in_tiles() -> bool:
    """Tell whether the CPU has AMX."""
    return "amx_int8" in _cpuinfo().split()


def _cpuinfo() -> str:
    return _CPUINFO.read_text() if _CPUINFO.is_file() else ""  # Linux alone has it
