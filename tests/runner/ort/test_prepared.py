"""Graphs prepared for this machine: the same logits to the bit, mapped, and all that can be in the way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from runtimes import Slots, open_package, open_runner, prepare_variant
from runtimes.cli import main
from runtimes.errors import BackendError, ResourceError
from runtimes.linked_data import external_data
from runtimes.ort import prepared
from runtimes.ort.prepared import FOLDER, find_prepared, prepare

PROMPT = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89]]  # long enough for the prefill graph


@pytest.fixture(scope="module")
def made(q4_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of both graphs, prepared. Do not change it."""
    package = Path(shutil.copytree(q4_package, tmp_path_factory.mktemp("prepared") / "p"))
    assert [new for _, new in prepare_variant(package, variant="q4")] == [True, True]
    return package


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "p"))


def logits(runner: Slots) -> list[np.ndarray]:
    return [runner.prefill(PROMPT)[0], *(runner.decode([token]) for token in (7, 8))]


def folders(package: Path) -> list[str]:
    return sorted(path.name for path in (package / FOLDER).iterdir() if path.name != ".lock")


def test_logits_are_the_same_to_the_bit(made: Path) -> None:
    with open_runner(made, variant="q4", threads=1) as ready, open_runner(made, threads=1, prepared=False) as own:
        assert np.array_equal(logits(ready), logits(own))


