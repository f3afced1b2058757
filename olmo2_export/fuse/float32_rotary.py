"""Keep q and k in float32 from their norm through the rotary embedding and the scaling; round once.

Matches:

    RotaryEmbedding(Transpose(Reshape(Cast(x, precision))), cos, sin, positions) [* query_scale]

Becomes:

    Cast(RotaryEmbedding(Transpose(Reshape(x)), cos, sin, positions) [* query_scale], precision)

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
        cast = _rounding_before(node)
        if cast is None:
            logger.debug("float32_rotary: %s: no rounding before it", node.name)
            continue
        exact, last = cast.inputs[0], node
        assert exact is not None  # a Cast has an input
        cast.outputs[0].replace_all_uses_with(exact)
        graph.remove(cast, safe=True)
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
