"""The runner for GPUs without one: onnxruntime's CPU provider in the place of the device, bound by address as on a GPU;
and the search for devices, against onnxruntime's own functions."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
from support.checkpoints import make_checkpoint

from olmo2_export.package.export import export
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import BackendError, ContextLengthError, InputError, UsageError
from runtimes.manifest import KVCacheSpec, Manifest, Variant
from runtimes.ort import open as ort_runner
from runtimes.ort.device import DeviceBuffer, DeviceRunner, compiled_shapes
from runtimes.ort.devices import PROVIDERS, Device, GpuMemory, find_device
from runtimes.ort.open import default_variant
from runtimes.ort.session import open_session
from runtimes.package import Package, open_package

CONTEXT = 256
RNG = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    return [int(i) for i in RNG.integers(0, 131, count)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "grouped")
    out = tmp_path_factory.mktemp("package") / "package"
    export(open_checkpoint(str(folder)), out, variants=("fp16",))
    return out


@pytest.fixture
def runner(package: Path) -> Iterator[DeviceRunner]:
    manifest = open_package(package).manifest
    variant = manifest.variants["fp16"]
    session = open_session(package / variant.graph, variant, 1)
    with DeviceRunner(session, variant, manifest.model, GpuMemory(kind="cpu"), capture=True) as opened:
        yield opened


def graph_ids(runner: DeviceRunner) -> list[str]:
    """Record the graph id of every run from here on."""
    seen: list[str] = []
    run = runner._run_bound

    def spy(session: Any, binding: Any, options: ort.RunOptions | None) -> None:
        assert options is not None
        seen.append(options.get_run_config_entry("gpu_graph_id"))
        run(session, binding, options)

    runner._run_bound = spy  # type: ignore[method-assign]
    return seen


def test_it_computes_what_the_host_runner_computes(package: Path, runner: DeviceRunner) -> None:
    """Ragged prefill, decode, candidates, blocks, chunks, truncate."""
    first, second, third = tokens(30), tokens(11), tokens(19)
    with open_runner(package, variant="fp16", threads=1) as host:
        for one in (host, runner):
            one.prefill([first, second])
        for step in range(5):
            assert np.array_equal(runner.decode([step, 9 - step]), host.decode([step, 9 - step]))
        for got, wanted in zip(runner.decode_top([3, 4]), host.decode_top([3, 4]), strict=True):
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)
        for one in (host, runner):
            one.truncate([12, 9])
        got, wanted = (one.prefill([third, first], all_positions=True) for one in (runner, host))
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert runner.cache_lengths == host.cache_lengths == (31, 39)
        for one in (host, runner):
            one.reset()
            one.prefill([first])
        assert np.array_equal(runner.decode_block(third), host.decode_block(third))


def test_slots_come_and_go_and_the_memory_grows_by_rows(package: Path, runner: DeviceRunner) -> None:
    """What the rows hold survives the move; one step computes any of them."""
    prompts = [tokens(n) for n in (21, 5, 33)]
    wanted = []
    with open_runner(package, variant="fp16", threads=1) as alone:
        for n, prompt in enumerate(prompts):
            alone.reset()
            alone.prefill([prompt])
            wanted.append([alone.decode([n + 1])[0], alone.decode([n + 2])[0]])
    slots = [runner.admit(prompt)[0] for prompt in prompts]
    assert slots == [0, 1, 2]
    assert (runner._device.rows, runner._device.version) == (4, 3)
    for round in range(2):
        logits = runner.step({slot: slot + 1 + round for slot in slots})
        for slot in slots:
            assert np.allclose(logits[slot], wanted[slot][round], atol=2e-2)
    runner.release(1)
    assert runner.admit(tokens(4))[0] == 1


def test_rows_that_come_are_zero_and_the_others_never_leave_the_device(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growing read all keys and values to the host, and wrote them back."""

    class Used(GpuMemory):
        def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
            value = super().allocate(shape, dtype)
            value.update_inplace(np.full(shape, 0x7C01, dtype))  # a NaN, as memory that was used before may hold
            return value

    variant = open_package(package).manifest.variants["fp16"]
    session = open_session(package / variant.graph, variant, 1)
    buffer = DeviceBuffer(variant.kv_cache, Used(kind="cpu"), session)
    buffer.reserve(2, [])
    written = {name: RNG.integers(0, 99, value.shape()).astype(np.uint16) for name, value in buffer._values.items()}
    for name, value in buffer._values.items():
        assert not value.numpy().any()
        value.update_inplace(written[name])
    with monkeypatch.context() as patch:
        patch.setattr(ort.OrtValue, "numpy", lambda _: pytest.fail("to the host"))
        buffer.reserve(5, [CONTEXT, 0])
    assert (buffer.rows, buffer.version) == (5, 2)
    for name, value in buffer._values.items():
        assert np.array_equal(value.numpy()[:2], written[name])
        assert not value.numpy()[2:].any()
    buffer.close()
    with pytest.raises(UsageError, match="closed"):
        buffer.reserve(1, [])


