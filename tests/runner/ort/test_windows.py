"""Layers with a window forget what no later token sees: the same logits, and memory of the window alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtimes import open_runner
from runtimes.manifest import KVCacheSpec
from runtimes.ort import shared
from runtimes.ort.mapped_buffer import MappedBuffer
from runtimes.ort.shared import SharedRunner

WINDOW, LAYERS, CONTEXT = 8, 4, 256


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Olmo 3 of four layers, three of which see 8 tokens; keys of 256 bytes, so that a page has 16 tokens."""
    pytest.importorskip("torch")
    from support.checkpoints import OLMO3, make_checkpoint

    from olmo2_export.package.export import export
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.weights.checkpoint import open_checkpoint

    folder = tmp_path_factory.mktemp("windows")
    checkpoint = make_checkpoint(folder / "model", **OLMO3 | {"hidden_size": 128, "num_attention_heads": 2})
    export(
        open_checkpoint(str(checkpoint)),
        folder / "p",
        variants=["q8"],
        options=Options(prefill_graph=False, kv_caches=("float32",)),
    )
    return folder / "p"


def opened(package: Path, *, whole: bool = False) -> SharedRunner:
    runner = open_runner(package, variant="q8", threads=1)
    assert isinstance(runner, SharedRunner)
    if whole:
        runner._window = 0
    return runner


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget after few tokens, as the texts of tests are short."""
    monkeypatch.setattr(shared, "KEPT", 4)
    monkeypatch.setattr(shared, "FORGOTTEN", 16)


def forgotten(runner: SharedRunner, row: int = 0) -> int:
    assert isinstance(runner._buffer, MappedBuffer)
    return runner._buffer.forgotten(row)


IDS = np.random.default_rng(5).integers(0, 131, CONTEXT)


def test_the_manifest_says_which_layers_have_a_window(package: Path) -> None:
    with opened(package) as runner:
        assert runner.variant.kv_cache.windows == (WINDOW, WINDOW, WINDOW, 0)


@pytest.mark.usefixtures("soon")
def test_a_text_has_the_same_logits_to_the_bit_whatever_is_forgotten(package: Path) -> None:
    with opened(package) as runner, opened(package, whole=True) as other:
        pairs = [(runner.prefill([IDS[:150]])[0], other.prefill([IDS[:150]])[0])]
        assert forgotten(runner) == 150 + 1 - WINDOW - 4
        for token in IDS[150:200].tolist():
            pairs.append((runner.decode([token]), other.decode([token])))
        assert forgotten(runner) > 150
        pairs.append((runner.decode_block(IDS[200:207]), other.decode_block(IDS[200:207])))
        pairs.append((runner.prefill([IDS[207:230]])[0], other.prefill([IDS[207:230]])[0]))
        assert forgotten(other) == 0
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("kept", [148, 100, 20, 5, 0])
def test_a_text_that_is_cut_back_further_is_computed_again(package: Path, kept: int) -> None:
    with opened(package) as runner, opened(package, whole=True) as other:
        for one in (runner, other):
            one.prefill([IDS[:150]])
            one.truncate([kept])
        assert runner.cache_lengths == (kept,)
        ours, theirs = runner.prefill([IDS[kept:170]]), other.prefill([IDS[kept:170]])
        # The pieces of a prompt are others where it is computed anew: float32 rounding.
        np.testing.assert_allclose(ours[0], theirs[0], atol=2e-4)
        np.testing.assert_allclose(runner.decode([3]), other.decode([3]), atol=2e-4)


@pytest.mark.usefixtures("soon")
def test_slots_forget_each_for_itself_and_take_what_they_have_along(package: Path) -> None:
    with opened(package) as runner, opened(package, whole=True) as other:
        found = []
        for one in (runner, other):
            first, _ = one.admit(IDS[:120])
            second, _ = one.admit(IDS[5:200])
            third = one.copy_prefix(second, 190)
            early = one.copy_prefix(second, 30)  # whose window is forgotten
            one.release(first)  # the last row moves into its place
            steps = [one.step({second: 1, third: 2, early: 3}) for _ in range(3)]
            found.append([step[slot] for step in steps for slot in (second, third, early)])
        for ours, theirs in zip(*found, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.usefixtures("soon")
def test_an_exact_runner_keeps_all(package: Path) -> None:
    with open_runner(package, variant="q8", threads=1, exact=True) as runner:
        assert isinstance(runner, SharedRunner)
        runner.prefill([IDS[:200]])
        assert forgotten(runner) == 0


@pytest.mark.alone
def test_a_long_text_takes_the_memory_of_its_windows() -> None:
    """65,536 tokens of three layers with a window of 4096 and one without: about a quarter of the memory."""
    spec = KVCacheSpec("shared", "float32", LAYERS, 2, 64, 65_536, windows=(4096, 4096, 4096, 0))
    whole, windows = grown(dataclasses.replace(spec, windows=())), grown(spec)
    assert whole > 0.95 * 65_536 * 8 * 2 * 64 * 4
    assert 0.25 < windows / whole < 0.33


def grown(spec: KVCacheSpec) -> int:
    """Write a text as long as the cache, and forget as the runner does; return the bytes that this takes at its end."""
    buffer = MappedBuffer(spec, 1)
    before = resident()
    buffer.reserve(1, [])
    for stop in range(512, spec.max_cache_length + 1, 512):
        for name in buffer._names:
            buffer._arrays[name][0, :, stop - 512 : stop] = 1.0
        buffer.forget(0, stop + 1 - 4096 - shared.KEPT)
    after = resident()
    for name in buffer._names:
        assert float(buffer._arrays[name][0, :, -4096:].min()) == 1.0
    assert float(buffer._arrays["3.key"][0, :, 0].min()) == 1.0
    assert float(buffer._arrays["0.key"][0, :, 0].max()) == (0.0 if spec.windows else 1.0)
    buffer.close()
    return after - before


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_rows_first_page_in_part_is_given_back_once_all_of_it_is_forgotten() -> None:
    spec = KVCacheSpec("shared", "float32", 1, 2, 16, 1024, windows=(8,))  # 64 tokens a page
    buffer = MappedBuffer(spec, 2)
    buffer.reserve(2, [])
    for array in buffer._arrays.values():
        array[:] = 1.0
    made: list[Callable[[], None]] = [lambda n=n: buffer.forget(1, n) for n in (40, 70, 130, 1024)]  # type: ignore[misc]
    zeros = []
    for make in made:
        make()
        key = buffer._arrays["0.key"]
        assert float(key[0].min()) == 1.0  # of the other row
        zeros.append([int((key[1, head, :, 0] == 0).sum()) for head in range(2)])
    assert zeros == [[0, 0], [64, 64], [128, 128], [1024, 1024]]
    buffer.close()
