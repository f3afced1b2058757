"""Engines really built by TensorRT for RTX, without a GPU; and what is refused before that."""

from __future__ import annotations

import dataclasses
import importlib
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
import tensorrt_rtx_bindings  # type: ignore[import-untyped]  # noqa: F401  # missing must fail, not skip
from checkpoints import make_checkpoint
from onnx import TensorProto, helper, numpy_helper

from olmo2_export import engine as engine_module
from olmo2_export.checkpoint import open_checkpoint
from olmo2_export.engine import CAPABILITIES, MAX_BATCH_SIZE, BuildReport, build
from olmo2_export.engine_compiler import CompileRequest, check_layers, check_messages, compile_plan
from olmo2_export.package import export
from runtimes import nvidia
from runtimes.errors import (
    BackendError,
    EngineBuildError,
    FailedError,
    FusionError,
    IntegrityError,
    PackageNotFoundError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import (
    MANIFEST_NAME,
    ProfileRange,
    TrtManifest,
    check_files,
    find_variant,
    load_trt_manifest,
    read_sealed,
    seal,
)

PRECISIONS = ("bf16", "fp16", "fp32")
LAYERS = {"ATTENTION_INPUT": 3, "KV_CACHE_UPDATE": 6, "ROTARY_EMBEDDING": 6, "NORMALIZATION|REDUCE": 13}


def copied(package: Path, out: Path) -> Path:
    """A package of its own for a test that builds into it."""
    return Path(shutil.copytree(package, out))


def trt_manifest(package: Path) -> TrtManifest:
    manifest = load_trt_manifest(package)
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def built(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BuildReport]]:
    """A package with an engine of each precision, built one after the other."""
    package = copied(tiny_package, tmp_path_factory.mktemp("built") / "tiny")
    return package, {p: build(package, precision=p, progress=False) for p in PRECISIONS}


