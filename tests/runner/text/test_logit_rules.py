"""Penalties and biases: agreement with transformers and with the definition, and options out of range."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.text.logit_rules import LogitBias, Penalties

VOCAB = 131


def test_repetition_equals_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    random = np.random.default_rng(0)
    prompt, text = random.integers(0, 40, 30).tolist(), random.integers(20, 60, 50).tolist()
    penalties = Penalties(repetition=1.3)
    penalties.begin(prompt)
    for token_id in text:
        penalties.push(token_id)
    logits = random.normal(0, 3, VOCAB).astype(np.float32)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + text]), torch.from_numpy(logits)[None])
    penalties.apply(logits)
    np.testing.assert_allclose(logits, expected[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_count_what_was_generated_and_not_the_prompt() -> None:
    random = np.random.default_rng(1)
    text = random.integers(0, 100, 300).tolist()  # more different ones than the table first has room for
    penalties = Penalties(presence=0.5, frequency=0.25)
    penalties.begin([120, 121, 5])
    for token_id in text:
        penalties.push(token_id)
    logits = random.normal(0, 3, VOCAB).astype(np.float32)
    counts = Counter(text)
    expected = [x - (0.5 + 0.25 * counts[i] if i in counts else 0) for i, x in enumerate(logits.tolist())]
    penalties.apply(logits)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    penalties.begin([])
    penalties.apply(logits)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition": 0.0}, "repetition penalty 0.0"),
        ({"repetition": math.inf}, "repetition penalty inf"),
        ({"repetition": 1e39}, r"repetition penalty 1e\+39"),
        ({"repetition": 1e-40}, "repetition penalty 1e-40"),
        ({"presence": -1e39}, r"presence penalty -1e\+39"),
        ({"presence": math.nan}, "presence penalty nan"),
        ({"frequency": "1"}, "frequency penalty '1'"),
        ({"frequency": True}, "frequency penalty True"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Penalties(**options)  # type: ignore[arg-type]


def test_biases_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import SequenceBiasLogitsProcessor

    bias = {3: -2.5, 130: 7.0, 0: float("-inf")}
    logits = np.random.default_rng(2).normal(0, 3, VOCAB).astype(np.float32)
    processor = SequenceBiasLogitsProcessor({(i,): value for i, value in bias.items()})
    expected = processor(torch.tensor([[5]]), torch.from_numpy(logits.copy())[None])[0]
    LogitBias(bias, VOCAB).apply(logits)
    np.testing.assert_array_equal(logits, expected.numpy())


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({VOCAB: 1.0}, "token id 131, the vocabulary has 0 to 130"),
        ({-1: 1.0}, "token id -1"),
        ({"5": 1.0}, "token id '5'"),
        ({5: math.inf}, "token 5: inf"),
        ({5: math.nan}, "token 5: nan"),
        ({5: 1e39}, r"token 5: 1e\+39"),
        ({5: -1e39}, r"token 5: -1e\+39"),
        ({5: "1"}, "token 5: '1'"),
    ],
)
def test_a_bias_out_of_range_is_refused(bias: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LogitBias(bias, VOCAB)
