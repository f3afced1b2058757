"""Generation in its layers: stop strings, ends, limits, what is fed to the model, and the same text as transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.errors import ContextLengthError, InputError, NumericError, UsageError
from runtimes.generation.generate import Generation, generate, generate_tokens, stream_text
from runtimes.generation.text_state import Piece, TextState, _Held
from runtimes.one_thread import OneThread
from runtimes.runners.runner import Runner
from runtimes.speculate.drafters import DraftModel, PromptLookup
from runtimes.text.logit_rules import Penalties
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

GREEDY = Sampler()
VOCAB = 4096


class ScriptedRunner:
    """A runner whose most probable next tokens are those of a script, one per call since it was last reset."""

    model = SimpleNamespace(vocab_size=VOCAB)
    variant = SimpleNamespace(answer="logits")
    top_k = 0
    exclusive = OneThread()

    def __init__(self, script: Sequence[int], max_cache_length: int = 64) -> None:
        self.script = list(script)
        self.max_cache_length = max_cache_length
        self.reset()

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.cached_tokens))

    @property
    def cached_tokens(self) -> tuple[np.ndarray, ...]:
        return (np.array(self.held, np.int64),) if self.fed else ()

    def truncate(self, lengths: Sequence[int]) -> None:
        (length,) = lengths
        assert 0 <= length <= len(self.held)
        del self.held[length:]

    def reset(self) -> None:
        self.fed: list[list[int]] = []
        self.held: list[int] = []

    def prefill(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        (row,) = sequences
        self.fed.append(list(row))
        self.held += row
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, self.script[len(self.fed) - 1]] = 1
        return [logits]

    def decode(self, token_ids: Sequence[int]) -> np.ndarray:
        return self.prefill([token_ids])[0]


class PieceTokenizer:
    """A tokenizer whose ids are positions in a list of pieces of text."""

    eos_token_ids = ()

    def __init__(self, pieces: Sequence[str], rest: str = "", special: Sequence[str] = ()) -> None:
        self.rest = rest
        self.special_tokens = {n: piece for n, piece in enumerate(pieces) if piece in special}
        self.pieces = ["" if piece in special else piece for piece in pieces]

    def stream(self) -> PieceTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


def streamed(pieces: Sequence[str], stop: Sequence[str], rest: str = "") -> list[Piece]:
    return list(stream_text(PieceTokenizer(pieces, rest), range(len(pieces)), stop=stop))


def cut_by_hand(text: str, stop: Sequence[str]) -> tuple[str, str]:
    """The definition: read character by character until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], "stop"
    return text, "length"


