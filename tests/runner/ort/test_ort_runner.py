"""The runners on onnxruntime against PyTorch: every way of feeding, both forms of KV cache, and what they refuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import packages

import runtimes
from runtimes import open_runner
from runtimes.errors import (
    BackendError,
    ContextLengthError,
    FailedError,
    InputError,
    IntegrityError,
    NumericError,
    PackageError,
    PackageNotFoundError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import MANIFEST_NAME
from runtimes.ort.concat import ConcatRunner
from runtimes.package import open_package
from runtimes.sealed import hash_file, read_sealed, seal

VOCAB, CONTEXT = 131, 256
# float32 on both sides, products summed in another order: 5e-6 measured on logits of size 1 to 4.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    return packages.sequences()


@pytest.fixture(scope="module")
def reference(tiny_logits: list[np.ndarray]) -> list[np.ndarray]:
    """PyTorch's logits of each sequence, all positions."""
    return tiny_logits


@pytest.fixture(scope="module")
def shared_runner(tiny_package: Path) -> Iterator[ConcatRunner]:
    with open_runner(tiny_package, threads=1) as runner:
        yield runner


@pytest.fixture
def runner(shared_runner: ConcatRunner) -> ConcatRunner:
    shared_runner.reset()
    return shared_runner


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE


def edit_manifest(package: Path, change: Any) -> None:
    manifest = read_sealed(package / MANIFEST_NAME)
    change(manifest)
    (package / MANIFEST_NAME).write_bytes(seal(manifest))


@pytest.fixture
def copy(tiny_package: Path, tmp_path: Path) -> Path:
    """A package that the test may change."""
    return Path(shutil.copytree(tiny_package, tmp_path / "a copy ünï"))


# What it computes


