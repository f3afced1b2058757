"""olmo2-export bench: figures that agree with each other and with the files, peers in turns, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support import fake_peers
from support.checkpoints import SHAPE

import olmo2_export.catalog as catalog
from olmo2_export.bench import command, compare, entries, machine, turns
from olmo2_export.bench.arguments import PEERS
from olmo2_export.bench.bytes_moved import Traffic, WeightBytes, graph_weight_bytes
from olmo2_export.bench.cli import main as bench_main
from olmo2_export.bench.cli import parse_args as parse_bench
from olmo2_export.bench.compare import Setting
from olmo2_export.bench.contenders import DEMO, GENAI_VENV, LLAMA_VENV, OPENVINO_VENV, OPTIMUM_VENV, Contender
from olmo2_export.bench.processes import run
from olmo2_export.bench.workers import common
from olmo2_export.cli import main
from runtimes.errors import FailedError
from runtimes.package import open_package

SMALL = ["--contexts", "8", "24", "--batch-sizes", "1", "3", "--new-tokens", "5", "--threads", "1"]
KV_BYTES = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
LIMITS = {"device": "cpu", "array_bytes": 8, "copied_bytes_per_second": 2e9, "read_bytes_per_second": 1e9}


@pytest.fixture
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one takes seconds; one test has it."""
    monkeypatch.setattr(compare, "device_limits", lambda _device, _threads: LIMITS)


def document_of(out: str) -> dict[str, Any]:
    """The last line of stdout, which is JSON."""
    found: dict[str, Any] = json.loads(out.rstrip("\n").rpartition("\n")[2])
    return found


