"""A recipe and a checkpoint -> quantised weights, one at a time.

| recipe     | scale and zero point from | calibration | when                                                     |
|------------|---------------------------|-------------|----------------------------------------------------------|
| rtn        | the extremes of a block   | no          | each tensor when it is asked for                         |
| search     | least squared error       | no          | each tensor when it is asked for                         |
| gptq       | search, weighted; codes   | yes         | all at once, layer by layer, into the spool              |
|            | from GPTQ                 |             |                                                          |
| mixed      | as search                 | yes         | as search; the most sensitive tensors get 8 bits         |
| gptq-mixed | as gptq                   | yes         | as gptq; the most sensitive tensors get 8 bits           |
| distill    | as gptq; then trained,    | no: a text  | as gptq; then all at once                                |
|            | and codes too             | of its own  |                                                          |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmo2_export.catalog import DISTILL_STEPS, BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.distill import distilled
from olmo2_export.quantize.encode import dots, over_rows
from olmo2_export.quantize.gptq_walk import gptq_checkpoint
from olmo2_export.quantize.round_to_nearest import round_to_nearest
from olmo2_export.quantize.search import search
from olmo2_export.quantize.sensitivity import choose_formats, measure_sensitivity
from olmo2_export.quantize.spool import Spool
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, linear_names, naming, stored_weight, weight_shapes
from runtimes.errors import UsageError

QUANTIZERS: dict[str, Callable[[Tensor, BlockFormat], QuantizedMatrix]] = {"rtn": round_to_nearest, "search": search}
"""the recipes that look at each tensor alone"""

CALIBRATED = ("gptq", "mixed", "gptq-mixed")
"""the recipes that run the model on a calibration text"""

DISTILLED = "distill"
"""the recipe that trains the weights on text that the model writes"""

RECIPES = (*QUANTIZERS, *CALIBRATED, DISTILLED)
MIXED = ("mixed", "gptq-mixed")
SPOOLED = ("gptq", "gptq-mixed", DISTILLED)
"""the recipes that begin with GPTQ, and make all tensors at once"""

_SENSITIVITY_SEQUENCES, _SENSITIVITY_LENGTH = 8, 128
_GPTQ_GAIN = 2.5  # search's divergence / GPTQ's, of linears; an embedding has none (measured on the demo: 2.5 to 3)


@dataclass(frozen=True)
class TensorError:
    """What quantising did to one tensor."""

    name: str
    bits: int
    block_size: int
    nmse: float
    """squared error / squared weights"""


class QuantizedWeights:
    """The quantised weights of a checkpoint; each is made, or read from the spool, when it is asked for."""

    def __init__(
        self,
        formats: Mapping[str, BlockFormat],
        make: Callable[[str, BlockFormat], QuantizedMatrix],
        source: Callable[[str], Tensor],
        orders: Mapping[str, np.ndarray] | None = None,
        folded: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.formats = dict(formats)
        self.orders = dict(orders or {})
        """int64 [K]: the order in which a linear wants its input, where that is another; see `QuantizedMatrix`"""
        self.folded = dict(folded or {})
        """the same of linears that get it in this order already; see `imported.FoldedOrders`"""
        self.source = source
        """name -> the weight as the checkpoint has it, or with these orders folded, [N, K]"""
        self._make = make
        self._errors: dict[str, TensorError] = {}

    def matrix(self, name: str) -> QuantizedMatrix:
        """Return one quantised weight, made anew at every call.

        Raises:
            CheckpointError: a weight is NaN, Inf or beyond 1e36; names the tensor.
        """
        with naming(name):
            matrix = self._make(name, self.formats[name])
        if name not in self._errors:
            self._errors[name] = measure_error(name, matrix, self.source(name))
        return matrix

    def errors(self) -> list[TensorError]:
        """Return the error of every tensor; those never asked for are made now."""
        return [self.error(name) for name in self.formats]

    def error(self, name: str) -> TensorError:
        """Return the error of one tensor, which is made now if it was never asked for."""
        if name not in self._errors:
            self.matrix(name)
        return self._errors[name]


def tensor_formats(
    config: ModelConfig,
    *,
    form: BlockFormat,
    head: BlockFormat | None = None,
    embedding: BlockFormat | None = None,
    keep: Collection[str] = (),
) -> dict[str, BlockFormat]:
    """Return the format of each tensor that is quantised, by the checkpoint's name; arguments as `quantize`."""
    formats = {EMBEDDING: embedding or form, **dict.fromkeys(linear_names(config), form), HEAD: head or form}
    known = weight_shapes(config)  # a classifier has no HEAD
    return {name: chosen for name, chosen in formats.items() if name in known and name not in keep}


