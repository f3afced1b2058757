"""How much memory this process may still take: what the machine has left, and what the control groups allow."""

from __future__ import annotations

import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(
    *, meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP
) -> int | None:
    """Return the bytes that this process can still have without swapping; None where the system does not say.

    File pages that can be dropped count as free.

    Args:
        meminfo: the kernel's file of that name.
        cgroups: where control groups of version 2 are mounted.
        membership: the file that says which one the process is in.
    """
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(meminfo), re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    path = next((line[3:] for line in _read(membership).splitlines() if line.startswith("0::")), "/")
    parts = [part for part in path.split("/") if part and part != ".."]
    for count in range(len(parts) + 1):
        group = cgroups.joinpath(*parts[:count])
        most, used = _read(group / "memory.max"), _read(group / "memory.current")
        if most.isdigit() and used.isdigit():
            dropped = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            limits.append(max(0, int(most) - int(used) + (int(dropped[1]) if dropped else 0)))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):  # not there, or not for us
        return ""