def test_weights_are_mapped_and_said_to_be(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with open_runner(made, variant="q4", threads=1) as runner:
        logits(runner)
        if sys.platform == "linux":
            assert re.fullmatch(r"0\.[1-9] MB of weights mapped, 0\.0 MB in huge pages", runner.memory_note)
    assert [f"variant q4: weights mapped from {made / FOLDER}" in line for line in caplog.messages] == [True, True]
    with open_runner(made, variant="q4", threads=1, huge_pages=False) as runner:
        logits(runner)
        assert "huge" not in runner.memory_note
    with open_runner(made, variant="q4", threads=1, prepared=False) as runner:
        logits(runner)
        assert "mapped" not in runner.memory_note


def test_each_weight_is_packed_once_and_begins_where_it_can_be_mapped(made: Path) -> None:
    """Of the packed ones; a large one begins at a huge page, which these are too small for."""
    entry = open_package(made).variant("q4")
    ready = find_prepared(open_package(made), entry.graph, entry.data)
    assert ready is not None
    values = external_data(ready.graph.read_bytes())
    assert {value for key, value in values if key == "location"} == {ready.data.name}
    plain = [int(value) for key, value in values if key == "offset"]
    packed = [value.split("|")[1].split(";") for key, value in values if key.startswith("prepacked")]
    assert len(packed) == 3 * 7 + 1  # matrices of three layers, and the head
    assert min(int(start) for start, *_ in packed) > max(plain)
    assert all(int(start) % 64 == 0 for start, *_ in packed)
    assert sum(int(size) for _, size, _ in packed) < ready.data.stat().st_size


def test_large_weights_begin_at_huge_pages(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_HUGE_PAGE", 1 << 13)
    package = Path(shutil.copytree(made, tmp_path / "p", ignore=shutil.ignore_patterns(FOLDER)))
    ready, *_ = [graph for graph, _ in prepare_variant(package, variant="q4")]
    values = external_data(ready.graph.read_bytes())
    packed = [value.split("|")[1].split(";") for key, value in values if key.startswith("prepacked")]
    large = [int(start) for start, size, _ in packed if int(size) >= 1 << 13]
    assert len(large) > 3
    assert all(start % (1 << 13) == 0 for start in large)
    with open_runner(package, threads=1) as runner, open_runner(made, threads=1, prepared=False) as own:
        assert np.array_equal(logits(runner), logits(own))


def test_what_is_there_is_not_made_again(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (package / FOLDER).rglob("*.onnx*")}
    assert main(["prepare", str(package), "--variant", "q4", "--skip-hash-check"]) == 0
    assert re.fullmatch(
        r"(.+/\.prepared/model_q4\w+\.onnx-\w{16}: there already, [0-9]+ MB\n){2}", capsys.readouterr().out
    )
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("other", [{"onnxruntime": "1.99.0"}, {"graph": {}}, {"form": 0}])
def test_what_is_stale_is_not_used_and_replaced(
    package: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, object]
) -> None:
    then = folders(package)
    made_of = prepared._made_of
    monkeypatch.setattr(prepared, "_made_of", lambda *args: made_of(*args) | other)
    opened = open_package(package)
    entry = opened.variant("q4")
    assert find_prepared(opened, entry.graph, entry.data) is None
    assert [new for _, new in prepare(opened, entry, 1)] == [True, True]
    now = folders(package)
    assert len(now) == len(then) == 2
    assert not set(now) & set(then)


def test_what_is_of_another_machine_is_kept(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = folders(package)
    monkeypatch.setattr(prepared, "_machine", lambda: {"architecture": "riscv64"})
    assert [new for _, new in prepare_variant(package, variant="q4")] == [True, True]
    assert set(folders(package)) > set(then)
    assert len(folders(package)) == 4


def test_a_changed_byte_is_found_and_the_package_taken(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = next((package / FOLDER).glob("*/model_q4.onnx_data"))
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    with (
        open_runner(package, variant="q4", threads=1) as runner,
        open_runner(package, threads=1, prepared=False) as own,
    ):
        assert np.array_equal(logits(runner), logits(own))
    assert f"{data.parent}: model_q4.onnx_data: sha256 " in caplog.text
    assert "run olmo2-run prepare again; until then the package's own graph is taken" in caplog.text


@pytest.mark.parametrize("damage", ["shorter", "document", "gone"])
def test_damage_is_said_and_the_package_taken(package: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (package / FOLDER).glob("*.onnx-*"):
        document, data = folder / "prepared.json", next(folder.glob("*_data"))
        if damage == "shorter":
            os.truncate(data, 999)
        elif damage == "document":
            document.write_text(document.read_text().replace("onnxruntime", "onnxruntome"))
        else:
            data.unlink()
    with open_runner(package, variant="q4", threads=1) as runner:
        logits(runner)
        assert "mapped" not in runner.memory_note
    assert caplog.text.count("delete it, and run olmo2-run prepare again") == 2


def test_a_full_disk_is_one_line_and_leaves_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(package / FOLDER)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 100_000))
    assert main(["prepare", str(package), "--variant", "q4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "100,000 bytes are free, preparing onnx/model_q4_shared.onnx takes" in line
    monkeypatch.undo()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "_force", full)
    with pytest.raises(ResourceError, match=r"the disk is full; free [0-9,]+ bytes"):
        list(prepare_variant(package, variant="q4"))
    assert folders(package) == []
    with open_runner(package, variant="q4", threads=1) as runner:
        logits(runner)


def test_two_writers_make_it_once(package: Path) -> None:
    shutil.rmtree(package / FOLDER)
    opened, found = open_package(package), []

    def write() -> None:
        found.extend(new for _, new in prepare(opened, opened.variant("q4"), 1))

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(found) == [False, False, True, True]
    assert len(folders(package)) == 2


def test_a_package_that_cannot_be_written_is_prepared_in_the_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(shutil.copytree(made, tmp_path / "p", ignore=shutil.ignore_patterns(FOLDER)))
    (package / FOLDER).write_text("in the way")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    places = [graph.folder for graph, _ in prepare_variant(package, variant="q4")]
    home = tmp_path / "home" / ".cache" if sys.platform == "linux" else tmp_path / "home"
    assert all(home in place.parents for place in places)
    with open_runner(package, variant="q4", threads=1) as runner:
        logits(runner)
        assert sys.platform != "linux" or "MB of weights mapped" in runner.memory_note


def test_what_no_cpu_runs_is_refused(made: Path) -> None:
    opened = open_package(made)
    entry = opened.variant("q4")
    cache = entry.kv_cache.__class__(**{**vars(entry.kv_cache), "dtype": "bfloat16"})
    with pytest.raises(BackendError, match="variant q4: does not run on the CPU, as device cpu; prepare q4, q8, fp32"):
        list(prepare(opened, entry.__class__(**{**vars(entry), "kv_cache": cache}), 1))


@pytest.mark.skipif(sys.platform != "linux", reason="what a process shares is said in /proc")
def test_two_processes_share_the_weights(made: Path) -> None:
    script = f"""
import json, re, sys
from pathlib import Path
from runtimes import open_runner
with open_runner({str(made)!r}, variant="q4", threads=1) as runner:
    runner.prefill({PROMPT!r})
    runner.decode([7])
    print("ready", flush=True)
    sys.stdin.readline()
    sizes = {{"Rss": 0, "Pss": 0}}
    there = False
    for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if "-" in words[0]:
            there = words[-1].endswith("_data")
        elif there and words[0][:-1] in sizes:
            sizes[words[0][:-1]] += int(words[1])
    print(json.dumps(sizes), flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", script]
    pipes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in pipes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in pipes:
            print(file=process.stdin, flush=True)
            sizes = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            assert sizes["Rss"] > 100
            assert sizes["Pss"] <= 0.55 * sizes["Rss"]
    finally:
        for process in pipes:
            process.communicate()


def test_what_a_killed_writer_left_is_swept_and_others_may_read(package: Path) -> None:
    shutil.rmtree(package / FOLDER)
    (package / FOLDER / ".staging-1").mkdir(parents=True)
    (package / FOLDER / ".staging-1" / "half").write_bytes(b"x")
    mode = (package / "manifest.json").stat().st_mode
    for graph, _ in prepare_variant(package, variant="q4"):
        assert graph.data.stat().st_mode == graph.graph.stat().st_mode == mode
        assert graph.folder.stat().st_mode == (package / FOLDER).stat().st_mode
    assert len(folders(package)) == 2
