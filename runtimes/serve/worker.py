"""The process in which a server's engine runs: it opens the package, says what it takes, and ticks.

A kill, a signal of the processor or a limit of memory ends this process and not the server, which starts another one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from typing import NamedTuple, TypeAlias

from runtimes import Slots, open_package, open_runner
from runtimes.errors import BackendError, InputError, Olmo2ExportError, PackageError
from runtimes.package import Package
from runtimes.serve.desk import Cancel, Submit, ToEngine
from runtimes.serve.engine import Engine, Tick
from runtimes.serve.options import EngineOptions
from runtimes.serve.requests import Capacity
from runtimes.text.structured import StructuredOutput
from runtimes.text.tokenizer import Tokenizer

_WARM_TOKENS = 16  # of a prompt: enough for the graph of prompts, where there is one


class Ready(NamedTuple):
    """From the engine: it takes requests."""

    capacity: Capacity


class Broken(NamedTuple):
    """From the engine: it cannot go on."""

    message: str
    exit_code: int


FromEngine: TypeAlias = Ready | Tick | Broken


OpenEngine: TypeAlias = Callable[[], AbstractContextManager[Engine]]


@contextmanager
def open_engine(options: EngineOptions) -> Iterator[Engine]:
    """Open a package for an engine, and load what its first request would wait for.

    Raises:
        Olmo2ExportError: as `open_runner`.
    """
    package = open_package(options.package)
    with open_runner(
        package,
        variant=options.variant,
        backend=options.backend,
        device=options.device,
        check_hashes=options.check_hashes,
        threads=options.threads,
        max_slots=options.max_slots,
        exact=options.exact,
        spinning=False,
    ) as runner:
        _warm_up(runner)
        yield Engine(
            runner,
            kv_tokens=options.kv_tokens,
            kept_rows=options.kept_rows,
            structured=_structured(package, options),
        )


def _warm_up(runner: Slots) -> None:
    prompt = [0] * min(_WARM_TOKENS, runner.max_cache_length - 1)
    if runner.model.labels:
        runner.score([prompt])
        return
    slot, _ = runner.admit(prompt)
    runner.step({slot: 0})
    runner.release(slot)


def _structured(package: Package, options: EngineOptions) -> StructuredOutput | None:
    if package.model.labels:
        return None
    try:
        tokenizer = Tokenizer.from_package(package, check_hashes=options.check_hashes)
        return StructuredOutput(tokenizer, package.model.vocab_size)
    except (BackendError, InputError, PackageError):  # no llguidance, or a tokenizer that it does not take
        return None


def run_engine(connection: Connection, opened: OpenEngine) -> None:
    """Serve one engine until the server wants no more, or has gone.

    Args:
        connection: to the server.
        opened: opens the engine.
    """
    # Ctrl-C in a terminal and a service manager's SIGTERM reach both processes; the server says when to end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        with opened() as engine:
            connection.send(Ready(engine.capacity))
            _serve(connection, engine)
    except (EOFError, ConnectionError):  # the server has gone
        return
    except Olmo2ExportError as error:
        connection.send(Broken(str(error), error.exit_code))


def _serve(connection: Connection, engine: Engine) -> None:
    while True:
        waits = engine.idle
        while waits or connection.poll():
            waits = False
            message: ToEngine = connection.recv()
            match message:
                case Submit(request):
                    engine.submit(request)
                case Cancel(request_id, choice):
                    engine.cancel(request_id, choice)
                case None:
                    return
        connection.send(engine.tick())