def test_prefill_equals_pytorch_at_all_positions(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    for ids, expected in zip(sequences, reference, strict=True):
        runner.reset()
        (logits,) = runner.prefill([ids], all_positions=True)
        close(logits, expected)
        assert runner.cache_lengths == (len(ids),)


def test_prefill_gives_the_last_row_and_computes_no_other(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    call = ConcatRunner._call

    def spy(self: ConcatRunner, *args: Any) -> Any:
        (logits,), values = call(self, *args)
        shapes.append(logits.shape)
        return [logits], values

    monkeypatch.setattr(ConcatRunner, "_call", spy)
    (logits,) = runner.prefill([sequences[0]])
    close(logits, reference[0][-1:])
    assert shapes == [(1, 1, VOCAB)]


def test_long_prompts_are_computed_in_pieces_whose_attention_is_small(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    call = ConcatRunner._call

    def spy(self: ConcatRunner, feeds: Any, *others: Any) -> Any:
        shapes.append((feeds["input_ids"].shape[1], feeds["attention_mask"].shape[1]))
        return call(self, feeds, *others)

    monkeypatch.setattr(ConcatRunner, "_call", spy)
    monkeypatch.setattr(type(runner), "prefill_chunk", 12)
    for logits, expected in zip(runner.prefill(sequences), reference, strict=True):  # 17, 5 and 29 tokens
        close(logits, expected[-1:])
    assert shapes == [(12, 12), (12, 24), (5, 29)]
    assert runner.cache_lengths == packages.LENGTHS
    runner.truncate([3, 2, 9])
    rest = [ids[n:] for ids, n in zip(sequences, (3, 2, 9), strict=True)]
    for logits, expected in zip(runner.prefill(rest), reference, strict=True):
        close(logits, expected[-1:])
    assert ids_held(runner) == [ids.tolist() for ids in sequences]


def test_a_prompt_that_fails_in_its_second_piece_leaves_the_runner_as_it_was(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = ConcatRunner._call, []

    def failing(self: ConcatRunner, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise FailedError("no memory")
        return call(self, *args)

    monkeypatch.setattr(type(runner), "prefill_chunk", 10)
    runner.prefill([sequences[2][:9]])
    with monkeypatch.context() as patch:
        patch.setattr(ConcatRunner, "_call", failing)
        calls.append(1)
        with pytest.raises(FailedError):
            runner.prefill([sequences[2][9:]])
    assert ids_held(runner) == [sequences[2][:9].tolist()]
    close(runner.prefill([sequences[2][9:]])[0], reference[2][-1:])


def test_prefill_and_decode_equal_the_full_forward(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    ids, expected = sequences[2], reference[2]
    close(runner.prefill([ids[:4]])[0], expected[3:4])
    for position in range(4, len(ids)):
        close(runner.decode([ids[position]]), expected[position : position + 1])


def test_chunked_prefill_equals_the_whole(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    found = [runner.prefill([chunk], all_positions=True)[0] for chunk in np.split(sequences[2], [1, 12, 14])]
    close(np.concatenate(found), reference[2])


def test_ragged_batch_equals_the_single_runs(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    for logits, expected in zip(runner.prefill(sequences, all_positions=True), reference, strict=True):
        close(logits, expected)
    assert runner.cache_lengths == packages.LENGTHS


def test_ragged_chunks_leave_holes_that_nothing_sees(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    bounds = [(0, 2, 11, 15, 16, 17), (0, 1, 2, 3, 4, 5), (0, 14, 15, 27, 28, 29)]
    for chunk in range(5):
        parts = [ids[b[chunk] : b[chunk + 1]] for ids, b in zip(sequences, bounds, strict=True)]
        found = (
            runner.prefill(parts, all_positions=True)
            if chunk < 3
            else list(runner.decode([int(p[0]) for p in parts])[:, None])
        )
        for logits, expected, b in zip(found, reference, bounds, strict=True):
            close(logits, expected[b[chunk] : b[chunk + 1]])
        assert runner.cache_lengths == tuple(b[chunk + 1] for b in bounds)


def test_reset_forgets(runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]) -> None:
    runner.prefill(sequences)
    runner.reset()
    assert runner.cache_lengths == ()
    close(runner.prefill([sequences[1]])[0], reference[1][-1:])


def test_exactly_the_context_works_and_one_more_is_refused(runner: ConcatRunner, tiny_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Olmo2ForCausalLM

    ids = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    with torch.no_grad():
        model = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint).eval()
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert runner.max_cache_length == CONTEXT
    close(runner.prefill([ids[:-1]])[0], expected[-2:-1])
    with pytest.raises(
        ContextLengthError, match=r"row 0: 255 tokens in the cache and 2 new ones make 257, at most 256"
    ):
        runner.prefill([[1, 2]])
    close(runner.decode(ids[-1:]), expected[-1:])
    with pytest.raises(ContextLengthError, match=r"256 tokens in the cache and 1 new ones make 257"):
        runner.decode([1])
    runner.reset()
    with pytest.raises(ContextLengthError, match=r"row 1: 0 tokens in the cache and 257 new ones"):
        runner.prefill([[1], [1] * 257])
    assert runner.cache_lengths == ()


# What it keeps


def ids_held(runner: ConcatRunner) -> list[list[int]]:
    return [row.tolist() for row in runner.cached_tokens]


@pytest.mark.parametrize("kept", [(17, 5, 29), (9, 5, 2), (0, 3, 29), (16, 0, 11), (4, 1, 7), (0, 0, 0)])
def test_truncated_rows_continue_like_fresh_ones(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray], kept: tuple[int, ...]
) -> None:
    wrong = [np.concatenate([ids[:n], (ids[n:] + 1) % VOCAB]) for ids, n in zip(sequences, kept, strict=True)]
    runner.prefill([ids[:3] for ids in wrong])
    runner.prefill([ids[3:] for ids in wrong])  # so that padding lies in the middle too
    runner.truncate(kept)
    assert runner.cache_lengths == kept
    assert ids_held(runner) == [ids[:n].tolist() for ids, n in zip(sequences, kept, strict=True)]
    rest = [ids[min(n, len(ids) - 2) :] for ids, n in zip(sequences, kept, strict=True)]
    runner.truncate([min(n, len(ids) - 2) for ids, n in zip(sequences, kept, strict=True)])
    for logits, new, expected in zip(
        runner.prefill([ids[:-1] for ids in rest], all_positions=True), rest, reference, strict=True
    ):
        close(logits, expected[-len(new) : -1])
    close(runner.decode([int(ids[-1]) for ids in sequences]), np.stack([expected[-1] for expected in reference]))
    assert ids_held(runner) == [ids.tolist() for ids in sequences]


def test_truncating_one_row_copies_only_what_is_kept(runner: ConcatRunner, sequences: list[np.ndarray]) -> None:
    runner.prefill([sequences[2]])
    runner.truncate([7])
    assert {value.shape()[2] for value in runner._cache.values.values()} == {7}
    before = runner._cache
    runner.truncate([7])
    assert runner._cache is before


def test_cached_tokens_are_those_that_were_fed(runner: ConcatRunner, sequences: list[np.ndarray]) -> None:
    assert runner.cached_tokens == ()
    given = sequences[1].copy()
    runner.prefill([given, [1, 2]])
    runner.decode(np.array([3, 4], np.uint8))
    given[:] = 0
    assert ids_held(runner) == [[*sequences[1].tolist(), 3], [1, 2, 4]]
    assert {row.dtype for row in runner.cached_tokens} == {np.dtype(np.int64)}
    runner.reset()
    assert runner.cached_tokens == ()
    runner.truncate([])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3], "1 lengths, but the cache holds 2 rows"),
        ([], "0 lengths, but the cache holds 2 rows"),
        ([3, 2, 1], "3 lengths"),
        ([3, -1], r"row 1: cannot keep -1 tokens, the cache holds 2; give 0 to 2"),
        ([6, 2], r"row 0: cannot keep 6 tokens, the cache holds 5"),
        ([2**70, 2], "cannot keep 1180591620717411303424 tokens"),
        ([1.0, 2], "row 0: expected an integer length, found float"),
        ([1, True], "row 1: expected an integer length, found bool"),
        (3, "one length per row, found int"),
        (None, "found NoneType"),
    ],
)
def test_lengths_that_cannot_be_kept_are_refused_and_nothing_changes(
    runner: ConcatRunner, lengths: Any, message: str
) -> None:
    with pytest.raises(InputError, match="the cache holds 0 rows"):
        runner.truncate([0])
    runner.prefill([[1, 2, 3, 4, 5], [6, 7]])
    with pytest.raises(InputError, match=message):
        runner.truncate(lengths)
    assert ids_held(runner) == [[1, 2, 3, 4, 5], [6, 7]]


# What it takes and refuses


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.astype(">i8"),
        lambda a: a.astype(">u2"),
        lambda a: a.astype(np.int32),
        lambda a: a.astype(np.uint8),
        lambda a: a.astype(np.uint64),
        lambda a: np.repeat(a, 2)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.tolist(),
        lambda a: tuple(a),
    ],
    ids=["big-endian", "big-endian u2", "int32", "uint8", "uint64", "strided", "reversed", "list", "numpy scalars"],
)
def test_any_integers_give_the_same_logits(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray], convert: Any
) -> None:
    close(runner.prefill([convert(sequences[0])])[0], reference[0][-1:])


