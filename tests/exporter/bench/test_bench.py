"""The benchmark runs on the demo's shape with ours alone, says what is missing, and ends in JSON with units."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from olmo2_export.bench import contenders, cpu, gpu, quality, stages
from olmo2_export.bench.checkpoint import SIZES, echo_successor, write_checkpoint
from olmo2_export.bench.claims import CLAIMS, Claim, Quantity, Result, claims_table, judge, samples_table, to_document
from olmo2_export.bench.cli import main, parse_args
from olmo2_export.bench.contenders import Contender, Workshop, peer_python
from olmo2_export.bench.processes import run, worker
from olmo2_export.bench.turns import take_turns
from olmo2_export.bench.workers.common import measure, prompt, resident
from olmo2_export.bench.workers.ours import Ours
from olmo2_export.bench.workers.profile import operator_times
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.truth.reference import open_reference
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.merged import open_merged, switchable_adapters
from runtimes import Runner
from runtimes.errors import FailedError, UsageError


@pytest.fixture(scope="module")
def kept(demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --keep, where the demo package stands for all that `cpu` wants; the demo model has that shape."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "checkpoint-demo-olmo2.json").write_text("{}")
    shutil.copytree(contenders.DEMO, folder / "checkpoint-demo-olmo2")
    for name in ("package-demo-fp32-bench", "package-demo-fp32-demo-model", "package-demo-fp32-gpu"):
        shutil.copytree(demo_package, folder / name)
        (folder / f"{name}.json").write_text('{"seconds": 80.0, "peak_memory_mb": 2600}')
    return folder


def last_line(text: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return result


def test_what_goes_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    command = ["profile", "--size", "demo", "--keep", str(tmp_path / "file" / "kept")]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("bench: error: [Errno 20] Not a directory: ")
    assert printed.count("\n") == 1
    assert main([*command, "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    assert main(["profile", "--fast"]) == 2
    assert capsys.readouterr().err.startswith(
        "bench: error: unrecognized arguments: --fast; see python -m olmo2_export"
    )


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SIZES, "demo", SIZES["demo"] | {"num_hidden_layers": 1})
    assert main(["stages", "--size", "demo", "--work", str(tmp_path), "--precision", "fp16"]) == 0
    result = last_line(capfd.readouterr().out)
    assert result["checkpoint_mb"] == 6
    assert [stage["stage"] for stage in result["stages"]] == ["export fp32", "build fp16"]
    assert all(0 < stage["seconds"] < 300 for stage in result["stages"])
    assert all(100 < stage["peak_memory_mb"] < 2500 for stage in result["stages"])
    assert list(tmp_path.iterdir()) == []


def test_stages_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What is made of the costs; that exports are run, `test_stages` shows."""
    asked: list[list[str]] = []

    def cost(name: str, arguments: Sequence[str | Path]) -> dict[str, Any]:
        asked.append([str(argument) for argument in arguments])
        out = Path(arguments[list(arguments).index("--out") + 1])
        out.mkdir()
        (out / "data").write_bytes(bytes(1_000_000 * (1 + 2 * len(asked))))
        return {"stage": name, "seconds": 3.0 * len(asked), "peak_memory_mb": 500 + 100 * len(asked)}

    monkeypatch.setattr(stages, "stage", cost)
    command = ["stages", "--size", "demo", "--work", str(tmp_path), "--variant", "q4", "--no-build"]
    assert main([*command, "--layers", "1"]) == 2
    assert "--layers 1: expected 2 or more" in capfd.readouterr().err
    assert main([*command, "--layers", "4", "--no-prefill-graph"]) == 0
    printed = capfd.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    few, many = result["stages"]
    assert (few["layers"], many["layers"]) == (2, 4)
    assert asked[1][3:] == ["--variant", "q4", "--no-prefill-graph"]
    assert few["said_package_mb"] < many["said_package_mb"]
    (layer,) = result["per_layer"]
    wanted = {"variant": "q4", "seconds": 1.5, "peak_memory_mb": 50.0, "package_mb": 1.0}
    assert layer == wanted | {"whole_seconds": 9, "whole_package_mb": 7}  # of 6 layers
    assert "so the whole model 9 s, 7 MB" in printed[-3]


