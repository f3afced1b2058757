"""Engines on a GPU that is none: what is refused, memory, CUDA graphs, compiled kernels that are kept."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx_bindings as real  # type: ignore[import-untyped]
from support.fake_gpu import CODES, FakeCudart, Plan, fake_tensorrt
from support.static_model import (
    CAPABILITY,
    CAPACITY,
    VERSION,
    VOCAB,
    edit_engine,
    engine,
    plan_bytes,
    reference,
    variant,
    write_engines,
    write_package,
    write_trt_manifest,
)

import runtimes
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.static import load_static_graph, static_variant
from runtimes import open_runner
from runtimes.cli import main
from runtimes.errors import (
    BackendError,
    FailedError,
    InputError,
    IntegrityError,
    Olmo2ExportError,
    PackageError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import MANIFEST_NAME, TensorSpec
from runtimes.package import open_package
from runtimes.runners.static import StaticRunner
from runtimes.trt import cuda, jit_cache, nvidia
from runtimes.trt.session import plan_memory

BACKENDS = ("trt_rtx", "trt")
CACHE_BYTES = 2 * 3 * 2 * CAPACITY * 3 * 4  # key and value; rows, heads, slots, head_dim, float32


@dataclass
class Machine:
    """A package with an engine of each TensorRT, and a GPU."""

    package: Path
    cudart: FakeCudart
    plans: dict[str, Plan]

    def open(self, backend: str = "trt_rtx", **options: Any) -> StaticRunner:
        runner = open_runner(self.package, backend=backend, **options)  # type: ignore[arg-type]
        assert isinstance(runner, StaticRunner)
        return runner

    def refused(self, kind: type[Olmo2ExportError], message: str, backend: str = "trt_rtx", *, loaded: int = 0) -> str:
        """Expect one line, and nothing left on the GPU."""
        with pytest.raises(kind, match=message) as caught:
            self.open(backend)
        assert "\n" not in str(caught.value)
        assert self.plans[backend].loads == loaded
        del caught
        assert self.cudart._memory == {}
        assert self.cudart._streams == {}
        return ""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    package = write_package(tmp_path / "package")
    cudart = FakeCudart()
    manifest = open_package(package).trt
    assert manifest is not None
    entry = manifest.variants["trt_fp32"]
    plans = {e.backend: Plan(e, entry, package / entry.graph) for e in manifest.engines.values()}
    monkeypatch.setattr(cuda, "cudart", cudart)
    for backend in BACKENDS:
        known = {plan_bytes(f"{backend}_fp32"): plans[backend]}
        monkeypatch.setitem(nvidia._loaded, backend, fake_tensorrt(backend, VERSION, known, cudart))  # type: ignore[arg-type]
    return Machine(package, cudart, plans)


def ids(length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCAB, length)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4  # see test_static_runner.py


# How it is opened


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"variant": "trt_fp32"}, {"device": "cuda"}, {"check_hashes": False}])
def test_opens_computes_and_leaves_nothing(machine: Machine, backend: str, options: dict[str, Any]) -> None:
    with machine.open(backend, **options) as runner:
        assert runner.variant == variant()
        assert (runner.max_cache_length, runner.top_k) == (CAPACITY, 4)
        close(runner.prefill([ids(9)])[0], reference(ids(9))[-1:])
    assert machine.cudart._memory == machine.cudart._streams == machine.cudart._graphs == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, r"device cpu: backend trt runs on the GPU, as device cuda; leave it out"),
        ({"device": "nv-rtx"}, "device nv-rtx: backend trt runs on the GPU"),
        ({"threads": 2}, "threads 2: backend trt runs on the GPU; leave them out"),
    ],
)
def test_options_that_mean_nothing_are_refused(machine: Machine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        machine.open("trt", **options)


def test_engine_that_is_not_there_is_refused_with_the_command_that_builds_it(machine: Machine) -> None:
    build = f"run: olmo2-export build {machine.package} --backend trt"
    with pytest.raises(VariantNotFoundError, match=rf"no engine of variant 'trt_int4' .* {build} --precision int4"):
        machine.open("trt", variant="trt_int4")
    with pytest.raises(VariantNotFoundError, match="no engine of variant 'fp32' for backend trt, it has those of trt_"):
        machine.open("trt", variant="fp32")
    manifest = open_package(machine.package).trt
    assert manifest is not None
    write_trt_manifest(machine.package, variant(), manifest.engines["trt_rtx_fp32"])
    with pytest.raises(VariantNotFoundError, match=rf"no engine for backend trt, it has none; {build}$"):
        machine.open("trt")
    (machine.package / "trt" / MANIFEST_NAME).unlink()
    with pytest.raises(VariantNotFoundError, match=rf"no engine for backend trt, it has none; {build}$"):
        machine.open("trt")


def test_commands_quote_a_path_with_a_space(tmp_path: Path, machine: Machine) -> None:
    package = Path(shutil.copytree(machine.package, tmp_path / "sp ace"))
    machine = replace(machine, package=package)
    with pytest.raises(VariantNotFoundError, match=rf"run: olmo2-export build '{package}' --backend trt --precision"):
        machine.open("trt", variant="trt_int4")
    machine.cudart._capability = "9.0"
    machine.refused(BackendError, f"olmo2-export build '{package}' --backend trt_rtx --precision fp32")


def test_first_engine_by_name_is_taken(machine: Machine) -> None:
    manifest = open_package(machine.package).trt
    assert manifest is not None
    fp32 = manifest.engines["trt_rtx_fp32"]
    other = replace(fp32, name="trt_rtx_bf16", variant="trt_bf16", backend_version="0.0.0")
    write_trt_manifest(machine.package, variant(), fp32, other)
    with pytest.raises(PackageError, match="engine trt_rtx_bf16 is of variant trt_bf16, which the manifest has not"):
        machine.open()
    machine.open(variant="trt_fp32").close()


def test_without_cuda_bindings_the_extra_is_named(machine: Machine) -> None:
    code = f"""
