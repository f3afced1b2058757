"""One row more in each layer, a norm without a weight before q, k and v: everything else follows from the rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from olmo2_export import architecture
from olmo2_export.architecture import (
    Operation,
    of_layer,
    operations,
    shared_inputs,
    stages,
    tensor_shapes,
)
from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.engine.build import expected_layers
from olmo2_export.fp16.safety import measure_safety
from olmo2_export.fp16.simulate import simulate
from olmo2_export.fp16.values import Float32Islands
from olmo2_export.fuse import DEVICE
from olmo2_export.fuse.edit import new_node
from olmo2_export.fuse.float32_islands import find_operations
from olmo2_export.fuse.gather_logit_row import gather_logit_row
from olmo2_export.graphs import device, shared, static, trace
from olmo2_export.graphs.device import device_graph
from olmo2_export.graphs.shared import shared_graph
from olmo2_export.graphs.static import static_graph
from olmo2_export.graphs.taps import find_segments
from olmo2_export.locate.layer_checks import LAYER_NORM, LayerChecks
from olmo2_export.locate.segments import Calls, run_segments
from olmo2_export.quantize.input_scales import input_scales
from olmo2_export.quantize.recipes import quantize
from olmo2_export.quantize.sweep import Head, embed, staged_layers
from olmo2_export.truth.torch_layers import TorchModel
from olmo2_export.views.openers import onnxruntime_opener
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.stored_names import weight_shapes
from runtimes.errors import FusionError
from runtimes.package import open_package

LAYERS = 3
NAME = "input_layernorm"
L1 = "model.layers.1."


@pytest.fixture
def config(tiny_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_json(tiny_checkpoint / "config.json")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture
def plain(config: ModelConfig) -> tuple[Operation, ...]:
    return operations(config)


@pytest.fixture
def rows(plain: tuple[Operation, ...], config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Operation, ...]:
    """The rows with the norm, which are now what every part of the exporter sees."""
    assert all(row.kind != "layer_norm" for row in plain)
    layer_operations = architecture.layer_operations

    def with_norm(config: ModelConfig, layer: int, x: str) -> tuple[Operation, ...]:
        norm = Operation(f"model.layers.{layer}.{NAME}", "layer_norm", (x,), layer)
        read_it = {f"model.layers.{layer}.self_attn.{n}_proj": (norm.name,) for n in "qkv"}
        rest = layer_operations(config, layer, x)
        return norm, *(dataclasses.replace(row, reads=read_it.get(row.name, row.reads)) for row in rest)

    monkeypatch.setattr(architecture, "layer_operations", with_norm)
    return operations(config)


@pytest.fixture
def portable(tiny_package: Path, plain: tuple[Operation, ...], config: ModelConfig) -> ir.Model:
    """The fp32 graph with that norm in it."""
    model = ir.load(tiny_package / "onnx" / "model.onnx")
    ones = np.ones(config.hidden_size, np.float32)
    found = find_operations(model.graph, plain)
    for layer in range(LAYERS):
        linears = [found[f"model.layers.{layer}.self_attn.{n}_proj"][0] for n in "qkv"]
        x = linears[0].inputs[0]
        assert x is not None
        assert x.dtype is not None
        assert x.shape is not None
        name = f"ones_{layer}"
        scale = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(ones, name=name))
        scale.shape = ir.Shape(ones.shape)
        model.graph.initializers.add(scale)
        norm = new_node("LayerNormalization", [x, scale], f"normed_{layer}", x.dtype, list(x.shape))
        norm.attributes["axis"] = ir.AttrInt64("axis", -1)
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", config.norm_eps)
        model.graph.insert_before(linears[0], norm)
        for linear in linears:
            linear.replace_input_with(0, norm.outputs[0])
    return model


def test_counts_follow(plain: tuple[Operation, ...], rows: tuple[Operation, ...]) -> None:
    one = {"LayerNormalization": LAYERS}
    assert trace.expected_op_counts(rows) == trace.expected_op_counts(plain) | one
    assert shared.expected_op_counts(rows) == shared.expected_op_counts(plain) | one
    assert device.expected_op_counts(rows, 13, 0) == device.expected_op_counts(plain, 13, 0) | one
    for precision in ("fp32", "int4"):
        assert static.expected_op_counts(rows, precision) == static.expected_op_counts(plain, precision) | one
    norms = "NORMALIZATION|REDUCE"
    assert expected_layers(rows) == expected_layers(plain) | {norms: 5 * LAYERS + 1}
    assert len(shared_inputs(rows)) == 4 * LAYERS + 1


def test_names_of_weights_follow(
    plain: tuple[Operation, ...], rows: tuple[Operation, ...], config: ModelConfig
) -> None:
    shapes = weight_shapes(config)
    assert tensor_shapes(rows) == tensor_shapes(plain)  # it has none
    weighted = tuple(
        dataclasses.replace(row, weight=f"{row.name}.weight", shape=(96,)) if row.kind == "layer_norm" else row
        for row in rows
    )
    more = tensor_shapes(weighted).items() - tensor_shapes(plain).items()
    assert more == {(f"model.layers.{layer}.{NAME}.weight", (96,)) for layer in range(LAYERS)}
    assert list(shapes) == [name for name, shape in tensor_shapes(weighted).items() if len(shape) == 2]


def test_stages_follow(rows: tuple[Operation, ...], checkpoint: Checkpoint, config: ModelConfig) -> None:
    first = stages(of_layer(rows, 1))[0]
    assert (first.reads, first.start) == (f"{L1}{NAME}", "model.layers.0.mlp_residual")
    sequences = [np.arange(40, dtype=np.int64)]
    scales = input_scales(checkpoint, config, sequences, lambda inputs: float(inputs.abs().amax()))
    x = torch.cat(embed(checkpoint, sequences))
    wanted = float(F.layer_norm(x, x.shape[-1:], eps=config.norm_eps).abs().amax())
    assert scales["model.layers.0.self_attn.v_proj.weight"] == wanted


def test_the_walk_in_float16_follows(rows: tuple[Operation, ...], checkpoint: Checkpoint, config: ModelConfig) -> None:
    found = measure_safety(checkpoint, config, tokens=256)
    values = [name for name in found.peaks if name.startswith(L1) and not name.endswith((".weight", ".scores"))]
    assert values == [row.name for row in of_layer(rows, 1)]
    assert 1 < found.peaks[f"{L1}{NAME}"].largest < 96**0.5
    assert Float32Islands(frozenset({f"{L1}{NAME}"})).operations(rows) == {
        f"{L1}{name}" for name in (NAME, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    }
    (simulated,) = simulate(checkpoint, config, [np.arange(40, dtype=np.int64)], [Float32Islands()])
    assert simulated.finite


@pytest.mark.usefixtures("rows")
def test_the_walk_is_the_graph(portable: ir.Model, checkpoint: Checkpoint, config: ModelConfig, tmp_path: Path) -> None:
    ids = np.arange(40, dtype=np.int64)
    (x,) = embed(checkpoint, [ids])
    for layer in staged_layers(checkpoint, config):
        x = layer(x)
    wanted = Head(checkpoint, config).logits(x)[0].numpy()
    ir.save(portable, tmp_path / "model.onnx", external_data="model.onnx_data")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    feeds = {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, 40), np.int64),
        "position_ids": ids[None],
        **{f"past_key_values.{n}.{kind}": empty for n in range(LAYERS) for kind in ("key", "value")},
    }
    (logits,) = session.run(["logits"], feeds)
    assert np.square(logits[0] - wanted).mean() < 1e-11 * wanted.var()


def test_graphs_follow(
    rows: tuple[Operation, ...], portable: ir.Model, checkpoint: Checkpoint, config: ModelConfig
) -> None:
    wide = Float32Islands(frozenset({f"{L1}{NAME}"}))
    fused = shared_graph(portable, rows, DEVICE)
    graph, _, counts = device_graph(fused, checkpoint, config, ir.DataType.FLOAT16, wide=wide)
    assert counts["LayerNormalization"] == LAYERS
    made = [node.outputs[0].dtype for node in graph.graph if node.op_type == "LayerNormalization"]
    assert made == [ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.FLOAT16]
    weights = quantize(checkpoint, config, "rtn", form=BlockFormat(4, 32, symmetric=False))
    _, counts = shared.decode_graph(shared_graph(portable, rows), weights, rows)
    assert counts["com.microsoft::MatMulNBits"] == 7 * LAYERS + 1
    with pytest.raises(FusionError, match="LayerNormalization: expected 3, found 0"):
        shared.decode_graph(shared_graph(without(portable), rows), weights, rows)
    graph, _ = static_graph(portable.clone(), config, "fp16", 40)
    made = [node.outputs[0].dtype for node in graph.graph if node.op_type == "LayerNormalization"]
    assert made == [ir.DataType.FLOAT] * LAYERS


@pytest.mark.parametrize(("operator", "applied"), [("LayerNormalization", 1), ("Softmax", 0)])
def test_the_row_of_the_logits_is_found_before_another_norm(operator: str, applied: int, portable: ir.Model) -> None:
    last = [node for node in portable.graph if node.op_type == "RMSNormalization"][-1]
    last.op_type = operator
    assert gather_logit_row(portable) == applied


def without(portable: ir.Model) -> ir.Model:
    """The graph, its norms left out."""
    model = portable.clone()
    for node in [node for node in model.graph if node.op_type == "LayerNormalization"]:
        assert node.inputs[0] is not None
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)
    return model


def test_taps_and_checks_follow(
    rows: tuple[Operation, ...], portable: ir.Model, checkpoint: Checkpoint, config: ModelConfig, tiny_package: Path
) -> None:
    segments = find_segments(portable, rows)
    assert [part.taps[f"model.layers.{part.layer}.{NAME}"] for part in segments[1:-1]] == [
        f"normed_{layer}" for layer in range(LAYERS)
    ]
    models = [TorchModel(checkpoint.folder, checkpoint.tensor, precision) for precision in ("fp64", "fp32")]
    entry = open_package(tiny_package).manifest.variants["fp32"]
    opener = onnxruntime_opener(tiny_package / entry.graph, entry)
    calls = Calls(np.arange(19, dtype=np.int64), (11, 7, 1))
    for segment, found in run_segments(portable, entry, rows, calls, opener):
        if segment.layer is None:
            continue
        layers = [model.layer(segment.layer) for model in models]
        for layer in layers:
            layer.module.input_layernorm = nn.LayerNorm(96, config.norm_eps, elementwise_affine=False)
        with torch.inference_mode():
            checks = LayerChecks(of_layer(rows, segment.layer), found, calls, *layers).run()
        assert (checks[0].parity.name, checks[0].parity.operation) == (
            f"model.layers.{segment.layer}.{NAME}",
            LAYER_NORM,
        )
        assert len(checks) == 19 - 1 + 2  # SiLU is a part of the gated activation; the attention has two caches
        assert max(check.parity.relative for check in checks) < 1e-5
