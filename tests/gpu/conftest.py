"""What the rows share: the device, what it lacks, and the table at the end.

A row is a test of gpu_*.py, one line of CHECKLIST.md. It notes its figure with `record_property("figure", ...)`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checklist import recorded
from rows import RowsFile, row_name, row_of

from olmo2_export.package.export import export
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from runtimes.errors import BackendError
from runtimes.manifest import EngineBackend
from runtimes.trt.nvidia import check_installed

CUDA_VARIANTS = ("bf16", "fp16", "q4f16")
QUICKEST_FIRST = (
    "cuda_candidates cuda_slots cuda_graph cuda_greedy cuda_parity_random cuda_parity_trained cuda_static_graph "
    "cuda_adapters nv_rtx_provider"
).split()
"""rows in the order of the time they took in a rehearsal; the others follow as they stand"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: a rehearsal; rows of the CUDA provider run on the CPU, where they can, and prove nothing of a GPU",
    )
    parser.addoption("--shape", choices=["1B", "demo"], default="1B", help="of the benchmark; default 1B")
    parser.addoption("--demo", type=Path, metavar="DIR", help="a package of the demo with bf16, fp16 and q4f16")
    parser.addoption(
        "--rows-to",
        type=Path,
        metavar="FILE",
        help="a JSON line a row, as soon as it ends; rows there are not run again",
    )
    parser.addoption("--row-seconds", type=int, help="end the process of a row that takes longer; with --rows-to")


def pytest_configure(config: pytest.Config) -> None:
    path, seconds = config.getoption("--rows-to", None), config.getoption("--row-seconds", None)
    if path is not None:
        config.pluginmanager.register(RowsFile(path, seconds, describe_machine()))
    elif seconds is not None:
        raise pytest.UsageError("--row-seconds wants --rows-to, or the rows before would be lost with the process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quickest rows first, so that a run that is cut off has shown as much as it could."""
    place = {name: index for index, name in enumerate(QUICKEST_FIRST)}
    own = [item for item in items if "tests/gpu/" in item.nodeid]
    own.sort(key=lambda item: place.get(row_name(item.nodeid).partition("[")[0], len(place)))
    items[:] = [*(item for item in items if "tests/gpu/" not in item.nodeid), *own]


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> str:
    """cuda, or cpu in a rehearsal; without a GPU every other row is skipped."""
    wanted: str = request.config.getoption("--device")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that PyTorch can use")
    return wanted


@pytest.fixture(scope="session")
def device(gpu: str) -> str:
    """The device of onnxruntime."""
    if gpu == "cuda":
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            pytest.skip("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    return gpu


@pytest.fixture(params=["trt_rtx", "trt"])
def backend(gpu: str, request: pytest.FixtureRequest) -> EngineBackend:
    """A TensorRT that is installed and knows this GPU."""
    found: EngineBackend = request.param
    if gpu == "cpu":
        pytest.skip("an engine runs on a GPU alone")
    try:
        check_installed(found)
    except BackendError as error:
        pytest.skip(str(error))
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if found == "trt_rtx" and capability in ("8.7", "9.0", "10.0", "10.3", "11.0"):
        pytest.skip(f"TensorRT for RTX does not run on compute capability {capability}: use full TensorRT")
    return found


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The bundled trained model."""
    return open_checkpoint("demo")


@pytest.fixture(scope="session")
def demo_package(
    gpu: str,  # noqa: ARG001
    demo: Checkpoint,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The demo with every variant for CUDA; engines are built into it."""
    made: Path | None = request.config.getoption("--demo")
    if made is not None and made.is_dir():
        return made
    out = tmp_path_factory.mktemp("gpu") / "demo"
    export(demo, out, variants=["fp32", *CUDA_VARIANTS])
    return out


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a line per row, why rows were skipped, and last one line of JSON."""
    path = config.getoption("--rows-to", None)
    rows = list(_rows(terminalreporter)) if path is None else recorded(path)
    if not rows:
        return
    machine = describe_machine()
    rehearsal = config.getoption("--device") == "cpu"
    terminalreporter.section("rehearsal on the CPU: proves nothing of a GPU" if rehearsal else machine["gpu"])
    widths = [max(len(str(row[key])) for row in rows) for key in ("row", "outcome", "seconds")]
    for row in rows:
        cells = [str(row[key]).ljust(w) for key, w in zip(("row", "outcome", "seconds"), widths, strict=True)]
        terminalreporter.write_line("  ".join([*cells, row["figure"] or row["why"]]))
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            if name == "report":
                terminalreporter.write_line(f"\n{report.nodeid}\n\n{value}\n")
    terminalreporter.write_line(json.dumps({**machine, "rehearsal": rehearsal, "rows": rows}))


def _rows(reporter: Any) -> Iterator[dict[str, Any]]:
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            if "tests/gpu/" not in report.nodeid:  # pytest asks this file for the others too
                continue
            yield row_of(report, outcome)


def describe_machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    gpu = driver = "none"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    libraries = {}
    for name in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-libs"):
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"gpu": gpu, "driver": driver, "python": platform.python_version(), **libraries}
