"""The bundled demo model is what its model card says: trained, and able to continue its corpus."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import Olmo2ForCausalLM

import olmo2_export.demo
from olmo2_export.demo.train import pack, perplexity
from runtimes import open_runner
from runtimes.generation.generate import generate
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

DEMO = Path(olmo2_export.demo.__file__).parent
PERPLEXITY = 29.996
"""on the held-out chapters, from the model card; of an untrained model: about the vocabulary's size, 4096"""


def test_held_out_perplexity_is_the_model_cards() -> None:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokens = pack(tokenizer, text.removesuffix("\n").split("\n\n"))
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert f"| held-out tokens | {len(tokens)} |" in card
    assert f"| held-out perplexity of the stored weights | {PERPLEXITY} |" in card
    model = Olmo2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True)
    assert perplexity(model, tokens) == pytest.approx(PERPLEXITY, abs=0.05)


def test_greedy_text_is_made_of_the_corpus_words(demo_package: Path) -> None:
    with open_runner(demo_package) as runner:
        tokenizer = Tokenizer.from_package(demo_package)
        result = generate(
            runner, tokenizer, "And God said unto", sampler=Sampler(), max_new_tokens=60, eos_token_ids=()
        )
    assert len(result.token_ids) == 60
    known = set(words((DEMO / "heldout.txt").read_text(encoding="utf-8")))
    found = words(result.text)
    assert len(found) > 30, result.text
    assert sum(word in known for word in found) >= 0.9 * len(found), result.text


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())
