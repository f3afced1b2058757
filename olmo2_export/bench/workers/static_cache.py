"""What PyTorch users take for speed: transformers' `generate` on its static cache, which it compiles on a GPU.

    python -m olmo2_export.bench.workers.static_cache CHECKPOINT DEVICE '{"kind": "decode", ...}'

Takes the tasks decode, streams and prefill of `common.py`. A step is the time between two calls of a streamer, which
gets every token on the host, as our runners' callers do. A prefill is a call of `generate` for one token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers

from olmo2_export.bench.workers.common import finish, prompt

_WARM_CALLS = 3  # the first compiles, the second records a CUDA graph


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        tokens.tolist()  # it is on the host
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class StaticCache:
    """The model at bfloat16 and how it is asked."""

    def __init__(self, folder: Path, device: str) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = model.to(device).eval()
        self._device = device

    def times(self, context: int, new_tokens: int, rows: int, vocab_size: int) -> list[float]:
        """Return seconds: until the first new token, then between each two."""
        ids = torch.tensor([prompt(context, vocab_size, row) for row in range(rows)], device=self._device)
        clock = _Clock()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                cache_implementation="static",
                streamer=clock,
            )
        prompted, *tokens = clock.times  # `generate` hands the prompt to the streamer first
        return [b - a for a, b in pairwise([prompted, *tokens])]

    def step_seconds(self, task: dict[str, Any], rows: int) -> float:
        for _ in range(_WARM_CALLS):
            times = self.times(task["context"], task["steps"] + 2, rows, task["vocab_size"])
        return statistics.median(times[1:])

    def prefill_seconds(self, task: dict[str, Any]) -> float:
        for _ in range(_WARM_CALLS):
            self.times(task["length"], 1, 1, task["vocab_size"])
        return statistics.median(
            self.times(task["length"], 1, 1, task["vocab_size"])[0] for _ in range(task["repeats"])
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("device")
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()
    task, model = args.task, StaticCache(args.checkpoint, args.device)
    match task["kind"]:
        case "decode":
            finish({"tokens_per_second": 1 / model.step_seconds(task, 1)})
        case "streams":
            finish({"tokens_per_second": task["rows"] / model.step_seconds(task, task["rows"])})
        case "prefill":
            finish({"tokens_per_second": task["length"] / model.prefill_seconds(task)})
        case kind:
            raise ValueError(f"task {kind!r}: there is decode, streams, prefill")


if __name__ == "__main__":
    main()