def quantize(
    checkpoint: WeightSource,
    config: ModelConfig,
    recipe: str,
    *,
    form: BlockFormat,
    head: BlockFormat | None = None,
    embedding: BlockFormat | None = None,
    keep: Collection[str] = (),
    calibration: Path | None = None,
    size_budget: float | None = None,
    steps: int | None = None,
    spool: Path | None = None,
) -> QuantizedWeights:
    """Quantise a checkpoint's linear weights, its head and its embedding.

    Args:
        checkpoint: the weights.
        config: their shape.
        recipe: a name out of `RECIPES`.
        form: of the layers' weights.
        head: of lm_head; None: `form`.
        embedding: of the embedding; None: `form`.
        keep: names of tensors that stay as they are.
        calibration: a UTF-8 text for the recipes of `CALIBRATED`; see `calibration_tokens` for None.
        size_budget: bits per weight over all tensors, for the recipes of `MIXED`.
        steps: of training, for distill; None: `catalog.DISTILL_STEPS`.
        spool: a folder for the recipes of `SPOOLED`; it must outlive the result, and its owner removes it.

    Raises:
        UsageError: no such recipe, an option that it needs is absent, or one that it has no use for is given.
        CheckpointError: a weight is NaN, Inf or beyond 1e36; the uncalibrated recipes say so from `matrix`.
        NumericError: activations on the calibration tokens that are not finite.
        ResourceError: no room for the spool.
    """
    _check_options(recipe, calibration, size_budget, steps, spool)
    formats = tensor_formats(config, form=form, head=head, embedding=embedding, keep=keep)
    if size_budget is not None:
        better = replace(form, bits=8)
        choose_formats(config, formats, dict.fromkeys(formats, 0.0), size_budget, better)  # refuses before the walk
        tokens = calibration_tokens(
            checkpoint, config, calibration, sequences=_SENSITIVITY_SEQUENCES, length=_SENSITIVITY_LENGTH
        )
        sensitivity = measure_sensitivity(checkpoint, config, tokens, formats, search)
        if spool is not None:
            sensitivity[EMBEDDING] *= _GPTQ_GAIN
        formats = choose_formats(config, formats, sensitivity, size_budget, better)

    def source(name: str) -> Tensor:
        return stored_weight(checkpoint, config, name)

    if spool is not None:
        store = Spool(spool)
        if recipe == DISTILLED:
            distilled(checkpoint, config, formats, store, DISTILL_STEPS if steps is None else steps)
        else:
            gptq_checkpoint(checkpoint, config, calibration_tokens(checkpoint, config, calibration), formats, store)
        return QuantizedWeights(formats, lambda name, _: store.load(name), source)
    quantizer = QUANTIZERS.get(recipe, search)
    return QuantizedWeights(formats, lambda name, form: quantizer(source(name), form), source)


def _check_options(
    recipe: str, calibration: Path | None, size_budget: float | None, steps: int | None, spool: Path | None
) -> None:
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe}: expected one of {', '.join(RECIPES)}")
    if calibration is not None and recipe not in CALIBRATED:
        raise UsageError(f"recipe {recipe} has no use for a calibration text; those that have: {', '.join(CALIBRATED)}")
    if (size_budget is not None) != (recipe in MIXED):
        raise UsageError(f"recipe {recipe}: a size budget goes with {' and '.join(MIXED)}, and they need one")
    if steps is not None and recipe != DISTILLED:
        raise UsageError(f"recipe {recipe} has no steps, {DISTILLED} has")
    if (spool is not None) != (recipe in SPOOLED):
        raise UsageError(f"recipe {recipe}: a spool folder goes with {', '.join(SPOOLED)}, and they need one")


def measure_error(name: str, matrix: QuantizedMatrix, weight: Tensor) -> TensorError:
    """Compare a quantised weight with its source, a chunk of rows at a time."""
    form = matrix.form
    sums: list[tuple[float, float]] = []

    def work(start: int, stop: int) -> None:
        truth, found = weight[start:stop].float(), matrix.dequantize(start, stop)
        error = found.sub_(truth)
        sums.append(
            (float(dots(error, error).sum(dtype=torch.float64)), float(dots(truth, truth).sum(dtype=torch.float64)))
        )

    over_rows(work, matrix.rows, matrix.columns)
    errors, energies = zip(*sums, strict=True)
    energy = max(math.fsum(energies), 1e-300)  # all zero: no error either
    return TensorError(name, form.bits, form.block_size, math.fsum(errors) / energy)
