"""Let a stored graph take LoRA adapters at run time, as optional inputs; its weights stay where they are.

Matches, in the portable graph and in those with a shared cache:

    y = W x                                             W: a linear of `modules`, in any form

Becomes:

    y = W x + MatMul(MatMul(x, A), B)

    {module}.lora_A: float32 [in, {module}.rank], {module}.lora_B: float32 [{module}.rank, out], the scale in B; both
    inputs with a default of rank 0, which adds zeros: without an adapter each number is what it was

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
from olmo2_export.fuse.edit import name_of, new_node
from olmo2_export.graphs.taps import linear_values
from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.lora import Adapter
from runtimes.errors import CheckpointError, FusionError, first_names
from runtimes.manifest import LORA_A, LORA_B, TensorSpec

FLOAT = ir.DataType.FLOAT


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


def lora_specs(linears: Collection[Operation]) -> tuple[TensorSpec, ...]:
    """Return the inputs, in order."""
    found: list[TensorSpec] = []
    for row in linears:
        (out, into), rank = row.shape, f"{row.name}.rank"
        found.append(TensorSpec(f"{row.name}{LORA_A}", "float32", (into, rank), "lora_a"))
        found.append(TensorSpec(f"{row.name}{LORA_B}", "float32", (rank, out), "lora_b"))
    return tuple(found)


def lora_tensors(adapter: Adapter) -> Mapping[str, np.ndarray]:
    """Return what an adapter gives to these inputs, float32."""
    found: dict[str, np.ndarray] = {}
    for weight, row in adapter.low_rank.items():
        a, b = adapter.factors(weight)
        module = weight.removesuffix(".weight")
        found[f"{module}{LORA_A}"] = np.ascontiguousarray(a.float().T.numpy())
        found[f"{module}{LORA_B}"] = np.ascontiguousarray((b.double() * row.scale).float().T.numpy())
    return found


def take_adapters(model: ir.Model, linears: Collection[Operation]) -> int:
    """Apply the rewrite; return how many linears it changed.

    Raises:
        FusionError: a linear is not in float32, or its shape is not known.
        PackageError: a linear is not in the graph.
    """
    graph = model.graph
    specs = iter(lora_specs(linears))
    for row in linears:
        assert row.weight is not None  # linears have one
        x, y = linear_values(graph, row.weight)
        producer = y.producer()
        if producer is None or y.dtype not in (None, FLOAT) or y.shape is None:
            raise FusionError(f"graph {graph.name}: {row.name} gives {y.dtype} {y.shape}, expected float32")
        a, b = (_optional_input(graph, next(specs)) for _ in "AB")
        small = new_node("MatMul", [x, a], f"{row.name}.small", FLOAT, [*y.shape[:-1], f"{row.name}.rank"])
        added = new_node("MatMul", [small.outputs[0], b], f"{row.name}.added", FLOAT, y.shape)
        whole = new_node("Add", [y, added.outputs[0]], f"{row.name}.adapted", FLOAT, y.shape)
        result = whole.outputs[0]
        given = y.is_graph_output()
        y.replace_all_uses_with(result, replace_graph_outputs=True)
        whole.replace_input_with(0, y)
        if given:  # an output keeps its name
            y.name, result.name = f"{row.name}.base", name_of(y)
        graph.insert_after(producer, [small, added, whole])
    return len(linears)


def take_adapters_at(path: Path, linears: Collection[Operation]) -> None:
    """Apply the rewrite to a graph's file; the file of its weights is not touched."""
    model = load_graph(path)
    take_adapters(model, linears)
    ir.save(model, path)


def _optional_input(graph: ir.Graph, spec: TensorSpec) -> ir.Value:
    value = ir.Value(name=spec.name, type=ir.TensorType(FLOAT), shape=ir.Shape(spec.shape))
    nothing = [size if isinstance(size, int) else 0 for size in spec.shape]
    value.const_value = ir.tensor(np.zeros(nothing, np.float32), name=spec.name)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
