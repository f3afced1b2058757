"""How many threads a matrix product should have here: one per physical core that this process may use.

A container or a batch job sees all CPUs of the machine in os.cpu_count() but may use few of them; threads beyond these
wait for each other. Two threads on the two hardware threads of one core share its multipliers, which helps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# The second is the older name of the first.
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")


def default_threads(
    *,
    allowed: Collection[int] | None = None,
    cpus: Path = _CPUS,
    cgroups: Path = _CGROUPS,
    membership: Path = _MEMBERSHIP,
) -> int:
    """Return the number of physical cores that this process may use, at least 1.

    What the system does not say limits nothing. Where there is no affinity (not Linux), it is os.cpu_count().

    Args:
        allowed: the CPUs the process may run on; None asks the system.
        cpus: the folder with a cpuN/topology for every CPU.
        cgroups: where the control groups are mounted, version 2 or 1; their CPU quotas are limits.
        membership: the file that says which control groups the process is in.
    """
    if allowed is None:
        if not hasattr(os, "sched_getaffinity"):
            return os.cpu_count() or 1
        allowed = os.sched_getaffinity(0)
    return max(1, min([_cores(allowed, cpus), *_quotas(cgroups, membership)]))


def _cores(allowed: Collection[int], cpus: Path) -> int:
    """Count the cores of the allowed CPUs: the CPUs of one core name each other as siblings."""
    return len({_siblings(cpu, cpus) & frozenset(allowed) for cpu in allowed})


def _siblings(cpu: int, cpus: Path) -> frozenset[int]:
    for name in _SIBLINGS:
        if text := _read(cpus / f"cpu{cpu}" / "topology" / name):
            return frozenset({cpu, *_listed(text)})
    return frozenset({cpu})


def _listed(text: str) -> Iterator[int]:
    """Yield the numbers of a list like 0-1,8,10-11; what is none of it is left out."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            yield from range(int(first), int(last or first) + 1)


def _quotas(cgroups: Path, membership: Path) -> Iterator[int]:
    """Yield what each control group of the process, and each one around it, allows: CPUs, rounded up."""
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            for folder in _upwards(cgroups, path):
                quota, _, period = _read(folder / "cpu.max").partition(" ")
                yield from _quota(quota, period)
        elif "cpu" in controllers.split(","):
            mount = next((m for m in (cgroups / controllers, cgroups / "cpu") if m.is_dir()), cgroups)
            for folder in _upwards(mount, path):
                yield from _quota(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    # In a container the path may lead out of what is mounted; then only the mounted root says something.
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    if ".." in parts:
        parts = []
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota(quota: str, period: str) -> Iterator[int]:
    """Yield microseconds of CPU per period as CPUs; nothing for `max`, -1 or what is no number."""
    if quota.isascii() and quota.isdigit() and period.isascii() and period.isdigit() and int(period) > 0:
        yield max(1, -(-int(quota) // int(period)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):  # not there, or not for us
        return ""
