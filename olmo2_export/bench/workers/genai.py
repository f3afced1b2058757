"""onnxruntime-genai: one task of a model that its builder wrote. Runs in the interpreter of onnxruntime-genai.

    python -m olmo2_export.bench.workers.genai FOLDER '{"kind": "decode", ...}'

Its threads are those of genai_config.json, which `cpu.py` sets: by default it leaves a core of two idle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]

from olmo2_export.bench.workers.common import OpenEngine, finish, measure


class Genai:
    """A model and some rows; every prefill makes a generator, which holds the KV cache. An `Engine`."""

    def __init__(self, model: og.Model, context: int, rows: int) -> None:
        self._model = model
        self._params = og.GeneratorParams(model)
        # min_length: no end of text before the end, as for the others
        self._params.set_search_options(
            max_length=context, min_length=context, batch_size=rows, do_sample=False, num_beams=1
        )
        self._generator: Any = None

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self._generator = None  # its cache is freed before the next is made
        self._generator = og.Generator(self._model, self._params)
        self._generator.append_tokens(
            np.array(rows, np.int32).squeeze(0) if len(rows) == 1 else np.array(rows, np.int32)
        )
        self.step()  # the logits are there already; this picks from them

    def step(self) -> None:
        if self._generator.is_done():
            raise RuntimeError("onnxruntime-genai ended the text before its time")
        self._generator.generate_next_token()

    def close(self) -> None:
        self._generator = self._params = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()
    og.disable_telemetry_events()

    def load() -> OpenEngine:
        model = og.Model(str(args.folder))
        return lambda context, rows: Genai(model, context, rows)

    finish(measure(args.task, load))


if __name__ == "__main__":
    main()
