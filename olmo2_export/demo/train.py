"""Train the demo model that ships in this folder: a small OLMo 2 and its own BPE tokenizer, on the King James Bible.

The text comes from Debian's `bible-kjv` package (public domain):

    apt-get install bible-kjv && bible -f "Gen1:1-Rev22:21" > kjv.txt
    python -m olmo2_export.demo.train kjv.txt --out demo-checkpoint

It writes an ordinary Hugging Face checkpoint (bfloat16 safetensors, config, tokenizer), the held-out chapters, a
table of losses and a model card. Training uses transformers' own models, so the weights owe nothing to the model code
of this project. `--model-type olmo` trains an OLMo 1. One seed fixes the split, the initial weights and the order of
the batches; the last bits of the weights still depend on the machine's matrix kernels and thread count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$")
# The pre-tokenisation of OLMo 2's own tokenizer (dolma2): contractions, words, up to three digits, punctuation, spaces.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_EVERY = 20
CONTEXT = 1024


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes the weights besides the text."""

    model_type: str = "olmo2"
    seed: int = 0
    epochs: int = 6
    batch_size: int = 4
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4


SMALL = Recipe(
    epochs=3,
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""a fifth of the size, for tests of other model types"""
OWN_FIELDS: dict[str, dict[str, Any]] = {"olmo": {"clip_qkv": 2.5}, "olmo2": {"rms_norm_eps": 1e-6}}
"""model type -> fields of its config"""


def read_chapters(path: Path) -> list[str]:
    """Return the chapters in order, one verse a line, without the verse numbers."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = VERSE.match(line)
        if match is None:
            raise ValueError(f"{path}:{number}: expected 'Book1:1 text', found {line[:40]!r}")
        book, chapter, text = match.groups()
        chapters.setdefault((book, chapter), []).append(text.strip())
    return ["\n".join(verses) for verses in chapters.values()]


def train_tokenizer(chapters: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, so that any text can be encoded and decoded back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, chapters: list[str]) -> torch.Tensor:
    """Return all tokens, (N,) int64, every chapter between two end-of-text tokens as OLMo 2 was trained."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for encoding in tokenizer.encode_batch(chapters):
        ids += [*encoding.ids, end]
    return torch.tensor(ids)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Return exp of the mean negative log-likelihood over windows of `CONTEXT` tokens, each scored from its start."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1]
        logits = model(window[None, :-1]).logits[0]  # (S, V)
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def train(model: Any, tokens: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> list[dict[str, float]]:
    """Train in place; return one row of losses per epoch."""
    per_step = recipe.batch_size * CONTEXT
    steps_per_epoch = (len(tokens) - CONTEXT - 1) // per_step
    steps = recipe.epochs * steps_per_epoch
    matrices = [w for w in model.parameters() if w.ndim > 1]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak_learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup_steps, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    order = torch.Generator().manual_seed(recipe.seed)
    rows: list[dict[str, float]] = []
    bar = tqdm(total=steps, unit="step")
    for epoch in range(recipe.epochs):
        # A new offset per epoch, so that the windows never fall on the same places twice.
        offset = int(torch.randint(CONTEXT, (1,), generator=order))
        windows = torch.randperm(steps_per_epoch * recipe.batch_size, generator=order) * CONTEXT + offset
        windows = windows.clamp(max=len(tokens) - CONTEXT - 1)
        total = 0.0
        for starts in windows.view(steps_per_epoch, recipe.batch_size):
            batch = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()])  # (B, S + 1)
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        rows.append(
            {
                "epoch": epoch + 1,
                "train_loss": total / steps_per_epoch,
                "held_out_perplexity": perplexity(model, held_out),
            }
        )
        tqdm.write(json.dumps(rows[-1]))
    bar.close()
    return rows


def model_card(recipe: Recipe, rows: list[dict[str, float]], facts: dict[str, object], sample: str) -> str:
    """Return the README.md of the checkpoint."""
    table = "\n".join(f"| {r['epoch']:.0f} | {r['train_loss']:.3f} | {r['held_out_perplexity']:.2f} |" for r in rows)
    fields = "\n".join(f"| {name} | {value} |" for name, value in (vars(recipe) | facts).items())
    return f"""# demo: a small OLMo 2 trained on the King James Bible

A real, if tiny, OLMo 2 (full-width QK-norm, post-norms, grouped-query attention) that ships with olmo2-export so that
parity, perplexity and text mean something on a machine without a model hub. It continues text in the style of its
corpus and knows nothing else.

Corpus: the King James Bible as printed by Debian's `bible-kjv` (public domain): one document a chapter, one verse a
line, no numbers. Every {HELD_OUT_EVERY}th chapter is held out (`heldout.txt`), also from the tokenizer's training.
Recipe: `python -m olmo2_export.demo.train kjv.txt --out DIR`; the weights are stored in bfloat16.

| | |
|---|---|
{fields}

| epoch | training loss | held-out perplexity |
|---|---|---|
{table}

Greedy sample after "In the beginning":

> {sample}
"""


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="the output of: bible -f 'Gen1:1-Rev22:21'")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--model-type", choices=OWN_FIELDS, default=Recipe.model_type)
    parser.add_argument("--small", action="store_true", help="for tests")
    args = parser.parse_args()
    recipe = replace(SMALL if args.small else Recipe(), seed=args.seed, model_type=args.model_type)
    recipe = recipe if args.epochs is None else replace(recipe, epochs=args.epochs)
    args.out.mkdir(parents=True, exist_ok=True)

    chapters = read_chapters(args.text)
    held_out_chapters = chapters[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    train_chapters = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    tokenizer = train_tokenizer(train_chapters, recipe.vocab_size)
    tokens, held_out = pack(tokenizer, train_chapters), pack(tokenizer, held_out_chapters)

    end, pad = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PAD)
    torch.manual_seed(recipe.seed)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(
            recipe.model_type,
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=pad,
            tie_word_embeddings=False,
            **OWN_FIELDS[recipe.model_type],
        )
    )
    started = time.monotonic()
    rows = train(model, tokens, held_out, recipe)
    minutes = (time.monotonic() - started) / 60

    model.to(torch.bfloat16).save_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(
        args.out, dtype=torch.float32
    )  # the stored weights, computed in float32
    prompt = torch.tensor([[end, *tokenizer.encode("In the beginning").ids]])
    sample = tokenizer.decode(model.generate(prompt, max_new_tokens=80, do_sample=False)[0].tolist())
    facts: dict[str, object] = {
        "parameters": sum(w.numel() for w in model.parameters()),
        "training tokens": len(tokens),
        "held-out tokens": len(held_out),
        "context": CONTEXT,
        "sha256 of the text": hashlib.sha256(args.text.read_bytes()).hexdigest(),
        "steps": recipe.epochs * ((len(tokens) - CONTEXT - 1) // (recipe.batch_size * CONTEXT)),
        "training minutes, two shared cores": round(minutes),
        "held-out perplexity of the stored weights": round(perplexity(model, held_out), 3),
    }
    tokenizer.save(str(args.out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    special_tokens = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    (args.out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (args.out / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n")
    (args.out / "heldout.txt").write_text("\n\n".join(held_out_chapters) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(recipe, rows, facts, sample.replace("\n", "\n> ")), encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
