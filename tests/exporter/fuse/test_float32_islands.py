"""An embedding that stays float32 where a graph takes vectors in its place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from olmo2_export.architecture import EMBED, operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.float32_islands import float32_islands
from olmo2_export.fuse.set_precision import set_precision

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "olmo2",
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
    }
)


def value(name: str, dtype: DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def looked_up(*, default: bool) -> tuple[ir.Model, ir.Node]:
    """A graph that looks tokens up, or takes a vector; and the node that chooses."""
    ids, given = value("input_ids", DataType.INT64, ["b", "s"]), value("is_vector", DataType.BOOL, ["b", "s", 1])
    vectors = value("inputs_embeds", DataType.FLOAT, ["b", "s", 96])
    weight = ir.Value(name=f"{EMBED}.weight", const_value=ir.tensor(np.zeros((131, 96), np.float32)))
    weight.type = ir.TensorType(DataType.FLOAT)
    gather = ir.node("Gather", [weight, ids])
    choice = ir.node("Where", [given, vectors, gather.outputs[0]])
    last = ir.node("Identity", [choice.outputs[0]])
    for node in (gather, choice, last):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(DataType.FLOAT), vectors.shape
        node.outputs[0].name = f"{node.op_type}_result"
    initializers = [weight]
    if default:
        vectors.const_value = ir.tensor(np.zeros((1, 1, 96), np.float32), name="inputs_embeds")
        initializers.append(vectors)
    inputs, nodes = [ids, given, vectors], [gather, choice, last]
    graph = ir.Graph(inputs, last.outputs, nodes=nodes, initializers=initializers, name="made")
    return ir.Model(graph, ir_version=10), choice


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_vectors_meet_an_embedding_in_float32(wide: bool, default: bool) -> None:
    """The lookup was float32, the vectors float16, and no node reads both."""
    model, choice = looked_up(default=default)
    kept = [EMBED] if wide else []
    assert float32_islands(model, operations(CONFIG)[:1], [EMBED], kept) == 1
    set_precision(model, DataType.FLOAT16)
    assert [v.name for v in choice.inputs if v is not None] == ["is_vector", "inputs_embeds", "Gather_result"]
    assert [v.dtype for v in choice.inputs[1:] if v is not None] == [DataType.FLOAT] * 2
    assert choice.outputs[0].dtype == DataType.FLOAT
    assert model.graph.outputs[0].dtype == (DataType.FLOAT if wide else DataType.FLOAT16)


@pytest.mark.parametrize("default", [True, False])
def test_without_islands_vectors_are_rounded(default: bool) -> None:
    model, choice = looked_up(default=default)
    set_precision(model, DataType.FLOAT16)
    assert [v.name for v in choice.inputs if v is not None][1:] == ["inputs_embeds_rounded", "Gather_result"]
    assert {v.dtype for v in (*choice.inputs[1:], *choice.outputs) if v is not None} == {DataType.FLOAT16}
