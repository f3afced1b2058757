"""This project: one task of a package, through its public functions only.

    python -m olmo2_export.bench.workers.ours PACKAGE VARIANT [--backend B] [--device D] [--adapter NAME] TASK

Beside the tasks of `common.py`:

| kind        | task                              | result                                                            |
|-------------|-----------------------------------|-------------------------------------------------------------------|
| lookup      | prompt_ids, new_tokens, repeats   | plain_ and lookup_tokens_per_second: medians, measured in turns   |
| lookup_text | text, texts, prompt_tokens,       | texts, identical_texts, drafted, accepted: greedy continuations   |
|             | new_tokens                        | of the text's parts, with and without prompt lookup               |
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtimes.ort.open  # noqa: F401  # before the clock starts, like the libraries of the others
from olmo2_export.bench.workers.common import OpenEngine, finish, measure
from runtimes import Runner, open_runner
from runtimes.generation.generate import generate, generate_tokens
from runtimes.speculate.drafters import Drafter, PromptLookup
from runtimes.targets import find_target
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer


class Ours:
    """A runner. An `Engine`."""

    def __init__(self, runner: Runner, adapter: str | None = None) -> None:
        self._runner = runner
        self._adapter = adapter
        self._ids = np.zeros(0, np.int64)

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self._runner.reset()
        self._ids = np.concatenate(self._runner.prefill(rows, adapter=self._adapter)).argmax(axis=-1)  # (B,)

    def step(self) -> None:
        if self._runner.top_k:
            self._ids = self._runner.decode_top(self._ids)[0][:, 0]
        else:
            self._ids = self._runner.decode(self._ids).argmax(axis=-1)

    def close(self) -> None:
        self._runner.reset()


def lookup(runner: Runner, prompt_ids: Sequence[int], new_tokens: int, repeats: int) -> dict[str, float]:
    """Continue a prompt greedily, plain and with prompt lookup in turns.

    Raises:
        ValueError: the two texts differ.
    """
    rates: dict[str, list[float]] = {"plain": [], "lookup": []}
    texts = set()
    for _ in range(repeats):
        for name, drafter in (("plain", None), ("lookup", PromptLookup())):
            ids, rate = _continue(runner, prompt_ids, new_tokens, drafter)
            rates[name].append(rate)
            texts.add(ids)
    if len(texts) != 1:
        raise ValueError(f"prompt lookup changed the text: {sorted(texts)}")
    return {f"{name}_tokens_per_second": statistics.median(values) for name, values in rates.items()}


def _continue(
    runner: Runner, prompt_ids: Sequence[int], new_tokens: int, drafter: Drafter | None
) -> tuple[tuple[int, ...], float]:
    """Return the new ids, and tokens/s from the first of them to the last."""
    runner.reset()
    ids, times = [], []
    for token_id in generate_tokens(
        runner, prompt_ids, sampler=Sampler(), max_new_tokens=new_tokens, speculate=drafter
    ):
        ids.append(token_id)
        times.append(time.perf_counter())
    return tuple(ids), (len(ids) - 1) / (times[-1] - times[0])


def lookup_text(runner: Runner, tokenizer: Tokenizer, task: dict[str, Any]) -> dict[str, float]:
    """Continue parts of a text greedily with and without prompt lookup, and count."""
    ids = tokenizer.encode(Path(task["text"]).read_text(encoding="utf-8"))
    length = task["prompt_tokens"]
    starts = np.linspace(0, len(ids) - length, task["texts"], dtype=int)
    result: dict[str, float] = {"texts": 0, "identical_texts": 0, "drafted": 0, "accepted": 0}
    for start in starts:
        prompt_ids = ids[start : start + length]
        plain, guessed = (
            generate(
                runner,
                tokenizer,
                prompt_ids,
                sampler=Sampler(),
                max_new_tokens=task["new_tokens"],
                eos_token_ids=(),
                speculate=drafter,
            )
            for drafter in (None, PromptLookup())
        )
        result["texts"] += 1
        result["identical_texts"] += plain.token_ids == guessed.token_ids
        result["drafted"] += guessed.drafted
        result["accepted"] += guessed.accepted
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path)
    parser.add_argument("variant")
    parser.add_argument("task", type=json.loads)
    parser.add_argument("--backend", default="ort")
    parser.add_argument("--device")
    parser.add_argument("--adapter")
    parser.add_argument("--kv-cache")
    args = parser.parse_args()
    task = args.task

    def open_package(check_hashes: bool = True) -> Runner:
        return open_runner(
            args.package,
            variant=args.variant,
            backend=args.backend,
            device=args.device,
            threads=task["threads"] if find_target(args.backend, args.device).takes_threads else None,
            check_hashes=check_hashes,
            kv_cache=args.kv_cache,
        )

    match task["kind"]:
        case "lookup":
            finish(lookup(open_package(), task["prompt_ids"], task["new_tokens"], task["repeats"]))
        case "lookup_text":
            finish(lookup_text(open_package(), Tokenizer.from_package(args.package), task))
        case _:

            def load() -> OpenEngine:
                runner = open_package(not task.get("trusted", False))
                return lambda _length, _rows: Ours(runner, args.adapter)

            finish(measure(task, load))


if __name__ == "__main__":
    main()