@pytest.mark.alone
def test_cpu_with_ours_alone(kept: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "demo", "--keep", str(kept), "--peers", str(tmp_path), "--variant", "fp32", "--threads", "1"]
    only = ["decode_128", "streams_8", "load_trusted", "memory_1024", "lookup_repeats", "lookup_demo"]
    flags = [word for name in only for word in ("--only", name)]
    assert main(["cpu", *options, "--rounds", "1", "--steps", "3", "--llama-type", "Q4_0", *flags]) == 0
    out = capfd.readouterr().out
    assert f"llama.cpp is left out: {tmp_path / '.venv-peers-llama'} is not there; make peers installs it" in out
    assert "onnxruntime-genai is left out" in out
    assert "llama.cpp Q4_0: not there" in out
    result = last_line(out)
    assert result["failures"] == []
    assert len(result["left_out"]) == 3
    samples = result["samples"]
    assert set(samples) == {*only, "export"}
    assert samples["decode_128"]["ours"][0]["tokens_per_second"] > 1
    assert set(samples["streams_8"]["ours"][0]) == {"tokens_per_second", "one_stream_tokens_per_second"}
    assert 0 < samples["load_trusted"]["ours"][0]["seconds"] < 30
    memory = samples["memory_1024"]["one_graph"][0]
    assert 50 < memory["resident_mb"] <= memory["peak_resident_mb"] < 1000
    text = samples["lookup_demo"]["demo"][0]
    assert text["texts"] == text["identical_texts"] == 8
    verdicts = {(c["what"], c["against"]): c["verdict"] for c in result["claims"]}
    assert verdicts["decode, 128-token context", "llama"] == "not measured"
    assert verdicts["peak resident memory, 1024 tokens, one graph", None] == "met"
    assert verdicts["peak resident memory, 1024 tokens, two graphs", None] == "not measured"
    assert verdicts["export", None] == "met"
    assert verdicts["export, peak memory", None] == "missed by 4%"
    assert verdicts["prompt lookup gives identical text", "demo"] == "met"


