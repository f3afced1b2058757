"""How much memory the machine and its control groups leave, on trees made for it."""

from __future__ import annotations

from pathlib import Path

from runtimes.free_memory import available_memory


def test_memory_that_a_control_group_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (tmp_path / "membership").write_text("0::/job\n")
    where = {"meminfo": tmp_path / "meminfo", "cgroups": tmp_path / "cgroup", "membership": tmp_path / "membership"}
    assert available_memory(**where) == 8_192_000
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text("active_file 7\ninactive_file 500000\n")
    assert available_memory(**where) == 1_500_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(**where) == 8_192_000


def test_control_groups_of_version_1_limit_too(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable:    8000 kB\n")
    outer = tmp_path / "cgroup" / "memory" / "jobs"
    (outer / "one").mkdir(parents=True)
    (tmp_path / "membership").write_text("8:pids:/\n4:hugetlb,memory:/jobs/one\n0::/\n")
    where = {"meminfo": tmp_path / "meminfo", "cgroups": tmp_path / "cgroup", "membership": tmp_path / "membership"}
    (outer / "one" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (outer / "one" / "memory.usage_in_bytes").write_text("100\n")
    assert available_memory(**where) == 8_192_000
    (outer / "memory.limit_in_bytes").write_text("3000000\n")
    (outer / "memory.usage_in_bytes").write_text("2500000\n")
    (outer / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 250000\n")
    assert available_memory(**where) == 750_000
