"""Clients of a server, and what they see: streams of tokens and when each came. Standard library only.

Times are of `time.perf_counter`, in seconds, as the client sees them: from the moment it connects to the moment an
event has been read. An event may hold several tokens, which then came at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from runtimes.errors import FailedError

Api: TypeAlias = Literal["ours", "llama"]
"""OpenAI's completions as `olmo2-run serve` has them, or the `/completion` of llama-server; both take token ids"""


@dataclass(frozen=True)
class Address:
    """Where a server listens on this machine, and how it is spoken to."""

    port: int
    api: Api = "ours"
    model: str = ""
    """by name; llama-server has one"""
    never: tuple[int, ...] = ()
    """ids that end a text, which must not come"""

    def call(self, prompt: Sequence[int], new_tokens: int, stream: bool) -> tuple[str, dict[str, Any]]:
        """Return the path and the body of a greedy completion of so many tokens."""
        if self.api == "llama":
            body: dict[str, Any] = {"n_predict": new_tokens, "ignore_eos": True, "return_tokens": True}
            return "/completion", {**body, "prompt": list(prompt), "temperature": 0, "stream": stream}
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0}
        body |= {"stream": stream, "return_token_ids": True}
        if stream:
            body["stream_options"] = {"include_usage": True}
        if self.never:
            body["logit_bias"] = {str(token): -100 for token in self.never}
        return "/v1/completions", body

    def tokens(self, event: Mapping[str, Any]) -> int:
        """Return how many new tokens an event, or a whole answer, holds."""
        if self.api == "llama":
            return len(event.get("tokens") or ())
        return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))

    def reused(self, event: Mapping[str, Any]) -> int | None:
        """Return how many tokens of the prompt were not computed anew, in the event that says it."""
        if self.api == "llama":
            timings = event.get("timings") if event.get("stop") else None
            return None if timings is None else int(timings.get("cache_n", 0))
        usage = event.get("usage")
        return None if usage is None else int(usage["prompt_tokens_details"]["cached_tokens"])


@dataclass
class Answer:
    """What a client saw of one call."""

    sent: float
    times: list[float] = field(default_factory=list)
    """of each token"""
    reused: int | None = None
    """tokens of the prompt; None: the answer did not come to its end"""
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in pairwise(self.times)]


async def complete(
    address: Address,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    stream: bool = True,
    give_up_after: int | None = None,
    watched: Answer | None = None,
) -> Answer:
    """Ask for one completion.

    Args:
        address: of the server.
        prompt: token ids.
        new_tokens: how many to ask for.
        stream: have each token as it is made; else all come at the end.
        give_up_after: go away when so many tokens have come.
        watched: is filled in while the answer comes, for whoever wants to see it before its end.

    Raises:
        FailedError: the server is not there, refuses the call, says that it failed, or breaks off.
    """
    path, body = address.call(prompt, new_tokens, stream)
    answer = watched or Answer(0.0)
    answer.sent = time.perf_counter()
    async with contextlib.aclosing(_events(address.port, path, body)) as events:
        async for event in events:
            if "error" in event:
                raise FailedError(f"the server says {json.dumps(event['error'])[:200]}")
            now = time.perf_counter()
            answer.times += [now] * address.tokens(event)
            reused = address.reused(event)
            answer.reused = answer.reused if reused is None else reused
            if give_up_after is not None and len(answer.times) >= give_up_after:
                break
    answer.ended = time.perf_counter()
    return answer


