"""What is chosen for the user, and what is refused, with its remedy, before anything expensive."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.matrix import refused

from olmo2_export.engine import options as engine_options
from olmo2_export.engine.options import EngineOptions, ResolvedOptions, gpu_at_hand, resolve_options
from runtimes.errors import BackendError, UsageError
from runtimes.manifest import ModelSpec

MODEL = ModelSpec("olmo2", 131, 96, 3, 6, 2, 16, 256)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries are there."""
    monkeypatch.setattr(engine_options, "check_installed", lambda _: None)


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(engine_options, "gpu_at_hand", lambda _: capability)


def test_defaults() -> None:
    assert resolve_options(EngineOptions(), MODEL) == ResolvedOptions(
        ("8.0", "8.6", "8.9", "12.0"), "compact", 4, 256, 256, ()
    )
    assert resolve_options(EngineOptions(), replace(MODEL, max_position_embeddings=9000)) == ResolvedOptions(
        ("8.0", "8.6", "8.9", "12.0"), "compact", 4, 4096, 512, ()
    )


@pytest.mark.parametrize(
    ("options", "profile", "batch"),
    [
        (EngineOptions(profile="latency"), "latency", 1),
        (EngineOptions(max_batch_size=1), "latency", 1),
        (EngineOptions(profile="compact"), "compact", 4),
        (EngineOptions(profile="compact", max_batch_size=7), "compact", 7),
    ],
)
def test_profile_and_batch(options: EngineOptions, profile: str, batch: int) -> None:
    resolved = resolve_options(options, MODEL)
    assert (resolved.profile, resolved.max_batch_size) == (profile, batch)


@pytest.mark.usefixtures("installed")
def test_every_option_of_full_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_gpu(monkeypatch, "9.0")
    options = EngineOptions(
        backend="trt", portable=True, weight_streaming=True, refit=True, timing_cache=tmp_path / "cache"
    )
    resolved = resolve_options(options, MODEL)
    assert resolved.compute_capabilities == ("9.0",)
    assert resolved.flags == ("portable", "refit", "weight_streaming")
    assert resolve_options(replace(options, compute_capabilities=["9.0"]), MODEL).compute_capabilities == ("9.0",)
    with pytest.raises(UsageError, match=r"8\.9: backend trt builds for the GPU at hand, which is 9\.0"):
        resolve_options(replace(options, compute_capabilities=["8.9"]), MODEL)


def test_current_is_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, "8.9")
    options = EngineOptions(compute_capabilities=["current", "12.0", "8.9"])
    assert resolve_options(options, MODEL).compute_capabilities == ("8.9", "12.0")
    with_gpu(monkeypatch, "9.0")
    with pytest.raises(UsageError, match=r"9\.0: TensorRT for RTX compiles for .*--backend trt on that GPU"):
        resolve_options(options, MODEL)
    with_gpu(monkeypatch, "7.5")
    with pytest.raises(UsageError, match=r"7\.5: bf16 needs 8\.0 or newer; use --precision fp16"):
        resolve_options(options, MODEL)


def no_gpu() -> None:
    raise BackendError("CUDA finds no GPU")


@pytest.mark.parametrize(
    ("backend", "remedy"), [("trt_rtx", "--compute-capability 8.9"), ("trt", "--backend trt_rtx builds without one")]
)
def test_current_without_a_gpu(monkeypatch: pytest.MonkeyPatch, backend: Any, remedy: str) -> None:
    import runtimes.trt.cuda

    monkeypatch.setattr(runtimes.trt.cuda, "find_gpu", no_gpu)
    with pytest.raises(BackendError, match=f"no GPU to ask .CUDA finds no GPU.; .*{remedy}"):
        gpu_at_hand(backend)


