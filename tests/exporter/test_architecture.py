"""The rows of a model say what its equations say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from olmo2_export.architecture import (
    EMBED,
    FINAL_NORM,
    LOGITS,
    around_attention,
    between,
    count,
    norm_counts,
    of_layer,
    operations,
    shared_inputs,
    stages,
    tensor_shapes,
    within_layer,
)
from olmo2_export.config import ModelConfig
from olmo2_export.fuse.float32_islands import find_operations
from olmo2_export.model.olmo import OlmoForCausalLM

L1 = "model.layers.1."
MOVES = ("Reshape", "Transpose", "Slice", "Cast", "RotaryEmbedding")


@pytest.fixture
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_json(tiny_checkpoint / "config.json")


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_a_layer_has_four_norms_two_rotations_an_attention_and_seven_linears(config: ModelConfig, layers: int) -> None:
    types = config.layer_types[:1] * layers
    rows = operations(dataclasses.replace(config, num_hidden_layers=layers, layer_types=types))
    assert norm_counts(rows) == {"RMSNormalization": 4 * layers + 1}
    assert (count(rows, "rotary"), count(rows, "attention")) == (2 * layers, layers)
    assert (count(rows, "linear"), len(shared_inputs(rows))) == (7 * layers + 1, 4 * layers + 1)
    assert len(rows) == 18 * layers + 3
    assert [len(of_layer(rows, layer)) for layer in range(layers)] == [18] * layers


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "head_dim": 24}], ids=str)
def test_the_tensors_are_those_of_the_equations(config: ModelConfig, fields: dict[str, Any]) -> None:
    changed = dataclasses.replace(config, **fields)
    with torch.device("meta"):
        model = OlmoForCausalLM(changed)
    assert tensor_shapes(operations(changed)) == {name: tuple(w.shape) for name, w in model.state_dict().items()}


def test_every_row_reads_what_an_earlier_one_writes(config: ModelConfig) -> None:
    rows = operations(config)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for place, row in enumerate(rows):
        assert set(row.reads) <= set(names[:place]), row.name
    read = {value for row in rows for value in row.reads}
    assert [name for name in names if name not in read] == [LOGITS]
    assert [row.name for row in rows if row.layer is None] == [EMBED, FINAL_NORM, LOGITS]


def test_stages_of_a_layer(config: ModelConfig) -> None:
    layer = of_layer(operations(config), 1)
    x, h = "model.layers.0.mlp_residual", f"{L1}attention_residual"
    assert [([within_layer(row) for row in s.linears], s.reads, s.start) for s in stages(layer)] == [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], x, x),
        (["self_attn.o_proj"], f"{L1}self_attn.attention", x),
        (["mlp.gate_proj", "mlp.up_proj"], h, h),
        (["mlp.down_proj"], f"{L1}mlp.product", h),
    ]


def test_what_lies_between_two_values(config: ModelConfig) -> None:
    layer = of_layer(operations(config), 1)
    h = f"{L1}attention_residual"
    names = [within_layer(row) for row in between(layer, h, [f"{L1}mlp.product"])]
    assert names == ["mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "mlp.product"]
    assert between(layer, h, [h]) == []
    keys = [within_layer(row) for row in between(layer, layer[0].reads[0], [f"{L1}self_attn.k_rotary"])]
    assert keys == ["self_attn.k_proj", "self_attn.k_norm", "self_attn.k_rotary"]


def test_what_a_fused_attention_holds(config: ModelConfig) -> None:
    held = around_attention(of_layer(operations(config), 1))
    names = ("v_proj", "q_norm", "k_norm", "q_rotary", "k_rotary", "attention")
    assert held == {f"{L1}self_attn.{name}" for name in names}


def test_the_traced_equations_do_what_the_rows_say(config: ModelConfig, tiny_package: Path) -> None:
    """Each operation is a node of the fp32 graph, and reads what its row says that it reads."""
    rows = operations(config)
    graph = ir.load(tiny_package / "onnx" / "model.onnx").graph
    found = find_operations(graph, rows)
    assert {row.name for row in rows} - found.keys() == {
        row.name for row in rows if row.kind in ("rotary", "attention")
    }
    written = {nodes[-1].outputs[0]: name for name, nodes in found.items()}
    presents = {value.name: value for value in graph.outputs}
    for row in rows:
        if row.kind == "attention":
            attention = presents[f"present.{row.layer}.key"].producer()
            assert attention is not None
            written[attention.outputs[0]] = row.name
            for value, name in zip(attention.inputs, row.reads, strict=False):
                rotary = next((other for other in rows if other.name == name and other.kind == "rotary"), None)
                source, passed = origin(value)
                assert written[source] == (name if rotary is None else rotary.reads[0])
                assert ("RotaryEmbedding" in passed) == (rotary is not None)
        elif row.weight is not None and row.kind != "gather":
            source, _ = origin(found[row.name][0].inputs[0])
            assert (written[source],) == row.reads
    order = [node for node in graph if any(node in nodes for nodes in found.values())]
    assert sum(len(nodes) for nodes in found.values()) == len(order)


def origin(value: ir.Value | None) -> tuple[ir.Value, list[str]]:
    """Walk back through what moves or rotates numbers; return where it ends and what was passed."""
    passed: list[str] = []
    assert value is not None
    while (node := value.producer()) is not None and node.op_type in MOVES and node.inputs[0] is not None:
        passed.append(node.op_type)
        value = node.inputs[0]
    return value, passed
