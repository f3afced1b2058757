"""Mixed load for as many requests as wanted, and whether a server is as it was behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from olmo2_export.bench.load import Address, Prompts, complete, get
from runtimes.errors import FailedError

_ROOM = 300  # tokens of a request, prompt and answer
_SETTLED = 20.0  # seconds until a server has noticed that clients went away
_GROWTH, _SLACK = 0.05, 32e6  # of memory, that are no leak: share, bytes
_PROC = Path("/proc")


@dataclass
class Soaked:
    """What came of it."""

    requests: int = 0
    answered: int = 0
    given_up: int = 0
    new_tokens: int = 0
    memory: list[int] = field(default_factory=list)
    """bytes after each quarter of the requests; empty: this system does not say"""
    problems: list[str] = field(default_factory=list)


def metric_values(text: str) -> dict[str, float]:
    """Return the families of a /metrics, each summed over its labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            family = name.partition("{")[0]
            found[family] = found.get(family, 0.0) + float(value)
    return found


def tree_memory(pid: int) -> int | None:
    """Return the bytes of a process and its children, pages that several share counted once; None: not said here."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        children = [word for path in _PROC.glob(f"{pid}/task/*/children") for word in path.read_text().split()]
    except OSError:
        return None
    own = next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)
    return None if own is None else own + sum(tree_memory(int(child)) or 0 for child in children)


async def soak(
    address: Address,
    requests: int,
    *,
    slots: int,
    vocab_size: int,
    room: int,
    pid: int,
    on_done: Callable[[], object] = lambda: None,
) -> Soaked:
    """Send requests of all kinds, twice as many at once as there are slots.

    Of ten requests two do not stream, one goes away in the middle, and three begin with the same 48 tokens.

    Args:
        address: of a server of ours that nobody else asks.
        requests: how many.
        slots: answers that it makes at once.
        vocab_size: of the model.
        room: tokens that its KV cache holds of a sequence.
        pid: of the server's process.
        on_done: is told of each request that has ended.
    """
    before = metric_values((await get(address.port, "/metrics"))[1])
    found, drawn = Soaked(requests), random.Random(1)
    prefix = Prompts(vocab_size, seed=9).draw(1, 48)[0]
    plan = iter(range(requests))
    marks = {max(1, requests * quarter // 4) for quarter in range(1, 5)}

    async def client() -> None:
        for number in plan:
            length, new_tokens = drawn.randrange(4, min(200, room // 2)), drawn.randrange(2, min(48, room // 4))
            prompt = Prompts(vocab_size, seed=number).draw(1, length)[0]
            if number % 10 in (0, 3, 7):
                prompt = [*prefix, *prompt][: room - new_tokens]
            leaves = 1 + new_tokens // 2 if number % 10 == 5 else None
            try:
                answer = await complete(
                    address, prompt, new_tokens, stream=number % 10 not in (1, 2), give_up_after=leaves
                )
            except FailedError as error:
                found.problems.append(f"request {number}: {error}")
            else:
                found.new_tokens += len(answer.times)
                if leaves is not None:
                    found.given_up += 1
                elif len(answer.times) != new_tokens or answer.reused is None:
                    found.problems.append(f"request {number}: {len(answer.times)} of {new_tokens} tokens, or no end")
                else:
                    found.answered += 1
            on_done()
            if found.answered + found.given_up + len(found.problems) in marks and (memory := tree_memory(pid)):
                found.memory.append(memory)

    await asyncio.gather(*(client() for _ in range(2 * slots)))
    after = await _settled(address.port)
    found.problems += accounts(before, after, found)
    found.problems += await _slots_left(address, slots, Prompts(vocab_size, seed=5).draw(slots, 8), room)
    return found


async def _settled(port: int) -> dict[str, float]:
    """Return the metrics once nothing is being answered, or as they are when that takes too long."""
    for _ in range(int(_SETTLED / 0.1)):
        values = metric_values((await get(port, "/metrics"))[1])
        if values["olmo2_num_requests_running"] == values["olmo2_num_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    return values


def accounts(before: Mapping[str, float], after: Mapping[str, float], found: Soaked) -> list[str]:
    """Return what a server's own metrics say against it.

    Args:
        before, after: families of its /metrics, of ours.
        found: what the clients saw.
    """

    def grown(name: str) -> float:
        return after.get(f"olmo2_{name}", 0.0) - before.get(f"olmo2_{name}", 0.0)

    said = []
    for name in ("num_requests_running", "num_requests_waiting"):
        if after[f"olmo2_{name}"] != 0:
            said.append(f"{name} is {after[f'olmo2_{name}']:g} when all is over, expected 0")
    for name in ("engine_restarts_total", "nan_events_total", "requests_rejected_total"):
        if grown(name):
            said.append(f"{name} grew by {grown(name):g}, expected 0")
    ended, cancelled = grown("request_success_total"), grown("requests_cancelled_total")
    if ended + cancelled != found.requests:
        said.append(f"of {found.requests} requests {ended:g} ended and {cancelled:g} were cancelled")
    if cancelled > found.given_up:
        said.append(f"{cancelled:g} requests were cancelled, but only {found.given_up} clients went away")
    if len(found.memory) > 1:
        first, last = found.memory[0], found.memory[-1]
        if last > first * (1 + _GROWTH) + _SLACK:
            said.append(f"memory grew from {first / 1e6:,.0f} to {last / 1e6:,.0f} MB behind the first quarter")
    return said


async def _slots_left(address: Address, slots: int, prompts: Sequence[Sequence[int]], room: int) -> list[str]:
    """Fill all slots; return a line if fewer requests run at once."""
    tasks = [asyncio.create_task(complete(address, prompt, room - len(prompt))) for prompt in prompts]
    most = 0.0
    while most < slots and not all(task.done() for task in tasks):
        values = metric_values((await get(address.port, "/metrics"))[1])
        most = max(most, values["olmo2_num_requests_running"])
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [] if most == slots else [f"{most:g} of {slots} slots were left behind it"]
