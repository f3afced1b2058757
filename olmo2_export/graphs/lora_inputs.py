"""Let a stored graph take LoRA adapters at run time, as optional inputs; its weights stay where they are.

Matches, in the portable graph, in those with a shared cache and in those for GPUs:

    y = W x                                             W: a linear of `modules`, in any form

Becomes:

    y = W x + MatMul(MatMul(x, A), B)

    {module}.lora_A: [in, {module}.rank], {module}.lora_B: [{module}.rank, out], the scale in B; both in the graph's own
    precision, and inputs with a default of rank 0, which adds zeros: without an adapter each number is what it was

Both products, and the sum, have the dtype of x: of a linear that is kept in float32 A and B are cast, and its result is
taken before it is rounded.

The names are those of onnxruntime's adapter files, which give all inputs of one adapter at once. Each module has a rank
of its own, as onnxruntime takes dimensions that are called alike to be of one size. The pass is the last, on the graph
as it was written: whatever quantised or measured it saw no adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from olmo2_export.architecture import Operation
from olmo2_export.dtypes import ir_dtype
from olmo2_export.fuse.edit import is_op, name_of, new_node
from olmo2_export.graphs.taps import linear_values
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.lora import Adapter
from runtimes.errors import CheckpointError, FusionError, first_names
from runtimes.manifest import LORA_A, LORA_B, Dtype, TensorSpec


def adapted_linears(adapters: Collection[Adapter], rows: Collection[Operation]) -> tuple[Operation, ...]:
    """Return the linears that some adapter changes, in the model's order.

    Raises:
        CheckpointError: an adapter does more than that, or by another formula.
    """
    linears = {row.weight: row for row in rows if row.kind == "linear"}
    for adapter in adapters:
        others = [*adapter.replaced, *(weight for weight in adapter.low_rank if weight not in linears)]
        others += [weight for weight, row in adapter.low_rank.items() if row.magnitude is not None]
        if others:
            raise CheckpointError(
                f"{adapter.stored.folder}: {first_names(sorted(others))}: an adapter as inputs changes linears by "
                "A and B alone, no embedding, no module that is saved whole, no DoRA; merge it with --lora"
            )
    wanted = {weight for adapter in adapters for weight in adapter.low_rank}
    return tuple(row for weight, row in linears.items() if weight in wanted)


def lora_specs(linears: Collection[Operation], dtype: Dtype = "float32") -> tuple[TensorSpec, ...]:
    """Return the inputs of a graph of some precision, in order."""
    found: list[TensorSpec] = []
    for row in linears:
        (out, into), rank = row.shape, f"{row.name}.rank"
        found.append(TensorSpec(f"{row.name}{LORA_A}", dtype, (into, rank), "lora_a"))
        found.append(TensorSpec(f"{row.name}{LORA_B}", dtype, (rank, out), "lora_b"))
    return tuple(found)


def lora_tensors(adapter: Adapter) -> Mapping[str, np.ndarray]:
    """Return what an adapter gives to these inputs, float32; who feeds a graph of 16 bits rounds it."""
    found: dict[str, np.ndarray] = {}
    for weight, row in adapter.low_rank.items():
        a, b = adapter.factors(weight)
        module = weight.removesuffix(".weight")
        found[f"{module}{LORA_A}"] = np.ascontiguousarray(a.float().T.numpy())
        found[f"{module}{LORA_B}"] = np.ascontiguousarray((b.double() * row.scale).float().T.numpy())
    return found


def take_adapters(model: ir.Model, linears: Collection[Operation], dtype: Dtype = "float32") -> int:
    """Apply the rewrite; return how many linears it changed.

    Args:
        model: as it was written.
        linears: that some adapter changes.
        dtype: the graph's precision, and that of the inputs.

    Raises:
        FusionError: a linear is not in the dtype of its input, or its shape is not known.
        PackageError: a linear is not in the graph.
    """
    graph = model.graph
    specs = iter(lora_specs(linears, dtype))
    for row in linears:
        assert row.weight is not None  # linears have one
        x, y = linear_values(graph, row.weight)
        computed = x.dtype or ir_dtype(dtype)
        y = _unrounded(y, computed)
        producer = y.producer()
        if producer is None or y.dtype not in (None, computed) or y.shape is None:
            raise FusionError(f"graph {graph.name}: {row.name} gives {y.dtype} {y.shape}, expected {computed}")
        a, b = (_optional_input(graph, next(specs)) for _ in "AB")
        small = new_node("MatMul", [x, a], f"{row.name}.small", computed, [*y.shape[:-1], f"{row.name}.rank"])
        added = new_node("MatMul", [small.outputs[0], b], f"{row.name}.added", computed, y.shape)
        whole = new_node("Add", [y, added.outputs[0]], f"{row.name}.adapted", computed, y.shape)
        casts = [_in_dtype(node, computed) for node in (small, added)]
        result = whole.outputs[0]
        given = y.is_graph_output()
        y.replace_all_uses_with(result, replace_graph_outputs=True)
        whole.replace_input_with(0, y)
        if given:  # an output keeps its name
            y.name, result.name = f"{row.name}.base", name_of(y)
        graph.insert_after(producer, [*filter(None, casts), small, added, whole])
    return len(linears)


def take_adapters_at(path: Path, linears: Collection[Operation], dtype: Dtype) -> None:
    """Apply the rewrite to a graph's file; the file of its weights is not touched."""
    model = load_graph(path)
    take_adapters(model, linears, dtype)
    ir.save(model, path)


def _unrounded(y: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return the result of a linear in the dtype of its input: before the Cast behind logits and float32 islands."""
    producer = y.producer()
    if producer is not None and is_op(producer, "Cast") and y.dtype != dtype and producer.inputs[0] is not None:
        return producer.inputs[0]
    return y


def _in_dtype(product: ir.Node, dtype: ir.DataType) -> ir.Node | None:
    """Let a product read its matrix, an input, in the dtype of what it multiplies; None: it has that."""
    matrix = product.inputs[1]
    assert matrix is not None  # a product has two inputs
    if matrix.dtype == dtype:
        return None
    cast = new_node("Cast", [matrix], f"{matrix.name}.cast", dtype, matrix.shape, {"to": int(dtype)})
    product.replace_input_with(1, cast.outputs[0])
    return cast


def _optional_input(graph: ir.Graph, spec: TensorSpec) -> ir.Value:
    dtype = ir_dtype(spec.dtype)
    value = ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(spec.shape))
    nothing = [size if isinstance(size, int) else 0 for size in spec.shape]
    value.const_value = ir.tensor(np.zeros(nothing, dtype.numpy()), name=spec.name)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
