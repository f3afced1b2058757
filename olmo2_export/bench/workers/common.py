"""What every worker shares; standard library only, for it runs in the interpreters of the peers too.

A worker is one contender, in a process of its own, that measures one thing and prints one JSON object as its last line.
A task says what to measure; `cpu.TASKS` and `compare.Setting.task` have them all:

| kind    | task                        | result                                                                     |
|---------|-----------------------------|----------------------------------------------------------------------------|
| points  | contexts, batch_sizes,      | load_s, peak_memory_bytes, and of each context and batch size: ttft_s,     |
|         | new_tokens                  | itl_s: the seconds before each token behind the first                      |
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

from olmo2_export.peak_memory import peak_bytes

_STATUS = Path("/proc/self/status")  # of Linux


class Engine(Protocol):
    """A model loaded, with room for a fixed number of rows."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Forget what was before, read the rows, and pick each row's likeliest next token."""

    def step(self) -> None:
        """Read the token that was picked for each row, and pick the one that follows it."""

    def close(self) -> None:
        """Free the room; the model stays loaded."""


OpenEngine: TypeAlias = Callable[[int, int], Engine]
"""(most tokens of a row, rows) -> an engine of the loaded model; one is open at a time"""

Load: TypeAlias = Callable[[], OpenEngine]
"""loads the model"""

_MEMORY_STEPS = 32
_WARM_TOKENS = 16
_WARM_STEPS = 2


def prompt(length: int, vocab_size: int, row: int = 0) -> list[int]:
    """Return well spread ids; no two rows are alike."""
    return [2 + (7919 * (row + 1) + 104_729 * i) % (vocab_size - 4) for i in range(length)]


def text_seconds(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[float]:
    """Return the seconds before each new token: the first are of the prefill, the time to first token.

    Every speed of every contender comes from here.
    """
    times = [time.perf_counter()]
    engine.prefill(prompts)
    times.append(time.perf_counter())
    for _ in range(new_tokens - 1):
        engine.step()
        times.append(time.perf_counter())
    return [b - a for a, b in pairwise(times)]


def measure(task: dict[str, Any], load: Load) -> dict[str, Any]:
    """Do a task; see the table above.

    Raises:
        ValueError: there is no such kind.
    """
    vocab_size = task["vocab_size"]
    match task["kind"]:
        case "points":
            return _points(task, load)
        case "decode":
            return {"tokens_per_second": 1 / _step_seconds(task, load(), 1)}
        case "streams":
            open_engine = load()
            one, all_rows = (_step_seconds(task, open_engine, rows) for rows in (1, task["rows"]))
            return {"tokens_per_second": task["rows"] / all_rows, "one_stream_tokens_per_second": 1 / one}
        case "prefill":
            engine, length = load()(task["length"] + 2, 1), task["length"]
            times = [
                text_seconds(engine, [prompt(length, vocab_size, row)], 1)[0] for row in range(1 + task["repeats"])
            ]
            return {"tokens_per_second": length / statistics.median(times[1:])}
        case "memory":
            engine = load()(task["context"], 1)
            text_seconds(engine, [prompt(task["context"] - _MEMORY_STEPS, vocab_size)], 1 + _MEMORY_STEPS)
            return resident()
        case "load":
            started = time.perf_counter()
            engine = load()(1024, 1)
            seconds_to_load = time.perf_counter() - started
            text_seconds(engine, [prompt(8, vocab_size)], 1)  # it is ready indeed
            return {"seconds": seconds_to_load}
        case kind:
            raise ValueError(f"task {kind!r}: there is points, decode, streams, prefill, memory, load")


def _points(task: dict[str, Any], load: Load) -> dict[str, Any]:
    vocab_size, new_tokens = task["vocab_size"], task["new_tokens"]
    started = time.perf_counter()
    open_engine = load()
    load_s = time.perf_counter() - started
    points: list[dict[str, Any]] = []
    for rows in task["batch_sizes"]:
        started = time.perf_counter()
        engine = open_engine(max(task["contexts"]) + new_tokens + _WARM_TOKENS, rows)
        if not points:
            load_s += time.perf_counter() - started  # some load in earnest only then
        warm = [prompt(_WARM_TOKENS, vocab_size, row) for row in range(rows)]
        text_seconds(engine, warm, 1 + _WARM_STEPS)
        for context in task["contexts"]:
            prompts = [prompt(context, vocab_size, row) for row in range(rows)]
            ttft_s, *itl_s = text_seconds(engine, prompts, new_tokens)
            points.append({"context_tokens": context, "batch_size": rows, "ttft_s": ttft_s, "itl_s": itl_s})
        engine.close()
    return {"load_s": load_s, "peak_memory_bytes": round(resident()["peak_resident_mb"] * 1e6), "points": points}


def _step_seconds(task: dict[str, Any], open_engine: OpenEngine, rows: int) -> float:
    engine = open_engine(task["context"] + task["steps"] + 2, rows)
    prompts = [prompt(task["context"], task["vocab_size"], row) for row in range(rows)]
    times = text_seconds(engine, prompts, 2 + task["steps"])
    engine.close()
    return statistics.median(times[2:])  # the first step is warm-up


def resident() -> dict[str, float]:
    """Return MB of this process's resident set, mapped files included; its peak for both, where that alone is known."""
    if not _STATUS.is_file():
        peak = round((peak_bytes() or 0) / 1e6, 1)
        return {"resident_mb": peak, "peak_resident_mb": peak}
    fields = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            fields[name] = round(int(value.split()[0]) * 1024 / 1e6, 1)
    return {"resident_mb": fields["VmRSS"], "peak_resident_mb": fields["VmHWM"]}


def finish(result: dict[str, Any]) -> None:
    """Print the worker's one line."""
    sys.stdout.write(json.dumps(result) + "\n")
