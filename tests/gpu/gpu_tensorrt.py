"""Engines, run: parity per precision, the cache in place, ragged batches, CUDA graphs, runtime cache, errors, refit.

Every row runs for each TensorRT that is installed and knows this GPU.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_onnxruntime import GREEDY_PROMPTS, NEAR_TIE, first_difference
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from transformers import Olmo2ForCausalLM

from olmo2_export.debug.debug import compare_variant
from olmo2_export.engine.build import build, refit
from olmo2_export.engine.options import EngineOptions
from olmo2_export.evaluate.revisions import sweep
from olmo2_export.package.export import export
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from runtimes import open_runner
from runtimes.errors import InputError
from runtimes.generation.generate import generate_tokens
from runtimes.manifest import Precision
from runtimes.text.sampling import Sampler
from runtimes.trt import open as trt_runner
from runtimes.trt.nvidia import TensorRTBackend

Record = Callable[[str, object], None]
PROMPTS = [[5, 9, 77, 300, 12], [8, 4000], [17] * 40]


def built(package: Path, backend: TensorRTBackend, precision: Precision, **flags: bool) -> Path:
    """Build for this GPU and return the package."""
    options = EngineOptions(
        precision, backend, compute_capabilities=["current"], max_cache_length=256, prefill_chunk=64
    )
    build(package, replace(options, **flags), progress=False)
    return package


def text(package: Path, backend: TensorRTBackend, precision: Precision) -> list[int]:
    """Twelve greedy tokens."""
    with open_runner(package, variant=f"trt_{precision}", backend=backend) as runner:
        return list(generate_tokens(runner, PROMPTS[0], sampler=Sampler(), max_new_tokens=12))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int4", "int8", "fp8"])
def test_engine_parity(
    precision: Precision, backend: TensorRTBackend, demo_package: Path, demo: Checkpoint, record_property: Record
) -> None:
    """Every case of verify at the gate of the precision; with it, that lower_right is relative to kv_lengths."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    built(demo_package, backend, precision)
    (report,) = verify(demo_package, demo, variants=[f"trt_{precision}"], backend=backend)
    worst = max(report.cases, key=lambda case: case.error_ratio)
    record_property("figure", f"error {worst.error_ratio:.2f} x PyTorch's, KL {worst.kl_mean:.1e} ({worst.mode})")
    assert report.passed, [case.failures for case in report.cases] + [c.failures for c in report.checks]


