"""Integers of any kind are integers, wherever a caller gives one; a bool is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.errors import InputError, UsageError
from runtimes.generation.generate import generate
from runtimes.integers import as_integer
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer


class Index:
    """Any other integer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), Index(3)])
def test_integers(value: Any) -> None:
    found = as_integer(value)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    "value", [None, True, np.True_, 3.0, np.float32(3), "3", [3], np.array([3, 4]), np.array(True)]
)
def test_what_is_no_integer(value: Any) -> None:
    assert as_integer(value) is None


@pytest.mark.parametrize("kind", [np.int64, np.uint16, Index])
def test_every_size_and_id_of_a_generation(demo_package: Path, kind: Any) -> None:
    tokenizer = Tokenizer.from_package(demo_package)
    ids = tokenizer.encode("And it came to pass")
    with open_runner(demo_package, threads=1) as runner:
        expected = generate(runner, tokenizer, ids, sampler=Sampler(0.8, 5, 1.0, 7), max_new_tokens=4)
    with open_runner(demo_package, threads=kind(1)) as runner:
        sampler = Sampler(0.8, kind(5), 1.0, kind(7))
        found = generate(runner, tokenizer, [kind(i) for i in ids], sampler=sampler, max_new_tokens=kind(4))
        assert (found.token_ids, found.prompt_token_ids) == (expected.token_ids, expected.prompt_token_ids)
        assert {type(i) for i in (*found.token_ids, *found.prompt_token_ids)} == {int}
        runner.truncate([kind(2)])
        assert runner.cached_tokens[0].tolist() == ids[:2]


def test_slots(q8_package: Path) -> None:
    with open_runner(q8_package, threads=1) as runner:
        slot, _ = runner.admit([1, 2])  # type: ignore[attr-defined]
        logits = runner.step({np.int64(slot): np.int64(3)})  # type: ignore[attr-defined]
        assert logits[slot].shape == (131,)
        for wrong in (True, 0.0, "0"):
            with pytest.raises(InputError, match="slots, integers"):
                runner.step({wrong: 3})  # type: ignore[attr-defined]
            with pytest.raises(InputError, match="not admitted"):
                runner.release(wrong)  # type: ignore[attr-defined]
        found = runner.step({Index(slot): np.array(4)})  # type: ignore[attr-defined]
        assert list(found) == [slot]
        with pytest.raises(InputError, match="slots, integers, each once"):
            runner.step({Index(slot): 5, slot: 6})  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="to token ids, found list"):
            runner.step([5])  # type: ignore[attr-defined]
        assert runner.cached_tokens[0].tolist() == [1, 2, 3, 4]
        runner.release(np.int64(slot))  # type: ignore[attr-defined]
        assert runner.cache_lengths == ()


def test_a_bool_and_a_float_are_refused(demo_package: Path) -> None:
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package, threads=1) as runner:
        for wrong in (True, 4.0, np.float64(4), "4"):
            with pytest.raises(InputError, match="max_new_tokens"):
                generate(runner, tokenizer, "x", sampler=Sampler(), max_new_tokens=wrong)  # type: ignore[arg-type]
            with pytest.raises(InputError, match="position 0: expected an integer token id"):
                runner.prefill([[wrong]])  # type: ignore[list-item]
            with pytest.raises(InputError, match="top_k"):
                Sampler(top_k=wrong)  # type: ignore[arg-type]
            with pytest.raises(InputError, match="seed"):
                Sampler(seed=wrong)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="threads"):
                open_runner(demo_package, threads=wrong)  # type: ignore[arg-type]


def test_a_0d_array_is_an_id_and_no_sequence_of_them(demo_package: Path) -> None:
    one = np.array(3)
    with open_runner(demo_package, threads=1) as runner:
        runner.prefill([[one, 4]])
        runner.decode([one])
        assert runner.cached_tokens[0].tolist() == [3, 4, 3]
        for call, said in (
            (runner.prefill, "expected a sequence of rows of token ids, found ndarray"),
            (runner.decode, "expected a sequence with one token id per row, found ndarray"),
            (runner.truncate, "expected a sequence with one length per row, found ndarray"),
            (runner.decode_block, "expected a 1-d array of integers, found 0-d int64"),
        ):
            with pytest.raises(InputError, match=said):
                call(one)  # type: ignore[operator]
        assert runner.cached_tokens[0].tolist() == [3, 4, 3]
