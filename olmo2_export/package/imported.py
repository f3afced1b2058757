"""Which variants hold the integers of a quantised checkpoint as they are, and which must be asked for.

| variant                     | holds                                                                              |
|-----------------------------|------------------------------------------------------------------------------------|
| weights in blocks, for CPUs | the codes, where they have no more bits; embedding, head and other floats: float32 |
| weights in blocks, for GPUs | with `requantize` alone: scales become float16                                     |
| plain                       | the dequantised weights                                                            |

With `requantize` a variant in blocks is made of the dequantised weights, by a recipe, and its cost is measured as that
of any other. A recipe that is asked for without it quantises embedding and head, which these checkpoints leave alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

import olmo2_export.catalog as catalog
from olmo2_export.catalog import BlockFormat, VariantRow
from olmo2_export.config import ModelConfig
from olmo2_export.package.weight_choice import Options, WeightChoice
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.imported import FoldedOrders, foldable_orders, held_form, in_blocks, likely_form
from olmo2_export.quantize.recipes import QUANTIZERS, QuantizedWeights
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.merged import switchable_adapters
from olmo2_export.weights.stored_names import EMBEDDING, stored_weight, weight_shapes
from runtimes.errors import UsageError


def is_imported(checkpoint: Checkpoint, row: VariantRow, options: Options) -> bool:
    """Tell whether a variant takes over the codes of a checkpoint; `check_import` has seen them."""
    return checkpoint.quantized is not None and row.defaults is not None and not options.requantize


def check_import(checkpoint: Checkpoint, variants: Sequence[str], options: Options) -> None:
    """Refuse a variant that cannot hold the codes of a quantised checkpoint, unless it is to be quantised again.

    Raises:
        UsageError: saying what holds them, and what `requantize` does.
    """
    found = checkpoint.quantized
    if found is None:
        if options.requantize:
            raise UsageError(f"--requantize: {checkpoint.model} is not quantised; leave it out")
        return
    wanted = [catalog.find(name) for name in variants]
    for row in (row for row in wanted if is_imported(checkpoint, row, options)):
        holding = [r.name for r in catalog.VARIANTS if r.graph == "blocks" and (found.bits or 99) <= r.weights.bits]
        held = f"{catalog.listed([*holding, 'fp32'])} hold{'' if holding else 's'} them exactly"
        why = "its values are those of no integers" if found.bits is None else f"its weights have {found.bits} bits"
        if row.name not in holding:
            raise UsageError(
                f"variant {row.name} of {checkpoint.model} ({found.title}): {why}; {held}, and --requantize makes "
                f"{row.name} of the dequantised weights"
            )
        given = {
            "--block-size": options.block_size,
            "--size-budget": options.size_budget,
            "--distill-steps": options.distill_steps,
        }
        extra = [name for name, value in given.items() if value is not None]
        if options.recipe not in (None, *QUANTIZERS):
            extra.append(f"--recipe {options.recipe}")
        if extra:
            raise UsageError(
                f"{extra[0]}: {row.name} takes over the weights of {checkpoint.model} ({found.title}) as they are; add "
                f"--requantize, or leave it out (--recipe {' or '.join(QUANTIZERS)} is for embedding and head)"
            )


def imported_weights(
    checkpoint: Checkpoint, config: ModelConfig, row: VariantRow, options: Options, choice: WeightChoice
) -> QuantizedWeights:
    """Return the codes of a checkpoint in blocks, and what a recipe makes of the rest, where one was asked for.

    Each linear is read once here, for its format, and again when it is written.

    Args:
        checkpoint: quantised; `check_import` has seen it.
        config: its shape, or that of its first layers; of one whose headers alone are here, what these say.
        row: of the variant.
        options: as they were given.
        choice: the formats of what is not in codes.

    Raises:
        UsageError: groups that blocks do not divide.
        CheckpointError: a linear that is not what its format says.
    """
    assert checkpoint.quantized is not None  # the caller has asked
    assert row.defaults is not None
    without = not checkpoint.is_here or bool(switchable_adapters(checkpoint))  # an adapter's columns are in order
    folded = {} if without else foldable_orders(checkpoint, config)
    ordered = FoldedOrders(checkpoint, folded)
    formats: dict[str, BlockFormat] = {}
    orders: dict[str, np.ndarray] = {}
    for name in weight_shapes(config):
        if name == EMBEDDING or name not in checkpoint.quantized.linears:
            continue
        codes, linear = ordered.codes(name) if checkpoint.is_here else None, checkpoint.quantized.linears[name]
        default = row.defaults.form
        try:
            formats[name] = likely_form(linear, default) if codes is None else held_form(codes, default)
        except UsageError as error:
            raise UsageError(f"{checkpoint.model}: {name}: {error}") from error
        if codes is not None and (order := codes.order) is not None:
            orders[name] = order
    imported = frozenset(formats)
    if options.recipe is not None:
        others = choice.formats(config)
        formats |= {name: form for name, form in others.items() if name not in imported}

    def source(name: str) -> Tensor:
        return stored_weight(ordered, config, name)

    def make(name: str, form: BlockFormat) -> QuantizedMatrix:
        if name not in imported:
            return QUANTIZERS[options.recipe or choice.recipe](source(name), form)
        codes = ordered.codes(name)
        assert codes is not None  # check_import has refused what has none
        return in_blocks(codes, form)

    return QuantizedWeights(formats, make, source, orders, folded)
