"""transformers, or optimum-onnx, which has the same interface: one task. Runs in the interpreter of either.

    python -m olmo2_export.bench.workers.hugging_face transformers CHECKPOINT DTYPE DEVICE '{"kind": "points", ...}'
    python -m olmo2_export.bench.workers.hugging_face optimum FOLDER float32 cpu '{"kind": "points", ...}'

The model is called in a loop with its own KV cache, which saves what `generate` does between two tokens. transformers
is asked for the last position's logits alone; optimum's graph gives those of all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from olmo2_export.bench.workers.common import OpenEngine, finish, measure


class CachedModel:
    """A model and its cache; an `Engine`."""

    def __init__(self, model: Any, device: str, arguments: dict[str, Any]) -> None:
        self._model = model
        self._device = device
        self._arguments = arguments
        self._cache: Any = None
        self._length = 0
        self._ids = torch.zeros(0, dtype=torch.int64)

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self.close()
        self._pick(torch.tensor(rows, device=self._device))

    def step(self) -> None:
        self._pick(self._ids[:, None])

    def close(self) -> None:
        self._cache, self._length = None, 0

    def _pick(self, ids: torch.Tensor) -> None:
        rows, count = ids.shape
        positions = torch.arange(self._length, self._length + count, device=self._device)
        with torch.inference_mode():
            output = self._model(
                input_ids=ids,
                attention_mask=torch.ones(rows, self._length + count, dtype=torch.int64, device=self._device),
                position_ids=positions.expand(rows, count),
                past_key_values=self._cache,
                use_cache=True,
                **self._arguments,
            )
        self._cache, self._length = output.past_key_values, self._length + count
        self._ids = output.logits[:, -1].argmax(dim=-1)
        self._ids.tolist()  # on the host, as the tokens of the others are


def load_transformers(folder: Path, dtype: str, device: str) -> Any:
    """Load a checkpoint as transformers users do."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def load_optimum(folder: Path, threads: int) -> Any:
    """Load what optimum exported, with its own runner."""
    from onnxruntime import SessionOptions  # type: ignore[import-untyped]
    from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]

    options = SessionOptions()
    options.intra_op_num_threads = threads
    return ORTModelForCausalLM.from_pretrained(folder, session_options=options, provider="CPUExecutionProvider")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["transformers", "optimum"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype")
    parser.add_argument("device")
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(args.task["threads"])
    if args.library == "optimum":
        import optimum.onnxruntime  # type: ignore[import-not-found]  # noqa: F401  # before the clock starts
    else:
        _ = transformers.Olmo2ForCausalLM  # likewise: it is imported when it is first named
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def load() -> OpenEngine:
        if args.library == "optimum":
            model, arguments = load_optimum(args.folder, args.task["threads"]), {}
        else:
            model, arguments = load_transformers(args.folder, args.dtype, args.device), {"logits_to_keep": 1}
        return lambda _length, _rows: CachedModel(model, args.device, arguments)

    finish(measure(args.task, load))


if __name__ == "__main__":
    main()
