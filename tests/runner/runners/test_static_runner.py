"""The runner of static-cache graphs on each session: onnxruntime in place, and both TensorRTs on a GPU that is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_gpu import FakeCudart, Plan, fake_tensorrt
from support.static_model import BATCH, CAPACITY, CHUNK, TOP_K, VERSION, VOCAB, plan_bytes, reference, write_package
from transformers import Olmo2ForCausalLM

from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.static import load_static_graph, static_variant
from runtimes import open_runner
from runtimes.errors import ContextLengthError, FailedError, InputError, NumericError, UsageError
from runtimes.ort.devices import GpuMemory
from runtimes.ort.session import open_session
from runtimes.ort.static_session import OrtStaticSession
from runtimes.package import open_package
from runtimes.runners.static import StaticRunner
from runtimes.trt import cuda, nvidia

# float32 against float64 of a one-layer model: 4e-6 measured on logits of size 1 to 20.
TOLERANCE = 1e-4
SESSIONS = ("ort", "device", "trt_rtx", "trt")
LENGTHS = (17, 4, 11)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("static") / "package")


def open_session_runner(package: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> StaticRunner:
    """A runner on one of the sessions, each with the limits of the engine: BATCH rows, CHUNK tokens a call."""
    manifest = open_package(package).trt
    assert manifest is not None
    variant = manifest.variants["trt_fp32"]
    if kind in ("ort", "device"):  # a device that is the CPU: its memory is bound by address, as on a GPU
        session = open_session(package / variant.graph, variant, 1)
        memory = GpuMemory(kind="cpu") if kind == "device" else None
        limited = OrtStaticSession(session, variant, memory=memory, prefill_chunk=CHUNK, max_batch_size=BATCH)
        return StaticRunner(limited, variant, open_package(package).manifest.model)
    cudart = FakeCudart()
    plans = {plan_bytes(e.name): Plan(e, variant, package / variant.graph) for e in manifest.engines.values()}
    monkeypatch.setattr(cuda, "cudart", cudart)
    monkeypatch.setitem(nvidia._loaded, kind, fake_tensorrt(kind, VERSION, plans, cudart))
    runner = open_runner(package, backend=kind)
    assert isinstance(runner, StaticRunner)
    return runner


@pytest.fixture(params=SESSIONS)
def runner(request: pytest.FixtureRequest, package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StaticRunner]:
    with open_session_runner(package, request.param, monkeypatch) as opened:
        yield opened


def tokens(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, n) for n in lengths]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE


def held(runner: StaticRunner) -> list[list[int]]:
    return [row.tolist() for row in runner.cached_tokens]


# What it computes


@pytest.mark.parametrize("all_positions", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_chunks_and_decode_equal_the_definition(runner: StaticRunner, seed: int, all_positions: bool) -> None:
    """Chunks of 1 to 13 tokens, computed 5 at a time, up to the last slot of the first row."""
    random = np.random.default_rng(seed)
    sequences = tokens(CAPACITY, 6, 18, seed=seed)
    cuts = [np.sort(random.choice(np.arange(1, len(ids) - 1), 2, replace=False)) for ids in sequences]
    for chunk in range(3):
        bounds = [[0, *c, len(ids) - 1][chunk : chunk + 2] for ids, c in zip(sequences, cuts, strict=True)]
        parts = [ids[a:b] for ids, (a, b) in zip(sequences, bounds, strict=True)]
        found = runner.prefill(parts, all_positions=all_positions)
        for logits, ids, (a, b) in zip(found, sequences, bounds, strict=True):
            close(logits, reference(ids)[a if all_positions else b - 1 : b])
        assert runner.cache_lengths == tuple(b for _, b in bounds)
    logits = runner.decode([int(ids[-1]) for ids in sequences])
    close(logits, np.stack([reference(ids)[-1] for ids in sequences]))
    assert held(runner) == [ids.tolist() for ids in sequences]


@pytest.mark.parametrize("all_positions", [True, False])
def test_padding_that_would_pass_the_capacity_does_not(runner: StaticRunner, all_positions: bool) -> None:
    first, second, third = tokens(CAPACITY, 9, CAPACITY - 1, seed=9)
    runner.prefill([first[:-1], second[:1], third[:-3]])
    found = runner.prefill([first[-1:], second[1:], third[-3:]], all_positions=all_positions)
    for logits, ids, new in zip(found, (first, second, third), (1, 8, 3), strict=True):
        close(logits, reference(ids)[-new if all_positions else -1 :])
    assert runner.cache_lengths == (CAPACITY, 9, CAPACITY - 1)


def test_many_steps_equal_the_definition(runner: StaticRunner) -> None:
    """So many that CUDA graphs are recorded and launched, for one row and for three, in turns."""
    alone, *rows = tokens(CAPACITY, 13, 12, 14)
    for _ in range(2):
        runner.reset()
        runner.prefill([alone[:2]])
        for n in range(2, 9):
            close(runner.decode([int(alone[n])]), reference(alone[: n + 1])[-1:])
        runner.reset()
        runner.prefill([ids[:5] for ids in rows])
        for n in range(5, 11):
            logits = runner.decode([int(ids[n]) for ids in rows])
            close(logits, np.stack([reference(ids[: n + 1])[-1] for ids in rows]))


def test_decode_top_gives_the_largest_logits(runner: StaticRunner) -> None:
    rows = tokens(*LENGTHS)
    runner.prefill([ids[:-3] for ids in rows])
    assert runner.top_k == TOP_K
    for back in (3, 2, 1):
        ids, logits = runner.decode_top([int(row[-back]) for row in rows])
        assert (ids.dtype, logits.dtype) == (np.int64, np.float32)
        expected = np.stack([reference(row[: len(row) - back + 1])[-1] for row in rows])
        order = np.argsort(-expected, axis=1)[:, :TOP_K]
        assert ids.tolist() == order.tolist()
        close(logits, np.take_along_axis(expected, order, axis=1))
    assert held(runner) == [row.tolist() for row in rows]


def test_decode_block_equals_the_definition(runner: StaticRunner) -> None:
    (ids,) = tokens(12)
    runner.prefill([ids[:5]])
    close(runner.decode_block(ids[5:]), reference(ids)[5:])
    assert held(runner) == [ids.tolist()]
    runner.reset()
    close(runner.decode_block(ids), reference(ids))
    runner.reset()
    runner.prefill([[1], [2]])
    with pytest.raises(InputError, match="1 rows, but the cache holds 2"):
        runner.decode_block([1])


@pytest.mark.parametrize("kept", [(16, 3, 10), (2, 4, 0), (0, 0, 0), (8, 1, 3)])
def test_truncated_rows_continue_like_fresh_ones(runner: StaticRunner, kept: tuple[int, ...]) -> None:
    rows = tokens(*LENGTHS)
    runner.prefill([np.concatenate([ids[:n], (ids[n:] + 1) % VOCAB]) for ids, n in zip(rows, kept, strict=True)])
    kept = tuple(min(n, len(ids) - 1) for ids, n in zip(rows, kept, strict=True))
    runner.truncate(kept)
    assert runner.cache_lengths == kept
    found = runner.prefill([ids[n:] for ids, n in zip(rows, kept, strict=True)], all_positions=True)
    for logits, ids, n in zip(found, rows, kept, strict=True):
        close(logits, reference(ids)[n:])
    assert held(runner) == [ids.tolist() for ids in rows]
    with pytest.raises(InputError, match="row 1: cannot keep 7 tokens"):
        runner.truncate([1, 7, 1])


# Slots


def test_slots_come_and_go_and_give_what_single_runs_give(runner: StaticRunner) -> None:
    """Three sequences, admitted one after the other; the second leaves, and a fourth takes its place."""
    a, b, c, d = tokens(12, CAPACITY, 9, 14, seed=4)
    slot_a, logits = runner.admit(a[:4])
    close(logits, reference(a[:4])[-1])
    for n in (4, 5, 6):  # a CUDA graph for one row is recorded
        close(runner.step({0: a[n]})[0], reference(a[: n + 1])[-1])
    slot_b, logits = runner.admit(b[:-1])  # then it waits at the last slot of its row
    close(logits, reference(b[:-1])[-1])
    assert (slot_a, slot_b) == (0, 1)
    close(runner.step({0: a[7]})[0], reference(a[:8])[-1])
    close(runner.step({1: b[-1]})[1], reference(b)[-1])
    slot_c, logits = runner.admit(c[:1])  # one token, in a row that does not begin at 0
    close(logits, reference(c[:1])[-1])
    found = runner.step({0: a[8], slot_c: c[1]})  # while b is full and waits
    close(found[0], reference(a[:9])[-1])
    close(found[slot_c], reference(c[:2])[-1])
    runner.release(slot_b)
    assert runner.cache_lengths == (9, 0, 2)
    found = runner.step({slot_c: c[2]})
    close(found[slot_c], reference(c[:3])[-1])
    slot_d, logits = runner.admit(d[:11])
    assert slot_d == slot_b
    close(logits, reference(d[:11])[-1])
    found = runner.step({slot_d: d[11], 0: a[9], slot_c: c[3]})
    for slot, ids in ((slot_d, d[:12]), (0, a[:10]), (slot_c, c[:4])):
        close(found[slot], reference(ids)[-1])
    with pytest.raises(InputError, match="4 rows"):
        runner.admit([1])
    assert held(runner) == [a[:10].tolist(), d[:12].tolist(), c[:4].tolist()]


def test_slots_that_are_none_are_refused(runner: StaticRunner) -> None:
    with pytest.raises(InputError, match=r"slot \(none\): not admitted"):
        runner.step({})
    with pytest.raises(InputError, match="slot 0: not admitted"):
        runner.step({0: 1})
    runner.admit([1])
    runner.admit([2])
    runner.release(0)
    with pytest.raises(InputError, match="slot 0: not admitted"):
        runner.release(0)
    with pytest.raises(UsageError, match="some slots are free"):
        runner.decode_top([1, 2])
    with pytest.raises(InputError, match="token id 13"):
        runner.step({1: 13})
    assert held(runner) == [[], [2]]


def test_prompts_come_in_pieces_and_prefixes_are_copied(runner: StaticRunner) -> None:
    """On each session: rows are copied where the cache is, and a released one is filled by the last."""
    a, b, c = tokens(12, 9, 14, seed=6)
    assert runner.max_slots >= BATCH
    slot_a, _ = runner.admit(a[:6])
    slot_b = runner.begin(b)
    assert runner.extend(slot_b, 7) is None
    close(runner.step({slot_a: a[6]})[slot_a], reference(a[:7])[-1])
    logits = runner.extend(slot_b, 7)
    assert logits is not None
    close(logits, reference(b)[-1])
    slot_c = runner.copy_prefix(slot_a, 5)
    assert slot_c == 2
    runner.append(slot_c, c)
    logits = runner.extend(slot_c)
    assert logits is not None
    close(logits, reference(np.append(a[:5], c))[-1])
    runner.release(slot_a)  # c moves into its row
    assert [len(row) for row in runner._tokens if row is not None] == [19, 9]
    found = runner.step({slot_b: 3, slot_c: 4})
    close(found[slot_b], reference(np.append(b, 3))[-1])
    close(found[slot_c], reference(np.concatenate([a[:5], c, [4]]))[-1])
    runner.truncate_slot(slot_c, 8)
    close(runner.step({slot_c: 1})[slot_c], reference(np.concatenate([a[:5], c[:3], [1]]))[-1])
    assert held(runner) == [[], [*b.tolist(), 3], [*a[:5].tolist(), *c[:3].tolist(), 1]]


# What it refuses


def test_what_does_not_fit_is_refused_with_numbers_and_nothing_changes(runner: StaticRunner) -> None:
    rows = tokens(*LENGTHS)
    with pytest.raises(InputError, match=r"4 rows.* 3"):
        runner.prefill([[1]] * 4)
    runner.prefill(rows)
    with pytest.raises(ContextLengthError, match=r"row 0: 17 tokens in the cache and 16 new ones make 33, at most 32"):
        runner.prefill([[1] * 16, [1], [1]])
    with pytest.raises(InputError, match="token id -1"):
        runner.decode_top([-1, 0, 0])
    with pytest.raises(InputError, match="2 rows, but the cache holds 3"):
        runner.decode_top([0, 0])
    assert held(runner) == [row.tolist() for row in rows]
    runner.reset()
    with pytest.raises(InputError, match="prefill first"):
        runner.decode_top([1])


def test_closed_runner_says_so(runner: StaticRunner) -> None:
    runner.prefill([[1, 2]])
    runner.close()
    runner.close()
    assert runner.cache_lengths == ()
    for call in (lambda: runner.prefill([[1]]), lambda: runner.begin([1])):
        with pytest.raises(UsageError, match="the runner is closed"):
            call()


@pytest.mark.parametrize("kind", SESSIONS)
def test_broken_numbers_are_an_error_that_leaves_no_trace(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the cache, behind the tokens that are held, would be read again, and 0 times NaN is NaN."""
    from support.static_model import weights

    embed = weights()["embed"]
    embed[12] = np.nan
    package = write_package(tmp_path / "package", changed={"embed": embed})
    rows = [ids % 12 for ids in tokens(*LENGTHS)]
    with open_session_runner(package, kind, monkeypatch) as runner:
        with pytest.raises(NumericError, match=r"row 1, position 3"):
            runner.prefill([rows[0], [*rows[1][:3], 12], rows[2]])
        assert runner.cache_lengths == ()
        runner.prefill([ids[:-2] for ids in rows])
        with pytest.raises(NumericError, match=r"row 2, position 9"):
            runner.decode([1, 2, 12])
        with pytest.raises(NumericError, match=r"row 0, position 15: 4 of 4"):
            runner.decode_top([12, 1, 2])
        with pytest.raises(NumericError, match=r"row 0"):
            runner.prefill([[1, 12], [1, 2], [3]])
        logits = runner.prefill([ids[-2:-1] for ids in rows])
        close(np.concatenate(logits), np.stack([reference(ids[:-1])[-1] for ids in rows]))
        close(runner.decode([int(ids[-1]) for ids in rows]), np.stack([reference(ids)[-1] for ids in rows]))
        runner.reset()
        runner.admit(rows[0])
        with pytest.raises(NumericError):
            runner.admit([3, 12])
        with pytest.raises(NumericError):
            runner.step({0: 12})
        slot, logits_b = runner.admit(rows[2])
        assert slot == 1
        close(logits_b, reference(rows[2])[-1])
        close(runner.step({0: 5})[0], reference(np.append(rows[0], 5))[-1])


