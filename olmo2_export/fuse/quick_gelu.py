"""Compute SiLU in one operator.

Matches:

    y = Mul(x, Sigmoid(x))            Sigmoid(x) used nowhere else

Becomes:

    y = com.microsoft::QuickGelu(x, alpha=1)

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.QuickGelu: x * sigmoid(alpha * x).
"""

from __future__ import annotations

import onnx_ir as ir

from olmo2_export.fuse.edit import is_op, only_user

DOMAIN = "com.microsoft"


def quick_gelu(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of activations rewritten."""
    graph = model.graph
    rewritten = 0
    for sigmoid in list(graph):
        product = only_user(sigmoid.outputs[0]) if is_op(sigmoid, "Sigmoid") else None
        if product is None or not is_op(product, "Mul"):
            continue
        x, gate = sigmoid.inputs[0], sigmoid.outputs[0]
        if list(product.inputs) not in ([x, gate], [gate, x]):
            continue
        old = product.outputs[0]
        output = ir.Value(name=f"{old.name}_gelu", type=old.type, shape=old.shape)
        fused = ir.node("QuickGelu", [x], {"alpha": 1.0}, domain=DOMAIN, outputs=[output], name=f"node_{output.name}")
        graph.insert_before(product, fused)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(product, safe=True)
        graph.remove(sigmoid, safe=True)
        rewritten += 1
    if rewritten:
        model.opset_imports[DOMAIN] = 1
    return rewritten