def test_a_prefix_is_computed_once_more_where_no_row_can_be_copied(package: Path, runner: DeviceRunner) -> None:
    prompt, more = tokens(21), tokens(9)
    with open_runner(package, variant="fp16", threads=1) as alone:
        wanted = [alone.prefill([[*prompt[:13], *more]])[0][0], alone.decode([4])[0]]
    first, _ = runner.admit(prompt)
    second = runner.copy_prefix(first, 13)
    runner.append(second, more)
    logits = runner.extend(second)
    assert logits is not None
    assert np.allclose(logits, wanted[0], atol=2e-2)
    runner.release(first)  # and none moves: the hole is the next one's
    assert np.allclose(runner.step({second: 4})[second], wanted[1], atol=2e-2)
    assert (runner._rows, runner.slots) == ({1: 1}, (1,))
    assert runner.begin([1]) == 0


def test_decode_steps_are_captured_once_per_number_of_rows_and_nothing_else_is(runner: DeviceRunner) -> None:
    seen = graph_ids(runner)
    runner.prefill([tokens(3), tokens(7)])
    assert seen == ["-1"]  # one padded call
    runner.decode([1, 2])
    step = runner._steps[2, None]
    addresses = [v.data_ptr() for v in (step.input_ids, step.attention_mask, *step.outputs.values())]
    runner.decode([3, 4])
    runner.decode_top([5, 6])
    assert seen[1:] == ["1", "1", "1"]
    assert addresses == [v.data_ptr() for v in (step.input_ids, step.attention_mask, *step.outputs.values())]
    assert step.attention_mask.shape() == [2, CONTEXT]
    assert step.attention_mask.numpy().sum(axis=1).tolist() == [6, 10]
    runner.reset()
    runner.prefill([tokens(1)])  # one token, but a prompt
    runner.decode([1])
    assert seen[4:] == ["-1", "2"]
    runner.reset()
    runner.prefill([tokens(2)] * 3)  # the memory moves: its graphs are not used again
    runner.decode([1] * 3)
    runner.reset()
    runner.prefill([tokens(2)] * 2)
    runner.decode([1] * 2)
    assert seen[6:] == ["-1", "3", "-1", "4"]