@pytest.fixture(scope="module")
def small(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package to be refused; nothing may be written into it."""
    return copied(tiny_package, tmp_path_factory.mktemp("small") / "tiny")


def test_successive_builds_accumulate(built: tuple[Path, Any]) -> None:
    package, reports = built
    manifest = trt_manifest(package)
    assert list(manifest.engines) == [f"trt_rtx_{p}" for p in PRECISIONS]
    assert list(manifest.variants) == [f"trt_{p}" for p in PRECISIONS]
    check_files(package, manifest.files)
    on_disk = {p.relative_to(package).as_posix() for p in (package / "trt").iterdir()}
    assert on_disk == {*manifest.files, "trt/manifest.json"}
    assert {
        name: report.engine for name, report in zip(manifest.engines, reports.values(), strict=True)
    } == manifest.engines
    assert not list(package.glob(".trt*"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_entry(built: tuple[Path, dict[str, BuildReport]], precision: str) -> None:
    package, reports = built
    engine = reports[precision].engine
    assert engine.plan == f"trt/model_{precision}.trt_rtx.engine"
    assert engine.variant == f"trt_{precision}"
    assert (engine.backend, engine.backend_version) == ("trt_rtx", nvidia.RTX_VERSION)
    assert engine.compute_capabilities == CAPABILITIES == ("8.0", "8.6", "8.9", "12.0")
    assert engine.layer_counts == LAYERS
    assert (engine.max_batch_size, engine.max_cache_length) == (MAX_BATCH_SIZE, 256)
    assert len(engine.aliases) == 6
    assert engine.aliases["present.2.value"] == "past_key_values.2.value"
    assert list(engine.profiles) == ["decode", "prefill"]
    ranges = {name: {r.name: r for r in profile} for name, profile in engine.profiles.items()}
    assert ranges["decode"]["input_ids"] == ProfileRange("input_ids", (1, 1), (1, 1), (4, 1))
    assert ranges["prefill"]["input_ids"] == ProfileRange("input_ids", (1, 1), (1, 256), (4, 256))
    for profile in ranges.values():
        assert profile["write_indices"] == ProfileRange("write_indices", (1,), (1,), (4,))
        assert profile["logit_index"] == ProfileRange("logit_index", (1, 1), (1, 1), (4, 1))
        cache = profile["past_key_values.0.key"]
        assert (cache.min, cache.max) == ((1, 2, 256, 16), (4, 2, 256, 16))
    variant, files = find_variant(package, engine.variant)
    assert variant.kv_cache.form == "static"
    assert variant.kv_cache.dtype == {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    assert variant.op_counts["trt::TRT_Attention"] == 3
    assert set(variant.files) <= files.keys()


def test_report(built: tuple[Path, dict[str, BuildReport]]) -> None:
    package, reports = built
    for report in reports.values():
        assert report.plan_bytes == (package / report.engine.plan).stat().st_size > 1_000_000
        assert 0 < report.compile_seconds < report.seconds
        assert 100e6 < report.peak_rss < 2e9
    assert reports["bf16"].graph_bytes < reports["fp32"].graph_bytes < 2 * reports["bf16"].graph_bytes


def programs(plan: Path) -> list[list[str]]:
    """The names of what the plan's programs launch; a plan carries them as text (seen in TensorRT for RTX 1.7.1)."""
    text = plan.read_bytes().decode("latin1")
    bodies = [text[m.start() : text.index("\n}\n", m.start())] for m in re.finditer(r"\nmain \{", text)]
    return [
        re.findall(r"\n  (?:function|fully_connected|runtime_fusion)=\{ name=\"?([^\s\"]+)", body) for body in bodies
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_profiles_have_dedicated_attention_kernels(built: tuple[Path, Any], precision: str) -> None:
    package, reports = built
    decode, _, prefill, _ = programs(package / reports[precision].engine.plan)
    assert decode.count("_gemv_mha_v1") == 3
    assert prefill.count("_gemm_mha_v2") == 3
    assert len(decode) == 11 * 3 + 4  # eleven a layer: none of them copies a cache or works on shapes
    assert not [name for name in decode if "Tran" in name]


def test_fp32_attention_is_composed_for_prefill_only(built: tuple[Path, Any]) -> None:
    package, reports = built
    decode, _, prefill, _ = programs(package / reports["fp32"].engine.plan)
    assert decode.count("_gemv_mha_v1") == 3
    assert not [name for name in prefill if "mha" in name]
    assert sum("Lte" in name or "AddReshMaxrSubExpSumDivMul" in name for name in prefill) == 3  # masked softmax


def test_mask_of_the_composed_attention_is_the_documented_one(built: tuple[Path, Any]) -> None:
    """Its CUDA source compares slot <= row + (kv_lengths - sequence_length)."""
    package, reports = built
    text = (package / reports["fp32"].engine.plan).read_bytes().decode("latin1")
    kernel = re.search(r'extern "C"[^\n]*AddCastIotaReshCastSubAddLteSele', text)
    assert kernel is not None
    start = text.index("read_input", kernel.end())
    source = text[start : text.index("write_output", start)]
    order = [source.index(step) for step in ("_add___myln_int64", "_sub___myln_int32", "_add___myln_int32", "_lte___")]
    assert order == sorted(order)


def test_two_builds_are_byte_identical(
    built: tuple[Path, Any], tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another folder, with another environment and other engines beside it."""
    package = copied(tiny_package, tmp_path / "a" / "package with spaces")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    monkeypatch.setenv("SOMETHING", "x" * 2000)
    build(Path("a/package with spaces"), precision="fp32", progress=False)
    build(package, precision="bf16", progress=False)
    first, second = trt_manifest(built[0]).files, trt_manifest(package).files
    assert len(second) == 6
    graphs = [name for name in second if not name.endswith(".engine")]
    assert {name: first[name] for name in graphs} == {name: second[name] for name in graphs}
    allowed = "import ctypes, sys; sys.exit(ctypes.CDLL(None).personality(0x0040000) == -1)"
    if subprocess.run([sys.executable, "-c", allowed], check=False).returncode != 0:
        pytest.skip("this system always randomises addresses (a container's seccomp profile?); the graphs were equal")
    assert {name: first[name] for name in second} == second


def test_rebuild_replaces_its_precision_and_links_the_others(built: tuple[Path, Any], tmp_path: Path) -> None:
    package = copied(built[0], tmp_path / "package")
    before = trt_manifest(package)
    inode = (package / "trt" / "model_bf16.onnx_data").stat().st_ino
    report = build(
        package,
        precision="fp16",
        max_batch_size=1,
        max_cache_length=40,
        prefill_chunk=7,
        compute_capabilities=["7.5", "12.0", "7.5"],
        progress=False,
    )
    after = trt_manifest(package)
    assert set(after.engines) == set(before.engines)
    assert after.engines["trt_rtx_fp16"] == report.engine != before.engines["trt_rtx_fp16"]
    assert report.engine.compute_capabilities == ("7.5", "12.0")
    assert report.engine.profiles["prefill"][0].max == (1, 7)
    assert after.variants["trt_fp16"].kv_cache.max_cache_length == 40
    assert after.engines["trt_rtx_bf16"] == before.engines["trt_rtx_bf16"]
    assert (package / "trt" / "model_bf16.onnx_data").stat().st_ino == inode
    check_files(package, after.files)


def test_one_row_stores_linear_weights_twice(tmp_path: Path) -> None:
    """Why the default batch is not 1."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
    checkpoint = make_checkpoint(tmp_path / "wide", num_hidden_layers=1, **wide)
    export(open_checkpoint(str(checkpoint)), tmp_path / "package")
    sizes = {n: build(tmp_path / "package", max_batch_size=n, progress=False).plan_bytes for n in (1, 2, 16)}
    linear = 2 * (4 * 512 * 512 + 3 * 512 * 1024)  # bytes
    assert 0.9 * linear < sizes[1] - sizes[2] < 1.3 * linear
    assert abs(sizes[16] - sizes[2]) < 0.1 * linear


def test_bias_builds(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "bias", attention_bias=True, num_hidden_layers=1)
    export(open_checkpoint(str(checkpoint)), tmp_path / "package")
    report = build(tmp_path / "package", progress=False)
    assert report.engine.layer_counts["ATTENTION_INPUT"] == 1


def test_progress_goes_to_standard_error(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(copied(small, tmp_path / "package"), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "building model_bf16.trt_rtx.engine: Parsing the graph" in err
    assert "Computing profile costs" in err


# Refusals.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int3"}, UsageError, r"precision 'int3': expected one of bf16, fp16, fp32"),
        ({"backend": "cuda"}, UsageError, r"backend 'cuda': expected one of trt_rtx, trt"),
        (
            {"backend": "trt", "compute_capabilities": ["9.0"]},
            BackendError,
            r"tensorrt .*pip install tensorrt --extra-i",
        ),
        ({"backend": "trt"}, UsageError, r"backend trt builds for the GPU at hand; give that one"),
        ({"compute_capabilities": ["8.9", "9.0", "10.0"]}, UsageError, r"capability 9\.0, 10\.0: .*full TensorRT"),
        ({"compute_capabilities": ["8.7"]}, UsageError, r"8\.7: TensorRT for RTX compiles for 7\.5, 8\.0"),
        ({"compute_capabilities": ["89", "sm_89"]}, UsageError, r"'89', 'sm_89': expected the form 8\.9"),
        ({"compute_capabilities": []}, UsageError, r"no compute capability"),
        ({"compute_capabilities": ["7.5", "8.9"]}, UsageError, r"7\.5: bf16 needs 8\.0 or newer; use --precision fp16"),
        ({"max_batch_size": 0}, UsageError, r"max_batch_size 0: expected 1 to 1024"),
        ({"max_cache_length": 257}, UsageError, r"max_cache_length 257: expected 1 to 256, the model's context"),
        ({"max_cache_length": 0}, UsageError, r"max_cache_length 0: expected 1"),
        ({"max_cache_length": 64, "prefill_chunk": 65}, UsageError, r"prefill_chunk 65: expected 1 to 64"),
        ({"prefill_chunk": 0}, UsageError, r"prefill_chunk 0: expected 1 to 256"),
    ],
)
def test_refused_before_anything_is_written(
    small: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(small, **options)
    assert not (small / "trt").exists()
    assert not list(small.glob(".trt*"))


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError):
        build(tmp_path / "nothing")


def test_package_without_fp32(small: Path, tmp_path: Path) -> None:
    package = copied(small, tmp_path / "package")
    document = read_sealed(package / MANIFEST_NAME)
    document["variants"]["bf16"] = document["variants"].pop("fp32")
    (package / MANIFEST_NAME).write_bytes(seal(document))
    with pytest.raises(VariantNotFoundError, match="no variant fp32"):
        build(package)


def test_tampered_weights(small: Path, tmp_path: Path) -> None:
    package = copied(small, tmp_path / "package")
    data = package / "onnx" / "model.onnx_data"
    raw = bytearray(data.read_bytes())
    raw[1000] ^= 1
    data.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"onnx/model\.onnx_data: sha256"):
        build(package)
    assert not (package / "trt").exists()


def test_engines_of_another_export_are_not_kept(built: tuple[Path, Any], tmp_path: Path, caplog: Any) -> None:
    package = copied(built[0], tmp_path / "package")
    document = read_sealed(package / MANIFEST_NAME)
    document["libraries"]["numpy"] = "1.0"
    (package / MANIFEST_NAME).write_bytes(seal(document))
    build(package, precision="fp16", progress=False)
    assert list(trt_manifest(package).engines) == ["trt_rtx_fp16"]
    assert not (package / "trt" / "model_bf16.onnx").exists()
    assert "built from another export" in caplog.text


def test_float16_overflow_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, checkpoint / "model.safetensors")
    export(open_checkpoint(str(checkpoint)), tmp_path / "package")
    with pytest.raises(
        FailedError, match=r"range of float16 in 1 of the tensors: lm_head\.weight; use --precision bf16"
    ):
        build(tmp_path / "package", precision="fp16", progress=False)
    assert not (tmp_path / "package" / "trt").exists()


def test_unusual_head_dim_is_warned_of(tmp_path: Path, caplog: Any) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", num_hidden_layers=1, hidden_size=48, num_key_value_heads=6)
    export(open_checkpoint(str(checkpoint)), tmp_path / "package")
    report = build(tmp_path / "package", progress=False)
    assert "head_dim 8: TensorRT has attention kernels for 16 to 256" in caplog.text
    decode, *_ = programs(tmp_path / "package" / report.engine.plan)
    assert decode


def test_head_dim_that_tensorrt_cannot_compile_is_refused_before_the_build(tmp_path: Path) -> None:
    """With head_dim 20 its compiler failed in a check of its own."""
    checkpoint = make_checkpoint(tmp_path / "c", num_hidden_layers=1, head_dim=20)
    export(open_checkpoint(str(checkpoint)), tmp_path / "package")
    with pytest.raises(UsageError, match="head_dim 20: in bf16 TensorRT takes multiples of 8; use --precision fp32"):
        build(tmp_path / "package", progress=False)
    assert build(tmp_path / "package", precision="fp32", progress=False).plan_bytes > 0


def test_damaged_engines_are_not_kept(built: tuple[Path, Any], tmp_path: Path, caplog: Any) -> None:
    package = Path(shutil.copytree(built[0], tmp_path / "package"))
    plan = package / "trt" / "model_fp16.trt_rtx.engine"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    build(package, precision="fp32", progress=False)
    assert "fp16 is not kept" in caplog.text
    manifest = load_trt_manifest(package)
    assert manifest is not None
    assert set(manifest.engines) == {"trt_rtx_bf16", "trt_rtx_fp32"}
    check_files(package, manifest.files)


# What the compiler's process does when it fails.


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


MATMUL = helper.make_node("MatMul", ["q", "w"], ["y"])


def test_ignored_input_is_an_error(tmp_path: Path) -> None:
    """TensorRT parses nonpad_kv_seqlen, ignores it, and only warns: the results would be wrong."""
    attention = helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["a"])
    graph = graph_of([attention, helper.make_node("MatMul", ["a", "w"], ["y"])], tmp_path)
    with pytest.raises(EngineBuildError, match=r"would not compute what the graph says: .*[Uu]nused"):
        engine_module._compile(request_for(graph), progress=False)
    assert not graph.with_suffix(".engine").exists()


