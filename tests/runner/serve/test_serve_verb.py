"""olmo2-run serve: its flags and its file of them; and the real thing, a model behind sockets, until SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from support.collector import collecting
from support.serving import until

import runtimes
from runtimes import open_runner
from runtimes.cli import main
from runtimes.errors import UsageError
from runtimes.generation.generate import generate
from runtimes.serve import server
from runtimes.serve.options import EngineOptions
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

ROOT = Path(runtimes.__file__).parents[1]
TLS = Path(__file__).parents[2] / "data" / "serve"
"""a certificate of localhost that nobody trusts, until 2126, and its key"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a server would be started with."""
    found: list[Any] = []
    monkeypatch.setattr(server, "log_as_json", lambda: None)

    def serve(engine: EngineOptions, options: server.ServerOptions, *, name: str | None, on_ready: Any) -> None:
        assert callable(on_ready)
        found.extend((engine, options, name))

    monkeypatch.setattr(server, "serve", serve)
    return found


def test_flags_reach_the_server_and_count_more_than_the_file(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a key\n")
    (tmp_path / "config.toml").write_text(
        'port = 1234\nqueue = 7\nexact = true\nqueue-seconds = 5\nname = "file"\nkv-tokens = 900\n'
    )
    flags = f"""serve p --config {tmp_path}/config.toml --host 0.0.0.0 --port 4321 --name flag --variant q4
        --otlp-traces-endpoint http://localhost:4318 --backend ort --device cpu --threads 3 --skip-hash-check
        --max-slots 2 --kept-texts 0 --answer-seconds 9 --drain-seconds 4 --api-keys-file {tmp_path}/keys
        --vllm-metric-names --calls-per-key 6 --no-page --tls-certificate {TLS}/cert.pem --tls-key {TLS}/key.pem"""
    assert main(flags.split()) == 0
    engine, options, name = asked
    assert engine == EngineOptions(
        package="p",
        variant="q4",
        backend="ort",
        device="cpu",
        check_hashes=False,
        threads=3,
        max_slots=2,
        exact=True,
        kv_tokens=900,
        kept_rows=0,
    )
    assert (options.host, options.port, options.queue, options.metrics_prefix) == ("0.0.0.0", 4321, 7, "vllm:")
    assert (options.patience.queue, options.patience.generation, options.drain_seconds) == (5, 9.0, 4.0)
    assert options.keys.name_of("Bearer a key")
    assert (options.certificate, options.private_key) == (TLS / "cert.pem", TLS / "key.pem")
    assert (options.limits.calls_per_key, options.page) == (6, False)
    assert options.traces_endpoint == "http://localhost:4318"
    assert name == "flag"


def test_without_flags_it_is_reached_from_this_machine_alone(asked: list[Any]) -> None:
    assert main(["serve", "p"]) == 0
    engine, options, name = asked
    assert engine == EngineOptions(package="p")
    assert (options.host, options.port, bool(options.keys), name) == ("127.0.0.1", 8000, False, None)
    assert options.page
    assert options.traces_endpoint is None
    assert main(["serve", "p", "--exact", "--queue", "3", "--kv-tokens", "5", "--queue-seconds", "2"]) == 0
    assert (asked[3].exact, asked[3].kv_tokens, asked[4].queue, asked[4].patience.queue) == (True, 5, 3, 2.0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--host 0.0.0.0", "others reach it, and there are no keys"),
        ("--host example.org", "others reach it"),
        ("--queue -1", "--queue -1: expected at least 0"),
        ("--kv-tokens 0", "--kv-tokens 0: expected a number above 0"),
        ("--queue-seconds nan", "--queue-seconds nan: expected a number above 0"),
        ("--calls-per-key 0", "--calls-per-key 0: expected a number above 0"),
        (f"--tls-key {TLS}/key.pem", "of no certificate; give --tls-certificate too"),
        (f"--tls-certificate {TLS}/cert.pem", "not a certificate with its key"),
        ("--tls-certificate nowhere", "not a certificate with its key, in PEM ([Errno 2]"),
        (
            "--otlp-traces-endpoint localhost:4318",
            "localhost:4318: expected a URL such as http://localhost:4318/v1/traces",
        ),
        ("--otlp-traces-endpoint grpc://localhost:4317", "expected a URL"),
        ("--otlp-traces-endpoint http:///v1/traces", "expected a URL"),
        ("--otlp-traces-endpoint http://localhost:no", "expected a URL"),
        (
            "--otlp-traces-endpoint http://me:secret@localhost",
            "has a user or a password; use OTEL_EXPORTER_OTLP_TRACES_",
        ),
        ("--api-keys-file nowhere", "nowhere: no such file"),
        ("--config nowhere", "nowhere: no such file"),
    ],
)
def test_what_means_nothing_is_refused(
    asked: list[Any], capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    assert main(["serve", "p", *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port =", "not valid TOML"),
        ("prot = 1", "'prot' is no option; expected some of host, port"),
        ('port = "1"', "port is str, expected int"),
        ("exact = 1", "exact is int, expected bool"),
    ],
)
def test_a_file_of_flags_that_is_wrong_is_refused(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "config.toml").write_text(text)
    assert main(["serve", "p", "--config", str(tmp_path / "config.toml")]) == 2
    assert said in capsys.readouterr().err
    assert asked == []


def test_an_address_that_is_taken_or_none_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: no address to listen on"):
            server._bound("127.0.0.1", port)
    with pytest.raises(UsageError, match="no address to listen on"):
        server._bound("no.such.host.invalid", 80)
    for number in (-1, 70_000):
        with pytest.raises(UsageError, match="expected 0 to 65535"):
            server._bound("127.0.0.1", number)
    for host in ("127.0.0.1", "::1"):
        server._bound(host, 0).close()


@dataclass
class Running:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str

    def get(self, path: str) -> str:
        try:
            trusted = ssl.create_default_context(cafile=TLS / "cert.pem")
            with urllib.request.urlopen(self.url + path, timeout=10, context=trusted) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()


@contextmanager
def running(*arguments: str | Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "runtimes", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"https?://127\.0\.0\.1:\d+", url), process.communicate()[1]
        yield Running(process, url)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.alone  # signals, and time
def test_accepted_answers_are_those_of_a_client_alone_and_sigterm_lets_them_end(demo_two_package: Path) -> None:
    """Rows 38 and 42 of test_fault_rows: random arrivals; then a stream that is under way when it is told to end."""
    tokenizer = Tokenizer.from_package(demo_two_package)
    prompts = ["In the beginning", "And it came to pass, that", "In the beginning God created the", "And", "The LORD"]
    with open_runner(demo_two_package, variant="q4", exact=True) as runner:
        alone = [
            generate(runner, tokenizer, text, sampler=Sampler(1.0, seed=n), max_new_tokens=24).text
            for n, text in enumerate(prompts)
        ]
    trusted = ssl.create_default_context(cafile=TLS / "cert.pem")
    tls = "--tls-certificate", TLS / "cert.pem", "--tls-key", TLS / "key.pem"
    with (
        collecting() as traces,
        running(
            demo_two_package,
            "--variant",
            "q4",
            "--exact",
            "--max-slots",
            "3",
            *tls,
            "--otlp-traces-endpoint",
            traces.url,
        ) as served,
    ):
        with openai.OpenAI(
            base_url=f"{served.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=trusted, timeout=60),
        ) as client:
            (name,) = [model.id for model in client.models.list()]

            def ask(number: int) -> str:
                found = client.completions.create(model=name, prompt=prompts[number], max_tokens=24, seed=number)
                return found.choices[0].text

            with ThreadPoolExecutor(8) as pool:
                for _ in range(2):
                    assert list(pool.map(ask, range(len(prompts)))) == alone
            form: dict[str, Any] = {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}
            found = client.completions.create(
                model=name, prompt="Is it so?", max_tokens=9, extra_body={"response_format": form}
            )
            assert found.choices[0].text in ("true", "false")
            form["json_schema"] = {"schema": {"type": "array", "uniqueItems": True}}
            with pytest.raises(openai.BadRequestError, match="JSON schema"):
                client.completions.create(model=name, prompt="x", extra_body={"response_format": form})
            endless: Any = {"logit_bias": {"0": -100.0}, "max_tokens": 900}  # the demo's end of a text has the id 0
            stream = client.completions.create(model=name, prompt="In the", stream=True, **endless)
            first = next(iter(stream))
            served.process.send_signal(signal.SIGTERM)
            until(lambda: served.get("/ready") == '{"status":"not ready"}')
            chunks = [first, *stream]
            assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        _, log = served.process.communicate(timeout=30)
        assert served.process.returncode == 0
        lines = [json.loads(line) for line in log.splitlines()]
        assert {line["event"] for line in lines} >= {"call", "ending"}
        assert "In the beginning" not in log
        logged = {line["trace_id"] for line in lines if line.get("method") == "POST"}
        assert {span.trace_id.hex() for span in traces.spans} == logged  # the last were sent at the end
        socket.create_server(("127.0.0.1", int(served.url.rsplit(":", 1)[1]))).close()  # the port is free again


@pytest.mark.alone  # it kills
def test_a_killed_engine_is_an_error_and_then_ready_again(demo_two_package: Path) -> None:
    """Row 41 of test_fault_rows."""
    with (
        running(demo_two_package, "--variant", "q4", "--max-slots", "1") as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        name = next(iter(client.models.list())).id
        endless: Any = {"logit_bias": {"0": -100.0}, "max_tokens": 1000}  # the demo's end of a text has the id 0
        stream = iter(client.completions.create(model=name, prompt="In", stream=True, **endless))
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.completions.create, model=name, prompt="And", max_tokens=5)
            until(lambda: line_of(served.get("/metrics")).endswith(" 1.0"))
            os.kill(child_of(served.process.pid), signal.SIGKILL)
            with pytest.raises(openai.APIError, match="SIGKILL"):
                list(stream)
            assert len(waiting.result(60).choices) == 1
        assert served.get("/ready") == '{"status":"ready"}'


def child_of(pid: int) -> int:
    """The process with the engine."""
    children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return next(child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text())


def line_of(text: str) -> str:
    """How many requests wait, in the text of /metrics."""
    return next(line for line in text.splitlines() if line.startswith("olmo2_num_requests_waiting{"))
