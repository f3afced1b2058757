"""The shared KV buffer: growth, slots that wait, rows picked by graph, and calls that fail and change nothing."""

from __future__ import annotations

import errno
import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import olmo2_export.demo
from runtimes import open_runner
from runtimes.errors import ContextLengthError, InputError, IntegrityError, NumericError, UsageError
from runtimes.generation.generate import generate
from runtimes.manifest import KVCacheSpec
from runtimes.ort import mapped_buffer
from runtimes.ort.mapped_buffer import MappedBuffer
from runtimes.ort.shared import SharedRunner
from runtimes.runners import rows as row_runner
from runtimes.speculate.drafters import PromptLookup
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

VOCAB, CONTEXT = 131, 256
TOLERANCE = 2e-5  # two ways of feeding one graph differ by float32 sums only, until a code tips over: see `close`


@pytest.fixture(scope="module")
def package(q8_package: Path) -> Path:
    """One graph of 8 bits."""
    return q8_package


@pytest.fixture(scope="module")
def two_graphs(q4_package: Path) -> Path:
    return q4_package


@pytest.fixture
def runner(package: Path) -> Iterator[SharedRunner]:
    with open_runner(package, threads=1) as opened:
        assert isinstance(opened, SharedRunner)
        yield opened


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Tell whether logits agree as well as 8-bit rounding of activations lets them; a wrong token is far outside."""
    return bool(np.mean((got - wanted) ** 2) <= 1e-3 * wanted.var())


def resident(buffer: Any) -> int:
    """Bytes of the KV cache that are memory, as the system counts them: pages that are there."""
    assert isinstance(buffer, MappedBuffer)
    count = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for array in buffer._arrays.values():
            first, last = array.ctypes.data // mmap.PAGESIZE, (array.ctypes.data + array.nbytes - 1) // mmap.PAGESIZE
            pages.seek(8 * first)
            entries = np.frombuffer(pages.read(8 * (last + 1 - first)), np.uint64)
            count += int((entries >> np.uint64(63)).sum())
    return mmap.PAGESIZE * count


needs_pagemap = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc/self/pagemap")


def test_the_buffer_grows_in_steps_and_keeps_what_it_holds(runner: SharedRunner) -> None:
    """In steps of pages, by what is written; the arrays stay where they are."""
    ids = tokens(CONTEXT)
    whole = runner.prefill([ids], all_positions=True)[0]
    runner.reset()
    places = set()
    for start in range(0, CONTEXT, 32):
        part = runner.prefill([ids[start : start + 32]], all_positions=True)[0]
        assert close(part, whole[start : start + 32])
        places.add(tuple(array.ctypes.data for array in runner._buffer._arrays.values()))
    assert len(places) == 1
    assert runner.cache_lengths == (CONTEXT,)


@needs_pagemap
def test_growth_starts_small_and_is_never_beyond_the_context(package: Path) -> None:
    """What is memory follows the tokens: of eight slots of the whole context, one is used here."""
    with open_runner(package, threads=1) as runner:
        assert isinstance(runner, SharedRunner)
        seen = []
        for length in (1, CONTEXT // 2, CONTEXT):
            runner.reset()
            runner.prefill([tokens(length)])
            seen.append(resident(runner._buffer))
        arrays = list(runner._buffer._arrays.values())
        row = sum(array[0].nbytes for array in arrays)
        pages = len(arrays) * mmap.PAGESIZE * 4  # where heads begin and end within pages
        assert all(len(array) == 8 for array in arrays)
        assert seen == sorted(seen)
        assert seen[0] <= 8 * row // 2
        assert seen[-1] <= row + pages


def test_a_prompt_leaves_room_for_the_tokens_that_follow(runner: SharedRunner) -> None:
    """A first new token that has to copy the whole cache keeps people waiting."""
    runner.prefill([tokens(64)])
    arrays = dict(runner._buffer._arrays)
    for token in tokens(32):
        runner.decode([int(token)])
    assert all(runner._buffer._arrays[name] is array for name, array in arrays.items())


@needs_pagemap
def test_a_released_slot_gives_its_memory_back() -> None:
    """Rows of some pages each, so that a row is not lost among what others hold of a page."""
    spec = KVCacheSpec("shared", "float32", 3, 2, 16, 4096)
    buffer = MappedBuffer(spec, 4)
    buffer.reserve(1, [])
    assert resident(buffer) <= 6 * mmap.PAGESIZE
    for array in buffer._arrays.values():
        array[1:3] = 1
    row = sum(array[0].nbytes for array in buffer._arrays.values())
    assert resident(buffer) >= 2 * row
    buffer.give_back(1)
    assert row <= resident(buffer) <= row + 12 * mmap.PAGESIZE
    assert all((array[1] == 0).all() and (array[2] == 1).all() for array in buffer._arrays.values())
    buffer.copy_row(2, 1, 7)
    assert all((array[1, :, :7] == 1).all() and (array[1, :, 7:] == 0).all() for array in buffer._arrays.values())
    buffer.reserve(9, [0, 7, 5])  # more rows than ever: what is held moves, and nothing else
    assert all(len(array) == 9 and (array[2, :, :5] == 1).all() for array in buffer._arrays.values())
    assert all((array[2, :, 5:] == 0).all() for array in buffer._arrays.values())


def test_exactly_the_context_works_and_one_more_is_an_error(runner: SharedRunner) -> None:
    runner.prefill([tokens(CONTEXT - 1)])
    runner.decode([3])
    with pytest.raises(ContextLengthError, match="257"):
        runner.decode([3])
    assert runner.cache_lengths == (CONTEXT,)


@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 3, 17), (90, 1)])
def test_a_ragged_batch_equals_the_single_runs(runner: SharedRunner, lengths: tuple[int, ...]) -> None:
    """(90, 1) is too uneven to be padded, so its rows run one by one."""
    rows = [tokens(n, seed=n + i) for i, n in enumerate(lengths)]
    singles = []
    for row in rows:
        runner.reset()
        first = runner.prefill([row])[0][0]
        singles.append((first, runner.decode([9])[0]))
    runner.reset()
    batch = runner.prefill(rows)
    after = runner.decode([9] * len(rows))
    for b, (first, second) in enumerate(singles):
        assert close(batch[b][0], first)
        assert close(after[b], second)


def test_slots_admit_step_and_release_without_disturbing_each_other(runner: SharedRunner) -> None:
    prompts = {name: tokens(n, seed=n) for name, n in (("a", 19), ("b", 33), ("c", 5), ("d", 27))}
    feeds = [11, 12, 13]
    alone = {}
    for name, prompt in prompts.items():
        runner.reset()
        alone[name] = [runner.prefill([prompt])[0][0], *(runner.decode([t])[0] for t in feeds)]
    runner.reset()
    a, logits = runner.admit(prompts["a"])
    assert close(logits, alone["a"][0])
    b, logits = runner.admit(prompts["b"])
    assert close(logits, alone["b"][0])
    assert close(runner.step({b: feeds[0]})[b], alone["b"][1])  # a waits
    c, logits = runner.admit(prompts["c"])
    assert (a, b, c) == (0, 1, 2)
    assert close(logits, alone["c"][0])
    both = runner.step({c: feeds[0], a: feeds[0]})  # b waits
    assert close(both[a], alone["a"][1])
    assert close(both[c], alone["c"][1])
    runner.release(b)
    assert runner.cache_lengths == (20, 0, 6)
    together = runner.step({a: feeds[1], c: feeds[1]})  # with a hole between them
    assert close(together[a], alone["a"][2])
    assert close(together[c], alone["c"][2])
    d, logits = runner.admit(prompts["d"])
    assert d == 1  # the lowest free slot
    assert close(logits, alone["d"][0])
    last = runner.step({a: feeds[2], c: feeds[2], d: feeds[0]})
    assert close(last[a], alone["a"][3])
    assert close(last[c], alone["c"][3])
    assert close(last[d], alone["d"][1])
    for slot in (a, c, d):
        runner.release(slot)
    assert runner.cache_lengths == ()


def test_a_full_slot_waits_unharmed(runner: SharedRunner) -> None:
    full, _ = runner.admit(tokens(CONTEXT))
    other, _ = runner.admit(tokens(8))
    before = {n: a[0].copy() for n, a in runner._buffer._arrays.items()}
    runner.step({other: 5})
    for name, array in before.items():
        assert np.allclose(runner._buffer._arrays[name][0], array, atol=1e-2)
    with pytest.raises(ContextLengthError):
        runner.step({full: 5})


def test_slots_refuse_what_is_not_admitted(runner: SharedRunner) -> None:
    for call in (lambda: runner.step({0: 1}), lambda: runner.release(0), lambda: runner.step({})):
        with pytest.raises(InputError, match="admit"):
            call()
    slot, _ = runner.admit(tokens(4))
    second, _ = runner.admit(tokens(4))
    runner.release(slot)
    with pytest.raises(InputError, match="not admitted"):
        runner.step({slot: 1})
    with pytest.raises(UsageError, match="slots"):
        runner.decode([1, 1])
    with pytest.raises(InputError, match="vocabulary"):
        runner.step({second: VOCAB})
    with pytest.raises(InputError):
        runner.admit([])
    assert runner.cache_lengths == (0, 4)


def test_a_call_that_fails_changes_nothing(runner: SharedRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(30)
    runner.prefill([ids])
    wanted = runner.decode([8])
    runner.truncate([30])
    with monkeypatch.context() as patch:
        patch.setattr(row_runner, "check_finite", _not_finite)
        for call in (
            lambda: runner.decode([9]),
            lambda: runner.prefill([tokens(40)]),
            lambda: runner.decode_block([1, 2]),
        ):
            with pytest.raises(NumericError):
                call()
    assert runner.cache_lengths == (30,)
    assert close(runner.decode([8])[0], wanted[0])


def _not_finite(*_: object) -> None:
    raise NumericError("not finite")


def test_memory_that_is_not_to_be_had_is_an_error_and_the_cache_lives(
    runner: SharedRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.prefill([tokens(10)])
    wanted = runner.decode([8])
    runner.truncate([10])

    zeros, made = mapped_buffer._zeros, []

    def no_memory(*arguments: Any) -> Any:
        made.append(arguments)
        if len(made) > 3:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return zeros(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mapped_buffer, "_zeros", no_memory)
        runner.reset()
        with pytest.raises(ContextLengthError, match=r"9 rows of 256 tokens needs .* bytes of memory"):
            runner.prefill([tokens(3)] * 9)
    assert runner.cache_lengths == ()
    runner.prefill([tokens(10)])
    assert close(runner.decode([8])[0], wanted[0])


def test_truncate_then_append_equals_a_fresh_run(runner: SharedRunner) -> None:
    ids, other = tokens(50), tokens(20, seed=5)
    runner.prefill([ids])
    runner.truncate([30])
    got = runner.prefill([other])[0]
    runner.reset()
    assert close(got, runner.prefill([ids[:30] + other])[0])
    assert [row.tolist() for row in runner.cached_tokens] == [ids[:30] + other]


def test_the_graph_is_picked_by_the_tokens_in_a_step(two_graphs: Path) -> None:
    """The int8 graph gets the steps with many rows, whoever asks; decode_block never."""
    with open_runner(two_graphs, threads=1) as runner:
        assert isinstance(runner, SharedRunner)
        assert runner.variant.prefill is not None
        rows = runner.variant.prefill.min_rows
        used: list[str] = []
        assert runner._prefill is not None
        sessions = {id(runner._decode_session): "decode", id(runner._prefill.result()): "prefill"}
        binding = runner._buffer.binding
        runner._buffer.binding = lambda session, *a: (used.append(sessions[id(session)]), binding(session, *a))[1]  # type: ignore[method-assign]
        runner.prefill([tokens(rows)])
        runner.prefill([tokens(rows - 1)])
        runner.decode([1])
        runner.decode_block(tokens(rows + 3))
        runner.reset()
        runner.prefill([tokens(1)] * rows)
        runner.decode([1] * rows)
        assert used == ["prefill", "decode", "decode", "decode", "prefill", "prefill"]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("suffix", ["", "_data"])
def test_a_tampered_prefill_graph_is_refused_before_it_is_used(two_graphs: Path, tmp_path: Path, suffix: str) -> None:
    """It is loaded in the background; the decode graph serves on."""
    copy = Path(shutil.copytree(two_graphs, tmp_path / "copy"))
    flip(copy / f"onnx/model_q4_prefill.onnx{suffix}")
    with open_runner(copy, threads=1) as runner:
        for _ in range(2):
            with pytest.raises(IntegrityError, match="model_q4_prefill"):
                runner.prefill([tokens(40)])
        assert runner.cache_lengths == ()
        runner.prefill([tokens(3)])
        runner.decode([1])
    with open_runner(copy, threads=1, check_hashes=False) as runner:
        if suffix:
            runner.prefill([tokens(40)])  # trusted, as asked


@pytest.mark.parametrize("name", ["model_q4_shared.onnx", "model_q4.onnx_data"])
def test_a_tampered_decode_graph_is_refused_at_once(two_graphs: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(two_graphs, tmp_path / "copy"))
    flip(copy / "onnx" / name)
    with pytest.raises(IntegrityError, match=name):
        open_runner(copy, threads=1)


def test_a_runner_opens_no_portable_graph(two_graphs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two_graphs, tmp_path / "copy"))
    flip(copy / "onnx/model_q4.onnx")
    open_runner(copy, threads=1).close()


def test_a_closed_runner_says_so(package: Path) -> None:
    runner = open_runner(package)
    runner.close()
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        runner.prefill([[1]])


@pytest.fixture(scope="module")
def demo_q4(package_of: Callable[[str], Path]) -> Path:
    pytest.importorskip("torch")
    return package_of("demo_q4")


NEAR_TIE = 0.1  # logits: what activation codes that tip over can move; seen: up to 0.02


def test_lookup_on_two_graphs_gives_the_text_of_plain_decoding(demo_q4: Path) -> None:
    """Guesses are checked by the decode graph whatever their number, so only a near-tie can part the texts."""
    text = (Path(olmo2_export.demo.__file__).parent / "heldout.txt").read_text()
    tokenizer = Tokenizer.from_package(demo_q4)
    accepted = 0
    with open_runner(demo_q4, threads=1) as runner:
        for start in range(0, 6000, 1000):
            prompt = tokenizer.encode(text[start : start + 300])
            plain = generate(runner, tokenizer, prompt, sampler=Sampler(), max_new_tokens=48, eos_token_ids=())
            runner.reset()
            fast = generate(
                runner,
                tokenizer,
                prompt,
                sampler=Sampler(),
                max_new_tokens=48,
                eos_token_ids=(),
                speculate=PromptLookup(),
            )
            accepted += fast.accepted
            part = next(
                (i for i, (a, b) in enumerate(zip(plain.token_ids, fast.token_ids, strict=True)) if a != b), None
            )
            if part is not None:
                runner.reset()
                logits = runner.prefill([[*prompt, *plain.token_ids[:part]]])[0][0]
                assert abs(logits[plain.token_ids[part]] - logits[fast.token_ids[part]]) < NEAR_TIE
            runner.reset()
    assert accepted > 20


def test_a_second_turn_prefills_only_what_is_new(demo_q4: Path) -> None:
    tokenizer = Tokenizer.from_package(demo_q4)
    first = tokenizer.encode("In the beginning God created the heaven and the earth.")
    with open_runner(demo_q4, threads=1) as runner:
        answer = generate(runner, tokenizer, first, sampler=Sampler(), max_new_tokens=12, eos_token_ids=())
        second = [*first, *answer.token_ids, *tokenizer.encode(" And God said,")]
        again = generate(runner, tokenizer, second, sampler=Sampler(), max_new_tokens=4, eos_token_ids=())
        assert again.reused_tokens == len(first) + 11  # the last id of an answer is in no cache
        with open_runner(demo_q4, threads=1) as fresh:
            wanted = fresh.prefill([second])[0][0]
        runner.truncate([len(second) - 1])
        got = runner.decode(second[-1:])[0]
        assert np.mean((got - wanted) ** 2) <= 0.02 * wanted.var()  # another mix of the two graphs


def test_a_slot_that_is_refused_moves_no_memory(q4_package: Path) -> None:
    with open_runner(q4_package, threads=1, max_slots=2) as runner:
        assert isinstance(runner, SharedRunner)
        assert isinstance(runner._buffer, MappedBuffer)
        for _ in range(2):
            runner.admit([1, 2, 3])
        places = [array.ctypes.data for array in runner._buffer._arrays.values()]
        with pytest.raises(InputError, match="this runner has 2 slots"):
            runner.begin([1])
        with pytest.raises(InputError, match="this runner has 2 slots"):
            runner.copy_prefix(0, 2)
        assert [array.ctypes.data for array in runner._buffer._arrays.values()] == places
