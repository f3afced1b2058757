"""Find where a graph for TensorRT goes wrong, with Polygraphy, the field's tool for that.

| function   | question                                              | of Polygraphy            |
|------------|-------------------------------------------------------|--------------------------|
| capability | which nodes does this TensorRT not take?              | inspect capability       |
| compare    | which tensor is the first that differs?               | Comparator, two runners  |
| reduce     | which few nodes still fail?                           | debug reduce             |
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx  # type: ignore[import-untyped]
from polygraphy.comparator import Comparator  # type: ignore[import-untyped]
from polygraphy.logger import G_LOGGER  # type: ignore[import-untyped]

from olmo2_export.atomic import can_write
from olmo2_export.graphs.files import save_graph
from olmo2_export.stored_graph import load_graph
from olmo2_export.views.first_call import first_call, float32_name
from olmo2_export.views.openers import tensorrt_runner
from olmo2_export.views.static_forms import exact_form, rounded_form
from runtimes.errors import FailedError, UsageError, VariantNotFoundError
from runtimes.manifest import EngineBackend, Variant
from runtimes.package import AnyPackage, open_package
from runtimes.targets import Backend
from runtimes.trt.nvidia import load_tensorrt

TOKENS = 16
"""of the call that is compared"""
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""dtype of activations -> RMS error / RMS of the tensor above which a tensor counts as different"""
_SHAPES = ("input_ids:[1,4]", "write_indices:[1]", "logit_index:[1,1]")
_SUPPORTED = "Graph is fully supported by TensorRT"


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of a graph, computed twice."""

    name: str
    op_type: str
    """of the node that gives it"""
    max_abs: float
    relative: float
    """RMS of the difference / RMS of the reference"""


def capability(package: Path, variant: str, backend: EngineBackend) -> tuple[bool, str]:
    """Ask a TensorRT's parser which nodes it takes; needs no GPU.

    Args:
        package: with TensorRT graphs, from `olmo2-export build`.
        variant: trt_bf16, ...
        backend: which TensorRT.

    Returns:
        Whether it takes all of them, and what Polygraphy says.

    Raises:
        VariantNotFoundError: no such TensorRT graph.
        BackendError: the library is not installed.
    """
    entry = find_graph(package, variant)
    load_tensorrt(backend)  # says what is missing
    with tempfile.TemporaryDirectory() as folder, _plain_files(package / entry.graph) as graph:
        said = _polygraphy(backend, ["inspect", "capability", str(graph)], Path(folder))
    return _SUPPORTED in said, said


def reduce(package: Path, variant: str, out: Path, backend: EngineBackend, check: Sequence[str] = ()) -> str:
    """Cut a failing graph down to the nodes that still fail.

    Polygraphy cannot cut in front of an attention, which has optional inputs that are absent. Where it would have to,
    only what comes after the failure is cut off, and the last node is the one that fails.

    Args:
        package: with TensorRT graphs.
        variant: trt_fp32 or trt_fp16: onnxruntime must run it, to find the values between the nodes.
        out: the ONNX file to write; its weights inside.
        backend: which TensorRT must fail, without a check.
        check: a command that is given the path of an ONNX file and exits with 0 if it is fine; none: the TensorRT
            parses it.

    Returns:
        What Polygraphy says.

    Raises:
        UsageError: the check passes on the whole graph, or cannot be run; the file cannot be written.
        FailedError: Polygraphy could not reduce it.
    """
    entry = find_graph(package, variant)
    if not can_write(out):
        raise UsageError(f"--out {out}: expected a file that can be written, in a folder that is there")
    with _plain_files(package / entry.graph) as graph:
        return _reduce(graph, variant, out.resolve(), backend, check)


def _reduce(graph: Path, variant: str, target: Path, backend: EngineBackend, check: Sequence[str]) -> str:
    command = list(check) or [sys.executable, "-m", "olmo2_export.debug.polygraphy_tool", backend, "parse"]
    try:
        whole = subprocess.run([*command, str(graph)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(f"check {command[0]}: cannot be run ({error.strerror}); give a command") from error
    if whole.returncode == 0:
        raise UsageError(f"{variant}: the check passes on the whole graph: there is nothing to reduce")
    words = ["debug", "reduce", str(graph), "-o", str(target), "--mode", "bisect", "--model-input-shapes", *_SHAPES]
    said = ""
    for less in ([], ["--no-reduce-inputs"]):
        with tempfile.TemporaryDirectory() as folder:
            said = _polygraphy(backend, [*words, *less, "--check", *command, "polygraphy_debug.onnx"], Path(folder))
        if target.is_file():
            return said
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    raise FailedError(f"Polygraphy did not reduce {graph.name}: {last[0][:300]}; try --variant trt_fp32")


def compare_variant(
    package: Path, variant: str, backend: Backend, tolerance: float | None = None
) -> tuple[list[TensorDifference], TensorDifference | None]:
    """Compare every tensor of a TensorRT graph's first call with what it should be.

    Args:
        package: with TensorRT graphs, from `olmo2-export build`.
        variant: trt_bf16, ...
        backend: ort: the graph's precision, rounding by rounding, against float32, both on the CPU. trt_rtx, trt: what
            this TensorRT computes on the GPU at hand, against the graph's precision on the CPU.
        tolerance: relative RMS error above which a tensor differs; None: that of its dtype in `TOLERANCES`.

    Returns:
        All tensors in the order of the graph, and the first that differs.

    Raises:
        VariantNotFoundError, IntegrityError: no such TensorRT graph, or it was changed.
        UsageError: a tolerance that is not above 0.
        BackendError: the library is not installed, or there is no GPU.
    """
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance {tolerance:g}: expected a number above 0")
    opened = open_package(package)
    entry = find_graph(opened, variant)
    runner = None if backend == "ort" else tensorrt_runner(backend)
    graph = load_graph(package / entry.graph)
    token_ids = np.random.default_rng(0).integers(0, opened.model.vocab_size, TOKENS, dtype=np.int64)
    if runner is None:
        differences = compare(exact_form(graph), rounded_form(graph), token_ids)
    else:
        differences = compare(rounded_form(graph), graph, token_ids, runner)
    limit = TOLERANCES[entry.kv_cache.dtype] if tolerance is None else tolerance
    return differences, first_difference(differences, limit)


def compare(
    graph: ir.Model,
    other: ir.Model,
    token_ids: np.ndarray,
    runner: Callable[[Path], Any] | None = None,
) -> list[TensorDifference]:
    """Compute every tensor of a graph's first call twice.

    Args:
        graph: the static-cache graph in a form that onnxruntime runs: the reference.
        other: the same graph as the other side runs it; tensors are matched by name.
        token_ids: int64 [TOKENS].
        runner: path of an ONNX file -> Polygraphy's runner of it; None: onnxruntime.

    Returns:
        In the order of the graph, those that both sides give.

    Raises:
        BackendError: the other side does not run here.
    """
    feed = {
        "input_ids": token_ids[None].astype(np.int64),
        "logit_index": np.array([[len(token_ids) - 1]], np.int64),
    }
    producers = {str(value.name): node.op_type for node in other.graph for value in node.outputs}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, model in (("reference", graph), ("other", other)):
            first_call(model, len(token_ids))
            paths.append(Path(folder) / f"{name}.onnx")
            save_graph(model, paths[-1])
        runners = [onnxruntime_runner(paths[0]), (runner or onnxruntime_runner)(paths[1])]
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            results = Comparator.run(runners, data_loader=[feed])
        wanted, found = (dict(results[index][1][0]) for index in range(2))
    pairs = [(name, op_type, _rounded(wanted, name), _rounded(found, name)) for name, op_type in producers.items()]
    return [_difference(name, op_type, a, b) for name, op_type, a, b in pairs if a is not None and b is not None]


def onnxruntime_runner(path: Path) -> OnnxrtRunner:
    """Return Polygraphy's runner of a graph on the CPU."""
    return OnnxrtRunner(SessionFromOnnx(str(path), providers=["cpu"]), name=path.stem)


