"""Look tokens up in an embedding of 4 or 8 bits, quantised in blocks.

Matches:

    x = Gather(W, ids)                W: constant initializer [vocab_size, hidden_size], used nowhere else
                                      ids: input_ids, or Max(input_ids, 0) where vectors may be given

Becomes:

    checked = ids + int64(Gather(zeros, ids))                            zeros: int8 [vocab_size]
    x = com.microsoft::GatherBlockQuantized(W.packed, checked, W.scales[, W.zero_points], bits, block_size)

GatherBlockQuantized gives zeros for an id that is not in the vocabulary; Gather makes it an error, as it was.

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from olmo2_export.catalog import BlockFormat
from olmo2_export.fuse.edit import find_input, is_op, name_of, new_node
from olmo2_export.fuse.matmul_nbits import DOMAIN, block_initializers

INT64, INT8 = ir.DataType.INT64, ir.DataType.INT8


def gather_block_quantized(model: ir.Model, formats: Mapping[str, BlockFormat]) -> int:
    """Apply the rewrite to the weights named in `formats`; return the number of lookups rewritten.

    The new initializers have no data yet; they are named after the weight: `.packed`, `.scales`, `.zero_points`.
    """
    graph = model.graph
    input_ids = find_input(graph, "input_ids")
    rewritten = 0
    for node in list(graph):
        weight = node.inputs[0] if is_op(node, "Gather") else None
        ids = node.inputs[1] if weight is not None else None
        if weight is None or weight.name not in formats or ids is None:
            continue
        maximum = ids.producer()
        known = maximum.inputs[0] if maximum is not None and is_op(maximum, "Max") else ids
        if known is not input_ids:
            continue
        if not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2 or len(weight.uses()) != 1:
            continue
        rows, columns = (int(str(size)) for size in weight.shape)
        form = formats[name_of(weight)]
        zeros = ir.tensor(np.zeros(rows, np.int8), name="vocabulary")
        table = ir.Value(name="vocabulary", const_value=zeros, shape=ir.Shape([rows]), type=ir.TensorType(INT8))
        graph.register_initializer(table)
        zero = new_node("Gather", [table, ids], "in_vocabulary", INT8, ids.shape)
        wide = new_node("Cast", [zero.outputs[0]], "in_vocabulary_int64", INT64, ids.shape, {"to": int(INT64)})
        checked = new_node("Add", [ids, wide.outputs[0]], "checked_ids", INT64, ids.shape)
        packed, *others = block_initializers(graph, weight, form, rows, columns)
        packed.shape = ir.Shape([rows, columns * form.bits // 8])  # without the padding of the last block
        old = node.outputs[0]
        output = ir.Value(name=f"{old.name}_blocks", type=old.type, shape=old.shape)
        fused = ir.node(
            "GatherBlockQuantized",
            [packed, checked.outputs[0], *others],
            {"bits": form.bits, "block_size": form.block_size, "gather_axis": 0, "quantize_axis": 1},
            domain=DOMAIN,
            outputs=[output],
            name=f"node_{output.name}",
        )
        graph.insert_before(node, [zero, wide, checked, fused])
        old.replace_all_uses_with(output)
        graph.remove(node, safe=True)
        del graph.initializers[name_of(weight)]
        rewritten += 1
    if rewritten:
        model.opset_imports[DOMAIN] = 1
    return rewritten
