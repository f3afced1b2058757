"""`olmo2-run serve`: a server of OpenAI's API."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from runtimes.errors import BackendError, UsageError
from runtimes.serve.keys import Keys, read_keys
from runtimes.serve.options import EngineOptions
from runtimes.targets import describe_backends, describe_devices
from runtimes.text.plain_text import read_text

HELP = "serve OpenAI's API"
DESCRIPTION = "Serve OpenAI's API until SIGTERM or Ctrl-C; the address goes to stdout, a log in JSON to stderr."


class _Option(NamedTuple):
    """A flag, and a key of the file that --config names."""

    kind: type
    default: Any
    metavar: str
    words: str


_OPTIONS = {
    "host": _Option(str, "127.0.0.1", "H", "address to listen on; others than this machine's need keys"),
    "port": _Option(int, 8000, "P", "0: any that is free"),
    "name": _Option(str, None, "NAME", "of the model, for clients (default: the folder's)"),
    "variant": _Option(str, None, "V", "which variant of the package (default: as generate)"),
    "backend": _Option(str, "ort", "B", describe_backends()),
    "device": _Option(str, None, "D", f"where onnxruntime runs: {describe_devices()} (default: cpu)"),
    "threads": _Option(int, None, "N", "CPU threads (default: one per physical core)"),
    "skip-hash-check": _Option(bool, False, "", "trust the files; check only their sizes"),
    "max-slots": _Option(int, None, "N", "answers at once (default: 8, or what an engine was built for)"),
    "exact": _Option(bool, False, "", "each answer is, bit for bit, what it would be alone; on a CPU"),
    "kv-tokens": _Option(int, None, "N", "tokens of all prompts and answers at once (default: all slots', full)"),
    "kept-texts": _Option(int, None, "N", "ended texts that are kept for prompts that begin so (default: the slots)"),
    "queue": _Option(int, 64, "N", "requests that may wait; more are told to come again"),
    "queue-seconds": _Option(float, 30.0, "S", "that a request may wait"),
    "answer-seconds": _Option(float, 300.0, "S", "that an answer may take"),
    "drain-seconds": _Option(float, 30.0, "S", "that answers may go on after SIGTERM"),
    "api-keys-file": _Option(str, None, "FILE", "a key a line, as it is or as sha256:HEX (default: no key is needed)"),
    "calls-per-key": _Option(int, None, "N", "calls with one key that are not answered yet (default: any number)"),
    "tls-certificate": _Option(str, None, "FILE", "PEM, with the chain (default: no TLS)"),
    "tls-key": _Option(str, None, "FILE", "PEM (default: in the certificate's file)"),
    "no-page": _Option(bool, False, "", "no page to chat on at /"),
    "otlp-traces-endpoint": _Option(
        str, None, "URL", "where OpenTelemetry's traces go, by OTLP over HTTP; needs the extra otel (default: nowhere)"
    ),
    "vllm-metric-names": _Option(bool, False, "", "names in /metrics begin with vllm: instead of olmo2_"),
}


def declare(verb: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    verb.add_argument("package", metavar="PACKAGE", help="its folder, or hf:OWNER/NAME[@REV] on the Hub")
    verb.add_argument("--config", type=Path, metavar="FILE", help="TOML with these flags as keys; a flag counts more")
    for name, option in _OPTIONS.items():
        if option.kind is bool:
            verb.add_argument(f"--{name}", action="store_true", default=None, help=option.words)
        else:
            said = "" if option.default is None else f" (default: {option.default})"
            verb.add_argument(f"--{name}", type=option.kind, metavar=option.metavar, help=option.words + said)
    verb.add_argument("--debug", action="store_true", help="show where an error came from")


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options: of the command line, else of the file that --config names, else the defaults.

    Raises:
        InputError: there is no such file.
        UsageError: it is no TOML, or holds what is no option.
    """
    found = {name: option.default for name, option in _OPTIONS.items()}
    if args.config is not None:
        found |= _read_config(args.config)
    given = {name: getattr(args, name.replace("-", "_")) for name in _OPTIONS}
    return found | {name: value for name, value in given.items() if value is not None}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads("".join(read_text(path)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    for name, value in found.items():
        option = _OPTIONS.get(name)
        if option is None:
            raise UsageError(f"{path}: {name!r} is no option; expected some of {', '.join(_OPTIONS)}")
        if type(value) is not option.kind and not (option.kind is float and type(value) is int):
            raise UsageError(f"{path}: {name} is {type(value).__name__}, expected {option.kind.__name__}")
    return found


def run(args: argparse.Namespace) -> None:
    """Serve.

    Raises:
        Olmo2ExportError: whatever is wrong.
    """
    options = chosen(args)
    for name in ("queue", "kept-texts"):
        if options[name] is not None and options[name] < 0:
            raise UsageError(f"--{name} {options[name]}: expected at least 0")
    for name in ("kv-tokens", "calls-per-key", "queue-seconds", "answer-seconds", "drain-seconds"):
        if options[name] is not None and not 0 < options[name] < float("inf"):
            raise UsageError(f"--{name} {options[name]}: expected a number above 0")
    keys = Keys() if options["api-keys-file"] is None else read_keys(Path(options["api-keys-file"]))
    engine = EngineOptions(
        package=args.package,
        variant=options["variant"],
        backend=options["backend"],
        device=options["device"],
        check_hashes=not options["skip-hash-check"],
        threads=options["threads"],
        max_slots=options["max-slots"],
        exact=options["exact"],
        kv_tokens=options["kv-tokens"],
        kept_rows=options["kept-texts"],
    )
    try:
        from runtimes.serve import edge, metrics, server, texts
    except ImportError as error:
        raise BackendError(f"a server needs {error.name}; pip install 'olmo2-export[serve]'") from error
    reached = server.ServerOptions(
        host=options["host"],
        port=options["port"],
        keys=keys,
        queue=options["queue"],
        drain_seconds=options["drain-seconds"],
        metrics_prefix=metrics.VLLM_PREFIX if options["vllm-metric-names"] else metrics.PREFIX,
        certificate=None if options["tls-certificate"] is None else Path(options["tls-certificate"]),
        private_key=None if options["tls-key"] is None else Path(options["tls-key"]),
        page=not options["no-page"],
        limits=edge.EdgeLimits(calls_per_key=options["calls-per-key"]),
        traces_endpoint=options["otlp-traces-endpoint"],
        patience=texts.Patience(queue=options["queue-seconds"], generation=options["answer-seconds"]),
    )
    server.check_reach(reached)
    server.check_certificate(reached)
    server.check_traces(reached)
    server.log_as_json()

    def on_ready(url: str) -> None:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()

    server.serve(engine, reached, name=options["name"], on_ready=on_ready)
