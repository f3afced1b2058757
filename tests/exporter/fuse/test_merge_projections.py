"""Products of one input become one product: the same numbers, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from olmo2_export.fuse import op_counts
from olmo2_export.fuse.merge_projections import merge_projections
from olmo2_export.graphs.files import save_graph
from runtimes.ort.concat import ConcatRunner
from runtimes.ort.session import open_session
from runtimes.package import open_package

ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"


@pytest.fixture
def portable(tiny_package: Path) -> ir.Model:
    return ir.load(tiny_package / "onnx" / "model.onnx")


def logits(package: Path, graph: Path) -> np.ndarray:
    manifest = open_package(package).manifest
    variant = manifest.variants["fp32"]
    with ConcatRunner(open_session(graph, variant, None), variant, manifest.model) as runner:
        return runner.prefill([np.arange(3, 20)], all_positions=True)[0]


def test_merged_products_compute_the_same(portable: ir.Model, tiny_package: Path, tmp_path: Path) -> None:
    before = op_counts(portable)
    assert merge_projections(portable) == 6  # q, k and v; gate and up; in three layers
    after = op_counts(portable)
    assert (before["MatMul"], after["MatMul"], after["Split"]) == (22, 13, 6)
    assert merge_projections(portable) == 0
    save_graph(portable, tmp_path / "merged.onnx")
    expected = logits(tiny_package, tiny_package / "onnx" / "model.onnx")
    assert np.abs(logits(tiny_package, tmp_path / "merged.onnx") - expected).max() <= 1e-6


def test_a_merged_weight_holds_its_parts_side_by_side_and_says_so(portable: ir.Model) -> None:
    names = [f"{ATTENTION}.{kind}_proj.weight" for kind in "qkv"]
    parts = [portable.graph.initializers[name].const_value for name in names]
    arrays = [np.array(part.numpy()) for part in parts if part is not None]
    merge_projections(portable)
    weight = portable.graph.initializers["+".join(names)]
    assert weight.const_value is not None
    assert weight.const_value.shape == (96, 96 + 32 + 32)
    assert np.array_equal(weight.const_value.numpy(), np.concatenate(arrays, axis=1))
    assert portable.graph.initializers.keys().isdisjoint(names)
    split = next(n for n in portable.graph if n.op_type == "Split")
    assert split.inputs[1] is not None
    assert split.inputs[1].const_value is not None
    assert split.inputs[1].const_value.numpy().tolist() == [96, 32, 32]


def product(model: ir.Model, weight: str) -> ir.Node:
    (use,) = model.graph.initializers[weight].uses()
    return use.node


def used_twice(model: ir.Model) -> None:
    model.graph.append(ir.node("Identity", [model.graph.initializers[f"{MLP}.up_proj.weight"]]))


def without_data(model: ir.Model) -> None:
    model.graph.initializers[f"{MLP}.up_proj.weight"].const_value = None


def of_another_input(model: ir.Model) -> None:
    node = product(model, f"{MLP}.up_proj.weight")
    node.replace_input_with(0, product(model, "model.layers.0.mlp.up_proj.weight").inputs[0])


def of_another_dtype(model: ir.Model) -> None:
    weight = model.graph.initializers[f"{MLP}.up_proj.weight"]
    weight.type = ir.TensorType(ir.DataType.FLOAT16)


@pytest.mark.parametrize("change", [used_twice, without_data, of_another_dtype], ids=lambda c: c.__name__)
def test_a_product_that_does_not_fit_stays(change: Callable[[ir.Model], None], portable: ir.Model) -> None:
    change(portable)
    assert merge_projections(portable) == 5
    assert f"{MLP}.gate_proj.weight" in portable.graph.initializers


def test_a_product_of_another_input_joins_that_ones_group(portable: ir.Model) -> None:
    of_another_input(portable)
    assert merge_projections(portable) == 5
    joined = next(n for n in portable.graph.initializers if n.startswith("model.layers.0.mlp.gate"))
    assert joined.count("+") == 2
