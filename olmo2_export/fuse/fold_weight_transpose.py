"""Store each weight in the layout its MatMul wants, instead of transposing it in the graph.

Matches:

    y = MatMul(x, Transpose(W, perm=[1, 0]))      W: initializer [out, in], used nowhere else

Becomes:

    y = MatMul(x, W)                              W: initializer [in, out], `W.meta["transposed"] = True`

The flag tells the package writer to transpose the checkpoint's tensor on its way to the file.
Source: torch.nn.Linear keeps [out, in]; ONNX MatMul takes [in, out].
"""

from __future__ import annotations

import onnx_ir as ir

TRANSPOSED = "transposed"


def fold_weight_transpose(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of weights folded."""
    folded = 0
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if weight is None or _why_not(node, weight) is not None:
            continue
        assert weight.shape is not None  # an initializer has a shape
        weight.shape = ir.Shape([weight.shape[1], weight.shape[0]])
        weight.meta[TRANSPOSED] = not weight.meta.get(TRANSPOSED, False)
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        folded += 1
    return folded


def _why_not(node: ir.Node, weight: ir.Value) -> str | None:
    """Return why the pattern does not match, or None if it does."""
    permutation = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    if not weight.is_initializer() or weight.is_graph_input():
        return f"{weight.name} is no constant initializer"
    if weight.const_value is not None:
        return f"{weight.name} already holds data in its own layout"
    if list(permutation or ()) != [1, 0] or weight.shape is None or len(weight.shape) != 2:
        return f"{weight.name} is not a matrix transposed by [1, 0]"
    if len(weight.uses()) != 1:
        return f"{weight.name} is used {len(weight.uses())} times"
    consumers = node.outputs[0].uses()
    if not consumers or any(use.node.op_type != "MatMul" or use.idx != 1 for use in consumers):
        return f"{weight.name} feeds something else than the right side of MatMul"
    return None
