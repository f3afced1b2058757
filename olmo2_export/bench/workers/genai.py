"""onnxruntime-genai: one task of a model that its builder wrote. Runs in the interpreter of onnxruntime-genai.

    python -m olmo2_export.bench.workers.genai FOLDER '{"kind": "decode", ...}'

Its threads are those of genai_config.json, which `cpu.py` sets: by default it leaves a core of two idle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]

from olmo2_export.bench.workers.common import finish, measure


class Genai:
    """A model; every prefill makes a generator, which holds the KV cache. An `Engine`."""

    def __init__(self, folder: Path, context: int, rows: int) -> None:
        self._model = og.Model(str(folder))
        self._params = og.GeneratorParams(self._model)
        # min_length: no end of text before the end, as for the others
        self._params.set_search_options(
            max_length=context, min_length=context, batch_size=rows, do_sample=False, num_beams=1
        )
        self._generator = og.Generator(self._model, self._params)

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        if self._generator.token_count() > 0:
            self._generator = og.Generator(self._model, self._params)
        self._generator.append_tokens(
            np.array(rows, np.int32).squeeze(0) if len(rows) == 1 else np.array(rows, np.int32)
        )

    def step(self) -> None:
        if self._generator.is_done():
            raise RuntimeError("onnxruntime-genai ended the text before its time")
        self._generator.generate_next_token()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()
    og.disable_telemetry_events()
    finish(measure(args.task, lambda context, rows: Genai(args.folder, context, rows)))


if __name__ == "__main__":
    main()
