"""Several texts of one prompt: each is what it would be alone, whatever the number of slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.errors import InputError
from runtimes.generation.generate import generate
from runtimes.generation.samples import generate_samples
from runtimes.text.logit_rules import Penalties
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

PROMPT = "And it came to pass, when"


def drawer(number: int) -> tuple[Sampler, list[Penalties]]:
    return Sampler(temperature=1.1, top_p=0.95, seed=7 + number), [Penalties(repetition=1.1)]


@pytest.mark.parametrize("max_slots", [None, 2, 1])
def test_each_of_an_exact_runner_is_what_it_would_be_alone(demo_two_package: Path, max_slots: int | None) -> None:
    tokenizer = Tokenizer.from_package(demo_two_package)
    options: dict[str, Any] = {"max_new_tokens": 12, "stop": [","], "logprobs": 2}
    with open_runner(demo_two_package, variant="q4", exact=True) as runner:
        if max_slots is not None:
            runner.max_slots = max_slots
        found = generate_samples(runner, tokenizer, PROMPT, 5, drawer=drawer, **options)
        assert runner.slots == ()
        for number, sample in enumerate(found):
            sampler, rules = drawer(number)
            alone = generate(runner, tokenizer, PROMPT, sampler=sampler, rules=rules, **options)
            assert (sample.text, sample.token_ids, sample.finish_reason) == (
                alone.text,
                alone.token_ids,
                alone.finish_reason,
            )
            assert sample.logprobs == alone.logprobs
            assert len(sample.logprobs) == len(sample.token_ids)
    assert len({sample.token_ids for sample in found}) > 1
    assert len({sample.finish_reason for sample in found}) == 2
    assert [sample.reused_tokens for sample in found] == [0, *[len(found[0].prompt_token_ids)] * 4]


@pytest.mark.parametrize("new", [0, 1])
def test_no_token_or_one(demo_package: Path, new: int) -> None:
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package) as runner:
        found = generate_samples(runner, tokenizer, PROMPT, 3, drawer=drawer, max_new_tokens=new)
        assert [len(sample.token_ids) for sample in found] == [new] * 3
        assert {sample.finish_reason for sample in found} == {"length"}
        assert runner.slots == ()


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_another_number_of_samples_is_refused(demo_package: Path, count: Any) -> None:
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package) as runner, pytest.raises(InputError, match=r"samples .*at least 1"):
        generate_samples(runner, tokenizer, PROMPT, count, drawer=drawer)


def test_logprobs_of_prompt_and_text_are_those_of_the_model(demo_package: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    import olmo2_export.demo

    tokenizer = Tokenizer.from_package(demo_package)
    prompt = tokenizer.encode("And it came to pass, " * 20)  # more than a piece
    with open_runner(demo_package) as runner:
        runner.prefill([prompt[:40]])  # what it holds is of no use
        found = generate(runner, tokenizer, prompt, sampler=Sampler(), max_new_tokens=5, logprobs=3, prompt_logprobs=2)
        plain = generate(runner, tokenizer, prompt, sampler=Sampler(), max_new_tokens=5)
    assert found.token_ids == plain.token_ids
    assert plain.logprobs == plain.prompt_logprobs == ()
    model = AutoModelForCausalLM.from_pretrained(Path(olmo2_export.demo.__file__).parent, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *found.token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    tokens = [*found.prompt_logprobs, *found.logprobs]
    assert [token.token_id for token in tokens] == ids[0, 1:].tolist()
    for position, token in enumerate(tokens):
        assert token.logprob == pytest.approx(expected[position, token.token_id].item(), abs=1e-4)
        top = np.array([p for _, p in token.top])
        np.testing.assert_allclose(top, expected[position].topk(len(top)).values.numpy(), atol=1e-4)
    assert {len(token.top) for token in found.logprobs} == {3}
