"""What the processes of a test run share and what each has for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.workers import LONG, Shared

TESTS = Path(__file__).parents[1]

MAKER = """
import sys, time
from pathlib import Path
from support.workers import LONG, Shared
def make(out):
    with open("makers", "a") as log:
        log.write("made ")
    out.mkdir()
    time.sleep(0.5)
    (out / "whole").touch()
made = Shared(Path("home")).made("kind", "name", make)
assert (made / "whole").exists()
print(made)
"""


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    )


def test_one_process_makes_what_two_ask_for(tmp_path: Path) -> None:
    both = [start(tmp_path, MAKER) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["home/kind/name\n"] * 2
    assert (tmp_path / "makers").read_text() == "made "


def test_what_could_not_be_made_is_made_by_the_next(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").mkdir(parents=True)
        raise OSError("no space")

    shared = Shared(tmp_path)
    with pytest.raises(OSError, match="no space"):
        shared.made("kind", "name", fail)
    assert not (tmp_path / "kind" / "name").exists()
    made = shared.made("kind", "name", lambda out: out.mkdir())
    assert list(made.iterdir()) == []


def test_the_files_that_begin_are_there(request: pytest.FixtureRequest) -> None:
    assert [name for name in LONG if not (TESTS / name).is_file()] == []
    order = [LONG.index(name) for name in dict.fromkeys(_files(request)) if name in LONG]
    assert order == sorted(order)


def _files(request: pytest.FixtureRequest) -> list[str]:
    return [item.nodeid.partition("::")[0].removeprefix("tests/") for item in request.session.items]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks Linux for it")
@pytest.mark.parametrize(("worker", "cpus"), [("gw0", 1), ("gw17", 1), ("", None)])
def test_each_process_of_a_run_has_one_cpu(worker: str, cpus: int | None, tmp_path: Path) -> None:
    code = "import os; from support.workers import take_one_cpu; take_one_cpu(); print(len(os.sched_getaffinity(0)))"
    said = start(tmp_path, code, PYTEST_XDIST_WORKER=worker).communicate(timeout=60)[0]
    assert int(said) == (cpus or len(os.sched_getaffinity(0)))
