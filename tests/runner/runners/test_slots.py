"""Slots on every form of graph: prompts in pieces, forks, compaction, broken numbers, and exact answers in company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import Slots, open_runner
from runtimes.errors import BrokenSlotsError, ContextLengthError, InputError, NumericError, UsageError
from runtimes.ort.concat import ConcatRunner
from runtimes.ort.shared import SharedRunner
from runtimes.runners.rows import RowRunner
from runtimes.runners.slots import piece_length

VOCAB, CONTEXT = 131, 256
PACKAGES = {"fp32": "tiny_package", "q8": "q8_package", "q4": "q4_package"}
"""a graph whose cache is handed on, one on a buffer, two on a buffer"""


@pytest.fixture(params=PACKAGES)
def package(request: pytest.FixtureRequest) -> Path:
    made: Path = request.getfixturevalue(PACKAGES[request.param])
    return made


@pytest.fixture
def runner(package: Path) -> Iterator[Slots]:
    with open_runner(package, threads=1) as opened:
        yield opened


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Tell whether logits agree as well as 8-bit rounding of activations lets them; a wrong token is far outside."""
    return bool(np.mean((got - wanted) ** 2) <= 1e-2 * wanted.var())


def alone(runner: Slots, prompt: list[int], *fed: int) -> np.ndarray:
    """The logits after a prompt and what was fed to it, as a batch of one row gets them."""
    runner.reset()
    logits: np.ndarray = runner.prefill([prompt])[0][0]
    for token in fed:
        logits = runner.decode([token])[0]
    runner.reset()
    return logits


# Prompts in pieces


def test_a_prompt_enters_in_pieces_while_others_are_stepped(runner: Slots) -> None:
    short, long = tokens(9, 1), tokens(116, 2)
    wanted = [alone(runner, short, 7), alone(runner, short, 7, 8), alone(runner, long), alone(runner, long, 5)]
    a, _ = runner.admit(short)
    b = runner.begin(long)
    assert (a, b, runner.slots) == (0, 1, (0, 1))
    assert runner.slot_tokens(b).tolist() == []
    assert runner.extend(b, 40) is None
    assert runner.slot_tokens(b).tolist() == long[:40]
    assert close(runner.step({a: 7})[a], wanted[0])
    assert runner.extend(b, 60) is None
    assert close(runner.step({a: 8})[a], wanted[1])
    with pytest.raises(InputError, match="slot 1: its prompt is not complete"):
        runner.step({a: 9, b: 5})
    logits = runner.extend(b, 60)
    assert logits is not None
    assert close(logits, wanted[2])
    assert runner.slot_tokens(b).tolist() == long
    with pytest.raises(InputError, match="slot 1: its prompt is complete"):
        runner.extend(b)
    assert close(runner.step({b: 5})[b], wanted[3])
    assert runner.cache_lengths == (11, 117)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "8"])
def test_budgets_that_are_none_are_refused(runner: Slots, budget: Any) -> None:
    slot = runner.begin([1, 2])
    with pytest.raises(InputError, match="budget"):
        runner.extend(slot, budget)
    assert runner.extend(slot, 2) is not None