import sys
sys.modules["cuda"] = None
from runtimes import BackendError, open_runner
for backend in ("trt_rtx", "trt"):
    try:
        open_runner({str(machine.package)!r}, backend=backend)
    except BackendError as error:
        print(error)
"""
    root = Path(runtimes.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    first, second = result.stdout.splitlines()
    assert "pip install 'olmo2-export[tensorrt-rtx]'" in first
    assert "pip install 'olmo2-export[tensorrt]'" in second


def test_neither_torch_nor_cupy_is_imported() -> None:
    code = """
import sys
for name in ("torch", "cupy", "onnx", "onnxruntime", "tensorrt_rtx_bindings", "olmo2_export"):
    sys.modules[name] = None
import runtimes.trt.open, runtimes.cli
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(runtimes.__file__).parent.parent)


def test_real_engine_gets_as_far_as_the_gpu(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the builder writes into the manifest is what the runner expects; then the real library wants a driver."""
    package = Path(shutil.copytree(tiny_package, tmp_path / "tiny"))
    build(package, EngineOptions(compute_capabilities=["8.9"], max_cache_length=64, top_k=3), progress=False)
    status, count = cuda.cudart.cudaGetDeviceCount()
    if status == CODES.cudaSuccess and count:
        pytest.skip("there is a GPU: tests/gpu runs engines")
    with pytest.raises(BackendError, match="CUDA finds no GPU"):
        open_runner(package, backend="trt_rtx", variant="trt_bf16")
    monkeypatch.setattr(cuda, "cudart", FakeCudart())
    with pytest.raises(BackendError, match=r"cannot load the engine: .*\(cudaError 35: CUDA driver version"):
        open_runner(package, backend="trt_rtx")
    caplog.clear()


# What is refused before the plan is loaded


@pytest.mark.parametrize("name", ["trt/model_fp32.trt_rtx.engine", "trt/model_fp32.onnx"])
@pytest.mark.parametrize("fault", ["flip", "cut", "remove"])
def test_changed_file_is_refused(machine: Machine, name: str, fault: str) -> None:
    path = machine.package / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if fault == "flip" else content[:-1])
    if fault == "remove":
        path.unlink()
    machine.refused(IntegrityError, rf"{name}: .*; build it again: olmo2-export build .* --precision fp32")


def test_engine_of_another_export_is_refused(machine: Machine, tmp_path: Path) -> None:
    other = write_package(tmp_path / "other", capacity=16)
    (machine.package / MANIFEST_NAME).write_bytes((other / MANIFEST_NAME).read_bytes())
    machine.refused(IntegrityError, "built from another export")


def test_changed_manifest_is_refused(machine: Machine) -> None:
    path = machine.package / "trt" / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"8.9"', b'"9.0"'))
    machine.refused(IntegrityError, "changed since it was written")


def test_another_version_is_refused(machine: Machine) -> None:
    edit_engine(machine.package, "trt_rtx_fp32", backend_version="1.6.0.1")
    machine.refused(BackendError, r"built with trt_rtx 1\.6\.0\.1, 1\.7\.1\.116 is installed: install 1\.6\.0\.1, or")


def test_another_gpu_is_refused(machine: Machine) -> None:
    machine.cudart._capability = "9.0"
    machine.refused(
        BackendError,
        r"engine trt_rtx_fp32 was built for compute capability 8\.9, 12\.0; Fake RTX has 9\.0: "
        r"olmo2-export build .* --backend trt_rtx --precision fp32 --compute-capability 9\.0",
    )


@pytest.mark.parametrize("capability", ["9.0", "12.1"])
def test_portable_engine_runs_on_other_gpus_and_later_versions(machine: Machine, capability: str) -> None:
    machine.cudart._capability = capability
    edit_engine(machine.package, "trt_fp32", flags=("portable",), backend_version="1.6.0.1")
    with machine.open("trt") as runner:
        close(runner.prefill([ids(9)])[0], reference(ids(9))[-1:])


@pytest.mark.parametrize(
    ("precision", "capability", "oldest", "other"),
    [(p, "7.5", "8.0", "fp16") for p in ("fp32", "fp16", "bf16", "int4", "int8")]
    + [("fp8", "7.5", "8.9", "fp16"), ("fp8", "8.6", "8.9", "bf16")],
)
def test_portable_engine_needs_a_gpu_that_computes_in_its_precision(
    machine: Machine, precision: str, capability: str, oldest: str, other: str
) -> None:
    edit_engine(machine.package, "trt_fp32", flags=("portable",), precision=precision, compute_capabilities=("12.0",))
    machine.cudart._capability = capability
    machine.refused(
        BackendError,
        rf"engine trt_fp32 is portable, and in {precision} that is compute capability {oldest} or newer; Fake RTX has "
        rf"{capability}: build one for it: olmo2-export build .* --backend trt --precision {other}$",
        "trt",
    )
    machine.cudart._capability = oldest
    machine.open("trt").close()


def test_no_gpu_is_said(machine: Machine) -> None:
    machine.cudart._faults["cudaGetDeviceCount"] = CODES.cudaErrorNoDevice
    machine.refused(BackendError, "CUDA finds no GPU")


ENTRY_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "aliases": ({"aliases": {"present.0.key": "past_key_values.0.key"}}, "its alias table is not that of its graph"),
    "swapped aliases": (
        {"aliases": {f"present.0.{a}": f"past_key_values.0.{b}" for a, b in (("key", "value"), ("value", "key"))}},
        "its alias table is not that of its graph",
    ),
    "capacity": ({"max_cache_length": 64}, "a KV cache of 2 x 32 x 3, expected 2 x 64 x 3"),
    "batch": ({"max_batch_size": 4}, r"profile decode ends at \(3, 1\), expected \(4, 1\)"),
    "chunk": ({"prefill_chunk": 6}, r"profile prefill ends at \(3, 5\), expected \(3, 6\)"),
    "no profiles": ({"profiles": {}}, "are not decode and prefill of all inputs"),
}


@pytest.mark.parametrize("fault", ENTRY_FAULTS)
def test_manifest_that_contradicts_itself_is_refused(machine: Machine, fault: str) -> None:
    changes, message = ENTRY_FAULTS[fault]
    edit_engine(machine.package, "trt_rtx_fp32", **changes)
    machine.refused(PackageError, f"engine trt_rtx_fp32: .*{message}.*; build it again: olmo2-export build")


def test_memory_that_is_not_there_is_refused_before_loading(machine: Machine) -> None:
    machine.cudart._total = CACHE_BYTES
    machine.refused(
        ResourceError,
        r"the engine needs 0\.0 MB more of GPU memory, 0\.0 MB are free: weights 0\.0 MB, KV cache 0\.0 MB "
        r"\(3 rows of 32 tokens\), inputs and outputs 0\.0 MB; close other programs, or build it with a smaller",
    )


# What is refused after it is loaded


def swapped_profiles(plan: Plan) -> None:
    shapes = [{r.name: [r.min, r.opt, r.max] for r in ranges} for ranges in plan.entry.profiles.values()]
    plan.profiles = shapes[::-1]


ENGINE_FAULTS: dict[str, tuple[Callable[[Plan], object], str]] = {
    "no alias": (
        lambda p: setattr(p, "aliases", {}),
        r"present\.0\.key: shares the memory of None, expected past_key_values\.0\.key",
    ),
    "wrong alias": (
        lambda p: setattr(p, "aliases", {**p.entry.aliases, "present.0.value": "past_key_values.0.key"}),
        r"present\.0\.value: shares the memory of past_key_values\.0\.key, expected past_key_values\.0\.value",
    ),
    "alias too many": (
        lambda p: setattr(p, "aliases", {**p.entry.aliases, "logits": "past_key_values.0.key"}),
        r"logits: shares the memory of past_key_values\.0\.key, expected None",
    ),
    "mode": (lambda p: p.modes.update(logit_index=real.TensorIOMode.OUTPUT), r"logit_index: \('OUTPUT', 'int64'"),
    "dtype": (
        lambda p: p.dtypes.update({"past_key_values.0.key": real.DataType.HALF}),
        r"past_key_values\.0\.key: \('INPUT', 'float16', \(-1, 2, 32, 3\)\), expected \('INPUT', 'float32'",
    ),
    "unknown dtype": (lambda p: p.dtypes.update(top_ids=real.DataType.INT32), r"top_ids: \('OUTPUT', 'INT32'"),
    "shape": (lambda p: p.shapes.update(logits=(-1, 14)), r"\(-1, 14\)\), expected \('OUTPUT', 'float32', \(-1, 13\)"),
    "location": (
        lambda p: p.locations.update(write_indices=real.TensorLocation.HOST),
        "write_indices: not in the GPU's memory",
    ),
    "extra": (lambda p: setattr(p, "extra_names", ("position_ids",)), "position_ids: unexpected"),
    "missing": (
        lambda p: setattr(p, "variant", replace(p.variant, outputs=p.variant.outputs[1:])),
        "logits: missing",
    ),
    "swapped profiles": (swapped_profiles, r"input_ids in profile decode: \[\(1, 1\), \(1, 5\), \(3, 5\)\], expected"),
    "one profile": (lambda p: setattr(p, "profiles", [{}]), "1 optimization profiles, expected 2"),
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_engine_that_is_not_what_its_manifest_says_is_refused(machine: Machine, fault: str) -> None:
    change, message = ENGINE_FAULTS[fault]
    change(machine.plans["trt"])
    machine.refused(
        PackageError, f"engine trt_fp32 is not what its manifest says: .*{message}.*; build it again", "trt", loaded=1
    )


def test_plan_that_tensorrt_refuses_is_one_line(machine: Machine) -> None:
    (machine.package / "trt/model_fp32.trt_rtx.engine").write_bytes(b"some other")
    edit_engine(machine.package, "trt_rtx_fp32")
    machine.refused(BackendError, "cannot load the engine: magic tag does not match; build it again")


@pytest.mark.parametrize("backend", BACKENDS)
def test_contexts_that_cannot_be_made_leave_nothing(machine: Machine, backend: str) -> None:
    machine.plans[backend].contexts = False
    machine.refused(FailedError, "makes no execution context: no memory for a context", backend, loaded=1)


def test_activations_that_do_not_fit_are_refused_with_numbers(machine: Machine) -> None:
    machine.plans["trt"].activation_bytes = 1 << 24
    machine.refused(
        ResourceError,
        r"needs 16\.8 MB more of GPU memory, 16\.8 MB are free: weights 0\.0 MB, activations 16\.8 MB, KV cache",
        "trt",
        loaded=1,
    )


@pytest.mark.parametrize("nth", range(1, 6))
def test_memory_that_another_takes_meanwhile_is_an_error_that_leaves_nothing(machine: Machine, nth: int) -> None:
    """The budget fits, and one of the allocations fails all the same."""
    function = "cudaMalloc" if nth < 5 else "cudaMallocHost"
    allocate, count = getattr(machine.cudart, function), 0

    def failing(size: int) -> Any:
        nonlocal count
        count += 1
        return (CODES.cudaErrorMemoryAllocation, None) if count == min(nth, 4) or nth == 5 else allocate(size)

    object.__setattr__(machine.cudart, function, failing)
    machine.refused(ResourceError, "out of GPU memory: .* bytes (for|of)", "trt", loaded=1)


def test_budget_is_said_before_it_is_allocated(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    allocated: list[str] = []
    with caplog.at_level(logging.INFO, logger="runtimes"):
        caplog.handler.addFilter(lambda _: bool(allocated.extend(machine.cudart._calls)) or True)
        machine.open().close()
    assert (
        "trt_rtx_fp32 on Fake RTX, GPU memory: weights 0.0 MB, activations 0.0 MB, KV cache 0.0 MB (3 rows of 32 "
        "tokens), inputs and outputs 0.0 MB; 16.8 MB of 16.8 MB are free" in caplog.text
    )
    assert "cudaMalloc" not in allocated


GB, MB = 10**9, 10**6
BESIDES = 1_000 + CACHE_BYTES + 1_536  # activations, KV cache, inputs and outputs


def stream(machine: Machine, total: int, taken: int = 0) -> None:
    """Let the engine have 6 GB of weights, of which 5.9 GB can be streamed, for 20 MB of scratch memory."""
    plan, machine.cudart._total = machine.plans["trt"], total
    edit_engine(machine.package, "trt_fp32", flags=("weight_streaming",))
    plan.entry = replace(plan.entry, flags=("weight_streaming",))
    plan.weight_bytes, plan.streamable_bytes, plan.scratch_bytes = 6 * GB, 5_900 * MB, 20 * MB
    if taken:
        machine.cudart._charge(taken)


@pytest.mark.parametrize(
    ("total", "taken", "budget"),
    [
        (8 * GB, 0, 5_900 * MB),
        (6 * GB + BESIDES, 0, 5_900 * MB),
        (4 * GB, 0, 4 * GB - 100 * MB - BESIDES - 20 * MB - 256 * MB),
        (8 * GB, 4 * GB, 4 * GB - 100 * MB - BESIDES - 20 * MB - 400 * MB),
        (6 * GB + BESIDES - 1, 0, 5_900 * MB - 1 - 20 * MB - (6 * GB + BESIDES - 1) // 20),
        (300 * MB, 0, 0),
        (120 * MB + BESIDES, 0, 0),
    ],
)
def test_weights_are_streamed_as_far_as_they_do_not_fit(
    machine: Machine, total: int, taken: int, budget: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Besides what the engine needs, 256 MB or 5 % of the GPU's memory stay free, if there are so many."""
    stream(machine, total, taken)
    with machine.open("trt") as runner:
        session: Any = runner._session
        assert session._engine.weight_streaming_budget_v2 == budget
        assert session._activation_size == 1_000 + (20 * MB if budget < 5_900 * MB else 0)
        close(runner.prefill([ids(9)])[0], reference(ids(9))[-1:])
    warning = f"{budget / MB:,.1f} MB of 5,900.0 MB of weights stay on the GPU, the others are copied there at each"
    assert (warning in caplog.text) is (budget < 5_900 * MB)


def test_scratch_memory_that_does_not_fit_is_refused(machine: Machine) -> None:
    stream(machine, 120 * MB + BESIDES - 1)
    machine.refused(
        ResourceError, r"needs 20\.0 MB more of GPU memory, 20\.0 MB are free: .*activations 20\.0 MB", "trt", loaded=1
    )


def test_weight_streaming_budget_that_is_not_taken_is_an_error(machine: Machine) -> None:
    stream(machine, 4 * GB)
    machine.plans["trt"].stubborn = True
    machine.refused(FailedError, "refused a weight streaming budget of 0 bytes", "trt", loaded=1)


def test_without_weight_streaming_the_same_memory_is_too_little(machine: Machine) -> None:
    machine.cudart._total = 9_000
    machine.refused(ResourceError, "more of GPU memory", "trt")


# Running


@pytest.mark.parametrize("backend", BACKENDS)
def test_engine_that_fails_is_an_error_and_the_runner_goes_on(machine: Machine, backend: str) -> None:
    with machine.open(backend) as runner:
        runner.prefill([ids(9)])
        machine.plans[backend].fail_at = machine.plans[backend].runs
        with pytest.raises(FailedError, match="failed to run the engine: injected failure"):
            runner.decode([3])
        assert runner.cache_lengths == (9,)
        close(runner.decode([3]), reference(np.append(ids(9), 3))[-1:])


def test_step_moves_a_few_bytes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[str, int]] = []

    def spied(name: str) -> Callable[..., None]:
        call = getattr(cuda, name)

        def spy(target: int, source: int, size: int, stream: Any) -> None:
            copies.append((name, size))
            call(target, source, size, stream)

        return spy

    for name in ("copy_to_device", "copy_to_host"):
        monkeypatch.setattr(cuda, name, spied(name))
    with machine.open() as runner:
        runner.prefill([ids(3), ids(2)])
        copies.clear()
        runner.decode_top([1, 2])
        # three tensors of two int64 at multiples of 256; four ids and four logits for two rows, in one piece
        assert copies == [("copy_to_device", 2 * 256 + 16), ("copy_to_host", 256 + 2 * 4 * 4)]
        copies.clear()
        runner.decode([1, 2])
        assert copies[1] == ("copy_to_host", 2 * VOCAB * 4)
        copies.clear()
        runner.prefill([ids(6), ids(1)])
        assert [name for name, _ in copies] == ["copy_to_device", "copy_to_host", "copy_to_device", "copy_to_host"]


