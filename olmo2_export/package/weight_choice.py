"""Options and a variant -> the recipe and the formats of its weights in blocks; nothing is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from olmo2_export.architecture import Operation
from olmo2_export.catalog import BlockFormat, QuantizationDefaults, VariantRow
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.safety import Safety
from olmo2_export.fp16.values import Float32Islands
from olmo2_export.quantize.recipes import MIXED, QuantizedWeights, quantize, tensor_formats
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING
from runtimes.errors import UsageError


@dataclass(frozen=True)
class Options:
    """How quantised variants are made."""

    recipe: str | None = None
    """a name out of `quantize.recipes.RECIPES`; None: the default of the variant"""
    calibration: Path | None = None
    """a UTF-8 text for the recipes, and the KV cache, that measure activations"""
    size_budget: float | None = None
    """bits per weight, for the recipes that choose"""
    distill_steps: int | None = None
    """of training, for the recipe distill; None: its default"""
    block_size: int | None = None
    """weights that share a scale; None: the default of the recipe"""
    kv_caches: tuple[str, ...] = ()
    """names out of `catalog.KV_CACHES`; (): the default ones, of a classifier float32 alone"""
    prefill_graph: bool = True
    """write a prefill graph if it passes its gate"""
    requantize: bool = False
    """make weights in blocks of a quantised checkpoint's dequantised weights, instead of taking its codes over"""
    fp16_islands: bool = False
    """keep what overflows float16 in float32, instead of refusing the model"""
    hidden_states: tuple[int, ...] = ()
    """that every graph gives beside its answer; see `ModelConfig.giving`"""
    inputs_embeds: bool = False
    """every graph takes vectors in the place of tokens"""
    fp16_safety: Safety | None = field(default=None, compare=False)
    """what was measured of the model; None: it is measured when it is needed"""


@dataclass(frozen=True)
class WeightChoice:
    """How the weights of a variant are quantised."""

    recipe: str
    form: BlockFormat
    """of the layers' weights"""
    head: BlockFormat
    embedding: BlockFormat
    keep: tuple[str, ...]
    """weights that stay as they are, by the checkpoint's names"""
    size_budget: float | None
    """bits per weight; None: the recipe does not choose"""
    steps: int | None = None
    """of training; None: the recipe's default"""

    def formats(self, config: ModelConfig) -> dict[str, BlockFormat]:
        """Return the format of each tensor, before a recipe with a budget has chosen."""
        return tensor_formats(config, form=self.form, head=self.head, embedding=self.embedding, keep=self.keep)

    def quantize(
        self, source: WeightSource, config: ModelConfig, calibration: Path | None, spool: Path | None
    ) -> QuantizedWeights:
        """Quantise; see `quantize.recipes.quantize`."""
        return quantize(
            source,
            config,
            self.recipe,
            form=self.form,
            head=self.head,
            embedding=self.embedding,
            keep=self.keep,
            calibration=calibration,
            size_budget=self.size_budget,
            steps=self.steps,
            spool=spool,
        )


def defaults_of(row: VariantRow) -> QuantizationDefaults:
    """Return how the weights of a variant are made by default.

    Raises:
        UsageError: they have no blocks.
    """
    if row.defaults is None:
        raise UsageError(f"variant {row.name}: its weights have no blocks")
    return row.defaults


def choose_weights(
    row: VariantRow, options: Options, rows: Sequence[Operation], wide: Float32Islands | None = None
) -> WeightChoice:
    """Choose, but for what is to be multiplied in float32: MatMulNBits has no kernel for it on GPUs.

    Args:
        row: the variant.
        options: what was asked for.
        rows: of the model.
        wide: what stays in float32; None: nothing.

    Raises:
        UsageError: the variant has no blocks.
    """
    in_float32 = (wide or Float32Islands()).operations(rows)
    products = [row.weight for row in rows if row.kind == "linear" and row.name in in_float32]
    default, size = defaults_of(row), options.block_size
    recipe = options.recipe or default.recipe
    form, head, embedding = (
        form if size is None else dataclasses.replace(form, block_size=size)
        for form in (default.form, default.head, default.embedding or default.form)
    )
    budget = options.size_budget
    if budget is None and recipe in MIXED:
        budget = default.size_budget
    keep = (*(() if default.embedding else (EMBEDDING,)), *(name for name in products if name is not None))
    return WeightChoice(recipe, form, head, embedding, keep, budget, options.distill_steps)