def first_difference(differences: Sequence[TensorDifference], tolerance: float) -> TensorDifference | None:
    """Return the first tensor that differs by more than a tolerance, or that is not finite."""
    return next((d for d in differences if not d.relative <= tolerance), None)


def format_differences(differences: Sequence[TensorDifference], first: TensorDifference | None) -> str:
    """Return a table for people: every tensor, the first different one marked."""
    width = max((len(d.name) for d in differences), default=0)
    lines = [f"{'tensor':<{width}}  {'operation':<20}  {'max_abs':>9}  {'relative':>9}"]
    for d in differences:
        mark = "  <- the first that differs" if d is first else ""
        lines.append(f"{d.name:<{width}}  {d.op_type:<20}  {d.max_abs:>9.2e}  {d.relative:>9.2e}{mark}")
    return "\n".join(lines)


def find_graph(package: AnyPackage, variant: str) -> Variant:
    """Return a TensorRT graph of a package, whose files are what its manifest says.

    Raises:
        VariantNotFoundError: naming those there are.
        IntegrityError: a file changed.
    """
    opened = open_package(package)
    known = opened.trt.variants if opened.trt is not None else {}
    if variant not in known:
        listed = ", ".join(known) or "none"
        raise VariantNotFoundError(
            f"{opened.folder}: no TensorRT graph {variant!r}; it has {listed}: olmo2-export build"
        )
    opened.check(known[variant].files, remedy="build it again")
    return known[variant]


@contextmanager
def _plain_files(graph: Path) -> Iterator[Path]:
    """Yield the absolute path of a graph; where it or its weights are links, which Polygraphy refuses, of a copy."""
    files = [graph, graph.with_name(f"{graph.name}_data")]
    if not any(path.is_symlink() for path in files):
        yield graph.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            shutil.copyfile(path, Path(folder, path.name))
        yield Path(folder, graph.name)


def _rounded(outputs: Mapping[str, Any], name: str) -> np.ndarray | None:
    """Return a tensor as the nodes behind it see it."""
    found = outputs.get(float32_name(name), outputs.get(name))
    return None if found is None else np.asarray(found)


def _difference(name: str, op_type: str, wanted: np.ndarray, found: np.ndarray) -> TensorDifference:
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    size = float(np.sqrt(np.mean(a**2)))
    return TensorDifference(
        name, op_type, float(np.abs(a - b).max()), float(np.sqrt(np.mean((a - b) ** 2))) / max(size, 1e-30)
    )


def _polygraphy(backend: EngineBackend, arguments: Sequence[str], folder: Path) -> str:
    """Run the command-line tool in a folder of its own; return all that it said."""
    command = [sys.executable, "-m", "olmo2_export.debug.polygraphy_tool", backend, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