def test_engine_slots(backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """Slots of different lengths decode as they do alone; what waits is not written over."""
    with open_runner(built(demo_package, backend, "fp16"), variant="trt_fp16", backend=backend) as runner:
        alone = []
        for prompt in PROMPTS:
            runner.reset()
            alone.append(list(generate_tokens(runner, prompt, sampler=Sampler(), max_new_tokens=12)))
        runner.reset()
        texts = {}
        for prompt in PROMPTS:
            slot, logits = runner.admit(prompt)  # type: ignore[attr-defined]
            texts[slot] = [int(logits.argmax())]
        for _ in range(11):
            logits = runner.step({slot: ids[-1] for slot, ids in texts.items()})  # type: ignore[attr-defined]
            for slot, row in logits.items():
                texts[slot].append(int(row.argmax()))
    same = sum(texts[slot] == wanted for slot, wanted in enumerate(alone))
    record_property("figure", f"{same} of {len(PROMPTS)} texts equal to the single runs")
    assert same >= 2


def test_engine_candidates(backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """The decode step that moves a few bytes picks what the logits say."""
    with open_runner(built(demo_package, backend, "fp16"), variant="trt_fp16", backend=backend) as runner:
        runner.prefill([PROMPTS[0]])
        logits = runner.decode([92])
        runner.reset()
        runner.prefill([PROMPTS[0]])
        ids, values = runner.decode_top([92])
    assert ids[0, 0] == logits[0].argmax()
    assert np.isclose(values[0, 0], logits[0].max(), rtol=1e-3)
    record_property("figure", f"{ids.nbytes + values.nbytes} bytes a step instead of {logits.nbytes:,}")


def test_engine_refuses_beyond_its_profile(
    backend: TensorRTBackend, demo_package: Path, record_property: Record
) -> None:
    """More rows than it was built for: one line with the numbers."""
    with open_runner(built(demo_package, backend, "fp16"), variant="trt_fp16", backend=backend) as runner:
        with pytest.raises(InputError) as caught:
            runner.prefill([[1, 2]] * 5)
        record_property("figure", str(caught.value))
        assert "5" in str(caught.value)
        runner.prefill([[1, 2]] * 4)


def test_engine_runtime_cache(backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """The second start finds what the first compiled for this GPU."""
    if backend == "trt":
        pytest.skip("full TensorRT compiles nothing when it loads")
    text(built(demo_package, backend, "fp16"), backend, "fp16")  # pays for what a process pays once
    package = built(demo_package, backend, "bf16")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with open_runner(package, variant="trt_bf16", backend=backend) as runner:
            runner.prefill([PROMPTS[0]])
            runner.decode([5])
        seconds.append(time.perf_counter() - started)
    (kernels,) = (package / "trt").glob("model_bf16.*.jit")
    size = kernels.stat().st_size
    record_property("figure", f"first start {seconds[0]:.2f} s, second {seconds[1]:.2f} s, {size / 1e6:.1f} MB kept")
    assert size > 1000
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize("flag", ["weight_streaming", "portable"])
def test_engine_flag(
    flag: str,
    backend: TensorRTBackend,
    demo_package: Path,
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine whose weights may stay on the host, or that runs on other versions and GPUs, gives the same text."""
    if flag == "portable" and backend == "trt_rtx":
        pytest.skip("TensorRT for RTX has no such thing")
    plain = text(built(demo_package, backend, "fp16"), backend, "fp16")
    built(demo_package, backend, "fp16", **{flag: True})
    assert text(demo_package, backend, "fp16") == plain
    if flag == "weight_streaming":  # the demo fits; it must say the same with half of its weights on the host

        def half(engine: Any, *_: object, **__: object) -> None:
            engine.weight_streaming_budget_v2 = engine.streamable_weights_size // 2

        monkeypatch.setattr(trt_runner, "_stream_weights", half)
        assert text(demo_package, backend, "fp16") == plain
    record_property("figure", "12 tokens equal")


@pytest.mark.parametrize("option", ["latency", "top_k"])
def test_engine_option(option: str, backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """An engine for one row, or that picks eight candidates, gives the text of the plain one."""
    plain = text(built(demo_package, backend, "bf16"), backend, "bf16")
    engine = EngineOptions("bf16", backend, ["current"], max_cache_length=256, prefill_chunk=64)
    engine = replace(engine, profile="latency") if option == "latency" else replace(engine, top_k=8)
    build(demo_package, engine, progress=False)
    assert text(demo_package, backend, "bf16") == plain
    record_property("figure", "12 tokens equal")


def test_engine_timing_cache(
    backend: TensorRTBackend, demo_package: Path, tmp_path: Path, record_property: Record
) -> None:
    """The second build takes its measurements from the file."""
    if backend == "trt_rtx":
        pytest.skip("TensorRT for RTX has no such thing")
    options = EngineOptions("bf16", backend, ["current"], timing_cache=tmp_path / "timings")
    first, second = (build(demo_package, options, progress=False).compile_seconds for _ in range(2))
    record_property("figure", f"first build {first:.1f} s, second {second:.1f} s")
    assert (tmp_path / "timings").stat().st_size > 0
    assert second < first


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (40, 8)])
def test_engine_random(
    heads: int, kv_heads: int, backend: TensorRTBackend, tmp_path: Path, record_property: Record
) -> None:
    """Randomised norms, the head layouts of the 1B and the 32B, at the gate of bf16."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 32 * heads}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", intermediate_size=256, **shape)))
    export(checkpoint, tmp_path / "package")
    built(tmp_path / "package", backend, "bf16")
    (report,) = verify(tmp_path / "package", checkpoint, variants=["trt_bf16"], backend=backend)
    worst = max(report.cases, key=lambda case: case.error_ratio)
    record_property("figure", f"error {worst.error_ratio:.2f} x PyTorch's ({worst.mode})")
    assert report.passed, [case.failures for case in report.cases]


def test_engine_greedy(backend: TensorRTBackend, demo_package: Path, demo: Checkpoint, record_property: Record) -> None:
    """64 greedy tokens of five prompts equal those of transformers on the same GPU, but for near-ties."""
    model = Olmo2ForCausalLM.from_pretrained(demo.folder, dtype=torch.bfloat16).to("cuda").eval()
    equal = 0
    with open_runner(built(demo_package, backend, "bf16"), variant="trt_bf16", backend=backend) as runner:
        for prompt in GREEDY_PROMPTS:
            runner.reset()
            ours = list(generate_tokens(runner, prompt, sampler=Sampler(), max_new_tokens=64))
            equal += first_difference(model, prompt, ours, NEAR_TIE["bf16"]) is None
    record_property("figure", f"{equal} of {len(GREEDY_PROMPTS)} prompts equal, the others part at a near-tie")
    assert equal >= 1


def with_another_norm(out: Path) -> Path:
    """Write the demo's checkpoint with one norm the other way round."""
    checkpoint = Path(shutil.copytree(open_checkpoint("demo").folder, out))
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].flip(0).contiguous()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def test_engine_refit(backend: TensorRTBackend, demo_package: Path, tmp_path: Path, record_property: Record) -> None:
    """Other weights in a plan give the text of an engine that was built with them."""
    if backend == "trt_rtx":
        pytest.skip("TensorRT for RTX has no such thing")
    checkpoint, other = with_another_norm(tmp_path / "checkpoint"), tmp_path / "other"
    export(open_checkpoint(str(checkpoint)), other)
    wanted = text(built(other, backend, "fp16"), backend, "fp16")
    source = built(demo_package, backend, "fp16", refit=True)
    report = refit(other, source, EngineOptions("fp16", backend), progress=False)
    assert text(other, backend, "fp16") == wanted != text(source, backend, "fp16")
    record_property("figure", f"refit in {report.seconds:.1f} s, 12 tokens equal to those of a build")