def test_text_is_the_same_for_every_way_to_cut_it_into_pieces() -> None:
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        text = "".join(random.choice(list("ab\n"), 12))
        stop = ["".join(random.choice(list("ab\n"), n)) for n in random.integers(2, 6, random.integers(0, 4))]
        cuts = np.sort(random.choice(13, 4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        expected, reason = cut_by_hand(text, stop)
        found = streamed(pieces[:-1], stop, rest=pieces[-1])
        assert ("".join(p.text for p in found), found[-1].finish_reason) == (expected, reason)
        assert all(p.text and p.finish_reason is None for p in found[:-1])
        seen.add(reason)
    assert seen == {"stop", "length"}


def test_stop_string_across_pieces_is_never_given_out_in_part() -> None:
    found = streamed(["one ", "\n", "Us", "er", ": two"], ["\nUser:"])
    assert found == [Piece("one ", None), Piece("", "stop")]


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert streamed(["abcd"], ["abcd", "bc"]) == [Piece("a", "stop")]
    assert streamed(["xabc"], ["bc", "abc"]) == [Piece("x", "stop")]


def streamed_with_names(pieces: Sequence[str], stop: Sequence[str]) -> list[Piece]:
    tokenizer = PieceTokenizer(pieces, special=("<|pad|>", "<|end|>"))
    return list(stream_text(tokenizer, range(len(pieces)), stop=stop))


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "reason"),
    [
        (["yes", "<|pad|>", "no"], ["<|pad|>"], "yes", "stop"),
        (["yes", "<|end|>", "no", "<|pad|>"], ["<|pad|>"], "yesno", "stop"),
        (["yes", "<|pad|>", "no"], ["s<|pad|>"], "ye", "stop"),
        (["yes", "<|pad|>", "no"], ["<|pad|>n"], "yes", "stop"),
        (["yes", "<|pad|>", "no"], ["s<|pad|>n"], "ye", "stop"),
        (["yes", "<|pad|>", "no"], ["s<|pad|>x"], "yesno", "length"),
        (["yes", "<|pad|>", "<|end|>", "no"], ["<|pad|><|end|>"], "yes", "stop"),
        (["yes", "<|pad|>", "no"], ["sn"], "ye", "stop"),
        (["yes", "<|pad|>", "no"], ["sn", "<|pad|>"], "yes", "stop"),
        (["a", "<|pad|>", "b", "<|pad|>", "c"], ["b<|pad|>c"], "a", "stop"),
        (["<|pad|>", "<|pad|>", "a"], ["<|pad|>b"], "a", "length"),
    ],
)
def test_a_stop_string_that_names_a_special_token_is_found_where_the_token_is(
    pieces: Sequence[str], stop: Sequence[str], expected: str, reason: str
) -> None:
    found = streamed_with_names(pieces, stop)
    assert ("".join(piece.text for piece in found), found[-1].finish_reason) == (expected, reason)
    assert all(piece.finish_reason is None and piece.text for piece in found[:-1])


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "reason"),
    [
        (["yes", "<|end|>", "no"], ["s<|end|>"], "ye", "stop"),
        (["ye", "s", "<|end|>"], ["es<|end|>"], "y", "stop"),
        (["yes", "<|end|>", "no"], ["<|end|>"], "yes", "stop"),
        (["yes", "<|pad|>", "<|end|>"], ["s<|pad|><|end|>"], "ye", "stop"),
        (["yes", "<|end|>", "no"], ["s<|end|>n"], "yes", "eos"),
        (["yes", "<|end|>", "no"], ["s<|pad|>"], "yes", "eos"),
        (["yes", "<|end|>", "no"], ["st"], "yes", "eos"),
    ],
)
def test_a_stop_string_with_the_name_of_the_token_that_ends_the_text_is_found(
    pieces: Sequence[str], stop: Sequence[str], expected: str, reason: str
) -> None:
    tokenizer = PieceTokenizer(pieces, special=("<|pad|>", "<|end|>"))
    found = list(stream_text(tokenizer, range(len(pieces)), stop=stop, eos_token_ids=[pieces.index("<|end|>")]))
    assert ("".join(piece.text for piece in found), found[-1].finish_reason) == (expected, reason)
    assert "".join(piece.text for piece in found[:-1]) in expected


