"""A runner in two threads at once: the right numbers or one line, never another text's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.errors import UsageError
from runtimes.generation.generate import generate, generate_tokens
from runtimes.runners.runner import Runner
from runtimes.speculate.drafters import PromptLookup
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

pytestmark = pytest.mark.alone  # threads that meet by chance do so on more than one CPU

GREEDY = Sampler()
FIRST, SECOND = "And it came to pass", "In the beginning God created"


@pytest.fixture(scope="module", params=["fp32", "q4"])
def runner(request: pytest.FixtureRequest, demo_two_package: Path) -> Iterator[Runner]:
    """A graph whose cache is handed on, and one whose cache is a buffer."""
    with open_runner(demo_two_package, variant=request.param, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives, or raises, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def calls(runner: Runner) -> list[Callable[[], object]]:
    return [
        lambda: runner.prefill([[1, 2]]),
        lambda: runner.decode([3]),
        lambda: runner.decode_block([3, 4]),
        lambda: runner.truncate([1]),
        runner.reset,
        runner.close,
    ]


def test_every_call_is_refused_while_another_thread_is_in_one(runner: Runner) -> None:
    runner.reset()
    runner.prefill([[5, 6]])
    with runner.exclusive:
        for call in calls(runner):
            with pytest.raises(
                UsageError, match="in use by another thread and serves one at a time; open one for each"
            ):
                elsewhere(call)
        if hasattr(runner, "admit"):
            for call in (lambda: runner.admit([1]), lambda: runner.step({0: 1}), lambda: runner.release(0)):
                with pytest.raises(UsageError, match="in use by another thread"):
                    elsewhere(call)
        assert runner.cached_tokens[0].tolist() == [5, 6]
        runner.decode([7])  # its own calls are not
    assert elsewhere(lambda: runner.decode([8])).shape == (1, runner.model.vocab_size)


def test_threads_that_take_turns_get_what_one_gets(runner: Runner) -> None:
    runner.reset()
    expected = [runner.prefill([[5, 6]])[0], *(runner.decode([n]) for n in (7, 8))]
    runner.reset()
    found = [
        elsewhere(lambda: runner.prefill([[5, 6]]))[0],
        *(elsewhere(lambda n=n: runner.decode([n])) for n in (7, 8)),
    ]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_threads_that_decode_at_once_get_the_right_logits_or_one_line(runner: Runner) -> None:
    runner.reset()
    runner.prefill([[5, 6]])
    expected = runner.decode([7])
    refused, right = [], []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(25):
            try:
                with runner.exclusive:
                    runner.truncate([2])
                    right.append(np.array_equal(runner.decode([7]), expected))
            except UsageError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right)
    assert len(right) + len(refused) == 100
    assert len(right) > 0


def test_generate_keeps_the_runner_to_itself_until_it_is_done(runner: Runner, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"sampler": GREEDY, "max_new_tokens": 8, "eos_token_ids": ()}
    runner.reset()
    expected = generate(runner, tokenizer, FIRST, **options).text
    said: list[str] = []

    def meddle(_: str) -> None:
        try:
            elsewhere(lambda: generate(runner, tokenizer, SECOND, **options))
        except UsageError as error:
            said.append(str(error))

    runner.reset()
    assert generate(runner, tokenizer, FIRST, **options, on_text=meddle).text == expected
    assert len(said) > 3
    assert elsewhere(lambda: generate(runner, tokenizer, FIRST, **options)).text == expected


@pytest.mark.parametrize("speculate", [None, PromptLookup()], ids=["plain", "lookup"])
@pytest.mark.parametrize("advanced", [1, 2, 5])
def test_two_texts_in_turns_on_one_runner_are_refused(
    runner: Runner, tokenizer: Tokenizer, speculate: PromptLookup | None, advanced: int
) -> None:
    runner.reset()
    repeating = tokenizer.encode("one two three " * 6)
    alone = list(generate_tokens(runner, repeating, sampler=GREEDY, max_new_tokens=30))
    runner.reset()
    ids = generate_tokens(runner, repeating, sampler=GREEDY, max_new_tokens=30, speculate=speculate)
    found = [next(ids) for _ in range(advanced)]
    generate(runner, tokenizer, SECOND, sampler=GREEDY, max_new_tokens=3)
    # Ids that were checked already may still come.
    with pytest.raises(UsageError, match=r"cache was changed by somebody else .*; open one runner for each text"):
        found.extend(ids)
    assert found == alone[: len(found)]
    assert len(found) < 30


def test_an_iterator_may_be_advanced_by_several_threads_in_turns(runner: Runner, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode(FIRST)
    runner.reset()
    expected = list(generate_tokens(runner, prompt, sampler=GREEDY, max_new_tokens=6))
    runner.reset()
    ids = generate_tokens(runner, prompt, sampler=GREEDY, max_new_tokens=6)
    assert [elsewhere(lambda: next(ids)) for _ in range(6)] == expected
