"""The CUDA provider of onnxruntime: parity of every precision, greedy text, ragged batches, slots.

Gates are those of `olmo2-export verify`, which feeds prefill, decode and chunked prefill, alone and in a ragged batch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import factors, write_adapter
from support.checkpoints import make_checkpoint
from transformers import Olmo2ForCausalLM

from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.package.export import export
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.hub import DEMO
from olmo2_export.weights.merged import open_merged
from runtimes import open_runner
from runtimes.generation.generate import generate_tokens
from runtimes.manifest import Precision
from runtimes.text.sampling import Sampler

Record = Callable[[str, object], None]
VARIANTS = ("bf16", "fp16", "q4f16")
GREEDY_PROMPTS = [[11 * (n + 1), 7 * (n + 3), 400 + n] for n in range(5)]
NEAR_TIE = {"bf16": 0.15, "fp16": 0.02}


def check(package: Path, checkpoint: Checkpoint, variant: str, device: str, record: Record) -> None:
    """Verify one variant and note how far from PyTorch it is."""
    (report,) = verify(package, checkpoint, variants=[variant], device=device)
    worst = max(report.cases, key=lambda case: case.error_ratio)
    record("figure", f"error {worst.error_ratio:.2f} x PyTorch's, KL {worst.kl_mean:.1e} ({worst.mode})")
    assert report.passed, [case.failures for case in report.cases] + [c.failures for c in report.checks]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_parity_trained(
    variant: str, demo_package: Path, demo: Checkpoint, device: str, record_property: Record
) -> None:
    """The demo model."""
    if device == "cpu" and variant == "bf16":
        pytest.skip("the CPU provider has no bfloat16")
    check(demo_package, demo, variant, device, record_property)


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_cuda_parity_random(variant: str, tmp_path: Path, device: str, record_property: Record) -> None:
    """Randomised norms, grouped heads, sizes that all differ."""
    if device == "cpu" and variant == "bf16":
        pytest.skip("the CPU provider has no bfloat16")
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint")))
    export(checkpoint, tmp_path / "package", variants=[variant])
    check(tmp_path / "package", checkpoint, variant, device, record_property)


@pytest.mark.parametrize("variant", ["bf16", "q4f16"])
def test_cuda_adapters(variant: str, demo: Checkpoint, tmp_path: Path, device: str, record_property: Record) -> None:
    """LoRA adapters: rows with one, another and none as in PyTorch, and a captured step with one as its prompt."""
    if device == "cpu" and variant == "bf16":
        pytest.skip("the CPU provider has no bfloat16")
    lora = [
        str(write_adapter(tmp_path / n, factors(demo.folder, seed=seed))) for seed, n in enumerate(("chat", "code"))
    ]
    checkpoint = open_merged(DEMO, switchable=lora)
    export(checkpoint, tmp_path / "package", variants=[variant])
    check(tmp_path / "package", checkpoint, variant, device, record_property)
    ids, found = [5, 9, 77, 300], {}
    with open_runner(tmp_path / "package", variant=variant, device=device) as runner:
        for name in (None, "chat"):
            runner.reset()
            whole = runner.prefill([ids], adapter=name)[0][-1]
            for _ in range(2):  # captured, and replayed
                runner.reset()
                runner.prefill([ids[:-1]], adapter=name)
                found[name] = runner.decode(ids[-1:])[0]
                assert np.abs(found[name] - whole).mean() < 0.05 * whole.std()
    assert np.abs(found["chat"] - found[None]).mean() > 0.1 * found[None].std()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int4", "int8", "fp8"])
def test_cuda_static_graph(
    precision: Precision, demo_package: Path, demo: Checkpoint, device: str, record_property: Record
) -> None:
    """The graph that TensorRT compiles, as itself."""
    if device == "cpu":
        pytest.skip("olmo2-export verify does this on a CPU in its own way")
    build(demo_package, EngineOptions(precision, compute_capabilities=["8.9"]), progress=False)
    check(demo_package, demo, f"trt_{precision}", device, record_property)


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_cuda_greedy(variant: str, demo_package: Path, demo: Checkpoint, device: str, record_property: Record) -> None:
    """64 greedy tokens equal those of transformers on the same GPU, but for near-ties."""
    if device == "cpu" and variant == "bf16":
        pytest.skip("the CPU provider has no bfloat16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[variant]
    model = Olmo2ForCausalLM.from_pretrained(demo.folder, dtype=dtype).to(device).eval()
    prompts = GREEDY_PROMPTS
    equal = ties = 0
    with open_runner(demo_package, variant=variant, device=device) as runner:
        for prompt in prompts:
            runner.reset()
            ours = list(generate_tokens(runner, prompt, sampler=Sampler(), max_new_tokens=64))
            parted = first_difference(model, prompt, ours, NEAR_TIE[variant])
            equal += parted is None
            ties += parted is not None
    record_property("figure", f"{equal} of {len(prompts)} prompts equal, {ties} part at a near-tie")
    assert equal >= 1


def first_difference(model: torch.nn.Module, prompt: Sequence[int], ours: list[int], near_tie: float) -> int | None:
    """Return where our text leaves the reference's; fail if that is not at a near-tie."""
    ids = torch.tensor([[*prompt, *ours]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float().cpu().numpy()  # (64, V)
    for position, (row, token) in enumerate(zip(logits, ours, strict=True)):
        if row.argmax() != token:
            gap = float(row.max() - row[token])
            assert gap <= near_tie, f"token {position}: {token} is {gap:.3f} below the reference's choice"
            return position
    return None


@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_slots(variant: str, demo_package: Path, device: str, record_property: Record) -> None:
    """Sequences of different lengths admitted at different times decode as they do alone."""
    if device == "cpu" and variant == "bf16":
        pytest.skip("the CPU provider has no bfloat16")
    prompts = [[5, 9, 77, 300, 12], [8, 4000], [17] * 40]
    with open_runner(demo_package, variant=variant, device=device) as runner:
        alone = []
        for prompt in prompts:
            runner.reset()
            alone.append(list(generate_tokens(runner, prompt, sampler=Sampler(), max_new_tokens=12)))
        runner.reset()
        texts: dict[int, list[int]] = {}
        slots = []
        for prompt in prompts:
            slot, logits = runner.admit(prompt)  # type: ignore[attr-defined]
            slots.append(slot)
            texts[slot] = [int(logits.argmax())]
            step(runner, texts)
        while min(map(len, texts.values())) < 12:
            step(runner, texts)
    same = sum(texts[slot][:12] == wanted for slot, wanted in zip(slots, alone, strict=True))
    record_property("figure", f"{same} of {len(prompts)} texts of 12 tokens equal to the single runs")
    assert same >= 2  # another batch size may round a near-tie the other way


def step(runner: object, texts: dict[int, list[int]]) -> None:
    """Decode every slot once."""
    logits = runner.step({slot: ids[-1] for slot, ids in texts.items()})  # type: ignore[attr-defined]
    for slot, row in logits.items():
        assert np.isfinite(row).all()
        texts[slot].append(int(row.argmax()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_graph(variant: str, demo_package: Path, device: str, record_property: Record) -> None:
    """Decode steps that are a replayed CUDA graph give what uncaptured ones give, and take no longer."""
    if device == "cpu":
        pytest.skip("CUDA graphs are of a GPU")
    texts, rates = [], []
    for capture in (True, False):
        with open_runner(demo_package, variant=variant, device=device) as runner:
            if not capture:
                runner._graph_ids = itertools.repeat(-1)  # type: ignore[attr-defined]  # onnxruntime's id for: no graph
            texts.append(list(generate_tokens(runner, [5, 9, 77], sampler=Sampler(), max_new_tokens=40)))
            started = time.perf_counter()
            runner.reset()
            texts.append(list(generate_tokens(runner, [5, 9, 77], sampler=Sampler(), max_new_tokens=40)))
            rates.append(40 / (time.perf_counter() - started))
    record_property("figure", f"{rates[0]:.0f} tokens/s captured, {rates[1]:.0f} not")
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert rates[0] > rates[1]


def test_cuda_candidates(demo_package: Path, device: str, record_property: Record) -> None:
    """decode_top gives what decode's logits say."""
    with open_runner(demo_package, variant="fp16", device=device) as runner:
        if not runner.top_k:
            pytest.skip("on this device the runner picks no candidates")
        runner.prefill([[3, 1, 4, 1, 5]])
        logits = runner.decode([92])
        runner.reset()
        runner.prefill([[3, 1, 4, 1, 5]])
        ids, values = runner.decode_top([92])
    assert ids[0, 0] == logits[0].argmax()
    assert values[0, 0] == logits[0].max()
    record_property("figure", f"{ids.nbytes + values.nbytes} bytes a step instead of {logits.nbytes:,}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nv_rtx_provider(
    variant: str, demo_package: Path, demo: Checkpoint, device: str, record_property: Record
) -> None:
    """The execution provider of TensorRT for RTX."""
    if device == "cpu":
        pytest.skip("needs a GPU of compute capability 8.0 or newer that TensorRT for RTX knows")
    if torch.cuda.get_device_capability() in ((9, 0), (10, 0), (8, 7)):
        pytest.skip("TensorRT for RTX does not run on this GPU")
    check(demo_package, demo, variant, "nv-rtx", record_property)
