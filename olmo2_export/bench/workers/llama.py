"""llama.cpp: one task, or the logits of given tokens, of a GGUF. Runs in the interpreter of llama-cpp-python.

    python -m olmo2_export.bench.workers.llama task FILE.gguf [--kv q8_0] '{"kind": "decode", ...}'
    python -m olmo2_export.bench.workers.llama logits FILE.gguf IDS.npy LOGITS.f32

It calls llama.cpp's C functions with the C defaults (mmap, F16 cache, flash attention "auto"), because the Python class
on top of them turns flash attention off. With `--kv q8_0` the cache is Q8_0 and flash attention on, which it needs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from olmo2_export.bench.workers.common import OpenEngine, finish, measure

_CHUNK = 512  # tokens a call; n_ubatch's default, and what fits into one llama_batch here


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, user_data: object) -> None:
    """llama.cpp narrates to stderr; what fails also returns None or a code."""


def load_model(path: Path) -> Any:
    """Map a GGUF."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if model is None:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model


class Llama:
    """A context of a model, of some sequences, called rows; an `Engine`."""

    def __init__(self, model: Any, threads: int, context: int, rows: int, kv: str = "f16") -> None:
        options = llama_cpp.llama_context_default_params()
        if kv == "q8_0":
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_Q8_0
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.n_ctx = context * rows
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, options)
        if self._context is None:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} rows of {context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_CHUNK, 0, 1)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._lengths = [0] * rows
        self._ids = [0] * rows

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """The rows follow each other in calls that are filled, so that short prompts share one."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self._lengths = [0] * len(self._lengths)
        tokens = [(row, t, i == len(ids) - 1) for row, ids in enumerate(rows) for i, t in enumerate(ids)]
        self._ids = [int(token) for token in self._append(tokens).argmax(axis=-1)]

    def step(self) -> None:
        logits = self._decode([(row, token, True) for row, token in enumerate(self._ids)])
        self._ids = [int(token) for token in logits.argmax(axis=-1)]

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def all_logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits of every position [n, V]."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self._lengths = [0]
        return self._append([(0, token, True) for token in token_ids])

    def _append(self, tokens: Sequence[tuple[int, int, bool]]) -> np.ndarray:
        return np.concatenate([self._decode(tokens[start : start + _CHUNK]) for start in range(0, len(tokens), _CHUNK)])

    def _decode(self, tokens: Sequence[tuple[int, int, bool]]) -> np.ndarray:
        """(row, id, are its logits wanted) of each token -> the logits that are wanted [n, V]."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (row, token, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self._lengths[row], wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            self._lengths[row] += 1
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        found = [llama_cpp.llama_get_logits_ith(self._context, i) for i, (_, _, wanted) in enumerate(tokens) if wanted]
        logits = [np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)) for pointer in found]
        return np.array(logits, np.float32).reshape(-1, self.vocab_size)


def write_logits(path: Path, ids_path: Path, out: Path) -> dict[str, Any]:
    """Write the logits of all positions of each row of ids (padded at the end with -1), one row after the other."""
    rows = [[int(t) for t in row if t >= 0] for row in np.load(ids_path)]
    engine = Llama(load_model(path), threads=2, context=max(len(row) for row in rows), rows=1)
    with out.open("wb") as file:
        for row in rows:
            engine.all_logits(row).tofile(file)
    return {"positions": sum(len(row) for row in rows)}


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("task")
    verb.add_argument("path", type=Path)
    verb.add_argument("task", type=json.loads)
    verb.add_argument("--kv", choices=["f16", "q8_0"], default="f16")
    verb = verbs.add_parser("logits")
    verb.add_argument("path", type=Path)
    verb.add_argument("ids", type=Path)
    verb.add_argument("out", type=Path)
    args = parser.parse_args()
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if args.verb == "logits":
        finish(write_logits(args.path, args.ids, args.out))
    else:

        def load() -> OpenEngine:
            model = load_model(args.path)
            return lambda context, rows: Llama(model, args.task["threads"], context, rows, args.kv)

        finish(measure(args.task, load))


if __name__ == "__main__":
    main()