async def _events(port: int, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events of a stream, or the one object of an answer that is none."""
    async with _response(port, "POST", path, json.dumps(body).encode()) as (status, headers, content):
        if status != 200:
            text = b"".join([part async for part in content])
            raise FailedError(f"the server answers {status}: {text.decode(errors='replace')[:200]}")
        if "event-stream" not in headers.get("content-type", ""):
            yield json.loads(b"".join([part async for part in content]))
            return
        held = b""
        async for part in content:
            *lines, held = (held + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    yield json.loads(line[6:])


@contextlib.asynccontextmanager
async def _response(
    port: int, method: str, path: str, body: bytes = b""
) -> AsyncIterator[tuple[int, dict[str, str], AsyncIterator[bytes]]]:
    """Call; yield status, headers and the parts of the body."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise FailedError(f"nobody listens on port {port}: {error.strerror}") from error
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        yield int(first.split()[1]), headers, _parts(reader, headers)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise FailedError(f"the server broke off: {error}") from error
    finally:
        writer.close()


async def _parts(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if "chunked" not in headers.get("transfer-encoding", ""):
        length = headers.get("content-length")
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
        return
    while size := int(await reader.readline() or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def get(port: int, path: str) -> tuple[int, str]:
    """Call without a body; return the status and the text of what comes back.

    Raises:
        FailedError: nobody does.
    """
    async with _response(port, "GET", path) as (status, _, content):
        return status, b"".join([part async for part in content]).decode()


@dataclass(frozen=True)
class Prompts:
    """Prompts of which no two begin alike, of ids that a tokenizer of some thousand words has."""

    vocab_size: int
    seed: int = 0

    def draw(self, count: int, length: int) -> list[list[int]]:
        """Return so many prompts."""
        source = random.Random(f"{self.seed} {count} {length}")
        most = min(self.vocab_size, 4096) - 64
        return [[source.randrange(most // 4, most) for _ in range(length)] for _ in range(count)]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def at_once(address: Address, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """Have a client for each prompt, all at once.

    Returns:
        tokens_per_second of all: new tokens over the time from the first call to the last token; of their tokens
        ttft_p50_ms, ttft_max_ms, itl_mean_ms, itl_p50_ms, itl_p99_ms.
    """
    answers = await asyncio.gather(*(complete(address, prompt, new_tokens) for prompt in prompts))
    seconds = max(answer.times[-1] for answer in answers) - min(answer.sent for answer in answers)
    return {
        "tokens_per_second": sum(len(answer.times) for answer in answers) / seconds,
        **_waits("ttft", [answer.ttft for answer in answers]),
        **_steps([gap for answer in answers for gap in answer.gaps]),
    }


def _waits(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50_ms": 1000 * quantile(seconds, 0.5), f"{name}_max_ms": 1000 * max(seconds)}


def _steps(gaps: Sequence[float]) -> dict[str, float]:
    return {
        "itl_mean_ms": 1000 * sum(gaps) / len(gaps),
        "itl_p50_ms": 1000 * quantile(gaps, 0.5),
        "itl_p99_ms": 1000 * quantile(gaps, 0.99),
    }


async def arrivals(
    address: Address,
    running: Sequence[Sequence[int]],
    long: Sequence[Sequence[int]],
    short: Sequence[int],
    room: int,
) -> dict[str, float]:
    """Let long prompts arrive one after the other, and a short one, while others are being answered.

    Args:
        address: of the server.
        running: prompts that are being answered meanwhile.
        long: prompts that arrive, each when the one before it has its first token.
        short: prompt that arrives last.
        room: tokens that an answer of those that run may have.

    Returns:
        itl_mean_ms, itl_p50_ms, itl_p99_ms of those that run, from the first arrival to the last one's token;
        long_ttft_p50_ms, long_ttft_max_ms, short_ttft_p50_ms.
    """
    seen = [Answer(0.0) for _ in running]
    tasks = [
        asyncio.create_task(complete(address, prompt, room, watched=answer))
        for prompt, answer in zip(running, seen, strict=True)
    ]
    try:
        while min(len(answer.times) for answer in seen) < 8 and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        newcomers = [await complete(address, prompt, 2, give_up_after=1) for prompt in long]
        last = await complete(address, short, 2, give_up_after=1)
        ended = time.perf_counter()
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    gaps = [b - a for answer in seen for a, b in pairwise(answer.times) if began <= b <= ended]
    if not gaps:
        raise FailedError("no answer ran on while prompts arrived: the model has too little room")
    return {
        **_steps(gaps),
        **_waits("long_ttft", [answer.ttft for answer in newcomers]),
        "short_ttft_p50_ms": 1000 * last.ttft,
    }


async def shared_prefix(address: Address, prefix: Sequence[int], tails: Sequence[Sequence[int]]) -> dict[str, float]:
    """Ask for the same beginning with different ends, one after the other.

    Returns:
        first_ttft_ms, and of those behind it again_ttft_p50_ms and reused_share, of their prompts' tokens.
    """
    answers = [await complete(address, [*prefix, *tail], 2) for tail in tails]
    again = answers[1:]
    tokens = len(again) * (len(prefix) + len(tails[0]))
    return {
        "first_ttft_ms": 1000 * answers[0].ttft,
        "again_ttft_p50_ms": 1000 * quantile([answer.ttft for answer in again], 0.5),
        "reused_share": sum(answer.reused or 0 for answer in again) / tokens,
    }