def test_engine_sweep(backend: TensorRTBackend, tmp_path: Path, record_property: Record) -> None:
    """Two revisions on engines: each is PyTorch's with its own weights, and the second engine is not built anew."""
    shutil.copytree(open_checkpoint("demo").folder, tmp_path / "revisions" / "step1")
    with_another_norm(tmp_path / "revisions" / "step2")
    names, out = ["step1", "step2"], tmp_path / "out"
    found = sweep(str(tmp_path / "revisions"), names, out, variant="trt_bf16", backend=backend, max_tokens=1000)
    assert [one.engine for one in found] == ["built", "refitted" if backend == "trt" else "built"]
    record_property("figure", f"{found[1].engine}: KL {found[1].kl_mean_nats:.1e}, {found[1].export_s:.1f} s")
    assert all(one.kl_mean_nats < 1e-3 for one in found)  # 0.006 with the weights of the other
    assert found[1].change_kl_mean_nats is not None
    assert found[1].change_kl_mean_nats > 0.003  # 0.006 in float32


def test_engine_layers(backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """Every tensor of the first call, TensorRT against onnxruntime, with Polygraphy."""
    built(demo_package, backend, "fp16")
    differences, first = compare_variant(demo_package, "trt_fp16", backend)
    worst = max(differences, key=lambda difference: difference.relative)
    record_property("figure", f"{len(differences)} tensors, at most {worst.relative:.1e} ({worst.name})")
    assert first is None, first


def test_engine_cuda_graph(backend: TensorRTBackend, demo_package: Path, record_property: Record) -> None:
    """A step that is a replayed CUDA graph gives what a prefill of the same token gives, and takes no longer."""
    with open_runner(built(demo_package, backend, "fp16"), variant="trt_fp16", backend=backend) as runner:
        runner.prefill([PROMPTS[0]])
        steps, seconds = [], []
        for token in range(20, 40):
            started = time.perf_counter()
            steps.append(runner.decode([token])[0])
            seconds.append(time.perf_counter() - started)
        contexts = runner._session._decode.values()  # type: ignore[attr-defined]
        captured = any(context.graph is not None for context in contexts)
        runner.reset()
        (wanted,) = runner.prefill([[*PROMPTS[0], *range(20, 40)]], all_positions=True)
    error = float(np.abs(np.stack(steps) - wanted[-20:]).max())
    first, later = 1e3 * seconds[0], 1e3 * sorted(seconds[5:])[len(seconds[5:]) // 2]
    record_property("figure", f"logits within {error:.1e}; first step {first:.2f} ms, later {later:.3f} ms")
    assert error < 0.05
    assert later <= first
    assert captured or backend == "trt_rtx"  # which records by itself, and does not tell
