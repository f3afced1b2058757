"""Contenders take turns, each sample in a fresh process, so that memory is theirs and the machine's moods are shared.

In every round each task goes once around (task 1: A B C, task 2: A B C, ...), so that the two sides of a ratio ran
within minutes of each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from olmo2_export.bench.contenders import Contender
from runtimes.errors import FailedError

Sampled = dict[str, dict[str, list[dict[str, Any]]]]
"""task -> contender -> a sample a round, empty where it failed"""


def take_turns(
    contenders: Sequence[Contender],
    tasks: Mapping[str, dict[str, Any]],
    rounds: int,
    *,
    give_up: bool = False,
    minutes: float | None = None,
    deadline: float | None = None,
    on_sample: Callable[[str, Contender, dict[str, Any]], None] | None = None,
) -> tuple[Sampled, list[str]]:
    """Measure in turns; a contender that fails does not take the others' samples with it.

    Args:
        contenders: each with the tasks it is measured in.
        tasks: name -> the task as the workers take it.
        rounds: how often.
        give_up: do not ask a contender again for a task that it failed; its samples stay empty.
        minutes: begin no round that would end later than that after the first one began, if it took as long as those
            before; there is always a first.
        deadline: of `time.monotonic`, when the one that is measured is ended, and none is begun any more, not even of
            the first round; their samples stay empty, which is no failure.
        on_sample: is told of each sample as it is there.

    Returns:
        The samples, and what failed.
    """
    failures: list[str] = []
    failed: set[tuple[str, str]] = set()
    samples: Sampled = {name: {} for name in tasks}
    plan = [(name, c) for name in tasks for c in contenders if name in c.tasks]
    started = time.monotonic()
    with tqdm(total=rounds * len(plan), desc="measuring", leave=False) as progress:
        for done in range(rounds):
            if minutes is not None and done and (time.monotonic() - started) * (done + 1) / done > 60 * minutes:
                break
            for name, contender in plan:
                progress.set_postfix_str(f"{name} of {contender.name}")
                sample: dict[str, Any] = {}
                left = None if deadline is None else deadline - time.monotonic()
                if not (give_up and (name, contender.key) in failed) and (left is None or left > 0):
                    try:
                        sample = contender.sample(tasks[name]) if left is None else contender.sample(tasks[name], left)
                        if on_sample is not None:
                            on_sample(name, contender, sample)
                    except FailedError as error:
                        if deadline is None or time.monotonic() < deadline:
                            failures.append(f"{contender.name}, {name}: {error}")
                            failed.add((name, contender.key))
                samples[name].setdefault(contender.key, []).append(sample)
                progress.update()
    return samples, failures