def test_long_prompts_come_in_chunks(runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(40)
    (whole,) = runner.prefill([ids])
    runner.reset()
    monkeypatch.setattr(DeviceRunner, "prefill_chunk", 16)
    seen = graph_ids(runner)
    (chunked,) = runner.prefill([ids])
    assert seen == ["-1"] * 3
    assert np.allclose(chunked, whole, atol=2e-2)


def test_the_whole_context_fits_and_not_one_token_more(runner: DeviceRunner) -> None:
    runner.prefill([tokens(CONTEXT - 1)])
    runner.decode([1])
    with pytest.raises(ContextLengthError):
        runner.decode([1])
    assert runner.cache_lengths == (CONTEXT,)


def test_memory_that_the_gpu_does_not_have_is_an_error_and_the_rows_live(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.prefill([tokens(5)])
    wanted = runner.decode([7]).copy()
    runner.truncate([5])

    def full(*_: object) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 98304")

    with monkeypatch.context() as patch:
        patch.setattr(GpuMemory, "allocate", full)
        with pytest.raises(ContextLengthError, match="2 rows of 256 tokens needs 196,608 bytes of the GPU's memory"):
            runner.admit(tokens(4))
    assert np.array_equal(runner.decode([7]), wanted)


def test_a_closed_runner_says_so(runner: DeviceRunner) -> None:
    runner.prefill([tokens(2)])
    runner.close()
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.prefill([tokens(2)])


def test_cuda_without_its_package_its_libraries_or_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's package is here; the rest is made up of what onnxruntime-gpu says."""
    with pytest.raises(BackendError, match="expected CUDAExecutionProvider; pip uninstall onnxruntime"):
        find_device("cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDERS["cuda"], PROVIDERS["cpu"]])
    monkeypatch.setattr(ort, "preload_dlls", mock.create_autospec(ort.preload_dlls))
    for text, remedy in (
        ("libcublasLt.so.13: cannot open shared object file", "brings CUDA's libraries"),
        ("libcuda.so.1: cannot open shared object file", "no NVIDIA driver"),
    ):
        monkeypatch.setattr("ctypes.CDLL", mock.Mock(side_effect=OSError(text)))
        with pytest.raises(BackendError, match=f"device cuda: {text.split(':')[0]}.*{remedy}"):
            find_device("cuda")
    monkeypatch.setattr("ctypes.CDLL", mock.Mock())
    with pytest.raises(BackendError, match="no usable GPU"):
        find_device("cuda")


def test_a_cuda_session_is_asked_for_with_capture_and_read_back() -> None:
    options = ort.SessionOptions()
    cuda = Device("cuda", GpuMemory())
    assert cuda.configure(options, capture=True) == [
        (PROVIDERS["cuda"], {"enable_cuda_graph": "1"}),
        PROVIDERS["cpu"],
    ]
    assert cuda.configure(options, capture=False)[0] == (PROVIDERS["cuda"], {})
    cuda.check([PROVIDERS["cuda"], PROVIDERS["cpu"]])
    with pytest.raises(BackendError, match="gave CPUExecutionProvider, expected CUDAExecutionProvider"):
        cuda.check([PROVIDERS["cpu"]])


def plugin(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_library_path = lambda: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_nv_rtx_without_its_plugin_a_driver_or_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"device nv-rtx: .*pip install 'olmo2-export\[nv-rtx\]'"):
        find_device("nv-rtx")
    plugin(monkeypatch, str(tmp_path / "libmissing.so"))
    with pytest.raises(BackendError, match="device nv-rtx: the plugin does not load"):  # by onnxruntime itself
        find_device("nv-rtx")
    register = mock.create_autospec(ort.register_execution_provider_library)
    monkeypatch.setattr(ort, "register_execution_provider_library", register)
    with pytest.raises(BackendError, match="no GPU that TensorRT for RTX runs on"):
        find_device("nv-rtx")
    register.assert_called_once_with(PROVIDERS["nv-rtx"], str(tmp_path / "libmissing.so"))


def test_nv_rtx_adds_its_gpu_to_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "unused")
    gpu = mock.create_autospec(ort.OrtEpDevice, instance=True)
    gpu.ep_name = PROVIDERS["nv-rtx"]
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [gpu])
    device = find_device("nv-rtx")
    gpu.memory_info.assert_called_once_with(ort.OrtDeviceMemoryType.DEFAULT)
    options = mock.create_autospec(ort.SessionOptions, instance=True)
    assert device.configure(options, capture=False) == []
    options.add_provider_for_devices.assert_called_once_with([gpu], {})
    options = mock.create_autospec(ort.SessionOptions, instance=True)
    spec = KVCacheSpec("shared", "float16", 1, 2, 16, 256)
    assert device.configure(options, capture=False, shapes=compiled_shapes(spec)) == []
    cache = "past_key_values.0.{}:{}x2x256x16"
    ((_, found),) = (call.args for call in options.add_provider_for_devices.call_args_list)
    assert found == {
        f"nv_profile_{bound}_shapes": f"input_ids:{ids},attention_mask:{mask},num_logits_to_keep:{keep},"
        f"{cache.format('key', rows)},{cache.format('value', rows)}"
        for bound, ids, mask, keep, rows in (
            ("min", "1x1", "1x1", 0, 1),
            ("opt", "1x1", "1x256", 1, 1),
            ("max", "16x256", "16x256", 256, 16),
        )
    }


def test_a_device_that_compiles_for_shapes_takes_so_many_rows(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}

    def open_here(graph: Path, variant: Variant, threads: int | None, **options: Any) -> ort.InferenceSession:
        opened.update(options)
        return open_session(graph, variant, threads)

    monkeypatch.setattr(ort_runner, "find_device", lambda name: Device(name, GpuMemory(kind="cpu")))
    monkeypatch.setattr(ort_runner, "open_session", open_here)
    with open_runner(package, variant="fp16", device="nv-rtx") as runner:
        assert opened["shapes"] is not None
        assert not opened["capture"]
        runner.prefill([tokens(2)] * 16)
        runner.reset()
        with pytest.raises(InputError, match="17 rows; this device takes 16, device cuda any number"):
            runner.prefill([tokens(2)] * 17)


def test_the_profile_names_the_inputs_of_the_graph(package: Path) -> None:
    variant = open_package(package).manifest.variants["fp16"]
    assert compiled_shapes(variant.kv_cache).keys() == {spec.name for spec in variant.inputs}
    for spec in variant.inputs:
        for shape in compiled_shapes(variant.kv_cache)[spec.name]:
            assert len(shape) == max(len(spec.shape), 1)


def test_the_default_variant_of_a_device(package: Path) -> None:
    manifest = open_package(package).manifest
    entry = manifest.variants["fp16"]

    def with_variants(*names: str) -> Manifest:
        return dataclasses.replace(manifest, variants=dict.fromkeys(names, entry))

    def default(device: str, *names: str) -> str | None:
        return default_variant(Package(package, with_variants(*names), "checksum"), device)

    assert default("cpu", "fp32", "q4f16", "bf16", "fp16") == "fp32"
    assert default("cpu", "fp32", "q8", "q4", "bf16") == "q4"
    assert default("cpu", "fp32", "q8", "bf16") == "q8"
    assert default("cuda", "fp32", "q4f16", "bf16", "fp16") == "bf16"
    assert default("nv-rtx", "q4f16", "fp16") == "fp16"
    assert default("cuda", "fp32", "q4f16") == "q4f16"
    with pytest.raises(BackendError, match="device cuda: the package has fp32, q4; export it with --variant bf16"):
        default("cuda", "fp32", "q4")


def test_a_variant_for_gpus_is_the_default_of_no_cpu(package: Path) -> None:
    manifest = open_package(package).manifest
    entry = manifest.variants["fp16"]
    bf16 = dataclasses.replace(entry, kv_cache=dataclasses.replace(entry.kv_cache, dtype="bfloat16"))
    both = dataclasses.replace(manifest, variants={"bf16": bf16, "fp16": entry})
    alone = dataclasses.replace(manifest, variants={"bf16": bf16})
    assert default_variant(Package(package, both, "checksum"), "cpu") == "fp16"  # which a CPU runs
    assert default_variant(Package(package, alone, "checksum"), "cpu") == "bf16"


def test_a_variant_that_needs_a_newer_onnxruntime_is_passed_over(package: Path) -> None:
    manifest = open_package(package).manifest
    entry = manifest.variants["fp16"]
    newer = dataclasses.replace(entry, min_onnxruntime="99.1")
    both = dataclasses.replace(
        manifest, variants={"q4": newer, "fp32": dataclasses.replace(entry, min_onnxruntime="1.23")}
    )
    alone = dataclasses.replace(manifest, variants={"q4": newer})
    assert default_variant(Package(package, both, "checksum"), "cpu") == "fp32"
    assert default_variant(Package(package, alone, "checksum"), "cpu") == "q4"
