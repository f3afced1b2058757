"""The processes of pytest-xdist: each has a CPU of its own, and what is expensive is made by one of them for all.

In a run without them nothing is bound, and nothing waits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
"""gw0, gw1, ...; empty in a run without processes"""


def take_one_cpu() -> None:
    """Bind this process, and those it starts, to one CPU: torch, OpenMP, BLAS and our runners count what is allowed.

    To be called before any of them is imported, as they count once.
    """
    if WORKER and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(WORKER.removeprefix("gw")) % len(cpus)]})


LONG = """
exporter/verify/test_verify_quantized.py exporter/family/test_family.py exporter/verify/test_verify_static.py
exporter/locate/test_locate.py exporter/package/test_imported.py exporter/weights/test_lora_inputs.py
runner/speculate/test_speculate.py exporter/heads/test_hidden_states.py exporter/bench/test_bench.py
exporter/weights/test_revisions.py exporter/test_cli.py exporter/engine/test_engine.py
exporter/family/test_family_bugs.py exporter/heads/test_classifiers.py
exporter/verify/test_verify.py exporter/graphs/test_trt_graph.py exporter/verify/test_injected_bugs.py
exporter/heads/test_inputs_embeds.py exporter/package/test_variants.py exporter/package/test_cuda_variants.py
exporter/package/test_plan.py exporter/package/test_family_quality.py exporter/bench/test_bench_compare.py
exporter/evaluate/test_sweep_revisions.py repository/test_docs.py runner/test_telemetry.py
exporter/verify/test_verify_by_layer.py exporter/heads/test_head_bugs.py exporter/fp16/test_fp16_safety.py
exporter/test_made_up_norm.py exporter/evaluate/test_lm_eval.py exporter/verify/test_asked_again.py
exporter/fp16/test_simulated_reference.py repository/test_platforms.py repository/test_demo.py
""".split()
"""the files that take longest, some of them with few tests: they begin, so that no process waits for another's last"""


def long_first(items: list[pytest.Item]) -> None:
    """Sort tests, each file's as they are."""
    place = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(LONG)))


Make = Callable[[Path], object]
"""given a path that does not exist, in a folder that does, writes a file or a folder there"""


@dataclass(frozen=True)
class Shared:
    """What is made by the first that asks, in whatever process, and read by all."""

    home: Path

    def made(self, kind: str, name: str, make: Make) -> Path:
        """Return the path kind/name in `home`, unique in a run; where making it raises, the next to ask tries again."""
        out, making = self.home / kind / name, self.home / f".{kind}" / name
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.home / f".{kind}-{name}.lock"):
            if not out.exists():
                shutil.rmtree(making, ignore_errors=True)
                making.parent.mkdir(exist_ok=True)
                make(making)
                making.rename(out)
        return out


def shared_by(factory: pytest.TempPathFactory) -> Shared:
    """Return what this run shares: with its other processes, if it has any."""
    base = factory.getbasetemp()
    return Shared((base.parent if base.name == f"popen-{WORKER}" else base) / "shared")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if os.name != "posix":
        yield  # one process a run, there
        return
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed
        yield