def test_rows_of_one_array_are_sequences(runner: ConcatRunner, reference: list[np.ndarray]) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, packages.LENGTHS[0])
    both = runner.prefill(np.stack([ids, ids]))
    assert len(both) == 2
    close(both[1], reference[0][-1:])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([[3], []], "row 1: expected at least one token id"),
        ([np.zeros(0, np.int64)], "row 0: expected at least one token id"),
        ([[3, -1]], r"row 0, position 1: token id -1, the vocabulary has 0 to 130"),
        ([[3], [4, 131]], r"row 1, position 1: token id 131"),
        ([[2**40]], "token id 1099511627776"),
        ([[2**70]], "token id 1180591620717411303424"),
        ([np.array([2**63], np.uint64)], "token id 9223372036854775808"),
        ([[1.0]], "expected an integer token id, found float"),
        ([[True]], "found bool"),
        ([[3, np.bool_(True)]], "position 1: expected an integer token id, found bool"),
        ([np.array([1.0])], "found 1-d float64"),
        ([np.array([True])], "found 1-d bool"),
        ([np.array([[1]])], "found 2-d int64"),
        ([["a"]], "found str"),
        (["ab"], "found str"),
        ([b"ab"], "found bytes"),
        ([3, 4], "row 0: expected a sequence of token ids, found int"),
        (3, "expected a sequence of rows"),
        ([None], "found NoneType"),
    ],
)
def test_ids_that_are_none_are_refused_and_nothing_changes(runner: ConcatRunner, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.prefill(rows)
    assert runner.cache_lengths == ()


def test_an_output_that_is_neither_logits_nor_cache_changes_nothing(
    copy: Path, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    """A graph with one output more, hidden states: they are no part of the cache, and are not fed back as such."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(copy / "onnx/model.onnx", load_external_data=False)
    (embed,) = (node for node in graph.graph.node if "model.embed_tokens.weight" in node.input)
    graph.graph.node.append(onnx.helper.make_node("Identity", [embed.output[0]], ["hidden"]))
    shape = ["batch_size", "sequence_length", 96]
    graph.graph.output.append(onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, shape))
    onnx.save(graph, copy / "onnx/model.onnx")

    def change(manifest: dict[str, Any]) -> None:
        spec = {"name": "hidden", "dtype": "float32", "shape": shape, "role": "hidden_state"}
        manifest["variants"]["fp32"]["outputs"].append(spec)
        manifest["files"]["onnx/model.onnx"] = vars(hash_file(copy / "onnx/model.onnx"))

    edit_manifest(copy, change)
    with open_runner(copy) as runner:
        runner.prefill([ids[:-1] for ids in sequences])
        logits = runner.decode([int(ids[-1]) for ids in sequences])
    close(logits, np.stack([expected[-1] for expected in reference]))


def test_another_number_of_rows_is_refused(
    runner: ConcatRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    with pytest.raises(InputError, match="prefill first"):
        runner.decode([1])
    runner.prefill([ids[:-1] for ids in sequences])
    for call in (lambda: runner.prefill([[1], [2]]), lambda: runner.decode([1, 2])):
        with pytest.raises(InputError, match="2 rows, but the cache holds 3"):
            call()
    with pytest.raises(InputError, match="one token id per row, found int"):
        runner.decode(1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row 2, position 0: token id 131"):
        runner.decode([1, 2, 131])
    logits = runner.decode([int(ids[-1]) for ids in sequences])
    close(logits, np.stack([expected[-1] for expected in reference]))


def test_nan_weight_gives_an_error_that_names_row_and_position_and_nothing_changes(
    copy: Path, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    onnx = pytest.importorskip("onnx")
    poison = next(t for t in range(VOCAB) if not any(t in ids for ids in sequences))
    graph = onnx.load(copy / "onnx/model.onnx", load_external_data=False)
    (table,) = (t for t in graph.graph.initializer if t.name == "model.embed_tokens.weight")
    at = {e.key: e.value for e in table.external_data}
    with (copy / "onnx" / at["location"]).open("r+b") as file:
        file.seek(int(at.get("offset", 0)) + poison * 96 * 4)
        file.write(np.full(96, np.nan, np.float32).tobytes())
    with open_runner(copy, check_hashes=False) as runner:
        runner.prefill([sequences[0][:6], sequences[1][:3]])
        with pytest.raises(NumericError, match="row 1, position 3: 131 of 131 logits are NaN"):
            runner.prefill([[1, 2, 3], [poison, 4]], all_positions=True)
        with pytest.raises(NumericError, match="row 0, position 8: 131 of 131 logits are NaN"):
            runner.prefill([[1, poison, 3], [4]])
        assert runner.cache_lengths == (6, 3)
        found = runner.prefill([sequences[0][6:], sequences[1][3:]])
        close(np.concatenate(found), np.stack([reference[0][-1], reference[1][-1]]))


# How it is opened


def test_runner_says_what_it_is(runner: ConcatRunner, tiny_package: Path) -> None:
    manifest = open_package(tiny_package).manifest
    assert runner.variant == manifest.variants["fp32"]
    assert runner.model == manifest.model
    assert runner._session.get_providers() == ["CPUExecutionProvider"]


def test_threads_reach_onnxruntime(tiny_package: Path) -> None:
    with open_runner(tiny_package, threads=3) as runner:
        assert runner._session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize("threads", [0, -2, 1.0, True, 100_000, 10**12])
def test_threads_that_are_no_count_are_refused(tiny_package: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match="threads"):
        open_runner(tiny_package, threads=threads)


def test_closed_runner_is_refused(tiny_package: Path) -> None:
    with open_runner(tiny_package) as runner:
        runner.prefill([[1]])
    runner.close()
    assert runner.cache_lengths == ()
    with pytest.raises(UsageError, match="closed"):
        runner.prefill([[1]])


def test_unknown_variant_and_backend_name_what_there_is(tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(VariantNotFoundError, match=r"no variant 'q9'; it has fp32"):
        open_runner(tiny_package, variant="q9")
    with pytest.raises(BackendError, match=r"backend 'cuda': there is ort, trt_rtx, trt"):
        open_runner(tiny_package, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"device 'gpu': there is cpu, cuda, nv-rtx"):
        open_runner(tiny_package, device="gpu")  # type: ignore[arg-type]
    with pytest.raises(PackageNotFoundError):
        open_runner(tmp_path)


def test_missing_onnxruntime_names_the_extra(tiny_package: Path) -> None:
    code = f"""
import sys
sys.modules["onnxruntime"] = None
from runtimes import BackendError, open_runner
try:
    open_runner({str(tiny_package)!r})
except BackendError as error:
    print(error)
"""
    root = Path(runtimes.__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "pip install 'olmo2-export[cpu]'" in result.stdout


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx_data"])
@pytest.mark.parametrize("fault", ["flip", "cut", "remove"])
def test_changed_file_is_refused_by_name(copy: Path, name: str, fault: str) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=f"{name}: "):
        open_runner(copy)
    if fault != "flip":
        with pytest.raises(IntegrityError, match=f"{name}: "):
            open_runner(copy, check_hashes=False)


def test_file_that_the_manifest_does_not_vouch_for_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda m: m["files"].pop("onnx/model.onnx_data"))
    for check_hashes in (True, False):
        with pytest.raises(IntegrityError, match=r"onnx/model\.onnx_data: not in the manifest"):
            open_runner(copy, check_hashes=check_hashes)


def test_graph_that_is_no_graph_is_one_line(copy: Path) -> None:
    path = copy / "onnx/model.onnx"
    path.write_bytes(b"<html>" + bytes(path.stat().st_size - 6))
    with pytest.raises(PackageError, match=r"model\.onnx: onnxruntime cannot load it") as caught:
        open_runner(copy, check_hashes=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_graph_whose_names_are_not_the_manifests_is_refused(copy: Path, kind: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"]["fp32"][kind][1]["name"] = "something_else"

    edit_manifest(copy, change)
    with pytest.raises(
        PackageError, match=rf"its {kind} are not the manifest's \(missing: something_else; unexpected: "
    ):
        open_runner(copy)


@pytest.mark.parametrize(
    ("field", "value", "kind"), [("form", "paged", PackageError), ("dtype", "bfloat16", BackendError)]
)
def test_kv_cache_of_another_kind_is_refused(copy: Path, field: str, value: str, kind: type[Exception]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"]["fp32"]["kv_cache"][field] = value

    edit_manifest(copy, change)
    with pytest.raises(kind, match=value):
        open_runner(copy)


def test_wrong_kv_head_count_in_the_manifest_is_an_error_and_not_a_crash(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"]["fp32"]["kv_cache"]["num_key_value_heads"] = 3

    edit_manifest(copy, change)
    with open_runner(copy) as runner, pytest.raises(FailedError, match=r"onnxruntime failed in onnx/model\.onnx"):
        runner.prefill([[1]])