@pytest.mark.alone
def test_a_package_alone(tiny_package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    flags = ["--variant", "fp32", "--backend", "ort", "--device", "cpu", "--repeats", "1", "--out", str(out)]
    assert main(["bench", str(tiny_package), *SMALL, *flags]) == 0
    document = document_of(capfd.readouterr().out)
    assert json.loads(out.read_text()) == document
    assert set(document["machine"]) >= {"cpu", "cores", "memory_bandwidth_bytes_per_s"}
    assert 1e9 < document["machine"]["memory_bandwidth_bytes_per_s"] < 1e12
    assert document["machine"]["cores"] == os.cpu_count()
    assert (document["package"], document["repeats"], document["failures"]) == (str(tiny_package), 1, [])
    assert (document["ratios"], document["left_out"], list(document["contenders"])) == ([], [], ["ours fp32"])

    ours = document["contenders"]["ours fp32"]
    opened = open_package(tiny_package)
    variant = opened.variant("fp32")
    files = opened.files_of(variant)
    assert ours["disk_bytes"] == sum(files[name].size for name in variant.files)
    assert 0 < ours["load_s"] < 30
    assert 30e6 < ours["peak_memory_bytes"] < 1e9
    points = {(p["context_tokens"], p["batch_size"]): p for p in ours["points"]}
    assert list(points) == [(8, 1), (24, 1), (8, 3), (24, 3)]
    row = SHAPE["hidden_size"] * 4
    # the data file is the weights (aligned: a little more); of the embedding a row is read
    read = sum(files[name].size for name in variant.data) - (SHAPE["vocab_size"] - 1) * row
    for (context, rows), point in points.items():
        expected = (read - row) / rows + row + KV_BYTES * context
        assert point["bytes_per_token"] == pytest.approx(expected, rel=0.02)
        assert point["prefill_tokens_per_s"] * point["ttft_s"] == pytest.approx(context * rows)
        assert point["itl_p99_s"] >= point["itl_p50_s"] > 0
        assert [point["decode_tokens_per_s"]] == point["per_repeat"]["decode_tokens_per_s"]
        assert point["decode_tokens_per_s"] == pytest.approx(rows / point["itl_p50_s"])
        achieved = point["bytes_per_token"] * point["decode_tokens_per_s"]
        assert point["achieved_bytes_per_s"] == achieved
        assert point["bandwidth_share"] == achieved / document["machine"]["memory_bandwidth_bytes_per_s"]
    assert points[24, 1]["bytes_per_token"] - points[8, 1]["bytes_per_token"] == KV_BYTES * 16


def test_bytes_of_the_tiny_package_are_those_of_its_tensors(tiny_package: Path) -> None:
    hidden, mlp, vocab, kv = 96, 160, 131, 32
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 3 * hidden + kv  # and norms: 2, of q, of k
    found = graph_weight_bytes(tiny_package / "onnx" / "model.onnx")
    assert found.per_row == pytest.approx(4 * hidden, abs=4 * 16)  # and a row of the tables of RoPE
    assert found.per_step == pytest.approx(4 * (3 * layer + hidden + vocab * hidden), rel=1e-3)


@pytest.mark.usefixtures("_known_bandwidth")
def test_peers_take_turns_and_one_that_dies_is_a_result(
    tiny_package: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = tmp_path / "log"
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : A processor\nflags : fpu amx_int8 sse2\n")
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    venvs = [LLAMA_VENV, GENAI_VENV, OPENVINO_VENV, OPTIMUM_VENV]
    fake_peers.install(tmp_path, log, tiny_package / "onnx" / "model.onnx", venvs)
    sample = Contender.sample

    def noted(self: Contender, task: dict[str, Any]) -> dict[str, Any]:
        if self.key.startswith("ours"):
            with log.open("a") as file:
                file.write("ours\n")
            step = 0.004 if len(log.read_text().split("ours")) == 2 else 0.006  # first, later repeats
            return fake_peers._points(json.loads(json.dumps(task)), step)
        return sample(self, task)

    monkeypatch.setattr(Contender, "sample", noted)
    peers = {"fp32": {"llama.cpp": "Q8_0"}, "q4": {"llama.cpp": "Q4_K_M"}}
    rows = [dataclasses.replace(row, peers=row.peers | peers.get(row.name, {})) for row in catalog.VARIANTS]
    monkeypatch.setattr(catalog, "VARIANTS", tuple(rows))
    vs = ["--vs", "optimum-onnx", "onnxruntime-genai", "openvino-genai", "llama.cpp"]
    vs += ["--reference", str(tiny_checkpoint)]
    kept = ["--keep", str(tmp_path / "kept"), "--peers", str(tmp_path)]
    assert main(["bench", str(tiny_package), *SMALL, "--repeats", "3", *vs, *kept]) == 0
    out = capfd.readouterr().out
    document = document_of(out)
    around = ["ours", "hugging_face optimum", "genai genai-of", "openvino openvino-of", "llama Q8_0", "llama Q8_0"]
    turns_taken = [next(name for name in around if line.startswith(name)) for line in log.read_text().splitlines()]
    assert turns_taken == around + 2 * around[:4]  # the one that died is not asked again
    failure, with_cache = document["failures"]
    assert failure.startswith("llama.cpp Q8_0, points: ")
    assert with_cache.startswith("llama.cpp Q8_0, q8_0 KV cache, points: ")
    assert "ended by SIGKILL, most likely for want of memory" in failure
    assert f"FAILED: {failure}" in out
    dead = document["contenders"]["llama.cpp Q8_0"]
    assert (dead["points"], dead["load_s"], dead["peak_memory_bytes"], dead["disk_bytes"]) == ([], None, None, 20)
    assert dead["note"].endswith("; built without AMX, which this processor has: with it, it dies of SIGSEGV")
    assert document["contenders"]["OpenVINO GenAI int4"]["points"][0]["itl_p50_s"] == 0.03
    genai = document["contenders"]["onnxruntime-genai int4"]
    assert "a Llama of this shape" in genai["note"]
    assert (genai["load_s"], genai["peak_memory_bytes"], genai["repeats"]) == (1.5, fake_peers.MEMORY, 3)
    assert genai["make_s"] >= 0
    point = genai["points"][0]
    assert (point["ttft_s"], point["itl_p50_s"], point["itl_p99_s"]) == (0.5, 0.02, 0.02)
    assert (point["decode_tokens_per_s"], point["prefill_tokens_per_s"]) == (50.0, 16.0)
    assert point["bandwidth_share"] == point["bytes_per_token"] * 50.0 / 2e9

    assert len(document["ratios"]) == 3 * 4 * 2  # peers that live, points, metrics
    for ratio in document["ratios"]:
        mine, other = (
            next(
                p
                for p in document["contenders"][ratio[side]]["points"]
                if (p["context_tokens"], p["batch_size"]) == (ratio["context_tokens"], ratio["batch_size"])
            )
            for side in ("ours", "peer")
        )
        assert ratio["ratio_median"] == mine[ratio["metric"]] / other[ratio["metric"]]
        assert ratio["like_for_like"] == (ratio["peer"] == "optimum-onnx fp32")
    first = document["ratios"][0]
    assert (first["metric"], first["peer"]) == ("decode_tokens_per_s", "optimum-onnx fp32")
    found = [first[f"ratio_{which}"] for which in ("median", "low", "high")]
    assert found == pytest.approx([40 / 6, 40 / 6, 10])
    cells = [cell.strip() for line in out.splitlines() if "optimum-onnx fp32 =" in line for cell in line.split("|")]
    assert cells[1:5] == ["decode", "ours fp32", "optimum-onnx fp32 =", "6.67 (6.67-10.00)"]
    tables = [line for line in out.splitlines() if line.startswith("| ") and "optimum" in line]
    assert max(map(len, tables)) <= 130


@pytest.mark.usefixtures("_known_bandwidth")
def test_missing_peers_are_named_and_the_run_goes_on(
    tiny_package: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entries.importlib.util, "find_spec", lambda _name: None)
    vs = ["--vs", "all", "--reference", str(tiny_checkpoint), "--peers", str(tmp_path), "--repeats", "1"]
    assert main(["bench", str(tiny_package), *vs, "--batch-sizes", "1", "--new-tokens", "3"]) == 0
    out = capfd.readouterr().out
    document = document_of(out)
    assert [line.partition(" is left out")[0] for line in document["left_out"]] == list(PEERS)
    assert all(line in out for line in document["left_out"])
    assert sum("make peers installs it" in line for line in document["left_out"]) == 4
    (point,) = document["contenders"]["ours fp32"]["points"]
    assert point["context_tokens"] == 128  # of 128, 512 and 2048 what the model's 256 tokens leave room for
    assert document["ratios"] == []


@pytest.mark.usefixtures("_known_bandwidth")
def test_a_broken_environment_of_a_peer_does_not_stop_the_others(
    tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for venv in (LLAMA_VENV, GENAI_VENV, OPTIMUM_VENV):
        python = tmp_path / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        (tmp_path / venv / ".installed").touch()
        python.write_text("#!/bin/sh\necho nonsense\n")
        python.chmod(0o600 if venv == GENAI_VENV else 0o700)
    vs = ["--vs", "optimum-onnx", "onnxruntime-genai", "llama.cpp", "--reference", str(tiny_checkpoint)]
    assert main(["bench", str(tiny_package), *SMALL, *vs, "--peers", str(tmp_path), "--repeats", "1"]) == 0
    document = document_of(capfd.readouterr().out)
    assert len(document["failures"]) == 3
    assert "cannot be started: Permission denied" in document["failures"][1]
    assert len(document["contenders"]["ours fp32"]["points"]) == 4


def test_a_damaged_package_is_refused_before_anything_is_measured(
    tiny_package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    package = shutil.copytree(tiny_package, tmp_path / "package")
    with (package / "onnx" / "model.onnx_data").open("r+b") as file:
        file.truncate(1000)
    assert main(["bench", str(package), *SMALL]) == 2
    assert "model.onnx_data" in capfd.readouterr().err


@pytest.mark.usefixtures("_known_bandwidth")
def test_transformers_beside_ours(
    tiny_package: Path,
    tiny_checkpoint: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real peer: the worker of transformers and of optimum-onnx is one."""
    monkeypatch.setattr(entries, "multiplies_bfloat16", lambda: False)
    flags = ["--vs", "transformers", "--reference", str(tiny_checkpoint), "--repeats", "1", "--minutes", "9"]
    assert main(["bench", str(tiny_package), *SMALL, *flags]) == 0
    document = document_of(capfd.readouterr().out)
    assert list(document["contenders"]) == ["ours fp32", "transformers fp32"]
    ours, peer = document["contenders"].values()
    assert [p["batch_size"] for p in peer["points"]] == [1, 1, 3, 3]
    # the same weights: only padding and the tables of RoPE are ours alone
    for a, b in zip(ours["points"], peer["points"], strict=True):
        assert a["bytes_per_token"] == pytest.approx(b["bytes_per_token"], rel=0.02)
    assert peer["disk_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert all(ratio["like_for_like"] and ratio["ratio_low"] > 0 for ratio in document["ratios"])
    assert len(document["ratios"]) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vs", "gptfast"], "invalid choice: 'gptfast'"),
        (["--vs", "llama.cpp"], "--vs: --reference says which checkpoint"),
        (["--contexts", "250", "--new-tokens", "7"], "a context of 250 and 7 new tokens; its KV cache holds 256"),
        (["--contexts", "0"], "contexts [0]: expected different integers from 1"),
        (["--batch-sizes", "2", "2"], "batch sizes [2, 2]: expected different"),
        (["--new-tokens", "1"], "new tokens 1: expected an integer from 2"),
        (["--repeats", "0"], "repeats 0: expected an integer from 1"),
        (["--threads", "0"], "threads 0: expected an integer from 1"),
        (["--threads", "100000"], "threads 100000: this machine runs"),
        (["--out", "/nowhere/bench.json"], "--out /nowhere/bench.json: expected a file that can be written"),
        (["--minutes", "nan"], "minutes nan: expected more than 0"),
        (["--minutes", "0"], "minutes 0.0: expected more than 0"),
        (["--variant", "q4"], "no variant 'q4'; it has fp32"),
        (["--device", "cuda"], "device cuda"),
        (["--backend", "trt_rtx"], "no variant for backend trt_rtx"),
        (["--vs", "llama.cpp", "--reference", "demo"], "not of the shape of the reference demo"),
        (["--reference", "demo", "--revision", "main"], "revision"),
    ],
)
def test_what_is_refused(flags: list[str], message: str, tiny_package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fits = [] if "--contexts" in flags else ["--contexts", "8"]
    assert main(["bench", str(tiny_package), *fits, *flags]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.usefixtures("_known_bandwidth")
def test_a_variant_of_ours_that_fails_is_an_exit_code(
    tiny_package: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: Contender, _task: dict[str, Any]) -> dict[str, Any]:
        raise FailedError("it broke")

    monkeypatch.setattr(Contender, "sample", broken)
    assert main(["bench", str(tiny_package), *SMALL, "--repeats", "2"]) == 1
    document = document_of(capfd.readouterr().out)
    assert document["failures"] == ["ours fp32, points: it broke"]
    assert document["contenders"]["ours fp32"]["points"] == []


def test_help_explains_prefill_and_decode(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Prefill reads the whole prompt" in text
    assert "it is bound by compute" in text
    assert "it is bound by memory bandwidth" in text
    assert "the rows of a step share one reading of the weights" in text


def test_the_benchmark_of_made_up_weights(
    demo_package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What make bench runs: packages and checkpoint in one folder, all peers unless it is told otherwise."""
    monkeypatch.setattr(compare, "device_limits", lambda _device, _threads: LIMITS)
    assert parse_bench(["compare"]).vs == ["all"]
    assert parse_bench(["compare"]).size == "1B"
    for name, source in (("checkpoint-demo-olmo2", DEMO), ("package-demo-fp32", demo_package)):
        (tmp_path / name).symlink_to(source)
        (tmp_path / f"{name}.json").write_text("{}")
    flags = ["--contexts", "16", "--batch-sizes", "1", "--new-tokens", "3", "--repeats", "1", "--vs", "llama.cpp"]
    folders = ["--keep", str(tmp_path), "--peers", str(tmp_path)]
    assert bench_main(["compare", "--size", "demo", "--variant", "fp32", *flags, *folders]) == 0
    document = document_of(capfd.readouterr().out)
    assert list(document["contenders"]) == ["ours fp32"]
    assert document["left_out"][0].startswith("llama.cpp is left out")


def value(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))


@pytest.mark.parametrize(("tied", "per_step", "per_row"), [(False, 4 * 6 * 10 + 4 * 6, 4 * 6), (True, 4 * 6 * 10, 0)])
def test_rows_that_are_picked_count_once_per_row(tied: bool, per_step: int, per_row: int, tmp_path: Path) -> None:
    """An embedding that is the head too is read as a whole anyway."""
    ids = ir.Value(name="ids", shape=ir.Shape(["n"]), type=ir.TensorType(ir.DataType.INT64))
    table, norm = value("table", np.ones((10, 6), np.float32)), value("norm", np.ones(6, np.float32))
    head = table if tied else value("head", np.ones((6, 10), np.float32))
    unused = value("unused", np.ones(1000, np.float32))
    picked = ir.Node("", "Gather", [table, ids])
    scaled = ir.Node("", "Mul", [picked.outputs[0], norm])
    right = ir.Node("", "Transpose", [head])
    logits = ir.Node("", "MatMul", [scaled.outputs[0], right.outputs[0]])
    given = [table, norm, unused, *([] if tied else [head])]
    graph = ir.Graph(
        [ids],
        logits.outputs,
        nodes=[picked, scaled, right, logits],
        initializers=given,
        opset_imports={"": 23},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "model.onnx")
    found = graph_weight_bytes(tmp_path / "model.onnx")
    assert (found.per_step, found.per_row) == (per_step + (4 * 6 if tied else 0), per_row)


def test_a_batch_shares_the_weights_and_a_static_cache_is_read_whole() -> None:
    graphs = ((1, WeightBytes(100.0, 2.0)), (8, WeightBytes(240.0, 4.0)))
    held, whole = (Traffic(graphs, 10.0, capacity, "") for capacity in (None, 50))
    assert held.bytes_per_token(7, 1) == 100 + 2 + 70
    assert held.bytes_per_token(7, 4) == 25 + 2 + 70
    assert held.bytes_per_token(7, 8) == 30 + 4 + 70
    assert whole.bytes_per_token(7, 1) == 100 + 2 + 500


class Engine:
    """Ten ms for a prompt, one for a step."""

    def __init__(self, clock: list[float], calls: list[str]) -> None:
        self.clock, self.calls = clock, calls

    def prefill(self, rows: list[list[int]]) -> None:
        self.calls.append(f"prefill {len(rows)} x {len(rows[0])}")
        self.clock[0] += 0.010

    def step(self) -> None:
        self.calls.append("step")
        self.clock[0] += 0.001

    def close(self) -> None:
        self.calls.append("close")


def test_every_point_is_measured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def load() -> common.OpenEngine:
        clock[0] += 2.0
        return lambda length, rows: calls.append(f"open {length} x {rows}") or Engine(clock, calls)

    task = Setting(contexts=(5, 9), batch_sizes=(1, 2), new_tokens=3).task(97)
    found = common.measure(task, load)
    warm = ["prefill {} x 16", "step", "step"]
    measured = ["prefill {} x 5", "step", "step", "prefill {} x 9", "step", "step", "close"]
    expected = [[f"open 28 x {rows}", *(call.format(rows) for call in warm + measured)] for rows in (1, 2)]
    assert calls == expected[0] + expected[1]
    assert found["load_s"] == 2.0
    assert [(p["context_tokens"], p["batch_size"]) for p in found["points"]] == [(5, 1), (9, 1), (5, 2), (9, 2)]
    for point in found["points"]:
        assert [point["ttft_s"], *point["itl_s"]] == pytest.approx([0.010, 0.001, 0.001])


def test_no_repeat_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: clock[0])

    def sample(_self: Contender, _task: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 40.0
        return {"x": clock[0]}

    monkeypatch.setattr(Contender, "sample", sample)
    one = [Contender("a", "A", Path("x"), "x", (), ("t",), {})]
    for minutes, repeats in ((0.1, 1), (2.0, 3), (2.1, 3), (None, 5)):
        clock[0] = 0.0
        samples, _ = turns.take_turns(one, {"t": {}}, 5, minutes=minutes)
        assert len(samples["t"]["a"]) == repeats


def test_a_killed_process_says_so() -> None:
    with pytest.raises(FailedError, match="ended by SIGKILL, most likely for want of memory"):
        run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"])


def test_bandwidth_is_of_the_data_sheet_where_the_gpu_is_known() -> None:
    assert machine.memory_bandwidth({**LIMITS, "device": "NVIDIA H200"}) == (4.8e12, "data sheet of H200")
    rate, source = machine.memory_bandwidth(LIMITS)
    assert (rate, source.startswith("measured: a copy")) == (2e9, True)
    assert machine.memory_bandwidth({**LIMITS, "read_bytes_per_second": 3e9})[0] == 3e9
    assert math.isfinite(rate)


def test_a_folder_that_is_kept(tmp_path: Path) -> None:
    with command.work_folder(None, tmp_path / "a" / "b") as work:
        (work / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()
    with command.work_folder(tmp_path, None) as work:
        assert work.parent == tmp_path
    assert not work.exists()