def test_parser_errors_have_the_parsers_own_words(tmp_path: Path) -> None:
    graph = graph_of([MATMUL, helper.make_node("Frobnicate", ["q"], ["z"])], tmp_path, ("y", "z"))
    with pytest.raises(
        EngineBuildError, match=r"TensorRT 1\.7\.1\.116 cannot parse the graph: .*Plugin not found.* at Frobnicate"
    ):
        engine_module._compile(request_for(graph), progress=False)


def test_build_errors_have_tensorrts_own_words(tmp_path: Path) -> None:
    """A dedicated attention kernel for a head of 2 does not exist."""
    slices = [numpy_helper.from_array(np.array([i], np.int64), n) for n, i in (("from", 0), ("to", 2), ("axis", 3))]
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in slices]
    nodes += [helper.make_node("Slice", [n, "from", "to", "axis"], [f"{n}2"]) for n in "qkv"]
    nodes += [helper.make_node("Attention", ["q2", "k2", "v2"], ["y"]), helper.make_node("MatMul", ["q", "w"], ["z"])]
    graph = graph_of(nodes, tmp_path, ("y", "z"))
    with pytest.raises(EngineBuildError, match=r"could not build the engine: .*not supported by a dedicated kernel"):
        engine_module._compile(request_for(graph), progress=False)


