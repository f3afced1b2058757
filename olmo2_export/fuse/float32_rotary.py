"""Keep q and k in float32 from their norm through the rotary embedding and the scaling; round once.

Matches:

    RotaryEmbedding(Transpose(Reshape(Cast(x, precision))), cos, sin, positions) [* query_scale]

Becomes:

    Cast(RotaryEmbedding(Transpose(Reshape(x)), cos, sin, positions) [* query_scale], precision)

Where q and k have no norm, and so no rounding before the rotation, it becomes

    Cast(RotaryEmbedding(Cast(x, float32), cos, sin, positions) [* query_scale], precision)

cos and sin stay float32, which a rotation of float32 takes. transformers rounds once more, between norm and rotation.
Source: transformers, Olmo2Attention and its apply_rotary_pos_emb.
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from olmo2_export.fuse.edit import TO_PRECISION, is_op, name_of, new_cast, only_user

logger = logging.getLogger(__name__)


def float32_rotary(model: ir.Model) -> int:
    """Apply the rewrite everywhere it matches; return the number of rotations rewritten."""
    graph = model.graph
    rewritten = 0
    for node in list(graph):
        if not is_op(node, "RotaryEmbedding"):
            continue
        if _is_done(node):
            logger.debug("float32_rotary: %s: it is in float32", node.name)
            continue
        last = node
        if (cast := _rounding_before(node)) is not None:
            exact = cast.inputs[0]
            assert exact is not None  # a Cast has an input
            cast.outputs[0].replace_all_uses_with(exact)
            graph.remove(cast, safe=True)
        else:
            x = node.inputs[0]
            assert x is not None  # the operator requires it
            up = new_cast(x, f"{name_of(node.outputs[0])}_input_float32", to_precision=False)
            graph.insert_before(node, up)
            node.replace_input_with(0, up.outputs[0])
        follower = only_user(node.outputs[0])
        if (
            follower is not None
            and is_op(follower, "Mul")
            and follower.inputs[1] is graph.initializers.get("query_scale")
        ):
            last = follower
        down = new_cast(last.outputs[0], f"{name_of(last.outputs[0])}_rounded", to_precision=True)
        graph.insert_after(last, down)
        last.outputs[0].replace_all_uses_with(down.outputs[0])
        down.replace_input_with(0, last.outputs[0])
        rewritten += 1
    return rewritten


def _is_done(node: ir.Node) -> bool:
    """Tell whether what the rotation gives is rounded, at once or after the scaling of the queries."""
    follower = only_user(node.outputs[0])
    if follower is not None and is_op(follower, "Mul"):
        follower = only_user(follower.outputs[0])
    return follower is not None and follower.meta.get(TO_PRECISION, False)


def _rounding_before(node: ir.Node) -> ir.Node | None:
    """Return the Cast to the precision that feeds the rotation through Reshape and Transpose alone."""
    value = node.inputs[0]
    while value is not None and only_user(value) is not None:
        producer = value.producer()
        if producer is None:
            return None
        if producer.meta.get(TO_PRECISION, False):
            return producer
        if not is_op(producer, "Reshape") and not is_op(producer, "Transpose"):
            return None
        value = producer.inputs[0]
    return None