def test_gpu_table_on_a_processor(kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command of the GPU, with the CPU in its place: every worker runs, and the walls are the shape's."""
    command = ["gpu", "--size", "demo", "--device", "cpu", "--with", "ort:fp32", "--rounds", "1", "--steps", "4"]
    assert main([*command, "--keep", str(kept), "--only", "decode_128"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["failures"] == []
    assert {task: set(row) for task, row in result["samples"].items()} == {
        "decode_128": {"ours", "static_cache", "wall"},
        "export": {"ours", "static_cache"},
    }
    assert all(sample["tokens_per_second"] > 0 for sample in result["samples"]["decode_128"]["static_cache"])


def test_the_walls_of_the_1b_shape() -> None:
    """2.56 GB of weights a token: 0.53 ms on an H200, and two operations a weight and token."""
    device = {"device": "NVIDIA H200", "copied_bytes_per_second": 1.0, "bf16_flops_per_second": 790e12}
    walls = gpu.walls("1B", device)
    cache = 128 * 2 * 16 * 2048 * 2
    assert 4.8e12 / walls["decode_128"]["tokens_per_second"] == pytest.approx(2.558e9 + cache, rel=1e-3)
    assert walls["decode_2048"]["tokens_per_second"] < walls["decode_128"]["tokens_per_second"]
    assert 790e12 / walls["prefill_2048"]["tokens_per_second"] == pytest.approx(
        2 * 1.0737e9 + 2 * 16 * 2048**2, rel=1e-3
    )
    slower = gpu.walls("1B", {**device, "device": "another", "copied_bytes_per_second": 1e12})
    assert slower["decode_128"]["tokens_per_second"] < walls["decode_128"]["tokens_per_second"] / 4


@pytest.mark.parametrize("text", ["bf16", "onnx:bf16", "ort:"])
def test_a_contender_of_no_backend_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected ort:VARIANT"):
        gpu.contenders(Workshop(tmp_path, "demo"), [text], "cuda", baseline=False)


def test_profile_of_a_kept_package(kept: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "demo", "--keep", str(kept), "--variant", "fp32", "--threads", "1"]
    assert main(["profile", *options, "--context", "19", "--steps", "2", "--rows", "1", "3"]) == 0
    out = capfd.readouterr().out
    assert "fp32, prefill of 19 tokens: " in out
    assert "fp32, one decode step, rows 3: " in out
    result = last_line(out)
    times = result["variants"]["fp32"]
    assert set(times) == {"prefill_ms", "decode_1_ms", "decode_3_ms"}
    for operators in times.values():
        for name in ("MatMul", "(rest)", "(Python)"):
            assert operators[name] > 0
    one, three = (result["walls"]["fp32"][f"decode_{rows}_ms"] for rows in (1, 3))
    cache = 2 * 6 * 4 * 32 * 4 * 20 + 256 * 4  # bytes of a row: what it holds, and its embedding
    assert three - one == pytest.approx(1000 * 2 * cache / result["memory_bandwidth_bytes_per_s"], rel=0.01)
    assert main(["profile", *options, "--rows", "0"]) == 2
    assert "--rows [0]: expected different integers from 1" in capfd.readouterr().err


def test_what_an_adapter_costs_is_measured_in_turns_on_packages_with_and_without_inputs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exports: list[list[str]] = []
    turns: list[list[str]] = []

    def stage(_verb: str, arguments: Sequence[str | Path]) -> dict[str, float]:
        exports.append([Path(word).name for word in arguments])
        return {"seconds": 1.0, "peak_memory_mb": 1}

    def worker(
        _python: Path,
        _name: str,
        arguments: Sequence[str],
        seconds: float | None = None,  # noqa: ARG001
    ) -> dict[str, float]:
        turns.append([Path(word).name for word in arguments[:-1]])
        return {"tokens_per_second": (100.0, 80.0, 50.0)[len(turns) % 3 - 1]}

    monkeypatch.setattr(contenders, "stage", stage)
    monkeypatch.setattr(contenders, "worker", worker)
    (tmp_path / "checkpoint-demo-olmo2.json").write_text("{}")
    assert main(["lora", "--size", "demo", "--keep", str(tmp_path), "--rank", "4", "--rounds", "2"]) == 0
    assert [words[2] for words in exports] == ["package-demo-q4-plain", "package-demo-q4-lora-4"]
    assert [words[-2:] for words in exports] == [
        ["rtn", "--no-prefill-graph"],
        ["--lora-inputs", "adapter-demo-4=adapter-demo-4"],
    ]
    columns = [["package-demo-q4-plain", "q4"], ["package-demo-q4-lora-4", "q4"]]
    assert turns == 2 * [*columns, [*columns[1], "--adapter", "adapter-demo-4"]]
    result = last_line(capfd.readouterr().out)
    assert result["step_ms"] == {"plain": 10.0, "idle": 12.5, "adapter": 20.0}
    (adapter,) = switchable_adapters(open_merged("demo", switchable=[str(tmp_path / "adapter-demo-4")]))
    assert len(adapter.low_rank) == 7 * 6
    assert adapter.numbers == result["adapter_numbers"]


def test_a_worker_gives_its_adapter_to_the_runner() -> None:
    given: list[object] = []
    runner = SimpleNamespace(
        reset=lambda: None, prefill=lambda rows, adapter: given.append((rows, adapter)) or [np.ones((1, 3))]
    )
    Ours(cast(Runner, runner), "chat").prefill([[1, 2]])
    assert given == [([[1, 2]], "chat")]


def test_quality_of_the_variant_of_8_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(verb: str, arguments: Sequence[str | Path]) -> None:
        assert (verb, arguments[1], arguments[3:]) == ("export", "--out", ["--variant", "q8"])
        export(open_checkpoint("demo"), Path(arguments[2]), variants=["q8"], options=Options(kv_caches=("float32",)))

    monkeypatch.setattr(quality, "stage", stage)
    folders = ["--work", str(tmp_path), "--peers", str(tmp_path)]
    assert main(["quality", *folders, "--variant", "q8", "--llama-type", "Q8_0", "--windows", "1"]) == 0
    out = capfd.readouterr().out
    assert "llama.cpp is left out" in out
    result = last_line(out)
    reference, ours = result["models"].values()
    assert result["tokens"] == 511
    assert 1e-6 < ours["kl_mean_nats"] < 5e-4
    assert reference["top1_share"] == 1.0
    assert ours["top1_share"] > 0.97
    assert ours["perplexity"] == pytest.approx(reference["perplexity"], rel=5e-3)
    assert 8.4 < ours["bits_per_weight"] < 8.6


def test_without_a_verb_it_is_the_table_of_targets() -> None:
    args = parse_args([])
    assert (args.verb, args.size, args.rounds, args.threads, args.variant) == ("cpu", "1B", 3, 2, None)


def test_an_error_is_a_message_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(_verb: str, _arguments: Sequence[str | Path]) -> None:
        raise FailedError("no variant q3")

    monkeypatch.setattr(contenders, "stage", stage)
    assert main(["profile", "--size", "demo", "--work", str(tmp_path), "--variant", "q3"]) == 1
    assert "bench: error: no variant q3\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failing_contender_leaves_the_others_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: Contender, task: dict[str, Any]) -> dict[str, float]:
        if self.key == "llama":
            raise FailedError("it broke")
        return {"tokens_per_second": float(task["threads"])}

    monkeypatch.setattr(Contender, "sample", sample)
    both = [Contender(key, key.upper(), Path("x"), "x", (), ("decode_128",), {}) for key in ("ours", "llama")]
    samples, failures = take_turns(both, {"decode_128": {"threads": 2}}, rounds=2)
    assert samples["decode_128"] == {"ours": [{"tokens_per_second": 2.0}] * 2, "llama": [{}, {}]}
    assert failures == ["LLAMA, decode_128: it broke"] * 2
    assert judge(samples)[0].median is None


def test_contenders_take_turns_within_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Contender, "sample", lambda self, task: seen.append((task["kind"], self.key)) or {})
    two = [Contender(key, key, Path("x"), "x", (), ("load", "prefill_512"), {}) for key in "ab"]
    take_turns(two, {"prefill_512": {"kind": "prefill"}, "load": {"kind": "load"}}, rounds=2)
    assert seen == [("prefill", "a"), ("prefill", "b"), ("load", "a"), ("load", "b")] * 2


SPEED = Claim("x", Quantity("t", "ours", "n"), Quantity("t", "llama", "n"), "x", 1.3, 1.6)
SECONDS = Claim("y", Quantity("t", "ours", "n"), None, "s", 1.0, 0.5, at_most=True)


@pytest.mark.parametrize(
    ("claim", "per_round", "verdict"),
    [
        (SPEED, (1.0, 1.29, 1.7), "missed by 1%"),
        (SPEED, (1.3,), "met"),
        (SPEED, (1.5, 1.7), "stretch"),
        (SPEED, (), "not measured"),
        (SECONDS, (0.5,), "stretch"),
        (SECONDS, (0.4, 0.9, 2.0), "met"),
        (SECONDS, (1.5,), "missed by 50%"),
    ],
)
def test_verdicts(claim: Claim, per_round: tuple[float, ...], verdict: str) -> None:
    assert Result(claim, per_round).verdict == verdict


def test_a_ratio_is_taken_within_its_round() -> None:
    """Medians of each side would say 30 / 20; the machine was three times as fast in the second round."""
    samples = {
        "decode_128": {
            "ours": [{"tokens_per_second": 20.0}, {"tokens_per_second": 90.0}, {"tokens_per_second": 30.0}],
            "llama": [{"tokens_per_second": 10.0}, {"tokens_per_second": 45.0}, {"tokens_per_second": 20.0}],
            "genai": [{"tokens_per_second": 10.0}, {}, {"tokens_per_second": 10.0}],
        }
    }
    llama, genai = judge(samples)
    assert llama.per_round == (2.0, 2.0, 1.5)
    assert llama.median == 2.0
    assert llama.verdict == "stretch"
    assert genai.per_round == (2.0, 3.0)  # the round in which it failed does not count
    names = {"ours": "ours q4", "llama": "llama.cpp", "genai": "genai"}
    row = claims_table([llama], names, samples).splitlines()[2]
    assert row == (
        "| decode, 128-token context | 30 tokens/s | llama.cpp: 20 tokens/s | 2 (1.5 to 2) x | ≥ 1.3 x | ≥ 1.6 x | "
        "stretch |"
    )
    assert samples_table(samples, names).splitlines() == [
        "| | ours q4 | llama.cpp | genai |",
        "|---|---|---|---|",
        "| decode_128: tokens/s | 30 ±233% | 20 ±175% | 10 ±0% |",
    ]
    document = to_document([llama])[0]
    assert (document["per_round_ratio"], document["median_ratio"]) == ([2.0, 2.0, 1.5], 2.0)


def test_an_absolute_claim_shows_the_peers_beside_it() -> None:
    samples = {"load": {"ours": [{"seconds": 0.75}], "llama": [{"seconds": 2.7}]}}
    (result,) = judge(samples)
    row = claims_table([result], {"ours": "ours", "llama": "llama.cpp"}, samples).splitlines()[2]
    assert row == "| load, files hashed | 0.75 seconds | llama.cpp: 2.7 seconds | 0.75 s | ≤ 1 s | ≤ 0.5 s | met |"


def test_every_claim_is_about_a_task_that_is_measured() -> None:
    for claim in CLAIMS:
        for quantity in filter(None, (claim.ours, claim.against)):
            assert quantity.task in {*cpu.TASKS, "export"}
    for name in cpu.TASKS:
        assert cpu.task(name, 4096, threads=2, steps=5)["kind"]


@pytest.mark.parametrize("first", [100, 4096 - 3])
def test_greedy_text_of_the_checkpoint_is_the_cycle(first: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SIZES["demo"])
    expected = [first]
    while len(expected) < 71:
        expected.append(echo_successor(expected[-1], SIZES["demo"]["vocab_size"]))
    with open_reference(open_checkpoint(str(tmp_path)), "fp32") as model:
        ids, _ = model.greedy(np.array([first]), 70)
    assert ids.tolist() == expected[1:]
    assert len(set(expected)) == (64 if first == 100 else 71)


def test_no_weight_of_the_checkpoint_is_there_twice(tmp_path: Path) -> None:
    """genai's builder shared equal tensors: a third of the memory, and half as fast again."""
    for form in ("olmo2", "llama"):
        folder = tmp_path / form
        folder.mkdir()
        write_checkpoint(folder, SIZES["demo"], form)
        matrices = [w for w in load_file(folder / "model.safetensors").values() if w.ndim == 2]
        assert len(matrices) == 6 * 7 + 2
        assert len({w.view(torch.int16).numpy().tobytes() for w in matrices}) == len(matrices)


def test_prompts_are_valid_and_differ() -> None:
    for length, vocab_size in ((512, 4096), (3000, 100_352)):
        rows = [prompt(length, vocab_size, row) for row in range(8)]
        assert len({tuple(row) for row in rows}) == 8
        assert all(2 <= token_id < vocab_size - 1 for row in rows for token_id in row)
        assert len(set(rows[0])) > length / 2


class FakeEngine:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.prefills: list[list[int]] = []
        self.steps = 0

    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        self.prefills.append([len(row) for row in rows])

    def step(self) -> None:
        self.steps += 1

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("task", "opened", "prefills", "steps", "keys"),
    [
        ({"kind": "decode", "context": 7, "steps": 5}, [(14, 1)], [[7]], 6, ["tokens_per_second"]),
        (
            {"kind": "streams", "context": 7, "steps": 5, "rows": 3},
            [(14, 1), (14, 3)],
            [[7], [7, 7, 7]],
            12,
            ["tokens_per_second", "one_stream_tokens_per_second"],
        ),
        ({"kind": "prefill", "length": 11, "repeats": 2}, [(13, 1)], [[11]] * 3, 0, ["tokens_per_second"]),
        ({"kind": "memory", "context": 64}, [(64, 1)], [[32]], 32, ["resident_mb", "peak_resident_mb"]),
        ({"kind": "load"}, [(1024, 1)], [[8]], 0, ["seconds"]),
    ],
)
def test_tasks(
    task: dict[str, Any], opened: list[tuple[int, int]], prefills: list[list[int]], steps: int, keys: list[str]
) -> None:
    engine = FakeEngine()
    asked = []

    def open_engine(length: int, rows: int) -> FakeEngine:
        asked.append((length, rows))
        return engine

    result = measure({**task, "vocab_size": 97, "threads": 2}, lambda: open_engine)
    assert (asked, engine.prefills, engine.steps, list(result)) == (opened, prefills, steps, keys)
    assert all(value > 0 for value in result.values())


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'sleep': there is points, decode"):
        measure({"kind": "sleep", "vocab_size": 97}, lambda: lambda _length, _rows: FakeEngine())


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident()["resident_mb"]
    held = np.ones(30_000_000)  # 240 MB
    assert 200 < resident()["resident_mb"] - before < 300
    assert held[-1] == 1


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(FailedError, match=r"exit code 3: no such luck"):
        run([sys.executable, "-c", "import sys; print('no such luck', file=sys.stderr); sys.exit(3)"])


def test_what_cannot_be_started_has_failed(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="nothing cannot be started: No such file or directory"):
        run([tmp_path / "nothing"])


@pytest.mark.alone
def test_an_interruption_ends_the_process_and_what_it_started(tmp_path: Path) -> None:
    started = tmp_path / "started"
    grandchild = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    code = (
        "import sys\nfrom olmo2_export.bench.processes import run\nfrom runtimes.signals import interruptible\n"
        f"with interruptible():\n    run([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(started).encode() in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_worker_without_an_object_is_refused() -> None:
    with pytest.raises(FailedError, match="expected a JSON object, found \\[\\]"):
        worker(sys.executable, "common", [])


def test_a_half_made_venv_is_no_peer(tmp_path: Path) -> None:
    assert peer_python(tmp_path, "llama") is None
    (tmp_path / "llama").mkdir()
    assert peer_python(tmp_path, "llama") is None
    (tmp_path / "llama" / ".installed").touch()
    assert peer_python(tmp_path, "llama") == tmp_path / "llama" / "bin" / "python"


def test_what_was_interrupted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(folder: Path, shape: dict[str, int], form: str) -> int:
        calls.append((shape, form))
        (folder / "half").touch()
        if len(calls) == 1:
            raise FailedError("killed")
        return 5_000_000

    monkeypatch.setattr(contenders, "write_checkpoint", broken)
    workshop = Workshop(tmp_path, "demo")
    with pytest.raises(FailedError):
        workshop.checkpoint("llama")
    for _ in range(2):
        assert workshop.checkpoint("llama") == tmp_path / "checkpoint-demo-llama"
    assert calls == [(SIZES["demo"], "llama")] * 2
    assert json.loads((tmp_path / "checkpoint-demo-llama.json").read_text()) == {"checkpoint_mb": 5}


def test_windows_begin_with_bos_and_end_with_padding() -> None:
    assert quality.windows([5, 6, 7, 8, 9], bos=0, length=4).tolist() == [[0, 5, 6, 7], [0, 8, 9, -1]]
    assert quality.windows([5, 6, 7], bos=0, length=4).tolist() == [[0, 5, 6, 7]]


def test_metrics_of_known_logits() -> None:
    rows = [np.array([0, 2, 1]), np.array([0, 3])]
    reference = np.zeros((5, 4), np.float32)
    reference[:, 1] = np.log(3)  # 1/6, 1/2, 1/6, 1/6
    test = np.zeros((5, 4), np.float32)
    test[4, 1] = 1.0
    found = quality.metrics(rows, reference, test)
    uniform = 0.5 * np.log(0.5 * 4) + 0.5 * np.log(4 / 6)
    exact = 0.5 * np.log(0.5 / (np.e / (np.e + 3))) + 0.5 * np.log((1 / 6) * (np.e + 3))
    assert found["kl_mean_nats"] == pytest.approx((4 * uniform + exact) / 5)
    spread = [uniform - (4 * uniform + exact) / 5] * 4 + [exact - (4 * uniform + exact) / 5]  # blocks of one token
    assert found["kl_se_nats"] == pytest.approx(np.sqrt(5 / 4 * np.square(spread).sum()) / 5)
    assert found["top1_share"] == pytest.approx(1 / 5)
    assert found["perplexity"] == pytest.approx(4.0)  # the positions that predict are uniform
    assert found["perplexity_se"] == pytest.approx(0.0)


def test_a_profile_is_summed_by_phase() -> None:
    def node(at: int, dur: int, op: str) -> dict[str, Any]:
        return {"name": f"/{op}_kernel_time", "ts": at, "dur": dur, "args": {"op_name": op}}

    events = [
        {"name": "session_initialization", "ts": 0, "dur": 5},
        {"name": "model_run", "ts": 10, "dur": 100},
        node(20, 60, "MatMul"),
        node(85, 20, "Add"),
        {"name": "model_run", "ts": 200, "dur": 30},
        node(205, 20, "MatMul"),
        {"name": "model_run", "ts": 300, "dur": 30},
        node(305, 10, "MatMul"),
    ]
    assert operator_times(events, ["prefill", "decode", "decode"]) == {
        "prefill": Counter({"MatMul": 60, "Add": 20, "(rest)": 20}),
        "decode": Counter({"MatMul": 30, "(rest)": 30}),
    }
