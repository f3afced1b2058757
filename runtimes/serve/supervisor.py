"""Keeps a process with an engine: starts it, passes messages, and starts another one when it ends.

                      submit, cancel                       one message a tick
    server's loop  ------------------>  thread, pipe, process  ------------------>  thread, server's loop

Two threads write and read the pipe, so that the loop never waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from runtimes.errors import EngineLostError, FailedError, Olmo2ExportError, UsageError
from runtimes.serve.desk import Desk, ToEngine
from runtimes.serve.engine import Tick
from runtimes.serve.worker import Broken, FromEngine, OpenEngine, Ready, run_engine

logger = logging.getLogger(__name__)

_BACKOFF = (0.2, 30.0)
"""seconds before the first start after an end, and at most; twice as long each time"""
_STEADY_SECONDS = 60.0  # after which an end counts as the first again
_END_SECONDS = 5.0  # that a process may take to end when it is told to


class Supervisor:
    """A process with an engine, and the requests that it has."""

    def __init__(
        self,
        opened: OpenEngine,
        *,
        queue: int | None = None,
        on_tick: Callable[[Tick], object] = lambda _: None,
        on_restart: Callable[[], object] = lambda: None,
        backoff: tuple[float, float] = _BACKOFF,
    ) -> None:
        """Start nothing yet.

        Args:
            opened: opens the engine, in the process; it can be pickled.
            queue: requests that may wait; None: any number.
            on_tick: called with what the engine says of itself.
            on_restart: called when a process has ended by itself.
            backoff: seconds before a process is started anew, and at most.
        """
        self.desk = Desk(self._send, queue=queue, on_tick=on_tick)
        self._opened = opened
        self._on_restart = on_restart
        self._backoff = backoff
        self._connection: Connection | None = None
        self._process: SpawnProcess | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="to-engine")
        self._keeper: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def pid(self) -> int | None:
        """The process's id; None where there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process, and wait until it takes requests.

        Raises:
            Olmo2ExportError: it cannot open the package.
        """
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(first))
        await first

    async def close(self) -> None:
        """End the process; requests that are not answered have failed."""
        self._closing = True
        process = self._process
        self._send(None)
        if process is not None:
            await asyncio.to_thread(process.join, _END_SECONDS)
            if process.is_alive():
                process.kill()
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        self._writer.shutdown(wait=False, cancel_futures=True)

    def _send(self, message: ToEngine) -> None:
        connection = self._connection

        def write() -> None:
            if connection is not None:
                with suppress(OSError):  # it has ended, which the reader notices
                    connection.send(message)

        with suppress(RuntimeError):  # the writer is shut down
            self._writer.submit(write)

    async def _keep(self, first: asyncio.Future[None]) -> None:
        """Have a process as long as the server wants one."""
        least, most = self._backoff
        delay = least
        while not self._closing:
            began = time.monotonic()
            broken = await self._run(first)
            if self._closing:
                return
            if not first.done():
                first.set_exception(_error(broken))
                return
            message = f"the engine's process ended ({broken.message}); the request is lost, send it again"
            logger.error("the engine's process ended (%s); starting another one in %.1f s", broken.message, delay)
            self.desk.lost(message)
            self._on_restart()
            delay = least if time.monotonic() - began > _STEADY_SECONDS else delay
            await asyncio.sleep(delay)
            delay = min(most, 2 * delay)

    async def _run(self, first: asyncio.Future[None]) -> Broken:
        """Run one process to its end; return why it ended."""
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run_engine, args=(theirs, self._opened), name="engine", daemon=True)
        await asyncio.to_thread(process.start)
        theirs.close()
        self._process, self._connection = process, ours
        ended: asyncio.Future[None] = loop.create_future()

        def take(message: FromEngine) -> None:
            match message:
                case Ready(capacity):
                    self.desk.ready(capacity)
                    if not first.done():
                        first.set_result(None)
                case Broken():
                    said.append(message)
                case _:
                    self.desk.take(message)

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        def read() -> None:
            with suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(take, ours.recv())
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(end)

        said: list[Broken] = []
        threading.Thread(target=read, name="from-engine", daemon=True).start()
        try:
            await ended
            await asyncio.to_thread(process.join, _END_SECONDS)
        finally:
            self._connection = None
            if process.is_alive():
                process.kill()
            ours.close()
        return said[0] if said else Broken(_ending(process.exitcode), FailedError.exit_code)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _error(broken: Broken) -> Olmo2ExportError:
    if broken.exit_code == UsageError.exit_code:
        return UsageError(broken.message)
    return EngineLostError(f"the engine could not be started: {broken.message}")
