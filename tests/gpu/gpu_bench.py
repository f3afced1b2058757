"""Speed on the shape of the 1B, beside transformers' compiled static cache and the limits of the hardware.

The command of each row is `python -m olmo2_export.bench gpu`; its table is printed, its claims are the row's verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checklist import figure_of

from olmo2_export.bench import gpu
from runtimes.manifest import EngineBackend

Record = Callable[[str, object], None]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models are made once."""
    return tmp_path_factory.mktemp("bench")


def bench(work: Path, wanted: list[str], device: str, shape: str, record: Record, baseline: bool) -> None:
    """Measure and judge; note each claim's ratio."""
    short = shape == "demo"
    result, report = gpu.run(
        shape,
        work,
        wanted=wanted,
        device=device,
        rounds=1 if short else 3,
        steps=8 if short else 128,
        baseline=baseline,
    )
    record("report", report)
    assert not result["failures"]
    record("figure", figure_of(result["claims"]))
    assert short or all("missed" not in claim["verdict"] for claim in result["claims"])


def test_bench_cuda(work: Path, device: str, request: pytest.FixtureRequest, record_property: Record) -> None:
    """bf16 and q4f16 on the CUDA provider, against `generate(cache_implementation="static")`."""
    wanted = ["ort:fp16"] if device == "cpu" else ["ort:bf16", "ort:fp16", "ort:q4f16"]
    bench(work, wanted, device, request.config.getoption("--shape"), record_property, baseline=True)


def test_bench_engine(
    backend: EngineBackend, work: Path, request: pytest.FixtureRequest, record_property: Record
) -> None:
    """bf16 and int4 engines built for this GPU."""
    wanted = [f"{backend}:bf16", f"{backend}:int4"]
    bench(work, wanted, "cuda", request.config.getoption("--shape"), record_property, baseline=True)