def test_a_stop_string_with_the_name_of_the_end_cuts_the_text_of_a_real_tokenizer(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    runner = ScriptedRunner([*tokenizer.encode("the ends"), eos, 5])
    result = generate(runner, tokenizer, "x", sampler=GREEDY, stop=["ds<|endoftext|>"])
    assert (result.text, result.finish_reason, result.token_ids[-1]) == ("the en", "stop", eos)


def test_ids_are_pushed_into_a_text_until_it_ends(tokenizer: Tokenizer) -> None:
    """Half a character is held back, and so is what a stop string may begin with; other texts do not disturb it."""
    texts = ["a 👍 st", "ay and stop it now"]
    ids = [tokenizer.encode(text) for text in texts]
    states = [TextState(tokenizer, stop=["stop it"]) for _ in texts]
    pushed = ["", ""]
    for n in range(max(map(len, ids))):  # in turns
        for k, state in enumerate(states):
            if n < len(ids[k]) and state.finish_reason is None:
                pushed[k] += state.push(ids[k][n])
                assert texts[k].startswith(pushed[k])
    assert pushed == ["a 👍 ", "ay and "]
    assert [state.finish_reason for state in states] == [None, "stop"]
    assert states[0].finish() == "st"
    assert states[0].finish_reason == "length"
    for call in (lambda: states[1].push(5), states[1].finish):
        with pytest.raises(UsageError, match="the text has ended"):
            call()


def test_half_a_character_in_front_of_the_end_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    state = TextState(tokenizer)
    assert [state.push(i) for i in tokenizer.encode("👍")[:1]] == [""]
    assert (state.push(eos), state.finish_reason) == ("\ufffd", "eos")


def test_names_of_special_tokens_do_not_pile_up() -> None:
    held = _Held(["x<|pad|>"], {0: "<|pad|>"})
    for _ in range(100):
        held.push("", held.hidden(0))
        assert held.free() == ""
        assert sum(len(text) for text, _ in held._parts) <= len("x<|pad|>")


def test_random_texts_with_special_tokens_stop_where_the_definition_says() -> None:
    """Read the text with names, token by token; the first moment at which a stop string is complete ends it."""
    random = np.random.default_rng(3)
    names = ("<|pad|>", "<|end|>")
    for _ in range(3000):
        pieces = [str(random.choice(["a", "b", "ab", *names])) for _ in range(7)]
        stop = ["".join(random.choice(["a", "b", *names], random.integers(1, 4))) for _ in range(2)]
        expected, reason = "".join(p for p in pieces if p not in names), "length"
        for count in range(1, len(pieces) + 1):
            full = "".join(pieces[:count])
            shown = "".join(p for p in pieces[:count] if p not in names)
            cuts = [at for s in stop if (at := shown.find(s)) >= 0]
            for s in stop:
                at = full.find(s)
                if at >= 0 and any(name in s for name in names):
                    cuts.append(len(full[:at].replace(names[0], "").replace(names[1], "")))
            if cuts:
                expected, reason = shown[: min(cuts)], "stop"
                break
        found = streamed_with_names(pieces, stop)
        text = "".join(piece.text for piece in found)
        assert (text, found[-1].finish_reason) == (expected, reason), (pieces, stop)


def test_text_held_back_comes_when_it_is_no_stop_string() -> None:
    found = streamed(["one\n", "Us", "ual"], ["\nUser:"])
    assert found == [Piece("one", None), Piece("\nUsual", None), Piece("", "length")]
    assert streamed(["one\nUs"], ["\nUser:"]) == [Piece("one", None), Piece("\nUs", "length")]


def test_no_id_is_asked_for_after_a_stop_string() -> None:
    asked = []

    def ids() -> Iterator[int]:
        for i in range(3):
            asked.append(i)
            yield i

    list(stream_text(PieceTokenizer(["a", "stop", "b"]), ids(), stop=["to"]))
    assert asked == [0, 1]


@pytest.mark.parametrize("stop", [[""], ["a", ""], "ab", [3], 0, None])
def test_stop_that_means_nothing_is_refused_at_once(tokenizer: Tokenizer, stop: Any) -> None:
    with pytest.raises(InputError, match="none of them empty"):
        stream_text(tokenizer, [], stop=stop)


def test_eos_ends_the_text_and_gives_none(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    runner = ScriptedRunner([*tokenizer.encode("the end"), eos, 5])
    result = generate(runner, tokenizer, "x", sampler=GREEDY)
    assert (result.text, result.finish_reason) == ("the end", "eos")
    assert result.token_ids == (*tokenizer.encode("the end"), eos)


def test_eos_can_be_chosen_or_ignored(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    runner = ScriptedRunner([a, eos, b, a])
    ignored = generate(runner, tokenizer, "x", sampler=GREEDY, max_new_tokens=4, eos_token_ids=())
    assert (ignored.text, ignored.finish_reason) == ("aba", "length")
    chosen = generate(runner, tokenizer, "x", sampler=GREEDY, max_new_tokens=4, eos_token_ids=[b])
    assert (chosen.text, chosen.finish_reason, len(chosen.token_ids)) == ("a", "eos", 3)


def test_stop_in_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two")
    runner = ScriptedRunner(ids)
    result = generate(runner, tokenizer, "x", sampler=GREEDY, max_new_tokens=len(ids), stop=["two"])
    assert (result.text, result.finish_reason) == ("one ", "stop")


def test_half_a_character_at_the_limit_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👍")
    assert len(ids) > 1
    pieces: list[str] = []
    result = generate(
        ScriptedRunner(ids),
        tokenizer,
        "x",
        sampler=GREEDY,
        max_new_tokens=len(ids) - 1,
        on_text=pieces.append,
    )
    assert result.text == "\ufffd" == "".join(pieces)


def test_the_last_token_is_not_fed_to_the_model(tokenizer: Tokenizer) -> None:
    runner = ScriptedRunner([7, 8, 9, 10])
    assert list(generate_tokens(runner, [1, 2], sampler=GREEDY, max_new_tokens=3)) == [7, 8, 9]
    assert runner.fed == [[1, 2], [7], [8]]
    stopped = ScriptedRunner([*tokenizer.eos_token_ids, 9])
    generate(stopped, tokenizer, [1, 2], sampler=GREEDY, max_new_tokens=3)
    assert stopped.fed == [[1, 2]]


def test_generate_forgets_what_the_prompt_does_not_begin_with_and_generate_tokens_forgets_nothing(
    tokenizer: Tokenizer,
) -> None:
    runner = ScriptedRunner([7, 8, 9, 10])
    runner.prefill([[1, 1, 1]])
    ids = generate_tokens(runner, [2], sampler=GREEDY, max_new_tokens=2)
    assert list(ids) == [8, 9]
    assert runner.fed == [[1, 1, 1], [2], [8]]
    generate(runner, tokenizer, [3], sampler=GREEDY, max_new_tokens=1)
    assert runner.fed == [[3]]


class Recorder:
    """A runner that notes what is fed to another."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.fed: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def prefill(self, sequences: Sequence[Sequence[int]], **options: Any) -> Any:
        self.fed.append(list(sequences[0]))
        return self.runner.prefill(sequences, **options)

    def decode(self, token_ids: Sequence[int]) -> Any:
        self.fed.append(list(token_ids))
        return self.runner.decode(token_ids)


@pytest.fixture(scope="module")
def demo_runner(demo_package: Path) -> Iterator[Runner]:
    with open_runner(demo_package, threads=1) as runner:
        yield runner


def fresh(runner: Runner, tokenizer: Tokenizer, prompt: str | Sequence[int], **options: Any) -> Generation:
    runner.reset()
    return generate(runner, tokenizer, prompt, **options)


@pytest.mark.parametrize("speculate", [None, PromptLookup()], ids=["plain", "lookup"])
def test_second_turn_computes_only_what_is_new(
    demo_runner: Runner, tokenizer: Tokenizer, speculate: PromptLookup | None
) -> None:
    options: dict[str, Any] = {"sampler": GREEDY, "max_new_tokens": 20, "eos_token_ids": ()}
    first_prompt = tokenizer.encode("And the LORD said unto Moses,")
    new = tokenizer.encode("\nAnd Moses said,")
    first = fresh(demo_runner, tokenizer, first_prompt, **options)
    assert first.reused_tokens == 0
    second_prompt = [*first_prompt, *first.token_ids, *new]
    expected = fresh(demo_runner, tokenizer, second_prompt, **options)

    runner = Recorder(demo_runner)
    again = fresh(demo_runner, tokenizer, first_prompt, **options, speculate=speculate)
    assert again.token_ids == first.token_ids
    second = generate(runner, tokenizer, second_prompt, **options, speculate=speculate)
    assert second.reused_tokens == len(first_prompt) + 19  # the last id was in no cache
    assert runner.fed[0] == [first.token_ids[-1], *new]
    assert second.token_ids == expected.token_ids
    assert demo_runner.cached_tokens[0].tolist() == [*second_prompt, *second.token_ids[:-1]]


def test_prompt_that_differs_later_reuses_what_is_before(demo_runner: Runner, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"sampler": GREEDY, "max_new_tokens": 5, "eos_token_ids": ()}
    ids = tokenizer.encode("In the beginning God created the heaven and the earth.")
    for prompt, reused in ((ids, 0), (ids, len(ids) - 1), ([*ids[:6], 9, 8], 6), (ids[:4], 3), ([7, *ids], 0)):
        held = [row.copy() for row in demo_runner.cached_tokens] if reused else []
        expected = fresh(demo_runner, tokenizer, prompt, **options)
        demo_runner.reset()
        if held:
            demo_runner.prefill(held)
        found = generate(demo_runner, tokenizer, prompt, **options)
        assert (found.token_ids, found.reused_tokens) == (expected.token_ids, reused)


def test_runner_with_another_number_of_rows_is_reset(demo_runner: Runner, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("In the beginning")
    expected = fresh(demo_runner, tokenizer, ids, sampler=GREEDY, max_new_tokens=4)
    demo_runner.reset()
    demo_runner.prefill([ids, ids])
    found = generate(demo_runner, tokenizer, ids, sampler=GREEDY, max_new_tokens=4)
    assert (found.token_ids, found.reused_tokens) == (expected.token_ids, 0)
    demo_runner.truncate([0])
    assert generate(demo_runner, tokenizer, ids, sampler=GREEDY, max_new_tokens=4).token_ids == expected.token_ids


def test_nothing_is_forgotten_when_the_call_is_refused(demo_runner: Runner, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("In the beginning")
    demo_runner.reset()
    demo_runner.prefill([ids])
    bad: list[tuple[Any, dict[str, Any]]] = [
        ([*ids[:2], -1], {}),
        ([float(ids[0]), 4], {}),
        ([True, 4], {}),
        ([VOCAB], {}),
        ([], {}),
        ([1] * 1025, {}),
        ([1], {"max_new_tokens": 1024}),
        ([1], {"max_new_tokens": -1}),
        ([1], {"stop": [""]}),
        ([1], {"speculate": DraftModel(demo_runner)}),
    ]
    for prompt, options in bad:
        with pytest.raises((InputError, UsageError)):
            generate(demo_runner, tokenizer, prompt, sampler=GREEDY, **options)
        assert demo_runner.cached_tokens[0].tolist() == ids


def test_prompt_and_new_tokens_beyond_the_context_are_refused_before_the_model_runs(tokenizer: Tokenizer) -> None:
    runner = ScriptedRunner(range(20), max_cache_length=12)
    with pytest.raises(ContextLengthError, match=r"5 tokens and 8 new ones make 13: the context holds 12"):
        generate_tokens(runner, [1] * 5, sampler=GREEDY, max_new_tokens=8)
    with pytest.raises(ContextLengthError, match=r"a prompt of 13 tokens: the context holds 12"):
        generate(runner, tokenizer, [1] * 13, sampler=GREEDY)
    assert runner.fed == []
    runner.prefill([[1] * 6])
    with pytest.raises(ContextLengthError, match=r"a prompt of 11 tokens and 2 new ones make 13"):
        generate_tokens(runner, [1] * 5, sampler=GREEDY, max_new_tokens=2)


@pytest.mark.parametrize(("prompt", "asked", "new"), [(5, 7, 7), (5, None, 7), (12, None, 0), (12, 0, 0), (3, 0, 0)])
def test_exactly_the_context_works(tokenizer: Tokenizer, prompt: int, asked: int | None, new: int) -> None:
    runner = ScriptedRunner(range(20, 40), max_cache_length=12)
    result = generate(runner, tokenizer, [1] * prompt, sampler=GREEDY, max_new_tokens=asked, eos_token_ids=())
    assert (len(result.token_ids), result.finish_reason) == (new, "length")
    assert sum(map(len, runner.fed)) == (prompt + new - 1 if new else 0)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3"])
def test_max_new_tokens_that_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        generate_tokens(ScriptedRunner([]), [1], sampler=GREEDY, max_new_tokens=value)


def test_empty_prompt_begins_with_bos_if_there_is_one(tokenizer: Tokenizer) -> None:
    runner = ScriptedRunner([9])
    with_bos = replace(tokenizer, bos_token_id=6)
    result = generate(runner, with_bos, "", sampler=GREEDY, max_new_tokens=1)
    assert result.prompt_token_ids == (6,)
    with pytest.raises(InputError, match="empty prompt"):
        generate(runner, replace(tokenizer, bos_token_id=None), "", sampler=GREEDY)
    with pytest.raises(InputError, match="at least one prompt id"):
        generate(runner, tokenizer, [], sampler=GREEDY)


def test_a_text_that_is_cancelled_ends_there_and_feeds_no_more(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four")
    runner, asked = ScriptedRunner(ids), iter([False, True])
    result = generate(runner, tokenizer, [1, 2], sampler=GREEDY, cancelled=lambda: next(asked))
    assert (result.token_ids, result.finish_reason) == (tuple(ids[:2]), "cancelled")
    assert result.text == tokenizer.decode(ids[:2])
    assert runner.fed == [[1, 2], ids[:1]]


def test_an_end_counts_before_a_cancellation(tokenizer: Tokenizer) -> None:
    runner = ScriptedRunner([*tokenizer.eos_token_ids, 9])
    assert generate(runner, tokenizer, [1, 2], sampler=GREEDY, cancelled=lambda: True).finish_reason == "eos"


def test_times_are_measured(tokenizer: Tokenizer) -> None:
    result = generate(ScriptedRunner([7, 8, 9]), tokenizer, "x", sampler=GREEDY, max_new_tokens=3)
    assert result.time_to_first_token is not None
    assert result.time_to_first_token > 0
    assert result.decode_tokens_per_second == pytest.approx(2 / result.decode_seconds)
    one = generate(ScriptedRunner([7]), tokenizer, "x", sampler=GREEDY, max_new_tokens=1)
    assert one.decode_tokens_per_second is None
    none = generate(ScriptedRunner([7]), tokenizer, "x", sampler=GREEDY, max_new_tokens=0)
    assert none.time_to_first_token is None


def test_broken_model_gives_an_error_and_no_token(tokenizer: Tokenizer) -> None:
    class Broken(ScriptedRunner):
        def prefill(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
            return [np.full((1, VOCAB), np.nan, np.float32) for _ in sequences]

    with pytest.raises(NumericError):
        generate(Broken([7]), tokenizer, "x", sampler=GREEDY)


def test_greedy_text_equals_transformers(demo_package: Path, tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import olmo2_export.demo

    model = AutoModelForCausalLM.from_pretrained(Path(olmo2_export.demo.__file__).parent)
    prompt = "And it came to pass"
    ids = torch.tensor([tokenizer.encode(prompt)])
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    with open_runner(demo_package) as runner:
        pieces: list[str] = []
        result = generate(runner, tokenizer, prompt, sampler=GREEDY, max_new_tokens=24, on_text=pieces.append)
    assert list(result.token_ids) == expected
    assert result.text == "".join(pieces) == tokenizer.decode(expected)


def test_same_seed_gives_the_same_text(demo_package: Path, tokenizer: Tokenizer) -> None:
    with open_runner(demo_package) as runner:

        def text(seed: int) -> str:
            sampler = Sampler(temperature=1.0, top_p=0.95, seed=seed)
            return generate(runner, tokenizer, "And", sampler=sampler, max_new_tokens=12).text

        assert text(1) == text(1)
        assert text(1) != text(2)


def test_penalties_are_those_of_transformers_with_and_without_speculation(
    demo_runner: Runner, tokenizer: Tokenizer
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import olmo2_export.demo

    model = AutoModelForCausalLM.from_pretrained(Path(olmo2_export.demo.__file__).parent)
    prompt_ids = tokenizer.encode("And it came to pass, that it came to pass")
    plain, expected = (
        model.generate(torch.tensor([prompt_ids]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty)[0]
        for penalty in (1.0, 1.2)
    )
    assert not torch.equal(plain, expected)
    wanted = expected[len(prompt_ids) :].tolist()
    options: dict[str, Any] = {"sampler": GREEDY, "max_new_tokens": 24, "rules": [Penalties(repetition=1.2)]}
    assert list(fresh(demo_runner, tokenizer, prompt_ids, **options).token_ids) == wanted
    assert list(fresh(demo_runner, tokenizer, prompt_ids, **options, speculate=PromptLookup()).token_ids) == wanted
    candidates: Any = CandidateRunner(demo_runner, 1, 1e-6)
    assert list(fresh(candidates, tokenizer, prompt_ids, **options).token_ids) == wanted
    assert "decode_top" not in candidates.calls  # a penalty may bring up what the graph did not pick
    demo_runner.reset()
    assert list(generate_tokens(demo_runner, prompt_ids, **options)) == wanted


class CandidateRunner:
    """A runner that picks candidates, from another's logits."""

    def __init__(self, runner: Runner, top_k: int, step: float) -> None:
        self.runner, self.top_k, self.step = runner, top_k, step
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def rounded(self, logits: np.ndarray) -> np.ndarray:
        return np.round(logits / self.step).astype(np.float32) * np.float32(self.step)

    def prefill(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [self.rounded(logits) for logits in self.runner.prefill(sequences)]

    def decode(self, token_ids: Sequence[int]) -> np.ndarray:
        self.calls.append("decode")
        return self.rounded(self.runner.decode(token_ids))

    def decode_top(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append("decode_top")
        logits = self.rounded(self.runner.decode(token_ids))
        ids = np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]
        return ids, np.take_along_axis(logits, ids, axis=1)


@pytest.mark.parametrize(
    ("options", "top_k", "used"),
    [
        ({}, 1, True),
        ({}, 0, False),
        ({"temperature": 0.9, "top_k": 3}, 4, True),
        ({"temperature": 0.9, "top_k": 3}, 3, False),  # others may equal the third
        ({"temperature": 0.9, "top_k": 3, "top_p": 0.7}, 9, True),
        ({"temperature": 0.9}, 9, False),
        ({"temperature": 0.9, "top_p": 0.7}, 9, False),
    ],
)
def test_candidates_of_the_graph_give_the_same_text(
    demo_runner: Runner, tokenizer: Tokenizer, options: dict[str, Any], top_k: int, used: bool
) -> None:
    """With logits rounded to whole numbers, so that some steps have to be computed again for all of them."""
    recomputed = 0
    for seed in range(4):
        texts = []
        for k in (0, top_k):
            runner: Any = CandidateRunner(demo_runner, k, 1.0)
            sampler = Sampler(**options, seed=seed)
            texts.append(fresh(runner, tokenizer, "And God saw", sampler=sampler, max_new_tokens=20).token_ids)
        assert texts[0] == texts[1]
        assert ("decode_top" in runner.calls) is used
        recomputed += runner.calls.count("decode") if used else 0
    assert bool(recomputed) is (used and options != {})
