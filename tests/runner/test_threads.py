"""Threads: physical cores that the affinity and the control groups leave to this process, on trees made for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import runtimes
from runtimes import threads
from runtimes.threads import default_threads


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


class Machine:
    """8 CPUs, 4 cores: 0 and 4 are one core, 1 and 5 another, ...; no control group says anything."""

    def __init__(self, root: Path) -> None:
        self.cpus, self.cgroups, self.membership = root / "cpu", root / "cgroup", root / "membership"
        self.cgroups.mkdir()
        for cpu in range(8):
            write(self.cpus / f"cpu{cpu}/topology/core_cpus_list", f"{cpu % 4},{cpu % 4 + 4}")

    def threads(self, *allowed: int) -> int:
        return default_threads(
            allowed=allowed or range(8), cpus=self.cpus, cgroups=self.cgroups, membership=self.membership
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("allowed", "cores"), [((), 4), ((0,), 1), ((0, 4), 1), ((0, 1), 2), ((0, 1, 4), 2), ((3, 4, 5, 6), 4), ((2, 6), 1)]
)
def test_siblings_count_once(machine: Machine, allowed: tuple[int, ...], cores: int) -> None:
    assert machine.threads(*allowed) == cores


def test_older_name_ranges_and_missing_topology(machine: Machine) -> None:
    for cpu in range(8):
        topology = machine.cpus / f"cpu{cpu}/topology"
        (topology / "core_cpus_list").unlink()
        pair = cpu // 2 * 2
        write(topology / "thread_siblings_list", f"{pair}-{pair + 1}")
    assert machine.threads() == 4
    assert machine.threads(0, 1, 2) == 2
    (machine.cpus / "cpu0/topology/thread_siblings_list").write_text("nonsense\n")
    assert machine.threads(0, 2, 3) == 2
    assert machine.threads(0, 90, 91) == 3  # CPUs that nothing is said of are cores of their own


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("100001 100000", 2),
        ("1000 100000", 1),
        ("900000 100000", 4),
        ("", 4),
        ("200000", 4),
        ("200000 0", 4),
        ("a b", 4),
    ],
)
def test_quota_of_version_2_is_a_limit_rounded_up(machine: Machine, cpu_max: str, expected: int) -> None:
    write(machine.membership, "0::/a/b")
    write(machine.cgroups / "a/b/cpu.max", cpu_max)
    assert machine.threads() == expected


@pytest.mark.parametrize("level", ["", "a/", "a/b/"])
def test_the_smallest_quota_on_the_way_up_counts(machine: Machine, level: str) -> None:
    write(machine.membership, "0::/a/b")
    for folder in ("", "a/", "a/b/"):
        write(machine.cgroups / f"{folder}cpu.max", "300000 100000")
    write(machine.cgroups / f"{level}cpu.max", "100000 100000")
    write(machine.cgroups / "other/cpu.max", "1 100000")
    assert machine.threads() == 1


@pytest.mark.parametrize("path", ["/not/mounted/here", "/../outside", "/"])
def test_a_path_outside_of_the_mount_leaves_the_mounted_root(machine: Machine, path: str) -> None:
    write(machine.membership, f"0::{path}")
    write(machine.cgroups / "cpu.max", "200000 100000")
    assert machine.threads() == 2


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu", ""])
@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("250000", 3), ("50000", 1)])
def test_quota_of_version_1_is_a_limit(machine: Machine, mount: str, quota: str, expected: int) -> None:
    write(machine.membership, "5:memory:/x\n4:cpu,cpuacct:/job\n1:cpuset:/")
    write(machine.cgroups / mount / "job/cpu.cfs_quota_us", quota)
    write(machine.cgroups / mount / "job/cpu.cfs_period_us", "100000")
    assert machine.threads() == expected


def test_other_controllers_limit_nothing(machine: Machine) -> None:
    write(machine.membership, "4:cpuset:/job")
    write(machine.cgroups / "cpuset/job/cpu.cfs_quota_us", "50000")
    write(machine.cgroups / "cpuset/job/cpu.cfs_period_us", "100000")
    assert machine.threads() == 4


def test_files_that_cannot_be_read_limit_nothing(machine: Machine) -> None:
    machine.membership.write_bytes(b"\xff\xfe")
    assert machine.threads() == 4
    machine.membership.unlink()
    machine.membership.mkdir()
    assert machine.threads() == 4


def test_this_machine_has_an_answer() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


def test_one_allowed_cpu_is_one_thread() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert default_threads() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_without_affinity_it_is_the_cpu_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 6)
    assert default_threads() == 6
    monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
    assert default_threads() == 1


def test_runner_has_that_many_unless_asked(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "default_threads", lambda: 3)
    for asked, expected in ((None, 3), (2, 2)):
        with runtimes.open_runner(tiny_package, threads=asked) as runner:
            assert runner._session.get_session_options().intra_op_num_threads == expected
