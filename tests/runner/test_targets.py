"""Where graphs run: a row each, and everything that offers, chooses or refuses follows the rows."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

import runtimes.targets as targets
from runtimes import open_runner
from runtimes.cli import parse_args
from runtimes.errors import BackendError, UsageError
from runtimes.manifest import EngineBackend, KVCacheSpec, Variant
from runtimes.package import Package
from runtimes.targets import TARGETS, Backend, Device, Target, backends, devices, find_target, runnable, runs
from runtimes.trt.nvidia import RTX_VERSION

ROOT = Path(__file__).parents[2]


def variant(name: str, form: str, dtype: str) -> Variant:
    cache = KVCacheSpec(form, dtype, 3, 2, 16, 256)
    return Variant(name, "fp32", f"{name}.onnx", (), 23, (), (), cache, {})


GRAPHS = {
    "fp16": ("shared", "float16"),
    "fp32": ("concat", "float32"),
    "bf16": ("shared", "bfloat16"),
    "q8": ("shared", "float32"),
    "q4": ("shared", "int8"),
    "q4f16": ("shared", "float16"),
}


def package(
    *names: str, graphs: dict[str, tuple[str, str]] = GRAPHS, engines: tuple[tuple[str, str], ...] = ()
) -> Package:
    """A package of these variants, and of engines: variant and backend of each."""
    found = [SimpleNamespace(variant=name, backend=backend) for name, backend in engines]
    trt = SimpleNamespace(engines=dict(enumerate(found))) if engines else None
    manifest = SimpleNamespace(variants={name: variant(name, *graphs[name]) for name in names})
    return cast("Package", SimpleNamespace(manifest=manifest, trt=trt))


def test_the_rows_are_the_closed_sets() -> None:
    assert backends() == get_args(Backend)
    assert devices() == get_args(Device)
    assert backends(engines=True) == get_args(EngineBackend)
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    assert len({(target.backend, target.device) for target in TARGETS}) == len(TARGETS)


def test_pip_knows_the_extras() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {target.extra for target in TARGETS} <= known.keys()
    assert find_target().install == "pip install 'olmo2-export[cpu]'"
    assert find_target().reinstall == "pip install --force-reinstall 'olmo2-export[cpu]'"
    gpu = "pip uninstall onnxruntime && pip install --force-reinstall 'olmo2-export[gpu]'"
    assert find_target("ort", "cuda").reinstall == gpu
    index = " --extra-index-url https://pypi.nvidia.com"
    assert find_target("trt").install == f"pip install 'olmo2-export[tensorrt]'{index}"


def test_the_extra_of_tensorrt_for_rtx_is_the_version_whose_plans_are_read() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"tensorrt-rtx-cu13-bindings=={RTX_VERSION}" in known[find_target("trt_rtx").extra]


@pytest.mark.parametrize(
    ("backend", "device", "name"),
    [
        ("ort", None, "cpu"),
        ("ort", "cpu", "cpu"),
        ("ort", "cuda", "cuda"),
        ("ort", "nv-rtx", "nv-rtx"),
        ("trt_rtx", None, "trt_rtx"),
        ("trt", None, "trt"),
        ("trt", "cuda", "trt"),
    ],
)
def test_a_backend_and_a_device_are_a_target(backend: str, device: str | None, name: str) -> None:
    target = find_target(backend, device)
    assert target.name == name
    assert target.on_gpu == (name != "cpu")
    assert target.needs_engine == (backend != "ort")
    if device is not None and backend == "ort":
        assert target.flags == ("--backend", backend, "--device", device)
    if backend != "ort":
        assert target.flags == ("--backend", backend)


@pytest.mark.parametrize(
    ("backend", "device", "error", "message"),
    [
        ("cuda", None, BackendError, "backend 'cuda': there is ort, trt_rtx, trt"),
        ("ort", "gpu", BackendError, "device 'gpu': there is cpu, cuda, nv-rtx"),
        ("trt", "cpu", UsageError, "device cpu: backend trt runs on the GPU, as device cuda; leave it out"),
        ("trt_rtx", "nv-rtx", UsageError, "device nv-rtx: backend trt_rtx runs on the GPU, as device cuda; leave"),
    ],
)
def test_what_is_no_target_is_refused(backend: str, device: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_target(backend, device)


def test_a_graph_runs_where_its_cache_does() -> None:
    def where(form: str, dtype: str) -> list[str]:
        return [target.name for target in TARGETS if runs(variant("x", form, dtype), target)]

    assert where("concat", "float32") == ["cpu", "cuda"]
    assert where("concat", "float16") == ["cpu", "cuda"]
    assert where("shared", "float32") == where("shared", "int8") == where("shared", "uint8") == ["cpu"]
    assert where("shared", "float16") == ["cpu", "cuda", "nv-rtx"]
    assert where("shared", "bfloat16") == ["cuda", "nv-rtx"]
    assert where("static", "float32") == where("static", "float16") == ["cpu", "cuda", "trt_rtx", "trt"]
    assert where("static", "bfloat16") == ["cuda", "trt_rtx", "trt"]
    assert where("paged", "float32") == []


def test_the_best_of_a_package_comes_first() -> None:
    whole = package(*GRAPHS)
    assert runnable(whole, find_target("ort")) == ["q4", "q8", "fp32", "fp16", "q4f16"]
    assert runnable(whole, find_target("ort", "cuda")) == ["bf16", "fp16", "q4f16"]  # fp32 runs, but is slow
    assert runnable(whole, find_target("ort", "nv-rtx")) == ["bf16", "fp16", "q4f16"]
    assert runnable(package("fp32", "q4"), find_target("ort", "cuda")) == []
    assert runnable(package("bf16"), find_target("ort")) == []


def test_of_engines_those_of_the_backend_are_taken_by_name() -> None:
    both = package("fp32", engines=(("trt_int4", "trt"), ("trt_fp16", "trt"), ("trt_bf16", "trt_rtx")))
    assert runnable(both, find_target("trt")) == ["trt_fp16", "trt_int4"]
    assert runnable(both, find_target("trt_rtx")) == ["trt_bf16"]
    assert runnable(package("fp32"), find_target("trt")) == []


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target that is not there, as another author would add one."""
    row: Any = {"name": "npu", "backend": "npu", "device": "npu", "extra": "npu", "variants": ("q2", "q4")}
    words = {"backend_words": "a made-up runtime", "device_words": "a made-up chip"}
    made = Target(**row, **words, caches={"shared": ("int8",)}, takes_threads=False)
    monkeypatch.setattr(targets, "TARGETS", (*TARGETS, made))
    return made


def test_a_new_row_is_offered_and_chosen(npu: Target, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert backends() == ("ort", "trt_rtx", "trt", "npu")
    assert find_target("npu") == find_target("npu", "npu") == npu
    graphs = GRAPHS | {"q2": ("shared", "int8"), "q3": ("shared", "int8")}
    assert runnable(package("q3", "q4", "fp32", "q2", graphs=graphs), npu) == ["q2", "q4"]
    with pytest.raises(SystemExit):
        parse_args(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "npu: a made-up runtime" in said
    assert "npu (a made-up chip)" in said
    with pytest.raises(UsageError, match="threads 2: backend npu"):
        open_runner(tmp_path, backend="npu", threads=2)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="device 'gpu': there is cpu, cuda, nv-rtx, npu"):
        find_target("ort", "gpu")
    with pytest.raises(UsageError, match="device npu: backend trt runs on the GPU"):
        find_target("trt", "npu")
