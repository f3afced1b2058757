"""Forms of a stored static-cache graph that onnxruntime's providers can run, made in memory on the stored weights.

| form            | computes                                                                                           |
|-----------------|----------------------------------------------------------------------------------------------------|
| device          | what the graph says, with its own dtypes, on CUDA                                                  |
| exact           | in float32, what the stored weights say; inputs of linears are not quantised                       |
| rounded         | what the graph says: each result of bfloat16 or float16 in float32, then rounded; inputs quantised |
| all positions   | either of the two, with the logits of every position instead of one per row                        |

The CPU provider has no bfloat16 arithmetic, and no provider of onnxruntime 1.31 quantises from or dequantises to
bfloat16. The device form does that in float32 and rounds; the product of a code and a scale is exact there. Weights
stay in their file: onnxruntime casts and dequantises them once, when it loads the graph. It keeps a pair of casts to
bfloat16 and back, as that changes numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import HALVES, torch_dtype
from olmo2_export.fuse.dequantize_weights import CODES, SCALES
from olmo2_export.fuse.edit import find_input, is_op, name_of, new_node
from olmo2_export.fuse.merge_projections import JOINT
from olmo2_export.graphs.lazy_tensors import LazyTensors
from olmo2_export.quantize.linear import QuantizedLinear
from olmo2_export.weights.stored_names import EMBEDDING, weight_shapes
from runtimes.errors import FusionError, PackageError

FLOAT = ir.DataType.FLOAT
# These hand numbers on as they are, so that there is nothing to round.
_MOVES = ("Gather", "GatherND", "Reshape", "Transpose", "TensorScatter", "Split")


def device_form(graph: ir.Model) -> ir.Model:
    """Return the graph with QuantizeLinear and DequantizeLinear in float32; see the top of this file."""
    model = graph.clone()
    for node in list(model.graph):
        if not is_op(node, "QuantizeLinear") and not is_op(node, "DequantizeLinear"):
            continue
        for position, value in enumerate(node.inputs):
            if value is not None and value.dtype in HALVES:
                cast = _cast(value, f"{name_of(node.outputs[0])}.input_{position}", FLOAT)
                node.replace_input_with(position, cast.outputs[0])
                model.graph.insert_before(node, cast)
        result = node.outputs[0]
        if result.dtype in HALVES:
            down = _cast(result, f"{result.name}.rounded", result.dtype)
            result.type = ir.TensorType(FLOAT)  # a clone shares the old one
            result.replace_all_uses_with(down.outputs[0])
            down.replace_input_with(0, result)
            model.graph.insert_after(node, down)
    return model


def exact_form(graph: ir.Model) -> ir.Model:
    """Return the graph in float32; see the top of this file."""
    model = graph.clone()
    for node in list(model.graph):
        if is_op(node, "QuantizeLinear"):
            _bypass(model.graph, node)
    return _in_float32(model, rounded=False)


def rounded_form(graph: ir.Model) -> ir.Model:
    """Return the graph in float32, rounded where it has fewer bits; see the top of this file."""
    return _in_float32(graph.clone(), rounded=True)


def all_positions(form: ir.Model) -> ir.Model:
    """Return a form that has the logits of all positions, [batch_size, sequence_length, vocab_size], and no candidates.

    Raises:
        FusionError: no single node picks the position.
    """
    model = form.clone()
    graph = model.graph
    picks = [node for node in graph if is_op(node, "GatherND")]
    index = find_input(graph, "logit_index")
    if len(picks) != 1 or index is None or picks[0].inputs[0] is None:
        raise FusionError(f"graph {graph.name}: {len(picks)} nodes pick a position of logit_index, expected 1")
    picks[0].outputs[0].replace_all_uses_with(picks[0].inputs[0])
    graph.remove(picks[0], safe=True)
    graph.inputs.remove(index)
    candidates = {node for node in (value.producer() for value in graph.outputs[1:3]) if is_op(node, "TopK")}
    del graph.outputs[1:3]
    for node in candidates:
        assert node is not None  # it is an operator
        graph.remove(node, safe=True)
    logits = graph.outputs[0]
    value: ir.Value | None = logits
    while value is not None and value.producer() is not None and len(value.shape or ()) == 2:
        value.shape = None  # of two dimensions; it has three now, which onnxruntime infers
        producer = value.producer()
        value = producer.inputs[0] if producer is not None else None
    logits.shape = ir.Shape(["batch_size", "sequence_length", "vocab_size"])
    return model


def stored_linears(graph: ir.Model, config: ModelConfig) -> LazyTensors[QuantizedLinear]:
    """Return the quantised weights as a written graph has them, by the checkpoint's names.

    The parts of a merged weight are told apart by the widths that the checkpoint has, not by how the graph splits.

    Raises:
        PackageError: the graph quantises a tensor that the model does not have.
    """
    shapes, initializers = weight_shapes(config), graph.graph.initializers
    makers: dict[str, Callable[[], QuantizedLinear]] = {}
    for name, codes in initializers.items():
        scales = initializers.get(name.removesuffix(CODES) + SCALES)
        if not name.endswith(CODES) or scales is None:
            continue
        start = 0
        for part in name.removesuffix(CODES).split(JOINT):
            if part not in shapes:
                raise PackageError(f"graph {graph.graph.name}: the model has no {part}; build it again")
            stop = start + shapes[part][0]
            makers[part] = partial(_channels, codes, scales, start, stop)
            start = stop
    return LazyTensors(makers)


def _channels(codes: ir.Value, scales: ir.Value, start: int, stop: int) -> QuantizedLinear:
    return QuantizedLinear(_array(codes), _array(scales)).channels(start, stop)


def stored_input_scales(graph: ir.Model) -> dict[str, float]:
    """Return the scale with which the input of each quantised weight is rounded, by the checkpoint's names."""
    found: dict[str, float] = {}
    for node in graph.graph:
        if not is_op(node, "MatMul"):
            continue
        rounding, weight = (value.producer() if value is not None else None for value in node.inputs)
        if rounding is None or weight is None or not is_op(rounding, "DequantizeLinear"):
            continue
        codes, scale = weight.inputs[0], rounding.inputs[1]
        assert codes is not None  # DequantizeLinear requires both
        assert scale is not None
        for part in name_of(codes).removesuffix(CODES).split(JOINT):
            found[part] = float(_array(scale).astype(np.float32))
    return found


