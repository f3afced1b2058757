"""Give the graph its precision: weights, activations and the KV cache; what is between casts to float32 stays.

Matches:

    a float32 value that no Cast to float32 separates from the weights or the cache

Becomes:

    the same value in float32, float16 or bfloat16

Nodes and connections do not change: the precisions of one model differ in dtypes alone. The dtype flows along the
edges. A Cast decides what comes out of it; every other node hands on the dtype of what it reads, to its outputs and to
its own initializers. So the norm weights and the rotary tables, read in float32, stay float32, and the residual stream
has the graph's precision, as in transformers.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from olmo2_export.fuse.edit import IN_FLOAT32, TO_PRECISION, is_op, name_of, new_cast
from runtimes.errors import FailedError, FusionError, first_names
from runtimes.manifest import EMBEDDINGS


class WeightRounding:
    """Rounds weights to nearest-even, one at a time and only when they are read; remembers those that overflow."""

    def __init__(self, precision: ir.DataType) -> None:
        self.precision = precision
        self.overflowed: set[str] = set()

    def __call__(self, name: str, tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
        def rounded() -> ir.TensorProtocol:
            with np.errstate(over="ignore"):  # it is looked for below
                data = tensor.numpy().astype(dtype.numpy())
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # it has mapped the whole file
            if not np.isfinite(data).all():
                self.overflowed.add(name)
            return ir.Tensor(data, dtype=dtype, name=name)

        return ir.LazyTensor(rounded, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)

    def check(self) -> None:
        """Refuse weights that did not fit; to be called when all have been read.

        Raises:
            FailedError: naming them.
        """
        if self.overflowed:
            names = sorted(self.overflowed)
            raise FailedError(
                f"weights beyond the range of {self.precision.name.lower()} in {len(names)} of the tensors: "
                f"{first_names(names)}; use bf16, which has the range of float32"
            )


def set_precision(model: ir.Model, dtype: ir.DataType) -> WeightRounding:
    """Apply to the whole graph.

    Args:
        model: a float32 graph that has been through the TensorRT passes.
        dtype: FLOAT, FLOAT16 or BFLOAT16.

    Returns:
        What rounds the weights; its `check` tells whether all of them fitted, once they have been written.

    Raises:
        FusionError: a node would read two precisions, or an initializer would need two.
    """
    rounding = WeightRounding(dtype)
    _split_scalars(model.graph)
    settled: set[ir.Value] = set()
    for value in model.graph.inputs:
        if value.name == EMBEDDINGS:
            _cast_input(model.graph, value, dtype)
        elif _is_float(value):
            value.type = ir.TensorType(dtype)  # not its dtype: a clone shares the type object
    for node in model.graph:
        if is_op(node, "Cast"):
            if node.meta.get(TO_PRECISION, False):
                node.attributes["to"] = ir.AttrInt64("to", int(dtype))
                node.outputs[0].type = ir.TensorType(dtype)
            continue
        flowing = _dtype_of(node, dtype)
        for weight in [value for value in node.inputs if _is_float(value) and value.is_initializer()]:
            if weight not in settled:
                settled.add(weight)
                _give(weight, flowing, rounding)
            elif weight.dtype != flowing:
                raise FusionError(f"{node.name} needs {name_of(weight)} in {flowing.name}, another node does not")
        for result in filter(_is_float, node.outputs):
            result.type = ir.TensorType(flowing)
    return rounding


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Leave an input in float32, as numpy has no bfloat16, and cast what its readers get but for float32 islands."""
    readers = [(use.node, use.idx) for use in value.uses() if not use.node.meta.get(IN_FLOAT32, False)]
    if dtype == ir.DataType.FLOAT or not readers:
        return
    cast = new_cast(value, f"{value.name}_rounded", to_precision=True)
    for node, position in readers:
        node.replace_input_with(position, cast.outputs[0])
    graph.insert_before(next(iter(graph)), cast)


def _split_scalars(graph: ir.Graph) -> None:
    """Give each clip numbers of its own: what reads them may have another dtype than the next clip."""
    for node in graph:
        if not is_op(node, "Clip"):
            continue
        for position, value in enumerate(node.inputs[1:], 1):
            if value is None or value.const_value is None or len(value.uses()) == 1:
                continue
            name = f"{name_of(value)}_{name_of(node.outputs[0])}"
            tensor = ir.tensor(value.const_value.numpy(), name=name)
            own = ir.Value(name=name, const_value=tensor, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            graph.register_initializer(own)
            node.replace_input_with(position, own)


def _is_float(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _dtype_of(node: ir.Node, precision: ir.DataType) -> ir.DataType:
    """Return the float dtype in which a node computes: that of its computed inputs; if it has none, the precision, or
    float32 where a pass has marked it."""
    computed = [value for value in node.inputs if _is_float(value) and not value.is_initializer()]
    found = {value.dtype for value in computed if value.dtype is not None}
    if len(found) > 1:
        raise FusionError(f"{node.name}: {node.op_type} reads {' and '.join(sorted(d.name for d in found))}")
    if node.meta.get(IN_FLOAT32, False):
        return ir.DataType.FLOAT
    return found.pop() if found else precision


def _give(weight: ir.Value, dtype: ir.DataType, rounding: WeightRounding) -> None:
    """Give an initializer its dtype, and its data a rounding to it."""
    weight.type = ir.TensorType(dtype)
    if weight.const_value is not None:
        weight.const_value = rounding(name_of(weight), weight.const_value, dtype)