@pytest.mark.parametrize("exact", [False, True])
def test_pieces_have_the_lengths_that_are_allowed(exact: bool) -> None:
    for total in range(1, 120):
        for budget in range(1, 130):
            left, pieces = total, []
            while left:
                pieces.append(piece_length(left, budget, exact))
                left -= pieces[-1]
            if exact:
                assert pieces[-1] == total if total < 16 else 8 <= pieces[-1] < 16
                assert all(n % 8 == 0 and n <= max(8, budget) for n in pieces[:-1])
            else:
                assert max(pieces) <= budget
                assert len(pieces) == -(-total // budget)


def test_all_slots_taken_is_an_error_that_takes_none(package: Path) -> None:
    with open_runner(package, threads=1, max_slots=2) as runner:
        assert runner.max_slots == 2
        runner.admit([1, 2])
        second, _ = runner.admit([3])
        for call in (lambda: runner.begin([4]), lambda: runner.admit([4]), lambda: runner.copy_prefix(0, 1)):
            with pytest.raises(InputError, match="3 rows, this runner has 2 slots"):
                call()
        assert runner.slots == (0, 1)
        runner.release(0)
        assert runner.begin([5]) == 0
        assert runner.slot_tokens(second).tolist() == [3]
    with open_runner(package, threads=1) as runner:
        assert runner.max_slots == 8


def test_a_prompt_that_does_not_fit_takes_no_slot(runner: Slots) -> None:
    with pytest.raises(ContextLengthError, match="257"):
        runner.begin(tokens(CONTEXT + 1))
    with pytest.raises(InputError, match="vocabulary"):
        runner.begin([VOCAB])
    assert runner.slots == ()
    slot, _ = runner.admit(tokens(CONTEXT - 2))
    with pytest.raises(ContextLengthError, match="257"):
        runner.append(slot, [1, 2, 3])
    runner.append(slot, [1])
    with pytest.raises(ContextLengthError, match="257"):
        runner.append(slot, [1, 2])  # behind one that is still to be computed
    assert runner.extend(slot) is not None
    other, _ = runner.admit([3])
    with pytest.raises(InputError, match=f"slot {other}, position 0: token id {VOCAB}"):
        runner.step({other: VOCAB})
    runner.step({slot: 1})
    with pytest.raises(ContextLengthError, match=f"slot {slot}: 256 tokens in the cache"):
        runner.step({other: 1, slot: 1})


@pytest.mark.parametrize(
    "call",
    [
        lambda runner: runner.extend(0),
        lambda runner: runner.extend_all(0, 8),
        lambda runner: runner.append(0, [1]),
        lambda runner: runner.copy_prefix(0, 1),
        lambda runner: runner.truncate_slot(0, 0),
        lambda runner: runner.slot_tokens(0),
        lambda runner: runner.park(0),
        lambda runner: runner.release(0),
        lambda runner: runner.step({0: 1}),
    ],
    ids=["extend", "extend_all", "append", "copy_prefix", "truncate_slot", "slot_tokens", "park", "release", "step"],
)
def test_a_slot_that_is_free_is_refused(runner: Slots, call: Callable[[Slots], object]) -> None:
    runner.begin([1])
    runner.begin([2])
    runner.release(0)
    with pytest.raises(InputError, match="slot 0: not admitted"):
        call(runner)
    assert runner.slots == (1,)


def test_a_piece_gives_the_logits_behind_each_of_its_tokens(runner: Slots) -> None:
    ids = tokens(45)
    runner.reset()
    (wanted,) = runner.prefill([ids], all_positions=True)
    runner.reset()
    other, _ = runner.admit(tokens(5, 9))
    slot = runner.begin(ids)
    pieces = [runner.extend_all(slot, 20) for _ in range(3)]
    assert [len(piece) for piece in pieces] == [20, 20, 5]
    assert close(np.concatenate(pieces), wanted)
    assert runner.slot_tokens(slot).tolist() == ids
    with pytest.raises(InputError, match=f"slot {slot}: its prompt is complete"):
        runner.extend_all(slot, 20)
    runner.step({slot: 1, other: 2})


# Prefixes


def test_a_prefix_is_copied_and_goes_on_by_itself(runner: Slots) -> None:
    system, a, b = tokens(40, 1), tokens(21, 2), tokens(13, 3)
    wanted = [alone(runner, system + a), alone(runner, system + b), alone(runner, system + a, 9)]
    first, logits = runner.admit(system + a)
    assert close(logits, wanted[0])
    second = runner.copy_prefix(first, len(system))
    assert runner.slot_tokens(second).tolist() == system
    runner.append(second, b)
    logits_b = runner.extend(second)
    assert logits_b is not None
    assert close(logits_b, wanted[1])
    assert close(runner.step({first: 9})[first], wanted[2])


def test_a_fork_is_stepped_as_its_origin_would_be(runner: Slots) -> None:
    ids = tokens(30)
    wanted = {token: alone(runner, ids, token) for token in (3, 4, 5)}
    origin, _ = runner.admit(ids)
    forks = {token: runner.copy_prefix(origin, len(ids)) for token in (4, 5)}
    found = runner.step({origin: 3, forks[4]: 4, forks[5]: 5})
    for token, slot in {3: origin, **forks}.items():
        assert close(found[slot], wanted[token])
        assert runner.slot_tokens(slot).tolist() == [*ids, token]


def test_a_slot_is_truncated_and_goes_on(runner: Slots) -> None:
    ids, more = tokens(50), tokens(11, 4)
    wanted = [alone(runner, ids[:30] + more), alone(runner, ids[:20], 6)]
    slot, _ = runner.admit(ids)
    other, _ = runner.admit(tokens(5))
    runner.truncate_slot(slot, 30)
    runner.append(slot, more)
    logits = runner.extend(slot)
    assert logits is not None
    assert close(logits, wanted[0])
    runner.append(slot, more)
    runner.truncate_slot(slot, 20)  # and what was to come is forgotten
    assert close(runner.step({slot: 6})[slot], wanted[1])
    assert runner.cache_lengths == (21, 5)
    for length in (22, -1, 1.5):
        with pytest.raises(InputError, match="the slot holds 21 tokens"):
            runner.truncate_slot(slot, length)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected an integer from 1 to 5"):
        runner.copy_prefix(other, 0)


# Where slots are


def test_a_release_leaves_no_row_that_is_computed_for_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row moves into the hole; the slots keep their numbers and their texts."""
    prompts = [tokens(n, n) for n in (12, 33, 7, 25)]
    with open_runner(package, threads=1) as runner:
        wanted = [alone(runner, ids, 9) for ids in prompts]
        for ids in prompts:
            runner.admit(ids)
        runner.release(0)
        runner.release(1)
        assert runner.slots == (2, 3)
        rows = []
        if isinstance(runner, RowRunner):
            step = runner._step
            monkeypatch.setattr(runner, "_step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
        found = runner.step({2: 9, 3: 9})
        assert close(found[2], wanted[2])
        assert close(found[3], wanted[3])
        assert [runner.slot_tokens(slot).tolist() for slot in (2, 3)] == [[*prompts[2], 9], [*prompts[3], 9]]
        assert runner.cache_lengths == (0, 0, 8, 26)
        assert rows == ([2] if isinstance(runner, RowRunner) else [])
        assert [runner.begin([1]) for _ in range(3)] == [0, 1, 4]


def test_parked_slots_are_not_computed_with_the_others(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tokens(n, n) for n in (12, 33, 7, 25)]
    with open_runner(package, threads=1, max_slots=6) as runner:
        wanted = [alone(runner, ids, 9) for ids in prompts]
        for ids in prompts:
            runner.admit(ids)
        rows: list[int] = []
        if isinstance(runner, RowRunner):
            step = runner._step
            monkeypatch.setattr(runner, "_step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
        runner.park(0)
        runner.park(2)
        found = runner.step({1: 9, 3: 9})
        assert runner.slots == (0, 1, 2, 3)
        new = runner.begin([1, 2, 3])
        runner.extend(new)
        assert close(runner.step({0: 9})[0], wanted[0])  # it waits no longer
        found |= runner.step({2: 9})
        assert all(close(found[n], wanted[n]) for n in (1, 2, 3))
        assert rows == ([2, 4, 5] if isinstance(runner, RowRunner) else [])
        runner.truncate_slot(1, 10)
        runner.append(1, [1])
        with pytest.raises(InputError, match="slot 1: its prompt is not complete"):
            runner.park(1)


def test_slots_come_and_go_at_random_and_give_what_single_runs_give(runner: Slots) -> None:
    random = np.random.default_rng(5)
    texts: dict[int, tuple[list[int], list[int]]] = {}  # slot -> prompt, what was fed
    for _ in range(60):
        if len(texts) < 5 and random.random() < 0.4:
            ids = tokens(int(random.integers(1, 40)), int(random.integers(99)))
            slot, _ = runner.admit(ids)
            assert slot not in texts
            texts[slot] = (ids, [])
        if texts and random.random() < 0.3:
            slot = int(random.choice(list(texts)))
            runner.release(slot)
            del texts[slot]
        if texts and random.random() < 0.3:
            runner.park(int(random.choice(list(texts))))
        fed = {slot: int(random.integers(VOCAB)) for slot in texts if random.random() < 0.7}
        found = runner.step(fed) if fed else {}
        for slot, token in fed.items():
            texts[slot][1].append(token)
        held = {slot: runner.slot_tokens(slot).tolist() for slot in runner.slots}
        assert held == {slot: prompt + after for slot, (prompt, after) in texts.items()}
    found = {slot: logits for slot, logits in found.items() if slot in texts}
    assert len(found) >= 2
    for slot, logits in found.items():
        assert close(logits, alone(runner, texts[slot][0], *texts[slot][1]))


def test_slots_and_a_batch_do_not_mix_unnoticed(runner: Slots) -> None:
    runner.admit([1, 2])
    runner.admit([3])
    runner.release(0)
    for call in (lambda: runner.prefill([[1]]), lambda: runner.decode([1]), lambda: runner.truncate([0])):
        with pytest.raises(UsageError, match="slots"):
            call()
    runner.reset()
    assert runner.slots == runner.cache_lengths == ()
    with pytest.raises(InputError, match="slot 1: not admitted"):
        runner.step({1: 2})


def test_a_closed_runner_gives_no_slot(runner: Slots) -> None:
    runner.close()
    for call in (lambda: runner.begin([1, 2]), lambda: runner.admit([1, 2])):
        with pytest.raises(UsageError, match="the runner is closed; open another"):
            call()
    assert runner.slots == ()


# Broken numbers


def poison(runner: Slots, monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Make the logits after some token ids NaN."""
    if isinstance(runner, ConcatRunner):
        extend = runner._extend

        def broken_extend(cache: Any, rows: Any, *rest: Any, **options: Any) -> Any:
            logits, extended = extend(cache, rows, *rest, **options)
            return [v * np.nan if row[-1] in tokens else v for v, row in zip(logits, rows, strict=True)], extended

        monkeypatch.setattr(runner, "_extend", broken_extend)
        return
    assert isinstance(runner, SharedRunner)
    run = runner._run

    def broken_run(start: int, stop: int, ids: Any, *rest: Any, **options: Any) -> Any:
        found = run(start, stop, ids, *rest, **options)
        found[0][np.isin(ids[:, -1], tokens)] = np.nan
        return found

    monkeypatch.setattr(runner, "_run", broken_run)


def test_a_slot_that_breaks_down_ends_alone(runner: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {slot: tokens(n, n) for slot, n in enumerate((12, 33, 7))}
    prompts = {slot: [min(token, 99) for token in ids] for slot, ids in prompts.items()}
    wanted = {slot: [alone(runner, ids, 9), alone(runner, ids, 9, 8)] for slot, ids in prompts.items()}
    for ids in prompts.values():
        runner.admit(ids)
    poison(runner, monkeypatch, 100, 101)
    with pytest.raises(BrokenSlotsError, match=r"slot 1, position 33: 131 of 131 logits are NaN") as caught:
        runner.step({0: 9, 1: 100, 2: 9})
    assert isinstance(caught.value, NumericError)
    assert caught.value.slots == (1,)
    assert set(caught.value.logits) == {0, 2}
    for slot, logits in caught.value.logits.items():
        assert close(logits, wanted[slot][0])
    assert runner.cache_lengths == (13, 33, 8)
    found = runner.step({0: 8, 2: 8})
    assert all(close(found[slot], wanted[slot][1]) for slot in (0, 2))
    assert close(runner.step({1: 9})[1], wanted[1][0])  # as it was, if anybody wants to go on
    with pytest.raises(BrokenSlotsError, match=r"slot 2, .*; slot 0, ") as caught:
        runner.step({2: 101, 0: 100})
    assert (caught.value.slots, caught.value.logits) == ((2, 0), {})
    runner.release(1)
    with pytest.raises(NumericError, match="slot 1, position 2"):
        runner.admit([1, 2, 100])
    assert runner.slots == (0, 2)
    slot = runner.begin([1, 2, 100, 3])
    with pytest.raises(NumericError, match="slot 1, position 2"):
        runner.extend(slot, 3)
    assert runner.slot_tokens(slot).tolist() == []
    assert close(runner.step({0: 7})[0], alone_without(runner, monkeypatch, prompts[0], 9, 8, 7))


def alone_without(runner: Slots, monkeypatch: pytest.MonkeyPatch, prompt: list[int], *fed: int) -> np.ndarray:
    monkeypatch.undo()
    return alone(runner, prompt, *fed)


# Exact answers


class Client:
    """A prompt that is continued greedily, and every logits that it got."""

    def __init__(self, prompt: list[int], count: int) -> None:
        self.prompt, self.count = prompt, count
        self.found: list[np.ndarray] = []

    @property
    def next_token(self) -> int:
        return int(self.found[-1].argmax())

    @property
    def done(self) -> bool:
        return len(self.found) > self.count


def single(runner: Slots, prompt: list[int], count: int) -> list[np.ndarray]:
    runner.reset()
    client = Client(prompt, count)
    slot, logits = runner.admit(prompt)
    client.found.append(logits)
    while not client.done:
        client.found.append(runner.step({slot: client.next_token})[slot])
    return client.found


def in_company(runner: Slots, prompts: list[list[int]], count: int, seed: int) -> list[list[np.ndarray]]:
    """Random arrivals, pieces and pauses; who is done leaves, and others take the place."""
    random = np.random.default_rng(seed)
    clients = [Client(prompt, count) for prompt in prompts]
    waiting, inside = [clients[n] for n in random.permutation(len(clients))], dict[int, Client]()
    runner.reset()
    while waiting or inside:
        if waiting and len(inside) < runner.max_slots and random.random() < 0.6:
            client = waiting.pop()
            inside[runner.begin(client.prompt)] = client
        for slot, client in inside.items():
            if not client.found and random.random() < 0.7:
                logits = runner.extend(slot, int(random.integers(1, 70)))
                client.found += [] if logits is None else [logits]
        fed = {s: c.next_token for s, c in inside.items() if c.found and not c.done and random.random() < 0.8}
        for slot, logits in (runner.step(fed) if fed else {}).items():
            inside[slot].found.append(logits)
        for slot in [slot for slot, client in inside.items() if client.done]:
            runner.release(slot)
            del inside[slot]
    return [client.found for client in clients]


def differing(found: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> int:
    return sum(not np.array_equal(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f, w, strict=True))


PROMPTS = [tokens(n, n) for n in (3, 8, 15, 16, 17, 40, 65, 66, 100, 131, 143)]


@pytest.mark.parametrize("threads", [1, 2])
def test_exact_answers_do_not_depend_on_company_nor_on_pieces(package: Path, threads: int) -> None:
    """Bit for bit, at every token of every client, whatever this CPU is."""
    with open_runner(package, threads=threads, exact=True) as runner:
        assert runner.exact
        wanted = [single(runner, prompt, 8) for prompt in PROMPTS]
        for seed in range(3):
            assert differing(in_company(runner, PROMPTS, 8, seed), wanted) == 0


def test_answers_that_are_not_exact_do_depend_on_company(q4_package: Path) -> None:
    """So the test above can fail: eight rows, or a piece of a prompt, go through the other graph."""
    with open_runner(q4_package, threads=1) as runner:
        assert not runner.exact
        wanted = [single(runner, prompt, 8) for prompt in PROMPTS]
        assert differing(in_company(runner, PROMPTS, 8, 0), wanted) > 0


def test_exact_answers_of_other_weights(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """float16 and int4 weights with a float16 cache, where this CPU runs them."""
    pytest.importorskip("torch")
    from olmo2_export.package.export import export
    from olmo2_export.weights.checkpoint import open_checkpoint

    export(open_checkpoint(str(tiny_checkpoint)), tmp_path / "package", variants=["fp16", "q4f16"])
    for variant in ("fp16", "q4f16"):
        with open_runner(tmp_path / "package", variant=variant, threads=1, exact=True) as runner:
            wanted = [single(runner, prompt, 4) for prompt in PROMPTS]
            assert differing(in_company(runner, PROMPTS, 4, 0), wanted) == 0


def test_an_exact_prefix_that_is_copied_gives_the_bits_of_the_whole_prompt(package: Path) -> None:
    system, a, b = tokens(48, 1), tokens(20, 2), tokens(9, 3)
    with open_runner(package, threads=1, exact=True) as runner:
        wanted = [single(runner, system + ids, 4) for ids in (a, b)]
        runner.reset()
        first, logits = runner.admit(system + a)
        assert np.array_equal(logits, wanted[0][0])
        second = runner.copy_prefix(first, len(system))
        runner.append(second, b)
        found = [runner.extend(second)]
        for n in range(4):
            assert found[-1] is not None
            both = runner.step({first: int(wanted[0][n].argmax()), second: int(found[-1].argmax())})
            assert np.array_equal(both[first], wanted[0][n + 1])
            found.append(both[second])
        assert differing([found], [wanted[1]]) == 0  # type: ignore[list-item]


@pytest.mark.parametrize("length", [1, 3, 7, 8, 13, 25])
@pytest.mark.parametrize("prompted", [4, 21])
def test_an_exact_slot_that_is_cut_has_the_bits_of_a_prompt_so_short(package: Path, prompted: int, length: int) -> None:
    prompt, text = tokens(prompted, 1), tokens(25 - prompted, 2)
    after = tokens(3, 3)
    with open_runner(package, threads=1, exact=True) as runner:
        slot, _ = runner.admit(prompt[: min(length, prompted)])
        for token in text[: max(0, length - prompted)]:
            runner.step({slot: token})
        wanted = [runner.step({slot: token})[slot] for token in after]
        runner.reset()
        slot, _ = runner.admit(prompt)
        for token in text:
            runner.step({slot: token})
        fork = runner.copy_prefix(slot, length)
        assert runner.slot_tokens(fork).tolist() == (prompt + text)[:length]
        runner.truncate_slot(slot, length)
        for token, logits in zip(after, wanted, strict=True):
            found = runner.step({slot: token, fork: token})
            assert np.array_equal(found[slot], logits)
            assert np.array_equal(found[fork], logits)


def test_an_exact_runner_refuses_what_it_cannot_make_exact(package: Path) -> None:
    with open_runner(package, threads=1, exact=True) as runner:
        slot, _ = runner.admit(tokens(24))
        with pytest.raises(UsageError, match="24 tokens and 7 to append"):
            runner.append(slot, tokens(7))
        runner.step({slot: 5})
        with pytest.raises(UsageError, match="25 tokens, 24 of a prompt: what was generated"):
            runner.append(slot, tokens(8))
        with pytest.raises(UsageError, match="20 tokens and 9 to append: expected a multiple of 8"):
            runner.append(runner.copy_prefix(slot, 20), tokens(9))
        fork = runner.copy_prefix(slot, 25)
        with pytest.raises(UsageError, match="what was generated"):
            runner.append(fork, tokens(8))
        runner.truncate_slot(fork, 16)
        runner.append(fork, tokens(8))
        assert runner.extend(fork) is not None


def test_an_exact_batch_and_an_exact_block_have_the_bits_of_slots(package: Path) -> None:
    ids, text = tokens(30), tokens(5, 9)
    with open_runner(package, threads=1, exact=True) as runner:
        slot, first = runner.admit(ids)
        wanted = [runner.step({slot: token})[slot] for token in text]
        runner.reset()
        assert np.array_equal(runner.prefill([ids])[0][0], first)
        for token, logits in zip(text, wanted, strict=True):
            assert np.array_equal(runner.decode([token])[0], logits)
        runner.truncate([30])
        assert np.array_equal(runner.decode_block(text), np.stack(wanted))
        assert runner.cache_lengths == (35,)


@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_max_slots_that_are_no_count_are_refused(tiny_package: Path, value: Any) -> None:
    with pytest.raises(UsageError, match="max_slots"):
        open_runner(tiny_package, max_slots=value)


@pytest.mark.parametrize("value", ["no", 0, 1, None])
def test_exact_that_is_not_true_or_false_is_refused(tiny_package: Path, value: Any) -> None:
    with pytest.raises(UsageError, match=f"exact {value!r}: expected True or False"):
        open_runner(tiny_package, exact=value)


def test_exact_answers_are_for_cpus(tiny_package: Path) -> None:
    with pytest.raises(UsageError, match="exact: backend trt runs on device cuda"):
        open_runner(tiny_package, backend="trt", exact=True)
    with pytest.raises(UsageError, match="exact: backend ort runs on device cuda"):
        open_runner(tiny_package, device="cuda", exact=True)