def test_prefill_computes_only_what_is_new(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the calls, and that logits are fetched from the last of them alone."""
    calls = []
    run = OrtStaticSession.run

    def spy(self: Any, first_row: int, input_ids: Any, write: Any, index: Any, wanted: Any, vectors: Any = None) -> Any:
        calls.append((input_ids.shape, write.tolist(), index.tolist(), wanted))
        return run(self, first_row, input_ids, write, index, wanted, vectors)

    monkeypatch.setattr(OrtStaticSession, "run", spy)
    with open_session_runner(package, "ort", monkeypatch) as runner:
        runner.prefill([[1] * 12, [2] * 3])
        runner.prefill([[1], [2]])
        runner.decode_top([1, 2])
    assert calls == [
        ((2, 5), [0, 0], [4, 2], ("logits",)),
        ((2, 5), [5, 3], [4, 0], ()),
        ((2, 2), [10, 3], [1, 0], ("logits",)),
        ((2, 1), [12, 3], [0, 0], ("logits",)),
        ((2, 1), [13, 4], [0, 0], ("top_ids", "top_logits")),
    ]


# onnxruntime's session


def test_onnxruntime_writes_in_place(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the slots that were written differ, and the memory is the same before and after."""
    with open_session_runner(package, "ort", monkeypatch) as runner:
        runner.prefill(tokens(6, 4))
        session: Any = runner._session
        before = {name: (array.ctypes.data, array.copy()) for name, array in session._buffer._caches.items()}
        runner.decode([1, 2])
        for name, (address, old) in before.items():
            new = session._buffer._caches[name]
            assert new.ctypes.data == address
            changed = (new != old).any(axis=(1, 3))  # (B, C)
            assert [np.flatnonzero(row).tolist() for row in changed[:2]] == [[6], [4]]


def test_onnxruntime_failure_is_one_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session_runner(package, "ort", monkeypatch) as runner:
        runner.prefill([[1, 2]])
        with pytest.raises(FailedError, match=r"onnxruntime failed in trt/model_fp32\.onnx") as caught:
            runner._session.run(0, np.zeros((1, 2), np.int64), np.array([CAPACITY - 1]), np.array([0]), ("logits",))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_real_graph_equals_pytorch(tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, precision: Any) -> None:
    manifest = open_package(tiny_package).manifest
    graph, _ = load_static_graph(tiny_package, manifest, precision, 48, 3)
    variant = static_variant(manifest.model, precision, 48, 3, {})
    save_graph(graph, tmp_path / "graph.onnx")
    session = OrtStaticSession(open_session(tmp_path / "graph.onnx", variant, 1), variant, prefill_chunk=7)
    model = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
    random = np.random.default_rng(0)
    rows = [random.integers(0, 131, n) for n in (41, 48, 5)]
    with torch.no_grad():
        expected = [model(torch.from_numpy(ids)[None]).logits[0].numpy() for ids in rows]
    # fp32: 6e-6 measured. fp16: 3e-3 of rounding to 11 bits, on logits of size 3; a wrong slot gives more than 0.1.
    tolerance = {"fp32": 1e-4, "fp16": 2e-2}[precision]
    with StaticRunner(session, variant, manifest.model) as runner:
        found = runner.prefill([ids[:-1] for ids in rows], all_positions=True)
        for logits, truth in zip(found, expected, strict=True):
            assert np.abs(logits - truth[:-1]).max() <= tolerance
        ids, logits = runner.decode_top([int(ids[-1]) for ids in rows])
        for b, truth in enumerate(expected):
            assert np.abs(logits[b] - truth[-1][ids[b]]).max() <= tolerance
            assert np.abs(logits[b] - np.sort(truth[-1])[::-1][:3]).max() <= tolerance
