"""Nothing is reported to anybody: what export, verify and a run leave behind in a user's home, and whom they call."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import runtimes

ROOT = Path(runtimes.__file__).parents[1]
SWITCH = "ORT_DISABLE_TELEMETRY"
UPLOAD = 12  # seconds until onnxruntime 1.31 has looked up where to report to: seen after 9

WORK = """
import sys, time
import olmo2_export.cli, runtimes.cli
checkpoint, package, demo = sys.argv[1:]
assert olmo2_export.cli.main(["export", checkpoint, "--out", package]) == 0
assert olmo2_export.cli.main(["verify", package, "--reference", checkpoint, "--longest", "64"]) == 0
assert runtimes.cli.main(["generate", demo, "--prompt", "In the beginning", "--max-new-tokens", "5"]) == 0
time.sleep({wait})
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """That of a user who has set nothing."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "MPL", "TORCH", "ORT_"))}
    return {**mine, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT), **more}


@dataclass(frozen=True)
class Life:
    """What a process that did all of it has left."""

    home: list[Path]
    calls: str | None
    """its network calls, as strace shows them; None: there is no strace, or it may not trace"""


def strace() -> list[str]:
    command = ["strace", "--seccomp-bpf", "-f", "-qq", "-e", "trace=network"]  # it stops at no other call
    works = shutil.which("strace") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


@pytest.fixture(scope="module")
def life(tiny_checkpoint: Path, demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("life")
    home, log = folder / "home", folder / "calls"
    (home / "cache").mkdir(parents=True)
    tracer = strace()
    code = WORK.format(wait=UPLOAD if tracer else 0)
    command = [sys.executable, "-c", code, str(tiny_checkpoint), str(folder / "package"), str(demo_package)]
    traced = [*tracer, "-o", str(log), *command] if tracer else command
    done = subprocess.run(traced, env=environment(home), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Life(sorted(home.rglob("*")), log.read_text() if tracer else None)


def test_export_verify_and_a_run_leave_the_home_as_it_was(life: Life) -> None:
    assert [path.name for path in life.home] == ["cache"]


def test_export_verify_and_a_run_look_up_no_name(life: Life) -> None:
    if life.calls is None:
        pytest.skip("no strace that may trace")
    assert [line for line in life.calls.splitlines() if "AF_INET" in line] == []


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [
        ("runtimes.sealed", None, "1"),
        ("runtimes.sealed", "", "1"),
        ("runtimes.sealed", "0", "0"),
        ("runtimes.sealed", "true", "true"),
        ("olmo2_export.measure.parity", None, "1"),
        ("olmo2_export.bench.workers.common", None, "1"),
    ],
)
def test_whatever_is_imported_first_switches_it_off_unless_the_user_has_said_something(
    tmp_path: Path, module: str, given: str | None, expected: str
) -> None:
    code = f"import {module}, os; print(os.environ[{SWITCH!r}])"
    env = environment(tmp_path, **({} if given is None else {SWITCH: given}))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_switch_is_the_first_import_of_both_packages() -> None:
    """So that no file of them can import onnxruntime before it, and no script is outside of them."""
    for package in ("runtimes", "olmo2_export"):
        nodes = ast.parse((ROOT / package / "__init__.py").read_text()).body
        names = [n.name for node in nodes if isinstance(node, ast.Import) for n in node.names]
        ours = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        assert "runtimes.telemetry" in names
        assert not {"onnxruntime", "onnxruntime_genai"} & {str(name).split(".")[0] for name in [*names, *ours]}
        first = next(n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) and "runtimes" in ast.unparse(n))
        assert ast.unparse(first) == "import runtimes.telemetry"
    places = [p for p in ROOT.iterdir() if p.name not in ("tests", "build") and not p.name.startswith(".")]
    sources = [file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])]
    assert {
        p.relative_to(ROOT).parts[0] for p in sources if p.suffix == ".py" and "import onnxruntime" in p.read_text()
    } <= {
        "runtimes",
        "olmo2_export",
    }
