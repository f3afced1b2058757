"""bench serve: clients of a real server and of one that speaks as llama-server does; what a soak does not forgive."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import fake_llama_server, fake_peers

from olmo2_export.bench import soak
from olmo2_export.bench.cli import main
from olmo2_export.bench.contenders import LLAMA_VENV
from olmo2_export.bench.load import Address, Prompts, complete, quantile
from olmo2_export.bench.served import llama_server
from olmo2_export.bench.soak import Soaked, accounts, metric_values
from runtimes.errors import FailedError

ASKED = ["--clients", "1", "3", "--prompt-tokens", "16", "--new-tokens", "8", "--long-tokens", "60", "--rounds", "1"]
FEW = [*ASKED, "--slots", "5", "--threads", "1"]


@pytest.fixture(name="llama_program")
def _llama_program(tmp_path: Path) -> Path:
    """A llama-server."""
    fake_peers.install(tmp_path, tmp_path / "log", tmp_path / "graph", [LLAMA_VENV])
    program = tmp_path / LLAMA_VENV / "bin" / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(fake_llama_server.__file__).resolve()}" "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.usefixtures("llama_program")
def test_both_servers_are_measured_and_a_soak_leaves_ours_as_it_was(
    demo_two_package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(demo_two_package, kept / "package-demo-q4-served")
    (kept / "package-demo-q4-served.json").write_text("{}")
    command = ["serve", "--size", "demo", "--keep", str(kept), "--peers", str(tmp_path), *FEW, "--requests", "30"]
    assert main(command) == 0
    out = capfd.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["failures"], result["left_out"]) == ([], []) or "AMX" in result["left_out"][0]
    assert list(result["samples"]) == ["bare", "clients_1", "clients_3", "queue", "arrivals", "prefix"]
    for task, samples in result["samples"].items():
        assert set(samples) == ({"ours"} if task == "bare" else {"ours", "llama"})
    ours, llama = (result["samples"]["prefix"][name][0] for name in ("ours", "llama"))
    assert ours["reused_share"] == pytest.approx(30 / 42, abs=0.03)  # the beginning, of prompts of 30 + 12
    assert llama["reused_share"] == 0.5
    assert 0 < result["samples"]["arrivals"]["ours"][0]["itl_p50_ms"] < 10_000
    found = result["soak"]
    assert (found["requests"], found["answered"], found["given_up"]) == (30, 27, 3)
    assert found["new_tokens"] > 30
    assert len(result["claims"]) == 4
    assert all(claim["verdict"] != "not measured" for claim in result["claims"])
    assert "Soak: 30 requests, 27 answered whole, 3 given up" in out


def test_an_answer_is_counted_by_its_tokens(llama_program: Path, tmp_path: Path) -> None:
    with llama_server(llama_program, tmp_path / "x.gguf", threads=1, slots=2, room=64) as server:
        streamed = asyncio.run(complete(server.address, [1, 2, 3, 4], 7))
        whole = asyncio.run(complete(server.address, [1, 2, 3, 4], 7, stream=False))
        left = asyncio.run(complete(server.address, [1, 2, 3, 4], 7, give_up_after=3))
    assert (len(streamed.times), streamed.reused, len(streamed.gaps)) == (7, 2, 6)
    assert streamed.sent < streamed.times[0] <= streamed.times[-1] <= streamed.ended
    assert (len(whole.times), whole.reused, set(whole.gaps)) == (7, 2, {0.0})
    assert (len(left.times), left.reused) == (3, None)


def test_an_event_of_ours_may_hold_several_tokens() -> None:
    address = Address(1, "ours", "m", never=(7,))
    path, body = address.call([3, 4], 5, stream=True)
    assert path == "/v1/completions"
    assert (body["logit_bias"], body["prompt"], body["max_tokens"]) == ({"7": -100}, [3, 4], 5)
    assert address.tokens({"choices": [{"token_ids": [8, 9]}]}) == 2
    assert address.tokens({"choices": [], "usage": {}}) == 0
    assert address.reused({"usage": {"prompt_tokens_details": {"cached_tokens": 6}}}) == 6


def test_a_server_that_is_not_there_or_ends_is_said(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="nobody listens on port 1: Connect call failed"):
        asyncio.run(complete(Address(1), [1], 1))
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho no such model >&2; exit 3\n")
    program.chmod(0o755)
    with (
        pytest.raises(FailedError, match="ended with exit code 3: no such model"),
        llama_server(program, tmp_path / "x", threads=1, slots=1, room=8),
    ):
        pass


def test_prompts_differ_and_are_the_same_again() -> None:
    first = Prompts(4096, seed=1).draw(3, 20)
    assert first == Prompts(4096, seed=1).draw(3, 20)
    assert len({tuple(prompt) for prompt in [*first, *Prompts(4096, seed=2).draw(3, 20)]}) == 6
    assert all(0 <= token < 131 for prompt in Prompts(131).draw(2, 50) for token in prompt)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0


METRICS = """# HELP x y
olmo2_num_requests_running{model_name="m"} 0.0
olmo2_num_requests_waiting{model_name="m"} 0.0
olmo2_request_success_total{finished_reason="stop",model_name="m"} 3.0
olmo2_request_success_total{finished_reason="length",model_name="m"} 6.0
olmo2_requests_cancelled_total{model_name="m"} 1.0
olmo2_engine_restarts_total{model_name="m"} 2.0
"""


def _accounts(found: Soaked, **changed: float) -> list[str]:
    before = {"olmo2_engine_restarts_total": 2.0}
    return accounts(before, metric_values(METRICS) | {f"olmo2_{name}": value for name, value in changed.items()}, found)


def test_books_that_balance_say_nothing() -> None:
    assert metric_values(METRICS)["olmo2_request_success_total"] == 9
    assert _accounts(Soaked(10, answered=9, given_up=1, memory=[100_000_000, 120_000_000])) == []


@pytest.mark.parametrize(
    ("changed", "given_up", "memory", "said"),
    [
        ({"num_requests_running": 1.0}, 1, [], "num_requests_running is 1 when all is over, expected 0"),
        ({"engine_restarts_total": 3.0}, 1, [], "engine_restarts_total grew by 1, expected 0"),
        ({"requests_rejected_total": 4.0}, 1, [], "requests_rejected_total grew by 4, expected 0"),
        ({"request_success_total": 8.0}, 1, [], "of 10 requests 8 ended and 1 were cancelled"),
        ({}, 0, [], "1 requests were cancelled, but only 0 clients went away"),
        ({}, 1, [200e6, 260e6], "memory grew from 200 to 260 MB behind the first quarter"),
    ],
)
def test_what_a_soak_does_not_forgive(changed: dict[str, float], given_up: int, memory: list[int], said: str) -> None:
    assert _accounts(Soaked(10, answered=9, given_up=given_up, memory=memory), **changed) == [said]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_memory_is_that_of_a_process_and_its_children() -> None:
    source = (
        "import subprocess, sys; b = bytearray(b'x') * 60_000_000; "
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]); print(1, flush=True); p.wait()"
    )
    child = "b = bytearray(b'x') * 40_000_000; import sys; print(2, flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", source, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {b"1\n", b"2\n"}
    memory = soak.tree_memory(process.pid)
    process.communicate(b"")
    assert memory is not None
    assert 100e6 < memory < 200e6
    assert soak.tree_memory(process.pid) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clients", "0"], "--clients [0]: expected different integers from 1"),
        (["--slots", "4"], "--slots 4: expected 5 or more"),
        (["--long-tokens", "1020"], "prompts and answers of 1028 tokens: the model's context is 1024"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], message: str, demo_two_package: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--size", "demo", "--package", str(demo_two_package), *FEW, *flags]) == 2
    assert message in capfd.readouterr().err
