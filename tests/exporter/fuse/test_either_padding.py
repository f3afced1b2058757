"""The graph that other runtimes load: rows padded on either side, also with windows, and in one buffer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.packages import sequences

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.either_padding import either_padding
from olmo2_export.graphs.files import attach_weights
from olmo2_export.graphs.shared import padded_graph, shared_graph
from olmo2_export.graphs.trace import trace
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import FusionError

pytestmark = pytest.mark.usefixtures("traces")


def config_of(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_json(tiny_checkpoint / "config.json")


@pytest.fixture(scope="module")
def padded(tiny_checkpoint: Path) -> ir.Model:
    """Of the tiny model, its weights not quantised."""
    config = config_of(tiny_checkpoint)
    graph = padded_graph(shared_graph(trace(config), operations(config)), operations(config))
    attach_weights(graph, open_checkpoint(str(tiny_checkpoint)), config)
    return graph


def opened(graph: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)


def call(
    session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    empty = {
        v.name: np.zeros((len(ids), v.shape[1], 0, v.shape[3]), np.float32)
        for v in session.get_inputs()
        if v.name.startswith("past")
    }
    found = session.run(None, {"input_ids": ids, "attention_mask": mask, **(past or empty)})
    return found[0], dict(zip(empty, found[1:], strict=True))


def rows_of(side: str, count: int) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """The first tokens of three rows, with padding; and where they stand."""
    rows = [ids[: len(ids) - count] for ids in sequences()]
    width = max(map(len, rows))
    ids, mask, where = np.full((3, width), 7), np.zeros((3, width), np.int64), []
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        where.append(slice(start, start + len(row)))
        ids[number, where[-1]], mask[number, where[-1]] = row, 1
    return ids, mask, where


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(padded: ir.Model, tiny_logits: list[np.ndarray], side: str) -> None:
    """The runner's graph was off by more than 1 for rows that are padded on the left."""
    session = opened(padded)
    ids, mask, where = rows_of(side, 3)
    logits, past = call(session, ids, mask, {})
    for row, at in enumerate(where):
        np.testing.assert_allclose(logits[row, at], tiny_logits[row][: at.stop - at.start], atol=2e-5)
    for step in (3, 2, 1):  # what follows stands behind the padding
        new = np.array([[row[-step]] for row in sequences()])
        mask = np.concatenate([mask, np.ones_like(new)], axis=1)
        logits, past = call(session, new, mask, past)
        for row, wanted in enumerate(tiny_logits):
            np.testing.assert_allclose(logits[row, 0], wanted[-step], atol=2e-5)


def test_several_tokens_behind_a_past(padded: ir.Model, tiny_logits: list[np.ndarray]) -> None:
    """Of one row, padded on the left: the operator takes no more with a past."""
    session, row = opened(padded), sequences()[0][None]
    mask = np.ones((1, row.shape[1] + 4), np.int64)
    mask[0, :4] = 0
    first, past = call(session, np.concatenate([np.full((1, 4), 7), row[:, :6]], axis=1), mask[:, :10], {})
    rest, _ = call(session, row[:, 6:], mask, past)
    np.testing.assert_allclose(np.concatenate([first[0, 4:], rest[0]]), tiny_logits[0], atol=2e-5)


def test_past_and_present_may_be_one_buffer(padded: ir.Model, tiny_logits: list[np.ndarray]) -> None:
    """As onnxruntime-genai binds them, with past_present_share_buffer."""
    session = opened(padded)
    ids, mask, where = rows_of("right", 1)
    pasts = [v for v in session.get_inputs() if v.name.startswith("past")]
    buffers = {
        v.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((3, v.shape[1], 64, v.shape[3]), np.float32)) for v in pasts
    }
    last = np.array([[row[-1]] for row in sequences()])
    for tokens, seen in ((ids, mask), (last, np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1))):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", seen)
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[0].numpy()
    for row, wanted in enumerate(tiny_logits):
        np.testing.assert_allclose(logits[row, 0], wanted[-1], atol=2e-5)
    assert where[1].stop == 4


def test_it_is_applied_once_and_reads_no_position_ids(padded: ir.Model) -> None:
    again = padded.clone()
    assert either_padding(again) == 0
    names = [value.name for value in padded.graph.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    counts = Counter(node.op_type for node in padded.graph)
    assert (counts["CumSum"], counts["ArgMax"], counts["Expand"], counts["ReduceSum"]) == (1, 1, 2, 0)


def test_a_graph_without_a_shared_cache_is_left_alone(tiny_checkpoint: Path) -> None:
    config = config_of(tiny_checkpoint)
    portable = trace(config)
    before = len(portable.graph)
    assert either_padding(portable) == 0
    assert len(portable.graph) == before
    with pytest.raises(FusionError, match="either_padding: expected 3, applied 0 times"):
        padded_graph(portable, operations(config))