def test_inputs_of_a_step_lie_before_the_long_one() -> None:
    """So that one copy of a few bytes brings them all."""
    sizes = plan_memory(engine("trt", variant(), chunk=CAPACITY), variant())
    assert sizes.inputs == {"logit_index": 0, "write_indices": 256, "input_ids": 512}
    assert sizes.inputs_size == 512 + 3 * CAPACITY * 8
    assert (sizes.caches, sizes.caches_size) == ({"0.key": 0, "0.value": CACHE_BYTES // 2}, CACHE_BYTES)


def test_vectors_and_hidden_states_lie_behind_what_each_step_moves() -> None:
    plain = variant()
    shape = ("batch_size", "sequence_length", 4)
    wide = replace(
        plain,
        inputs=(*plain.inputs, TensorSpec("inputs_embeds", "float32", shape, "embeddings")),
        outputs=(*plain.outputs, TensorSpec("hidden_states.0", "float32", shape, "hidden_state")),
    )
    entry = engine("trt", plain, chunk=CAPACITY)
    before, sizes = plan_memory(entry, plain), plan_memory(entry, wide)
    assert sizes.inputs == {**before.inputs, "inputs_embeds": before.inputs_size}
    assert sizes.outputs == {**before.outputs, "hidden_states.0": before.outputs_size}
    assert sizes.outputs_size - before.outputs_size >= 3 * CAPACITY * 4 * 4


def test_full_tensorrt_launches_one_graph_per_batch_size(machine: Machine) -> None:
    plan = machine.plans["trt"]
    with machine.open("trt") as runner:
        for rows in (1, 2, 1, 2):
            runner.reset()
            runner.prefill([ids(4)] * rows)
            for n in range(4, 9):
                close(runner.decode([int(ids(9)[n])] * rows), np.stack([reference(ids(9)[: n + 1])[-1]] * rows))
        # four prefills, and per batch size one run and one that is recorded
        assert plan.runs == 4 + 2 * 2
        assert machine.cudart._calls.count("cudaGraphLaunch") == 4 * 5 - 2
        assert len(plan.made) == 3
        assert len(machine.cudart._graphs) == 2
    assert machine.cudart._graphs == {}


def test_tensorrt_for_rtx_records_by_itself(machine: Machine) -> None:
    plan = machine.plans["trt_rtx"]
    with machine.open() as runner:
        for rows in (1, 2):
            runner.reset()
            runner.prefill([ids(4)] * rows)
            for _ in range(4):
                runner.decode([1] * rows)
    assert "cudaStreamBeginCapture" not in machine.cudart._calls
    assert plan.runs == 2 * 5
    strategies = [config.cuda_graph_strategy.name for config in plan.made]
    assert strategies == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]  # prefill, decode


def test_graph_that_cannot_be_recorded_is_said_once_and_done_without(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.cudart._faults["cudaGraphInstantiate"] = CODES.cudaErrorInvalidValue
    with machine.open("trt") as runner:
        for rows in (1, 2):
            runner.reset()
            runner.prefill([ids(4)] * rows)
            for n in range(4, 9):
                close(runner.decode([int(ids(9)[n])] * rows), np.stack([reference(ids(9)[: n + 1])[-1]] * rows))
    assert caplog.text.count("decoding goes on without CUDA graphs") == 1


def test_what_the_engine_was_not_built_for_is_refused_with_the_remedy(machine: Machine) -> None:
    with machine.open() as runner:
        with pytest.raises(
            InputError,
            match=r"4 rows, but engine trt_rtx_fp32 was built for batch <= 3; build it with --max-batch-size 4",
        ):
            runner.prefill([[1]] * 4)
        with pytest.raises(InputError, match=r"6 tokens in one call, .* for 5; build it with --prefill-chunk 6"):
            runner._session.run(0, np.zeros((1, 6), np.int64), np.array([0]), np.array([0]), ())


def test_rows_that_begin_between_alignments_serve_batches_but_no_slots(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = write_package(tmp_path / "odd", capacity=11)  # 264 bytes a row
    manifest = open_package(package).trt
    assert manifest is not None
    entry = manifest.variants["trt_fp32"]
    plans = {plan_bytes("trt_fp32"): Plan(manifest.engines["trt_fp32"], entry, package / entry.graph)}
    monkeypatch.setitem(nvidia._loaded, "trt", fake_tensorrt("trt", VERSION, plans, machine.cudart))
    with open_runner(package, backend="trt") as runner:
        assert isinstance(runner, StaticRunner)
        rows = [ids(9), ids(3), ids(11)]
        for logits, row in zip(runner.prefill(rows), rows, strict=True):
            close(logits, reference(row, 11)[-1:])
        runner.reset()
        runner.admit([1])
        with pytest.raises(
            UsageError, match=r"row 1 begins at no multiple of 256 bytes, as a row .* has 264; for slot"
        ):
            runner.admit([1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_of_the_command_line_is_that_of_onnxruntime(
    demo_package: Path,
    tmp_path: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The real graph of the demo model, through the fake engine, picked from candidates, greedily and drawn."""
    package = Path(shutil.copytree(demo_package, tmp_path / "demo"))
    model = open_package(package).manifest.model
    graph, _ = load_static_graph(package, open_package(package).manifest, "fp32", 64, 5)
    entry = static_variant(model, "fp32", 64, 5, {})
    (package / "trt").mkdir()
    save_graph(graph, package / entry.graph)
    write_engines(package, entry)
    manifest = open_package(package).trt
    assert manifest is not None
    cudart = FakeCudart(total=1 << 26)
    plans = {plan_bytes(e.name): Plan(e, entry, package / entry.graph) for e in manifest.engines.values()}
    monkeypatch.setattr(cuda, "cudart", cudart)
    monkeypatch.setitem(nvidia._loaded, backend, fake_tensorrt(backend, VERSION, plans, cudart))  # type: ignore[arg-type]
    command = ["generate", str(package), "--prompt", "And God saw the light, that it was", "--max-new-tokens", "24"]
    for sampling in ([], ["--temperature", "0.8", "--top-k", "4", "--seed", "3"]):
        assert main([*command, *sampling, "--threads", "1"]) == 0
        expected = capfd.readouterr().out
        with caplog.at_level(logging.INFO, logger="runtimes"):
            assert main([*command, *sampling, "--backend", backend]) == 0
        assert capfd.readouterr().out == expected
        assert len(expected) > 40
    assert f"{backend}_fp32 on Fake RTX, GPU memory: weights 0.0 MB" in caplog.text
    assert cudart._memory == {}


# Compiled kernels


def jit_files(package: Path) -> list[Path]:
    return [p for p in (package / "trt").iterdir() if ".jit" in p.name]


def test_compiled_kernels_are_kept_and_loaded(machine: Machine) -> None:
    plan = machine.plans["trt_rtx"]
    machine.open().close()
    digest = hashlib.sha256(plan_bytes("trt_rtx_fp32")).hexdigest()
    (path,) = jit_files(machine.package)
    assert path.name == f"model_fp32.trt_rtx.engine.{digest[:16]}.sm{CAPABILITY.replace('.', '')}.jit"
    assert plan.caches == []
    plan.made.clear()
    before = path.stat()
    machine.open().close()
    assert plan.caches == [b"kernels of 2 contexts"]
    same = path.stat()
    assert (same.st_ino, same.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # nothing new, nothing written
    machine.open().close()
    assert path.stat().st_ino != before.st_ino
    machine.open("trt").close()
    assert jit_files(machine.package) == [path]


def test_kernels_that_cannot_be_serialised_leave_nothing_on_the_gpu(machine: Machine) -> None:
    machine.plans["trt_rtx"].cache_fails = True
    runner = machine.open()
    with pytest.raises(RuntimeError, match="no memory to serialize"):
        runner.close()
    assert machine.cudart._memory == machine.cudart._streams == {}
    runner.close()  # and again does nothing


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "writable", "foreign", "folder"])
def test_kept_kernels_that_cannot_be_trusted_are_not_loaded(
    machine: Machine, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.open().close()
    (path,) = jit_files(machine.package)
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[-1] ^= 1
    if fault in ("flip", "cut", "empty"):
        path.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[fault])
    elif fault == "writable":
        path.chmod(0o666)
    elif fault == "folder":
        path.unlink()
        path.mkdir()
    stranger = SimpleNamespace(st_uid=os.geteuid() + 1, st_mode=0o100644)
    with monkeypatch.context() as patch:
        if fault == "foreign":
            patch.setattr(jit_cache.os, "fstat", lambda _: stranger)
        with machine.open() as runner:
            close(runner.prefill([ids(5)])[0], reference(ids(5))[-1:])
    assert machine.plans["trt_rtx"].caches == []
    assert path.name in caplog.text
    if fault != "folder":
        machine.open().close()
        assert len(machine.plans["trt_rtx"].caches) == 1
    assert not list(path.parent.glob(".jit-*"))


def test_folder_that_cannot_be_written_keeps_no_kernels(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", denied)
    with caplog.at_level(logging.INFO, logger="runtimes"):
        machine.open().close()
    assert "compiled kernels are not kept" in caplog.text
    assert jit_files(machine.package) == []