def test_missing_layers_are_a_fusion_error(tmp_path: Path) -> None:
    graph = graph_of([MATMUL], tmp_path)
    with pytest.raises(FusionError, match=r"TensorRT network: ATTENTION_INPUT: expected 3, found 0"):
        engine_module._compile(request_for(graph, layer_counts={"ATTENTION_INPUT": 3}), progress=False)


def test_compile_in_this_process(tmp_path: Path) -> None:
    phases: list[str] = []
    graph = graph_of([MATMUL], tmp_path)
    result = compile_plan(request_for(graph, layer_counts={"MATRIX_MULTIPLY": 1}), phases.append)
    assert result.layer_counts == {"MATRIX_MULTIPLY": 1}
    assert result.aliases == {}
    assert phases[0] == "Parsing the graph"
    assert "Building engine" in phases
    assert graph.with_suffix(".engine").stat().st_size > 10_000


def test_disk_full_while_the_plan_is_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No space left on device"):
        engine_module._compile(request_for(graph_of([MATMUL], tmp_path), plan="/dev/full"), progress=False)


def test_unknown_capability_is_a_backend_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"compute capability 13\.7: unknown to TensorRT for RTX 1\.7\.1\.116"):
        compile_plan(request_for(graph_of([MATMUL], tmp_path), compute_capabilities=("13.7",)), lambda _: None)


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
def test_dead_compiler_leaves_the_old_engines(
    built: tuple[Path, Any], tmp_path: Path, monkeypatch: Any, source: str, error: type[Exception], message: str
) -> None:
    package = copied(built[0], tmp_path / "package")
    before = {p.name: p.stat().st_mtime_ns for p in (package / "trt").iterdir()}
    (tmp_path / "broken_compiler.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(engine_module, "COMPILER", "broken_compiler")
    with pytest.raises(error, match=message):
        build(package, progress=False)
    assert {p.name: p.stat().st_mtime_ns for p in (package / "trt").iterdir()} == before
    assert not list(package.glob(".trt*"))
    check_files(package, trt_manifest(package).files)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_compiler_dies_with_its_parent(tmp_path: Path) -> None:
    """A build that is killed must not go on, unseen, for minutes and with gigabytes."""
    request = tmp_path / "request.json"
    os.mkfifo(request)
    script = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'olmo2_export.engine_compiler', sys.argv[1]]\n"
        "print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=engine_module._environment()) as parent:
        assert parent.stdout is not None
        compiler = Path("/proc") / parent.stdout.readline().decode().strip()
        with request.open("w"):  # opens when the compiler is about to read it
            assert compiler.exists()
            parent.kill()
            parent.wait()
            deadline = time.monotonic() + 10
            while compiler.exists() and "Z" not in (compiler / "stat").read_text().rpartition(")")[2]:
                assert time.monotonic() < deadline
                time.sleep(0.02)


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


