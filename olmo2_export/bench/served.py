"""Servers as processes: ours, and llama.cpp's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from olmo2_export.bench.load import Address, get
from olmo2_export.bench.processes import ROOT
from runtimes.errors import FailedError
from runtimes.text.tokenizer import Tokenizer

_START, _END = 300.0, 30.0  # seconds that a server may take
_TICK = 0.05


@dataclass(frozen=True)
class Server:
    """One that answers."""

    address: Address
    pid: int


@contextlib.contextmanager
def our_server(package: Path, variant: str, threads: int, slots: int) -> Iterator[Server]:
    """Serve a package, as `olmo2-run serve` does.

    Raises:
        FailedError: it does not come up, or does not end as it should.
    """
    flags = ["--variant", variant, "--threads", str(threads), "--max-slots", str(slots), "--port", "0", "--no-page"]
    flags += ["--queue-seconds", "3600", "--answer-seconds", "3600"]  # a slow machine is measured, too
    ends = Tokenizer.from_package(package, check_hashes=False).eos_token_ids
    with _process([sys.executable, "-m", "runtimes", "serve", package, *flags]) as (process, out, err):
        until = time.monotonic() + _START
        while not (line := out.read_text()).endswith("\n"):
            _check_alive(process, err, until)
            time.sleep(_TICK)
        address = Address(int(line.strip().rpartition(":")[2].rstrip("/")), "ours", package.resolve().name, ends)
        yield Server(address, process.pid)


@contextlib.contextmanager
def llama_server(program: Path, gguf: Path, threads: int, slots: int, room: int) -> Iterator[Server]:
    """Serve a GGUF with llama-server: its defaults, continuous batching among them, with as many slots as ours.

    Args:
        program: llama-server.
        gguf: with a tokenizer in it.
        threads: of steps and of prompts.
        slots: answers at once.
        room: tokens of each.

    Raises:
        FailedError: it does not come up, or does not end as it should.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(threads)
    flags = ["--port", str(port), "--threads", count, "--threads-batch", count, "--parallel", str(slots)]
    with _process([program, "--model", gguf, *flags, "--ctx-size", str(room * slots)]) as (process, _, err):
        until = time.monotonic() + _START
        while not _is_healthy(port):
            _check_alive(process, err, until)
            time.sleep(_TICK)
        yield Server(Address(port, "llama"), process.pid)


def _is_healthy(port: int) -> bool:
    with contextlib.suppress(FailedError):
        return asyncio.run(get(port, "/health"))[0] == 200
    return False


@contextlib.contextmanager
def _process(command: Sequence[str | Path]) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """Run a command until the block ends; yield it, and the files that it writes to."""
    with tempfile.TemporaryDirectory(prefix="olmo2-bench-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                [str(word) for word in command], stdout=to_out, stderr=to_err, env=os.environ | {"PYTHONPATH": path}
            )
        try:
            yield process, out, err
        finally:
            code = _end(process)
        if code != 0:
            raise FailedError(f"{Path(command[0]).name}: exit code {code} on SIGTERM, expected 0: {_last_line(err)}")


def _end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _check_alive(process: subprocess.Popen[bytes], err: Path, until: float) -> None:
    if process.poll() is not None:
        raise FailedError(f"the server ended with exit code {process.returncode}: {_last_line(err)}")
    if time.monotonic() > until:
        raise FailedError(f"the server was not ready within {_START:.0f} seconds: {_last_line(err)}")


def _last_line(err: Path) -> str:
    return " ".join(err.read_text(errors="replace").strip().splitlines()[-1:]) or "silent"
