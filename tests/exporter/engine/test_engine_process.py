"""What the process in which TensorRT works does when it fails, and what is never accepted of TensorRT."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from olmo2_export.engine import process as engine_process
from olmo2_export.engine.build import build
from olmo2_export.engine.compiler import CompileRequest, CompileResult, check_layers, check_messages, compile_plan
from olmo2_export.engine.options import EngineOptions
from olmo2_export.engine.process import run_worker
from runtimes.errors import BackendError, EngineBuildError, FusionError, ResourceError
from runtimes.trt import nvidia

MATMUL_LAYERS = {"MATRIX_MULTIPLY": 1}


def graph_of(nodes: Sequence[onnx.NodeProto], folder: Path, outputs: Sequence[str] = ("y",)) -> Path:
    """Write a small graph over q, k, v [1, 4, 2, 64] float16, lengths [1] and w [64, 64], external as ours are."""
    shape = [1, 4, 2, 64]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, shape) for n in "qkv"]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
    inputs = [value for value in inputs if any(value.name in node.input for node in nodes)]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, None) for n in outputs]
    data = np.ones((64, 64), np.float16)
    tensors = [numpy_helper.from_array(data, "w")]
    graph = helper.make_graph(list(nodes), "small", inputs, results, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    path = folder / "small.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="small.onnx_data", size_threshold=0)
    return path


def request_for(graph: Path, **changes: Any) -> CompileRequest:
    request = CompileRequest("trt_rtx", str(graph), str(graph.with_suffix(".engine")), {"only": ()}, ("8.9",), {})
    return dataclasses.replace(request, **changes)


def compiled(request: CompileRequest) -> CompileResult:
    return run_worker(request, Path(request.graph).parent, progress=False)


MATMUL = helper.make_node("MatMul", ["q", "w"], ["y"])


def test_ignored_input_is_an_error(tmp_path: Path) -> None:
    """TensorRT parses nonpad_kv_seqlen, ignores it, and only warns: the results would be wrong."""
    attention = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["a"])
    graph = graph_of([attention, helper.make_node("MatMul", ["a", "w"], ["y"])], tmp_path)
    with pytest.raises(EngineBuildError, match=r"would not compute what the graph says: .*[Uu]nused"):
        compiled(request_for(graph))
    assert not graph.with_suffix(".engine").exists()


def test_parser_errors_have_the_parsers_own_words(tmp_path: Path) -> None:
    graph = graph_of([MATMUL, helper.make_node("Frobnicate", ["q"], ["z"])], tmp_path, ("y", "z"))
    with pytest.raises(
        EngineBuildError, match=r"TensorRT 1\.7\.1\.116 cannot parse the graph: .*Plugin not found.* at Frobnicate"
    ):
        compiled(request_for(graph))


def test_build_errors_have_tensorrts_own_words(tmp_path: Path) -> None:
    """A dedicated attention kernel for a head of 2 does not exist."""
    slices = [numpy_helper.from_array(np.array([i], np.int64), n) for n, i in (("from", 0), ("to", 2), ("axis", 3))]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in slices]
    nodes += [helper.make_node("Slice", [n, "from", "to", "axis"], [f"{n}2"]) for n in "qkv"]
    nodes += [helper.make_node("Attention", ["q2", "k2", "v2"], ["y"]), helper.make_node("MatMul", ["q", "w"], ["z"])]
    graph = graph_of(nodes, tmp_path, ("y", "z"))
    with pytest.raises(EngineBuildError, match=r"could not build the engine: .*not supported by a dedicated kernel"):
        compiled(request_for(graph))


def test_missing_layers_are_a_fusion_error(tmp_path: Path) -> None:
    graph = graph_of([MATMUL], tmp_path)
    with pytest.raises(FusionError, match=r"TensorRT network: ATTENTION_INPUT: expected 3, found 0"):
        compiled(request_for(graph, layer_counts={"ATTENTION_INPUT": 3}))


def test_compile_in_this_process(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    graph = graph_of([MATMUL], tmp_path)
    result = compile_plan(request_for(graph, layer_counts={"MATRIX_MULTIPLY": 1}), lambda *now: seen.append(now))
    assert result.layer_counts == {"MATRIX_MULTIPLY": 1}
    assert result.aliases == {}
    assert seen[0] == ("Parsing the graph", 0.0)
    assert "Building engine" in [name for name, _ in seen]
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 5
    assert graph.with_suffix(".engine").stat().st_size > 10_000


def test_disk_full_while_the_plan_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No space left on device"):
        compiled(request_for(graph_of([MATMUL], tmp_path), plan="/dev/full"))


def test_unknown_capability_is_a_backend_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"compute capability 13\.7: unknown to TensorRT for RTX 1\.7\.1\.116"):
        compile_plan(request_for(graph_of([MATMUL], tmp_path), compute_capabilities=("13.7",)), lambda *_: None)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            ResourceError,
            "killed, as the system does when memory",
        ),
        ("raise SystemExit('out of luck')", EngineBuildError, "ended with code 1: out of luck"),
        ("", EngineBuildError, "ended with code 0: it printed nothing"),
    ],
)
def test_dead_process_leaves_the_folder_as_it_was(
    tiny_package: Path, tmp_path: Path, monkeypatch: Any, source: str, error: type[Exception], message: str
) -> None:
    package = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    (tmp_path / "broken_worker.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(engine_process, "WORKER", "broken_worker")
    with pytest.raises(error, match=message):
        build(package, EngineOptions(), progress=False)
    assert not (package / "trt").exists()
    assert not list(package.glob(".trt*"))


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_process_dies_with_its_parent() -> None:
    """A build that is killed must not go on, unseen, for minutes and with gigabytes."""
    script = (
        "import os, subprocess, sys, time\n"
        "from olmo2_export.engine.process import worker_command\n"
        "process = subprocess.Popen(worker_command(), stdin=sys.stdin, stdout=subprocess.DEVNULL)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)"
    )
    read, write = os.pipe()
    environment = engine_process.worker_environment()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=read, stdout=subprocess.PIPE, env=environment
    ) as parent:
        os.close(read)
        assert parent.stdout is not None
        worker = Path("/proc") / parent.stdout.readline().decode().strip()
        deadline = time.monotonic() + 20
        while "pipe_read" not in (worker / "wchan").read_text() and "S" not in state(worker):  # waits for its request
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert worker.exists()
        parent.kill()
        parent.wait()
        while worker.exists() and "Z" not in state(worker):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    os.close(write)


def state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def test_layer_counts_of_either_kind_are_added() -> None:
    assert check_layers({"REDUCE": 9, "NORMALIZATION": 4}, {"NORMALIZATION|REDUCE": 13}) == {"NORMALIZATION|REDUCE": 13}
    with pytest.raises(FusionError, match="REDUCE: expected 13, found 12"):
        check_layers({"REDUCE": 12}, {"REDUCE": 13})


@pytest.mark.parametrize("text", ["Unused Input: nonpad", "weights will be clamped", "attribute x is ignored"])
def test_messages_that_change_the_meaning(text: str) -> None:
    with pytest.raises(EngineBuildError, match=re.escape(text)):
        check_messages([nvidia.Message(logging.WARNING, text)])


def test_other_messages_pass() -> None:
    check_messages([nvidia.Message(logging.WARNING, "the build takes long")])
