"""How much memory this process may still take: what the machine has left, and what the control groups allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


class _Version(NamedTuple):
    """How one version of control groups says what a group may have."""

    member: re.Pattern[str]
    """of a line that names the process's group"""
    folder: str
    most: str
    used: str
    dropped: str
    """in memory.stat: file pages that can be"""


_VERSION_2 = _Version(re.compile("0::(.*)"), ".", "memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Version(
    re.compile(r"\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(.*)"),
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def available_memory(
    *, meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP
) -> int | None:
    """Return the bytes that this process can still have without swapping; None where the system does not say.

    File pages that can be dropped count as free.

    Args:
        meminfo: the kernel's file of that name.
        cgroups: where control groups are mounted, of version 2, and in `memory` of version 1.
        membership: the file that says which one the process is in.
    """
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(meminfo), re.MULTILINE)
    limits = [int(found[1]) * 1024] if found else []
    groups = _read(membership).splitlines()
    for form in (_VERSION_2, _VERSION_1):
        path = next((found[1] for line in groups if (found := form.member.match(line))), "/")
        parts = [part for part in path.split("/") if part and part != ".."]
        for count in range(len(parts) + 1):
            group = cgroups.joinpath(form.folder, *parts[:count])
            most, used = _read(group / form.most), _read(group / form.used)
            if most.isdigit() and used.isdigit():
                dropped = re.search(rf"^{form.dropped} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                limits.append(max(0, int(most) - int(used) + (int(dropped[1]) if dropped else 0)))
    return min(limits, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):  # not there, or not for us
        return ""
