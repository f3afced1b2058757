"""Remove what no output needs any more: nodes, initializers, and inputs.

Matches:

    a node, an initializer or an input without a user

Becomes:

    nothing
"""

from __future__ import annotations

import onnx_ir as ir


def drop_unused(model: ir.Model) -> int:
    """Apply the removal; return the number of nodes, initializers and inputs removed."""
    graph = model.graph
    removed = 0
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            removed += 1
    for value in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(value)
        removed += 1
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_input()]:
        del graph.initializers[name]
        removed += 1
    return removed