def stored_tensors(graph: ir.Model) -> LazyTensors[torch.Tensor]:
    """Return the weights that are not quantised, by the checkpoint's names and in its layout and the stored dtype."""
    values = {n: v for n, v in graph.graph.initializers.items() if n.endswith((".weight", ".bias"))}
    return LazyTensors({name: partial(_tensor, name, value) for name, value in values.items()})


def _tensor(name: str, value: ir.Value) -> torch.Tensor:
    assert value.dtype is not None  # loaded from a file
    tensor = torch.from_numpy(_array(value).astype(np.float32)).to(torch_dtype(value.dtype))
    return tensor.T if tensor.ndim == 2 and name != EMBEDDING else tensor


def all_weights(linears: LazyTensors[QuantizedLinear], tensors: LazyTensors[torch.Tensor]) -> LazyTensors[torch.Tensor]:
    """Return all weights as a graph stores them, dequantised, by the checkpoint's names."""
    dequantized = {name: partial(_dequantized, linears, name) for name in linears}
    return LazyTensors(dequantized | {name: partial(tensors.__getitem__, name) for name in tensors})


def _dequantized(linears: LazyTensors[QuantizedLinear], name: str) -> torch.Tensor:
    return linears[name].dequantize()


def _in_float32(model: ir.Model, *, rounded: bool) -> ir.Model:
    graph = model.graph
    nodes = list(graph)
    for value in graph.inputs:
        dtype = value.dtype
        if dtype not in HALVES:
            continue
        value.type = ir.TensorType(FLOAT)  # a clone shares the old one
        if value.const_value is not None:  # an adapter's, of rank 0 by default
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            if rounded:
                _round(graph, None, value, dtype)
    for value in list(graph.initializers.values()):
        if value.dtype in HALVES:
            cast = _cast(value, f"{value.name}.float32", FLOAT)
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(next(iter(graph)), cast)
    for node in nodes:
        for value in node.outputs:
            dtype = value.dtype
            if dtype not in HALVES:
                continue
            value.type = ir.TensorType(FLOAT)
            if is_op(node, "Cast"):
                node.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
            if rounded and node.op_type not in _MOVES and not value.is_graph_output():  # a cache is written in place
                _round(graph, node, value, dtype)
    return model


def _round(graph: ir.Graph, node: ir.Node | None, value: ir.Value, dtype: ir.DataType) -> None:
    """Round a float32 value to fewer bits, and go on in float32; `node` gives it, None: it is an input."""
    down = _cast(value, f"{value.name}.rounded", dtype)
    up = _cast(down.outputs[0], f"{value.name}.float32", FLOAT)
    value.replace_all_uses_with(up.outputs[0])
    down.replace_input_with(0, value)
    if node is None:
        graph.insert_before(next(iter(graph)), [down, up])
    else:
        graph.insert_after(node, [down, up])


def _cast(value: ir.Value, output: str, dtype: ir.DataType) -> ir.Node:
    return new_node("Cast", [value], output, dtype, value.shape, {"to": int(dtype)})


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a QuantizeLinear and the DequantizeLinear that reads it."""
    (use,) = node.outputs[0].uses()
    source = node.inputs[0]
    assert source is not None  # QuantizeLinear requires it
    use.node.outputs[0].replace_all_uses_with(source)
    graph.remove(use.node, safe=True)
    graph.remove(node, safe=True)


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None  # loaded from a file
    return np.array(value.const_value.numpy())  # its file is mapped
