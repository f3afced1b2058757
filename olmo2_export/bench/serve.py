"""What a server adds to a runner, and how many clients share it: ours, and llama-server beside it, in turns.

In a round each server is started, measured in all of `tasks`, and ended, so that no two are there at once; our bare
runner goes first. A soak of mixed requests follows, of ours alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from olmo2_export.bench.claims import Claim, Quantity, claims_table, judge, samples_table, to_document
from olmo2_export.bench.contenders import DEMO, LLAMA_VENV, Workshop, left_out, llama_build, peer_python
from olmo2_export.bench.load import Address, Prompts, arrivals, at_once, shared_prefix
from olmo2_export.bench.machine import processor
from olmo2_export.bench.processes import worker
from olmo2_export.bench.served import Server, llama_server, our_server
from olmo2_export.bench.soak import Soaked, soak
from olmo2_export.bench.turns import Sampled
from runtimes.errors import FailedError, UsageError
from runtimes.package import open_package

RUNNING, ARRIVING, SHARING = 4, 3, 4
"""answers that are being made while long prompts arrive; long prompts; prompts with one beginning"""
_ROOM = 2048  # tokens of a slot of llama-server, which takes their memory at once


@dataclass(frozen=True)
class Load:
    """What is asked of each server."""

    clients: tuple[int, ...] = (1, 2, 4, 8)
    prompt_tokens: int = 128
    new_tokens: int = 64
    long_tokens: int = 1000
    rounds: int = 3
    threads: int = 2
    slots: int = 8
    requests: int = 0
    """of the soak"""

    def check(self, room: int) -> None:
        """Refuse what makes no sense.

        Args:
            room: tokens that a sequence may have.

        Raises:
            UsageError: a number out of range.
        """
        if not self.clients or min(self.clients) < 1 or len(set(self.clients)) != len(self.clients):
            raise UsageError(f"--clients {list(self.clients)}: expected different integers from 1")
        for name, least in (("prompt_tokens", 4), ("new_tokens", 8), ("rounds", 1), ("slots", RUNNING + 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more")
        longest = max(self.prompt_tokens + self.new_tokens, self.long_tokens + 8)
        if longest > room:
            raise UsageError(f"prompts and answers of {longest} tokens: the model's context is {room}")


def claims(load: Load, size: str) -> list[Claim]:
    """Return what is judged; what a server may add to a token is a share of it, or of the demo, whose steps take
    less than a millisecond, a time."""
    few, many = (f"clients_{count}" for count in (min(load.clients), max(load.clients)))
    speed = "tokens_per_second"
    found = [
        Claim(
            f"{max(load.clients)} clients, total", Quantity(many, "ours", speed), Quantity(few, "ours", speed), "x", 2.2
        ),
        Claim(
            f"{max(load.clients)} clients, total",
            Quantity(many, "ours", speed),
            Quantity(many, "llama", speed),
            "x",
            1.5,
        ),
        Claim(
            "running answers while long prompts arrive, ITL p99 over p50",
            Quantity("arrivals", "ours", "itl_p99_ms"),
            Quantity("arrivals", "ours", "itl_p50_ms"),
            "x",
            3.0,
            at_most=True,
        ),
    ]
    if size == "demo":
        return [
            *found,
            Claim(
                "a token through the server, beside the bare runner",
                Quantity(few, "ours", "added_ms"),
                None,
                "ms",
                0.4,
                at_most=True,
            ),
        ]
    bare = Quantity("bare", "ours", "itl_mean_ms")
    return [
        *found,
        Claim("a token through the server", Quantity(few, "ours", "itl_mean_ms"), bare, "x", 1.05, at_most=True),
    ]


def run(
    size: str, work: Path, peers_folder: Path, *, load: Load, variant: str, package: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Make what is missing in `work`, measure, and judge.

    Args:
        size: of `SIZES`; of `demo` it is the demo model.
        work: where models are made.
        peers_folder: where `make peers` put its venvs.
        load: what is asked.
        variant: of ours.
        package: a package that is there, which is measured instead, alone.

    Returns:
        What the last line of stdout says, and the report for people, in markdown.

    Raises:
        UsageError: a number out of range.
        FailedError: a server does not come up, or refuses what is asked.
    """
    workshop = Workshop(work, size, DEMO if size == "demo" else None)
    made = workshop.served(variant) if package is None else package
    opened = open_package(made)
    vocab_size, room = opened.model.vocab_size, opened.variant(variant).kv_cache.max_cache_length
    load.check(room)
    servers = {"ours": lambda: our_server(made, variant, load.threads, load.slots)}
    names, said = {"ours": f"olmo2-run serve, {variant}", "llama": "llama-server Q4_K_M"}, []
    python = peer_python(peers_folder, LLAMA_VENV)
    program = peers_folder / LLAMA_VENV / "bin" / "llama-server"
    if package is not None:
        said.append("llama-server is left out: it is measured beside a model that is made here, not beside --package")
    elif python is None or not program.exists():
        said.append(left_out("llama-server", program))
    else:
        gguf, _ = workshop.gguf(python, "Q4_K_M", tokenizer=True)
        held = min(room, _ROOM)
        servers["llama"] = lambda: llama_server(program, gguf, load.threads, load.slots, held)
        said += filter(None, [f"llama-server: {how}" if (how := llama_build(python)) else ""])
    busy = os.getloadavg()[0]  # of others
    samples, failures = _rounds(servers, made, variant, load, vocab_size, min(room, _ROOM))
    soaked = None
    if load.requests:
        soaked = _soak(servers["ours"](), load, vocab_size, min(room, _ROOM))
        failures += soaked.problems
    results = judge(samples, claims(load, size))
    machine = f"{processor()}, {os.cpu_count()} cores, load average {busy:.1f} before the first sample"
    asked = f"prompts of {load.prompt_tokens} tokens, answers of {load.new_tokens}, long prompts of {load.long_tokens}"
    report = [
        f"{machine}; {size} shape, {load.threads} threads, {load.slots} slots, {load.rounds} rounds; {asked}",
        *said,
        claims_table(results, names, samples),
        "Medians of all samples, ± (largest - smallest) / median:",
        samples_table(samples, names),
        *([] if soaked is None else [_soaked(soaked)]),
        *(f"FAILED: {failure}" for failure in failures),
    ]
    return {
        "size": size,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": load.threads,
        "rounds": load.rounds,
        "load_average_before": round(busy, 1),
        "contenders": names,
        "left_out": said,
        "failures": failures,
        "claims": to_document(results),
        "samples": samples,
        "soak": None if soaked is None else vars(soaked),
    }, "\n\n".join(report)


