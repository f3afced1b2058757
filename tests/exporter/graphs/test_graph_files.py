"""Where weights lie in the data file of a graph: the same with every onnx-ir, and never half written."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from olmo2_export.graphs import files as graph_files
from olmo2_export.graphs.files import save_graph
from runtimes.errors import Olmo2ExportError

SIZES = {"tiny": 64, "large": (1 << 18) + 1, "small": 65, "even": 1 << 18, "larger": (1 << 18) + 5}
"""name -> float32 numbers; 64 of them stay in the graph, more than 2^18 begin at a page"""
OFFSETS = {"large": 0, "small": 1048580, "even": 1048840, "larger": 2097152 + 4096}
END = OFFSETS["larger"] + 4 * SIZES["larger"]


def numbers(name: str) -> np.ndarray:
    return np.random.default_rng(SIZES[name]).standard_normal(SIZES[name]).astype(np.float32)


def graph(lazy: bool = False) -> ir.Model:
    """Return a graph that adds them all to nothing; lazy: the large ones are made when they are written."""
    values = []
    for name in SIZES:
        tensor: ir.TensorProtocol = ir.Tensor(numbers(name), name=name)
        if lazy and SIZES[name] > 1 << 18:
            shape = ir.Shape([SIZES[name]])
            tensor = ir.LazyTensor(
                lambda name=name: ir.Tensor(numbers(name), name=name), dtype=ir.DataType.FLOAT, shape=shape, name=name
            )
        values.append(
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape, const_value=tensor)
        )
    node = ir.Node("", "Sum", values[:1])
    body = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    return ir.Model(body, ir_version=10)


@pytest.mark.parametrize("lazy", [False, True])
def test_large_tensors_begin_at_a_page_in_the_order_of_the_graph(lazy: bool, tmp_path: Path) -> None:
    save_graph(graph(lazy), tmp_path / "model.onnx")
    written = ir.load(tmp_path / "model.onnx").graph.initializers
    outside = {name: v.const_value for name, v in written.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert {name: tensor.offset for name, tensor in outside.items()} == OFFSETS
    assert {tensor.location for tensor in outside.values()} == {"model.onnx_data"}
    assert (tmp_path / "model.onnx_data").stat().st_size == END
    for name, value in written.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), numbers(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]


@pytest.mark.skipif("alignment" not in signature(ir.save).parameters, reason="of onnx-ir 1.1")
def test_the_bytes_are_those_of_onnx_ir_1_1(tmp_path: Path) -> None:
    """Packages made before onnx-ir 1.0 would do have these bytes."""
    save_graph(graph(), tmp_path / "ours" / "model.onnx")
    (tmp_path / "theirs").mkdir()
    ir.save(graph(), tmp_path / "theirs" / "model.onnx", external_data="model.onnx_data", alignment=4096)
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_an_onnx_ir_that_cannot_align_writes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """1.0 sorts the tensors it writes by size and knows no `alignment`: `save() got an unexpected keyword argument`."""
    save_graph(graph(), tmp_path / "new.onnx")
    save = ir.save

    def save_1_0(model: ir.Model, path: Path, format: str | None = None) -> None:
        save(model, path, format)

    monkeypatch.setattr(graph_files.ir, "save", save_1_0)
    save_graph(graph(), tmp_path / "old.onnx")
    assert (tmp_path / "old.onnx_data").read_bytes() == (tmp_path / "new.onnx_data").read_bytes()
    old = (tmp_path / "old.onnx").read_bytes().replace(b"old.onnx_data", b"new.onnx_data")
    assert old == (tmp_path / "new.onnx").read_bytes()


def test_a_graph_can_take_the_place_of_the_one_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_graph(graph(), path)
    before = [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx_data")]
    model = ir.load(path)
    kept = [value.const_value for value in model.graph.initializers.values()]
    save_graph(model, path)
    assert [(tmp_path / name).read_bytes() for name in ("model.onnx", "model.onnx_data")] == before
    assert [value.const_value for value in model.graph.initializers.values()] == kept


def test_a_failure_leaves_the_model_and_the_old_data_as_they_were(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    save_graph(graph(), path)
    before = (tmp_path / "model.onnx_data").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir.Tensor, "tofile", full)
    model = graph()
    kept = [value.const_value for value in model.graph.initializers.values()]
    with pytest.raises(Olmo2ExportError, match="No space left on device"):
        save_graph(model, path)
    assert (tmp_path / "model.onnx_data").read_bytes() == before
    assert [value.const_value for value in model.graph.initializers.values()] == kept
