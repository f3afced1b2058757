"""Graph passes: one transformation per file, applied in the order of the visible lists below.

A pass is a function `(ir.Model) -> int` that changes the model in place and returns how often it did. A pass that
must apply a known number of times is checked by its caller, with `check_op_counts` or against what it returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import onnx_ir as ir

from olmo2_export.fuse.drop_unused import drop_unused
from olmo2_export.fuse.either_padding import either_padding
from olmo2_export.fuse.float32_logits import float32_logits
from olmo2_export.fuse.float32_norm import float32_norm
from olmo2_export.fuse.float32_rotary import float32_rotary
from olmo2_export.fuse.fold_weight_transpose import fold_weight_transpose
from olmo2_export.fuse.gather_logit_row import gather_logit_row
from olmo2_export.fuse.group_query_attention import group_query_attention
from olmo2_export.fuse.plain_reshape import plain_reshape
from olmo2_export.fuse.quick_gelu import quick_gelu
from olmo2_export.fuse.static_cache import static_cache
from olmo2_export.fuse.write_index_positions import write_index_positions
from runtimes.errors import FusionError

Pass = Callable[[ir.Model], int]

PORTABLE: list[Pass] = [
    fold_weight_transpose,
]
"""traced graph -> onnx/model.onnx"""

ONNXRUNTIME: list[Pass] = [
    group_query_attention,
    quick_gelu,
    drop_unused,
]
"""portable graph -> the shared-cache graph, whose weights are then quantised"""

DEVICE: list[Pass] = [
    group_query_attention,
    drop_unused,
]
"""the same for GPUs: onnxruntime finds QuickGelu itself for CUDA, and TensorRT for RTX has no such operator"""

OTHER_RUNTIMES: list[Pass] = [
    either_padding,
    drop_unused,
]
"""the shared-cache graph -> the one of the same weights that other runtimes load"""

TENSORRT: list[Pass] = [
    gather_logit_row,
    write_index_positions,
    static_cache,
    float32_norm,
    float32_rotary,
    float32_logits,
    plain_reshape,
    drop_unused,
]
"""portable graph -> the static-cache graph; set_precision and set_cache_length make trt/model_{precision}.onnx of it"""


UNCOUNTED = frozenset({"drop_unused"})
"""passes that may apply any number of times"""


def apply(model: ir.Model, passes: list[Pass]) -> dict[str, int]:
    """Apply passes in order; return how often each changed the graph."""
    return {a_pass.__name__: a_pass(model) for a_pass in passes}


def check_applied(model: ir.Model, applied: Mapping[str, int], expected: Mapping[str, int], table: str) -> None:
    """Compare how often passes changed a graph with how often they must.

    Args:
        model: the graph, for its name.
        applied: as `apply` returns it.
        expected: a number for each of these passes that is not in `UNCOUNTED`; it may have others.
        table: where `expected` is written down, for the message.

    Raises:
        FusionError: a pass has no number, or applied more or less often; it names all of them.
    """
    counted = {name: times for name, times in applied.items() if name not in UNCOUNTED}
    if unknown := [name for name in counted if name not in expected]:
        raise FusionError(
            f"passes without a number of times that they must apply: {', '.join(unknown)}; add it to {table}, or the "
            "name to UNCOUNTED in olmo2_export/fuse/__init__.py"
        )
    wrong = [
        f"{name}: expected {expected[name]}, applied {n} times" for name, n in counted.items() if n != expected[name]
    ]
    if wrong:
        raise FusionError(f"graph {model.graph.name}: {'; '.join(wrong)}; it is not a graph of this exporter")


def op_counts(model: ir.Model) -> Counter[str]:
    """Count the nodes of the main graph by operator, `domain::op` outside the default domain."""
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph)


def check_op_counts(model: ir.Model, expected: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of the expected operators.

    Raises:
        FusionError: an operator occurs more or less often than expected; it names all of them.
    """
    counts = op_counts(model)
    wrong = [f"{op}: expected {n}, found {counts[op]}" for op, n in expected.items() if counts[op] != n]
    if wrong:
        raise FusionError(f"graph {model.graph.name}: {'; '.join(wrong)}")
    return {op: counts[op] for op in expected}