def _rounds(
    servers: dict[str, Any], package: Path, variant: str, load: Load, vocab_size: int, room: int
) -> tuple[Sampled, list[str]]:
    samples: Sampled = {}
    failures: list[str] = []

    def note(task: str, key: str, sample: dict[str, Any]) -> None:
        samples.setdefault(task, {}).setdefault(key, []).append(sample)

    bare_task: dict[str, Any] = {"kind": "points", "contexts": [load.prompt_tokens], "batch_sizes": [1]}
    bare_task |= {"new_tokens": load.new_tokens, "threads": load.threads, "vocab_size": min(vocab_size, 4096)}
    with tqdm(total=load.rounds * len(servers), desc="measuring", leave=False) as progress:
        for number in range(load.rounds):
            (point,) = worker(sys.executable, "ours", [package, variant, json.dumps(bare_task)])["points"]
            bare = 1000 * fmean(point["itl_s"])
            note("bare", "ours", {"itl_mean_ms": bare})
            for key, server in servers.items():
                progress.set_postfix_str(key)
                try:
                    with server() as running:
                        found = asyncio.run(_measured(running.address, load, Prompts(vocab_size, number), room))
                except FailedError as error:
                    failures.append(f"{key}: {error}")
                    found = {task: {} for task in tasks(load)}
                if key == "ours" and (one := found[f"clients_{min(load.clients)}"]):
                    one["added_ms"] = one["itl_mean_ms"] - bare
                for task, sample in found.items():
                    note(task, key, sample)
                progress.update()
    return samples, failures


def tasks(load: Load) -> list[str]:
    """Return what each server is measured in."""
    return [*(f"clients_{count}" for count in load.clients), "queue", "arrivals", "prefix"]


async def _measured(address: Address, load: Load, prompts: Prompts, room: int) -> dict[str, dict[str, float]]:
    """Measure a server in all of `tasks`.

    Raises:
        FailedError: it refuses what is asked, or breaks off.
    """
    await at_once(address, prompts.draw(2, load.prompt_tokens + 1), 8)  # warm-up
    found = {}
    for count in load.clients:
        drawn = prompts.draw(count, load.prompt_tokens)
        found[f"clients_{count}"] = await at_once(address, drawn, load.new_tokens)
    found["queue"] = await at_once(address, prompts.draw(2 * load.slots, load.prompt_tokens), load.new_tokens // 4)
    found["arrivals"] = await arrivals(
        address,
        prompts.draw(RUNNING, load.prompt_tokens + 2),  # others than before: none of them is reused
        prompts.draw(ARRIVING, load.long_tokens),
        prompts.draw(1, 16)[0],
        room - load.prompt_tokens - 2,
    )
    prefix = prompts.draw(1, load.long_tokens // 2)[0]
    found["prefix"] = await shared_prefix(address, prefix, prompts.draw(SHARING, 12))
    return found


def _soak(server: AbstractContextManager[Server], load: Load, vocab_size: int, room: int) -> Soaked:
    with server as running, tqdm(total=load.requests, desc="soak", leave=False) as progress:
        return asyncio.run(
            soak(
                running.address,
                load.requests,
                slots=load.slots,
                vocab_size=vocab_size,
                room=room,
                pid=running.pid,
                on_done=progress.update,
            )
        )


def _soaked(found: Soaked) -> str:
    memory = "" if not found.memory else f"; memory {', '.join(f'{value / 1e6:,.0f}' for value in found.memory)} MB"
    return (
        f"Soak: {found.requests} requests, {found.answered} answered whole, {found.given_up} given up by their client, "
        f"{found.new_tokens} tokens{memory}; {len(found.problems)} problems"
    )
