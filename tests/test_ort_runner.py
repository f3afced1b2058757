"""The runners on onnxruntime against PyTorch: every way of feeding, both forms of KV cache, and what they refuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import Olmo2ForCausalLM

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
from runtimes.manifest import MANIFEST_NAME, hash_files, load_manifest, read_sealed, seal
from runtimes.ort_runner import OrtRunner

VOCAB, CONTEXT = 131, 256
LENGTHS = (17, 5, 29)
# float32 on both sides, products summed in another order: 5e-6 measured on logits of size 1 to 4.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Olmo2ForCausalLM:
    return Olmo2ForCausalLM.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, VOCAB, n) for n in LENGTHS]


@pytest.fixture(scope="module")
def reference(model: Olmo2ForCausalLM, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """PyTorch's logits of each sequence, all positions."""
    return [logits_of(model, ids) for ids in sequences]


@pytest.fixture(scope="module")
def shared_runner(tiny_package: Path) -> Iterator[OrtRunner]:
    with open_runner(tiny_package, threads=1) as runner:
        yield runner


@pytest.fixture
def runner(shared_runner: OrtRunner) -> OrtRunner:
    shared_runner.reset()
    return shared_runner


def logits_of(model: Olmo2ForCausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


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
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    for ids, expected in zip(sequences, reference, strict=True):
        runner.reset()
        (logits,) = runner.prefill([ids], all_positions=True)
        close(logits, expected)
        assert runner.cache_lengths == (len(ids),)


def test_prefill_gives_the_last_row_and_computes_no_other(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    call = OrtRunner._call

    def spy(self: OrtRunner, *args: Any) -> Any:
        logits, values = call(self, *args)
        shapes.append(logits.shape)
        return logits, values

    monkeypatch.setattr(OrtRunner, "_call", spy)
    (logits,) = runner.prefill([sequences[0]])
    close(logits, reference[0][-1:])
    assert shapes == [(1, 1, VOCAB)]


def test_prefill_and_decode_equal_the_full_forward(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    ids, expected = sequences[2], reference[2]
    close(runner.prefill([ids[:4]])[0], expected[3:4])
    for position in range(4, len(ids)):
        close(runner.decode([ids[position]]), expected[position : position + 1])


def test_chunked_prefill_equals_the_whole(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    found = [runner.prefill([chunk], all_positions=True)[0] for chunk in np.split(sequences[2], [1, 12, 14])]
    close(np.concatenate(found), reference[2])


def test_ragged_batch_equals_the_single_runs(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
) -> None:
    for logits, expected in zip(runner.prefill(sequences, all_positions=True), reference, strict=True):
        close(logits, expected)
    assert runner.cache_lengths == LENGTHS


def test_ragged_chunks_leave_holes_that_nothing_sees(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
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


def test_reset_forgets(runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]) -> None:
    runner.prefill(sequences)
    runner.reset()
    assert runner.cache_lengths == ()
    close(runner.prefill([sequences[1]])[0], reference[1][-1:])


def test_exactly_the_context_works_and_one_more_is_refused(runner: OrtRunner, model: Olmo2ForCausalLM) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, CONTEXT)
    expected = logits_of(model, ids)
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


def ids_held(runner: OrtRunner) -> list[list[int]]:
    return [row.tolist() for row in runner.cached_tokens]


@pytest.mark.parametrize("kept", [(17, 5, 29), (9, 5, 2), (0, 3, 29), (16, 0, 11), (4, 1, 7), (0, 0, 0)])
def test_truncated_rows_continue_like_fresh_ones(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray], kept: tuple[int, ...]
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


def test_truncating_one_row_copies_only_what_is_kept(runner: OrtRunner, sequences: list[np.ndarray]) -> None:
    runner.prefill([sequences[2]])
    runner.truncate([7])
    assert {value.shape()[2] for value in runner._cache.values.values()} == {7}
    before = runner._cache
    runner.truncate([7])
    assert runner._cache is before


def test_cached_tokens_are_those_that_were_fed(runner: OrtRunner, sequences: list[np.ndarray]) -> None:
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
    runner: OrtRunner, lengths: Any, message: str
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
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray], convert: Any
) -> None:
    close(runner.prefill([convert(sequences[0])])[0], reference[0][-1:])


def test_rows_of_one_array_are_sequences(runner: OrtRunner, reference: list[np.ndarray]) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, LENGTHS[0])
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
def test_ids_that_are_none_are_refused_and_nothing_changes(runner: OrtRunner, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.prefill(rows)
    assert runner.cache_lengths == ()


def test_another_number_of_rows_is_refused(
    runner: OrtRunner, sequences: list[np.ndarray], reference: list[np.ndarray]
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


def test_runner_says_what_it_is(runner: OrtRunner, tiny_package: Path) -> None:
    manifest = load_manifest(tiny_package)
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
    with pytest.raises(BackendError, match=r"backend 'cuda': there is ort"):
        open_runner(tiny_package, backend="cuda")  # type: ignore[arg-type]
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


# The static form, on a one-layer model that is small enough to write down twice

STATIC_VOCAB, CAPACITY, HEADS, HEAD_DIM = 13, 11, 2, 3
WIDTH = HEADS * HEAD_DIM


def static_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    shapes = {"embed": (STATIC_VOCAB, WIDTH), "place": (CAPACITY, WIDTH), "head": (WIDTH, STATIC_VOCAB)}
    return {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def static_reference(ids: np.ndarray) -> np.ndarray:
    """The same model in numpy, without any cache: float32 [len(ids), STATIC_VOCAB]."""
    w = static_weights()
    x = (w["embed"][ids] + w["place"][: len(ids)]).astype(np.float64)
    heads = x.reshape(len(ids), HEADS, HEAD_DIM).transpose(1, 0, 2)
    scores = heads @ heads.transpose(0, 2, 1)
    scores[:, np.triu(np.ones((len(ids), len(ids)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ (heads * 2)
    return (mixed.transpose(1, 0, 2).reshape(len(ids), WIDTH) @ w["head"]).astype(np.float32)


def static_graph() -> onnx.ModelProto:
    """past.key holds x by head, past.value twice that; slot = position."""
    cache = ["batch_size", HEADS, CAPACITY, HEAD_DIM]
    constants = {
        **static_weights(),
        "zero": np.array(0),
        "one": np.array(1),
        "two": np.array(2.0, np.float32),
        "axis1": np.array([1]),
        "split": np.array([0, 0, HEADS, HEAD_DIM]),
        "join": np.array([0, 0, WIDTH]),
        "slots": np.arange(CAPACITY),
        "hidden": np.array(-np.inf, np.float32),
    }
    steps = [
        ("Shape", ["input_ids"], "shape", {"start": 1, "end": 2}),
        ("Squeeze", ["shape"], "length", {}),
        ("Range", ["zero", "length", "one"], "range", {}),
        ("Unsqueeze", ["write_indices", "axis1"], "start", {}),
        ("Add", ["start", "range"], "wide_positions", {}),
        ("Gather", ["embed", "input_ids"], "embedded", {}),
        ("Gather", ["place", "wide_positions"], "placed", {}),  # out of range beyond the capacity: onnxruntime refuses
        ("Add", ["embedded", "placed"], "x", {}),
        ("Reshape", ["x", "split"], "by_head", {}),
        ("Transpose", ["by_head"], "q", {"perm": [0, 2, 1, 3]}),
        ("Mul", ["q", "two"], "v", {}),
        ("TensorScatter", ["past_key_values.0.key", "q", "write_indices"], "present.0.key", {"axis": -2}),
        ("TensorScatter", ["past_key_values.0.value", "v", "write_indices"], "present.0.value", {"axis": -2}),
        ("Transpose", ["present.0.key"], "k_t", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["q", "k_t"], "scores", {}),
        ("Unsqueeze", ["wide_positions", "axis1"], "positions_1", {}),
        ("Transpose", ["positions_1"], "positions_t", {"perm": [0, 2, 1]}),
        ("LessOrEqual", ["slots", "positions_t"], "seen_3", {}),  # (B, S, C)
        ("Unsqueeze", ["seen_3", "axis1"], "seen", {}),
        ("Where", ["seen", "scores", "hidden"], "masked", {}),
        ("Softmax", ["masked"], "weights", {"axis": -1}),
        ("MatMul", ["weights", "present.0.value"], "mixed", {}),
        ("Transpose", ["mixed"], "mixed_t", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["mixed_t", "join"], "joined", {}),
        ("GatherND", ["joined", "logit_index"], "row", {"batch_dims": 1}),
        ("MatMul", ["row", "head"], "logits", {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in steps],
        "static",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("write_indices", TensorProto.INT64, ["batch_size"]),
            helper.make_tensor_value_info("logit_index", TensorProto.INT64, ["batch_size", 1]),
            *(
                helper.make_tensor_value_info(f"past_key_values.0.{k}", TensorProto.FLOAT, cache)
                for k in ("key", "value")
            ),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", STATIC_VOCAB]),
            *(helper.make_tensor_value_info(f"present.0.{k}", TensorProto.FLOAT, cache) for k in ("key", "value")),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.fixture(scope="module")
def static_runner_shared(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtRunner]:
    package = tmp_path_factory.mktemp("static")
    model = static_graph()
    (package / "trt").mkdir()
    onnx.save(model, package / "trt/static.onnx")

    def specs(values: Any) -> list[dict[str, Any]]:
        return [{"name": v.name, "dtype": "float32", "shape": []} for v in values]

    manifest = read_sealed(tiny_package / MANIFEST_NAME)
    manifest["model"] |= {"vocab_size": STATIC_VOCAB, "max_position_embeddings": CAPACITY}
    variant = manifest["variants"].pop("fp32")
    variant |= {"name": "trt_fp32", "graph": "trt/static.onnx", "data": [], "opset": 24}
    variant |= {"inputs": specs(model.graph.input), "outputs": specs(model.graph.output)}
    sizes = {"num_layers": 1, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "max_cache_length": CAPACITY}
    variant["kv_cache"] |= {"form": "static", **sizes}
    manifest["variants"]["trt_fp32"] = variant
    manifest["files"] = {name: vars(e) for name, e in hash_files(package, ["trt/static.onnx"]).items()}
    (package / MANIFEST_NAME).write_bytes(seal(manifest))
    with open_runner(package, threads=1) as runner:
        yield runner


@pytest.fixture
def static_runner(static_runner_shared: OrtRunner) -> OrtRunner:
    static_runner_shared.reset()
    return static_runner_shared


@pytest.mark.parametrize("all_positions", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_static_ragged_chunks_and_decode_equal_the_definition(
    static_runner: OrtRunner, seed: int, all_positions: bool
) -> None:
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, STATIC_VOCAB, n) for n in (11, 6, 8)]
    reference = [static_reference(ids) for ids in sequences]
    cuts = [np.sort(random.choice(np.arange(1, len(ids) - 1), 2, replace=False)) for ids in sequences]
    for chunk in range(3):
        bounds = [[0, *c, len(ids) - 1][chunk : chunk + 2] for ids, c in zip(sequences, cuts, strict=True)]
        parts = [ids[a:b] for ids, (a, b) in zip(sequences, bounds, strict=True)]
        found = static_runner.prefill(parts, all_positions=all_positions)
        for logits, expected, (a, b) in zip(found, reference, bounds, strict=True):
            close(logits, expected[a if all_positions else b - 1 : b])
        assert static_runner.cache_lengths == tuple(b for _, b in bounds)
    logits = static_runner.decode([int(ids[-1]) for ids in sequences])
    close(logits, np.stack([expected[-1] for expected in reference]))
    assert static_runner.cache_lengths == (11, 6, 8)


@pytest.mark.parametrize("all_positions", [True, False])
def test_static_padding_that_would_pass_the_capacity_does_not(static_runner: OrtRunner, all_positions: bool) -> None:
    random = np.random.default_rng(9)
    first, second, third = (random.integers(0, STATIC_VOCAB, n) for n in (11, 9, 10))
    static_runner.prefill([first[:10], second[:1], third[:7]])
    # widths 1, 8 and 3: padded to 8, the first row would end at slot 18 of 11
    found = static_runner.prefill([first[10:], second[1:9], third[7:10]], all_positions=all_positions)
    ends = [(first, 1), (second, 8), (third, 3)]
    for logits, (ids, new) in zip(found, ends, strict=True):
        close(logits, static_reference(ids)[-new if all_positions else -1 :])
    assert static_runner.cache_lengths == (11, 9, 10)


def test_static_capacity_is_the_limit(static_runner: OrtRunner) -> None:
    ids = np.random.default_rng(2).integers(0, STATIC_VOCAB, CAPACITY)
    close(static_runner.prefill([ids])[0], static_reference(ids)[-1:])
    with pytest.raises(ContextLengthError, match=r"11 tokens in the cache and 1 new ones make 12, at most 11"):
        static_runner.decode([1])


@pytest.mark.parametrize("kept", [(9, 5, 7), (2, 5, 0), (0, 0, 0), (8, 1, 3)])
def test_static_truncated_rows_continue_like_fresh_ones(static_runner: OrtRunner, kept: tuple[int, ...]) -> None:
    random = np.random.default_rng(5)
    sequences = [random.integers(0, STATIC_VOCAB, n) for n in (10, 6, 8)]
    wrong = [np.concatenate([ids[:n], (ids[n:] + 1) % STATIC_VOCAB]) for ids, n in zip(sequences, kept, strict=True)]
    static_runner.prefill(wrong)
    static_runner.truncate(kept)
    assert static_runner.cache_lengths == kept
    found = static_runner.prefill([ids[n:] for ids, n in zip(sequences, kept, strict=True)], all_positions=True)
    for logits, ids, n in zip(found, sequences, kept, strict=True):
        close(logits, static_reference(ids)[n:])
    assert [row.tolist() for row in static_runner.cached_tokens] == [ids.tolist() for ids in sequences]
    with pytest.raises(InputError, match="row 1: cannot keep 7 tokens"):
        static_runner.truncate([1, 7, 1])