# The chooser.


def test_capabilities_are_those_of_the_library() -> None:
    library = nvidia.load_tensorrt("trt_rtx")
    known = [name for name in library.module.ComputeCapability.__members__ if name.startswith("SM")]
    assert known == ["SM" + c.replace(".", "") for c in nvidia.RTX_CAPABILITIES]
    assert library.version == nvidia.RTX_VERSION


def test_one_logger_per_process() -> None:
    assert nvidia.load_tensorrt("trt_rtx") is nvidia.load_tensorrt("trt_rtx")


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "_loaded", {})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(
        BackendError, match=r"cannot be imported .*; pip install tensorrt-rtx-cu13-libs==1\.7\.1\.116 tens"
    ):
        nvidia.load_tensorrt("trt_rtx")


def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"backend trt_rtx: tensorrt_rtx_bindings is not installed; pip install"):
        nvidia.check_installed("trt_rtx")


def test_int64_bindings_are_not_worth_a_warning(caplog: Any) -> None:
    library = nvidia.load_tensorrt("trt_rtx")
    with library.collected() as messages, caplog.at_level(logging.DEBUG):
        library.log.log(library.module.ILogger.WARNING, "Make sure input x has Int64 binding.")
        library.log.log(library.module.ILogger.WARNING, "something else")
        library.log.log(library.module.ILogger.VERBOSE, "chatter")
    assert [m.text for m in messages] == ["something else"]
    assert [r.levelno for r in caplog.records] == [logging.DEBUG, logging.WARNING]
