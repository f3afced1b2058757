"""OpenVINO GenAI: one task of a model that optimum-intel exported. Runs in the interpreter of openvino-genai.

    python -m olmo2_export.bench.workers.openvino FOLDER '{"kind": "decode", ...}'

Its continuous batching, which `LLMPipeline` has inside, is stepped by hand: a step is one token of each row. Whole
prompts go in at once, none is kept for the next, and the end of a text is not heeded, as for the others. All else is
as OpenVINO has it by default: int8 KV cache, dynamic quantisation of activations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from olmo2_export.bench.workers.common import OpenEngine, finish, measure


class GenAI:
    """A pipeline and some rows. An `Engine`."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 1 << 16
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler_config=scheduler, device="CPU", properties={"INFERENCE_NUM_THREADS": threads}
        )
        self._config = openvino_genai.GenerationConfig()
        self._config.max_new_tokens = context
        self._config.ignore_eos = True
        self._config.do_sample = False
        self._rows: list[Any] = []
        self._number = 0

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self.close()
        for ids in rows:
            self._number += 1
            tensor = openvino.Tensor(np.array([ids], np.int64))
            self._rows.append(self._pipeline.add_request(self._number, tensor, self._config))
        waiting = list(self._rows)
        while waiting:
            self._pipeline.step()
            waiting = [row for row in waiting if not row.can_read()]
        for row in self._rows:
            row.read()

    def step(self) -> None:
        self._pipeline.step()
        for row in self._rows:
            if not row.can_read():
                raise RuntimeError("OpenVINO GenAI made no token in a step")
            row.read()

    def close(self) -> None:
        for row in self._rows:
            row.stop()
        if self._rows:
            self._pipeline.step()  # which lets go of what was stopped
        self._rows = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", type=json.loads)
    args = parser.parse_args()

    def load() -> OpenEngine:
        pipeline = GenAI(args.folder, args.task["threads"], 4096)
        return lambda _context, _rows: pipeline

    finish(measure(args.task, load))


if __name__ == "__main__":
    main()
