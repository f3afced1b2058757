"""What every worker shares; standard library only, for it runs in the interpreters of the peers too.

A worker is one contender, in a process of its own, that measures one thing and prints one JSON object as its last line.
A task says what to measure; `cpu.TASKS` has them all:

| kind    | task                        | result                                                                     |
|---------|-----------------------------|----------------------------------------------------------------------------|
| decode  | context, steps              | tokens_per_second: 1 / the median time of one step                         |
| streams | context, steps, rows        | tokens_per_second of all rows together, one_stream_tokens_per_second       |
| prefill | length, repeats             | tokens_per_second: length / the median time, after one that is not counted |
| memory  | context                     | resident_mb now, peak_resident_mb so far: after filling that context       |
| load    |                             | seconds until the model is ready, libraries imported before                |

and for each: threads, vocab_size. The prompts are the same for every contender, and the next token is the likeliest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeAlias


class Engine(Protocol):
    """A model loaded, for a fixed number of rows."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Forget what was before and compute the logits that follow each row."""

    def step(self) -> None:
        """Pick each row's likeliest next token and compute the logits that follow it."""


OpenEngine: TypeAlias = Callable[[int, int], Engine]
"""(most tokens of a row, rows) -> a fresh engine"""

_MEMORY_STEPS = 32


def prompt(length: int, vocab_size: int, row: int = 0) -> list[int]:
    """Return well spread ids; no two rows are alike."""
    return [2 + (7919 * (row + 1) + 104_729 * i) % (vocab_size - 4) for i in range(length)]


def measure(task: dict[str, Any], open_engine: OpenEngine) -> dict[str, Any]:
    """Do a task; see the table above.

    Raises:
        ValueError: there is no such kind.
    """
    vocab_size = task["vocab_size"]
    match task["kind"]:
        case "decode":
            return {"tokens_per_second": 1 / _step_seconds(task, open_engine, 1)}
        case "streams":
            one, all_rows = (_step_seconds(task, open_engine, rows) for rows in (1, task["rows"]))
            return {"tokens_per_second": task["rows"] / all_rows, "one_stream_tokens_per_second": 1 / one}
        case "prefill":
            engine = open_engine(task["length"] + 2, 1)
            seconds = _prefill_times(engine, task["length"], task["repeats"], vocab_size)
            return {"tokens_per_second": task["length"] / statistics.median(seconds)}
        case "memory":
            engine = open_engine(task["context"], 1)
            engine.prefill([prompt(task["context"] - _MEMORY_STEPS, vocab_size)])
            for _ in range(_MEMORY_STEPS):
                engine.step()
            return resident()
        case "load":
            started = time.perf_counter()
            engine = open_engine(1024, 1)
            seconds_to_load = time.perf_counter() - started
            engine.prefill([prompt(8, vocab_size)])  # it is ready indeed
            return {"seconds": seconds_to_load}
        case kind:
            raise ValueError(f"task {kind!r}: there is decode, streams, prefill, memory, load")


def _step_seconds(task: dict[str, Any], open_engine: OpenEngine, rows: int) -> float:
    engine = open_engine(task["context"] + task["steps"] + 2, rows)
    engine.prefill([prompt(task["context"], task["vocab_size"], row) for row in range(rows)])
    engine.step()  # warm
    times = [time.perf_counter()]
    for _ in range(task["steps"]):
        engine.step()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times))


def _prefill_times(engine: Engine, length: int, repeats: int, vocab_size: int) -> list[float]:
    times = []
    for repeat in range(repeats + 1):
        ids = prompt(length, vocab_size, row=repeat)
        started = time.perf_counter()
        engine.prefill([ids])
        times.append(time.perf_counter() - started)
    return times[1:]


def resident() -> dict[str, float]:
    """Return MB of this process's resident set, mapped files included."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            fields[name] = round(int(value.split()[0]) * 1024 / 1e6, 1)
    return {"resident_mb": fields["VmRSS"], "peak_resident_mb": fields["VmHWM"]}


def finish(result: dict[str, Any]) -> None:
    """Print the worker's one line."""
    sys.stdout.write(json.dumps(result) + "\n")
