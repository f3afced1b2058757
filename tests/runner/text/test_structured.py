"""Structured output: what is drawn is always allowed, and what cannot be enforced is refused before the first token."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import Runner, open_runner
from runtimes.errors import BackendError, InputError, NumericError
from runtimes.generation.generate import generate
from runtimes.speculate.drafters import PromptLookup
from runtimes.text.logit_rules import LogitBias
from runtimes.text.sampling import Sampler
from runtimes.text.structured import GrammarRule, StructuredOutput
from runtimes.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")
PROMPT = "And the king said unto them, "
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "years": {"type": "integer", "minimum": 0, "maximum": 969},
        "sons": {"type": "array", "items": {"enum": ["Shem", "Ham", "Japheth"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "years", "sons"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


@pytest.fixture(scope="module")
def runner(demo_package: Path) -> Any:
    with open_runner(demo_package) as opened:
        yield opened


@pytest.fixture(scope="module")
def structured(tokenizer: Tokenizer, runner: Runner) -> StructuredOutput:
    return StructuredOutput(tokenizer, runner.model.vocab_size)


def text_of(runner: Runner, tokenizer: Tokenizer, rule: GrammarRule, seed: int, **options: Any) -> str:
    sampler = Sampler(temperature=1.3, seed=seed)
    found = generate(runner, tokenizer, PROMPT, sampler=sampler, max_new_tokens=200, rules=[rule], **options)
    assert found.finish_reason == "eos"
    assert rule.complete
    return found.text


@pytest.mark.parametrize("speculate", [None, PromptLookup()], ids=["plain", "speculation"])
def test_every_text_is_json_of_the_schema(
    runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput, speculate: PromptLookup | None
) -> None:
    rule = structured.json_schema(SCHEMA)
    texts = set()
    for seed in range(6):
        found = json.loads(text_of(runner, tokenizer, rule, seed, speculate=speculate))
        assert set(found) == {"name", "years", "sons"}
        assert isinstance(found["name"], str)
        assert len(found["name"]) <= 12
        assert type(found["years"]) is int
        assert 0 <= found["years"] <= 969
        assert 1 <= len(found["sons"]) <= 3
        assert set(found["sons"]) <= {"Shem", "Ham", "Japheth"}
        texts.add(json.dumps(found))
    assert len(texts) > 1


def test_without_the_rule_the_model_writes_no_json(runner: Runner, tokenizer: Tokenizer) -> None:
    text = generate(runner, tokenizer, PROMPT, sampler=Sampler(1.3, seed=0), max_new_tokens=40).text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_a_regex_matches_from_end_to_end(runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput) -> None:
    pattern = r"[A-Z][a-z]{2,5} begat [A-Z][a-z]+\."
    assert re.fullmatch(pattern, text_of(runner, tokenizer, structured.regex(pattern), 3))


def test_a_choice_is_one_of_the_texts_whatever_is_in_them(
    runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput
) -> None:
    texts = ['say "yes"', "no\\", "two\nlines", "ñandú 🦤"]
    assert {text_of(runner, tokenizer, structured.choice(texts), seed) for seed in range(12)} <= set(texts)
    for text in texts:
        assert text_of(runner, tokenizer, structured.choice([text]), 1) == text


def test_a_grammar_is_followed(runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput) -> None:
    rule = structured.grammar('start: "(" start ")" | "x"')
    text = text_of(runner, tokenizer, rule, 2)
    depth = text.count("(")
    assert text == "(" * depth + "x" + ")" * depth


def test_a_rule_goes_with_other_rules_and_a_fork_begins_anew(
    runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput
) -> None:
    rule = structured.choice(["ab", "cd"])
    for token_id in tokenizer.encode("a", add_special_tokens=False):
        rule.push(token_id)
    logits = np.zeros(runner.model.vocab_size, np.float32)
    fork = rule.fork()
    fork.apply(logits)
    allowed = {tokenizer.decode([i]) for i in np.flatnonzero(np.isfinite(logits))}
    assert allowed == {"a", "ab", "c", "cd"} & {tokenizer.decode([i]) for i in range(runner.model.vocab_size)}
    with pytest.raises(InputError, match="choice"):
        rule.push(tokenizer.encode("z", add_special_tokens=False)[0])


def test_rules_that_leave_no_token_are_an_error(
    runner: Runner, tokenizer: Tokenizer, structured: StructuredOutput
) -> None:
    every = LogitBias(dict.fromkeys(range(runner.model.vocab_size), -np.inf), runner.model.vocab_size)
    with pytest.raises(NumericError, match="leave no token"):
        generate(runner, tokenizer, PROMPT, sampler=Sampler(), rules=[every, structured.regex("a")])


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "no json", "JSON schema: not valid JSON"),
        ("json_schema", "[1]", "JSON schema: expected an object, found list"),
        ("json_schema", {"type": "objec"}, "Invalid type: objec"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", {"type": "string", "format": "nosuch"}, "Unknown format: nosuch"),
        ("json_schema", {"$ref": "http://example.org/schema"}, "does not fetch"),
        ("json_schema", "false", "expected an object, found bool"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("regex", "(a", "regex: .*unclosed group"),
        ("regex", "a(?=b)", "look-around"),
        ("choice", [], "choice \\[\\]: expected a list of strings"),
        ("choice", ["a", ""], "none of them empty"),
        ("choice", "ab", "expected a list"),
        ("grammar", "start: foo", "grammar: .*unknown name"),
    ],
)
def test_what_cannot_be_enforced_is_refused_in_one_line(
    structured: StructuredOutput, kind: str, source: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        getattr(structured, kind)(source)
    assert "\n" not in str(refused.value)


def test_a_model_without_an_end_or_a_machine_without_llguidance_is_told_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = Tokenizer(tokenizer._backend)
    with pytest.raises(InputError, match="no eos_token_id"):
        StructuredOutput(endless, 4096)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BackendError, match=re.escape("pip install 'olmo2-export[structured]'")):
        StructuredOutput(tokenizer, 4096)