def test_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"tensorrt .*not installed; pip install 'olmo2-export\[tensorrt\]' --extra"):
        resolve_options(EngineOptions(backend="trt"), MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, r"precision 'int3': expected one of bf16, fp16, fp32"),
        ({"backend": "cuda"}, r"backend 'cuda': expected one of trt_rtx, trt"),
        ({"profile": "fast"}, r"profile 'fast': expected one of latency, compact"),
        ({"profile": "latency", "max_batch_size": 2}, r"2: profile latency has one row; use --profile compact"),
        ({"profile": "compact", "max_batch_size": 1}, r"1: profile compact needs 2 or more; use --profile latency"),
        ({"backend": "trt", "compute_capabilities": ["8.9", "9.0"]}, r"backend trt builds for the GPU at hand"),
        ({"compute_capabilities": ["8.9", "9.0", "10.0"]}, r"9\.0, 10\.0: .*use full TensorRT \(--backend trt on that"),
        ({"compute_capabilities": ["8.7"]}, r"8\.7: TensorRT for RTX compiles for 7\.5, 8\.0"),
        ({"compute_capabilities": ["13.7"]}, r"13\.7: not known here; known are 7\.5, .*12\.1"),
        ({"compute_capabilities": ["89", "sm_89"]}, r"'89', 'sm_89': expected the form 8\.9, or current"),
        ({"compute_capabilities": []}, r"no compute capability"),
        ({"compute_capabilities": ["7.5", "8.9"]}, r"7\.5: bf16 needs 8\.0 or newer; use --precision fp16"),
        (
            {"precision": "int4", "compute_capabilities": ["7.5"]},
            r"7\.5: int4 needs 8\.0 or newer; use --precision fp1",
        ),
        (
            {"precision": "int8", "compute_capabilities": ["7.5"]},
            r"7\.5: int8 needs 8\.0 or newer; use --precision fp1",
        ),
        ({"precision": "fp8", "compute_capabilities": ["8.6"]}, r"8\.6: fp8 needs 8\.9 or newer; use --precision int8"),
        ({"max_batch_size": 0}, r"max_batch_size 0: expected 1 to 1024"),
        ({"max_cache_length": 257}, r"max_cache_length 257: expected 1 to 256, the model's context"),
        ({"max_cache_length": 0}, r"max_cache_length 0: expected 1"),
        ({"max_cache_length": 64, "prefill_chunk": 65}, r"prefill_chunk 65: expected 1 to 64"),
        ({"prefill_chunk": 0}, r"prefill_chunk 0: expected 1 to 256"),
        ({"portable": True}, r"portable: TensorRT for RTX has no such thing; full TensorRT has: --backend trt"),
        ({"refit": True, "timing_cache": Path("x")}, r"refit, timing_cache: TensorRT for RTX has no such thing"),
        ({"backend": "trt", "timing_cache": Path("/no/such/x")}, r"timing_cache /no/such/x: no such folder; make it"),
    ],
)
def test_refused(options: dict[str, Any], message: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve_options(EngineOptions(**options), MODEL)
    precision = options.get("precision", "bf16")
    for words, what in (
        ("or newer", f"engines in `{precision}` for older GPUs"),
        ("portable", "portable engines of TensorRT for RTX"),
    ):
        if words in message:
            refused(request, what, caught.value)


def test_fp8_is_built_for_those_that_have_it() -> None:
    options = EngineOptions("fp8")
    assert resolve_options(options, MODEL).compute_capabilities == ("8.9", "12.0")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_head_dim_that_tensorrt_cannot_compile(precision: Any, request: pytest.FixtureRequest) -> None:
    """With head_dim 20 its compiler failed in a check of its own."""
    with pytest.raises(
        UsageError, match=f"head_dim 20: in {precision} TensorRT takes multiples of 8; use --precision"
    ) as caught:
        resolve_options(EngineOptions(precision), replace(MODEL, head_dim=20))
    refused(request, f"other sizes of heads, engines in `{precision}`", caught.value)
    assert resolve_options(EngineOptions("fp32"), replace(MODEL, head_dim=20)).max_batch_size == 4


def test_unusual_head_dim_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    resolve_options(EngineOptions(), replace(MODEL, head_dim=8))
    assert "head_dim 8: TensorRT has attention kernels for 16 to 256" in caplog.text


@pytest.mark.usefixtures("installed")
def test_timings_that_cannot_be_kept_are_said_before_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_gpu(monkeypatch, "9.0")
    monkeypatch.setattr(engine_options.os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=r"cache: its folder is not writable; choose another file"):
        resolve_options(EngineOptions(backend="trt", timing_cache=tmp_path / "cache"), MODEL)
