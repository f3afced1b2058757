"""A precision and a checkpoint -> the quantised linears of a TensorRT graph, one at a time.

| precision | weights                                     | inputs                         | stay in bfloat16       |
|-----------|---------------------------------------------|--------------------------------|------------------------|
| int4      | blocks of 4 bits; recipes rtn, search, gptq | bfloat16                       | embedding              |
| int8      | per output channel, least squared error     | int8, a scale from calibration | and down_proj, lm_head |
| fp8       | per output channel, the largest becomes 448 | fp8, a scale from calibration  | and lm_head            |

down_proj reads products of two activations, whose outliers take the resolution of one int8 scale away from the rest; it
alone would cost more than all other linears together. lm_head is what the logits are read from: 8 bits there cost
about as much as those of all layers, for a sixth of the 1B model's weights. In int4 it has blocks of 32.

Where a package has taken over a quantised checkpoint's codes, int4 takes them over from it, and all else, lm_head too,
stays in bfloat16: see `imported`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from olmo2_export.architecture import operations, shared_inputs
from olmo2_export.catalog import BLOCK_SIZES, BlockFormat, listed, precisions, static_row
from olmo2_export.config import ModelConfig
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.quantize.imported import in_static_blocks, static_block
from olmo2_export.quantize.input_scales import Choose, fp8_scale, input_scales, int8_scale
from olmo2_export.quantize.linear import QuantizedLinear, fp8_linear, int4_linear, int8_linear, squared_error
from olmo2_export.quantize.recipes import CALIBRATED, MIXED, RECIPES, QuantizedWeights, quantize
from olmo2_export.weights.source import WeightSource
from olmo2_export.weights.stored_names import EMBEDDING, HEAD, naming, stored_weight, weight_shapes
from runtimes.errors import UsageError
from runtimes.manifest import QuantizedTensor

_LINEARS: dict[str, Callable[[Tensor], QuantizedLinear]] = {"int8": int8_linear, "float8e4m3fn": fp8_linear}
"""dtype of codes that have a scale per channel -> what makes them"""
_SCALES: dict[str, Choose] = {"int8": int8_scale, "float8e4m3fn": fp8_scale}
"""dtype of the codes of inputs -> what chooses their scale"""
_SCALE_BITS = 16
_CALIBRATION = {"sequences": 16, "length": 256}  # twice as many tokens change no scale by more than a few percent


@dataclass(frozen=True)
class LinearForm:
    """How a linear of the graph is stored."""

    precision: str
    """int4 | int8 | fp8: one whose weights are quantised, in `catalog`"""
    block_size: int
    """weights that share a scale; 0: a whole output channel"""
    input_scale: float | None
    """of inputs that are quantised"""


class StaticWeights:
    """The quantised linears of one precision; each is made when it is asked for."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        precision: str,
        forms: dict[str, LinearForm],
        blocks: QuantizedWeights | None,
    ) -> None:
        self.forms = forms
        """by the checkpoint's name"""
        self._source, self._config, self._blocks = source, config, blocks
        self._format = static_row(precision).weights
        self._nmse: dict[str, float] = {}

    def linear(self, name: str) -> QuantizedLinear:
        """Return one quantised weight, made anew at every call.

        Raises:
            CheckpointError: a weight is NaN, Inf or beyond 1e36; names the tensor.
        """
        if self._blocks is not None:
            linear = int4_linear(self._blocks.matrix(name))
            self._nmse[name] = self._blocks.error(name).nmse
            return linear
        weight = stored_weight(self._source, self._config, name)
        with naming(name):
            linear = _LINEARS[self._format.codes](weight)
        if name not in self._nmse:
            self._nmse[name] = squared_error(linear, weight)
        return linear

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Return the manifest's entries; of weights that were never asked for, made now."""
        for name in self.forms.keys() - self._nmse.keys():
            self.linear(name)
        bits = self._format.bits
        return {name: QuantizedTensor(bits, f.block_size, True, self._nmse[name]) for name, f in self.forms.items()}

    @property
    def bits_per_weight(self) -> float:
        """Over the quantised linears, scales included."""
        shapes = weight_shapes(self._config)
        bits = weights = 0.0
        for name, form in self.forms.items():
            rows, columns = shapes[name]
            weights += rows * columns
            bits += rows * (columns * self._format.bits + _SCALE_BITS * (columns // (form.block_size or columns)))
        return bits / weights


def uses_calibration(precision: str, recipe: str | None) -> bool:
    """Tell whether quantising runs the model on calibration tokens."""
    return static_row(precision).weights.inputs is not None or recipe in CALIBRATED


def check_recipe(config: ModelConfig, precision: str, recipe: str | None) -> None:
    """Refuse what cannot be quantised, before anything is read.

    Raises:
        UsageError: a recipe that TensorRT's format cannot hold, or a shape that 4-bit blocks do not divide.
    """
    recipes = static_row(precision).weights.recipes
    if recipe is not None and not recipes:
        free = [name for name in precisions() if static_row(name).weights.recipes]
        raise UsageError(f"recipe {recipe}: {listed(free)} alone has a choice, {precision} has none")
    if recipe is not None and recipe not in recipes:
        known = "is for onnxruntime's variants" if recipe in RECIPES else "is unknown"
        reason = "mixes precisions" if recipe in MIXED else known
        raise UsageError(f"recipe {recipe}: it {reason}; TensorRT's {precision} takes {', '.join(recipes)}")
    if static_row(precision).weights.layout == "blocks":
        static_block_size(config, precision)


def static_block_size(config: ModelConfig, precision: str) -> int:
    """Return the largest block that divides the rows of all linears.

    Raises:
        UsageError: none does.
    """
    lengths = sorted({weight_shapes(config)[name][1] for name in _names(config, precision)})
    fitting = [size for size in BLOCK_SIZES if not any(length % size for length in lengths)]
    if not fitting:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UsageError(
            f"{precision}: blocks of {sizes} weights do not divide {', '.join(map(str, lengths))} "
            "inputs, and TensorRT takes whole blocks; use --precision int8 or bf16"
        )
    return max(fitting)


def static_weights(
    source: WeightSource,
    config: ModelConfig,
    precision: str,
    *,
    recipe: str | None = None,
    calibration: Path | None = None,
    spool: Path,
) -> StaticWeights:
    """Quantise the linears of a checkpoint for a TensorRT graph.

    Args:
        source: the weights.
        config: their shape.
        precision: int4, int8 or fp8.
        recipe: out of its row's, where there is a choice; None: the default.
        calibration: a UTF-8 text for what measures activations; see `calibration_tokens` for None.
        spool: a folder for gptq; it must outlive the result, and its owner removes it.

    Raises:
        UsageError: see `check_recipe` and `calibration_tokens`.
        CheckpointError: a weight is NaN, Inf or beyond 1e36; the uncalibrated recipes say so from `linear`.
        NumericError: activations on the calibration tokens that are not finite.
    """
    check_recipe(config, precision, recipe)
    stored = static_row(precision).weights
    if stored.layout == "blocks":
        form, head = _block_formats(config, precision)
        recipe = recipe or stored.recipe or stored.recipes[0]
        blocks = quantize(
            source,
            config,
            recipe,
            form=form,
            head=head,
            keep=(EMBEDDING,),
            calibration=calibration if recipe in CALIBRATED else None,
            spool=spool if recipe == "gptq" else None,
        )
        return StaticWeights(source, config, precision, static_forms(config, precision, {}), blocks)
    scales = static_input_scales(source, config, precision, calibration)
    return StaticWeights(source, config, precision, static_forms(config, precision, scales), None)


def static_forms(config: ModelConfig, precision: str, scales: Mapping[str, float]) -> dict[str, LinearForm]:
    """Return how each linear is stored, by the checkpoint's name.

    Args:
        config: the shapes.
        precision: int4, int8 or fp8.
        scales: of the linears' inputs, where those are quantised; the step of one that is absent is 1.

    Raises:
        UsageError: 4-bit blocks do not divide a shape.
    """
    names, stored = _names(config, precision), static_row(precision).weights
    if stored.layout == "blocks":
        form, head = _block_formats(config, precision)
        sizes = {name: (head if name == HEAD else form).block_size for name in names}
        return {name: LinearForm(precision, size, None) for name, size in sizes.items()}
    return {name: LinearForm(precision, 0, scales.get(name, 1.0)) for name in names}


def imported_forms(config: ModelConfig, precision: str, formats: Mapping[str, BlockFormat]) -> dict[str, LinearForm]:
    """Return how linears are stored whose codes are taken over: in one block, as products that are merged must be.

    Args:
        config: the shapes.
        precision: one of blocks.
        formats: of the layers' linears that are in codes.

    Raises:
        UsageError: codes that TensorRT does not have, or of one of several linears that read one input.
    """
    shapes, sizes = weight_shapes(config), []
    for name, form in formats.items():
        try:
            sizes.append(static_block(form, shapes[name][1]))
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    for group in shared_inputs(operations(config)):
        names = [row.weight for row in group if row.weight is not None]
        if not set(names).isdisjoint(formats) and (others := [name for name in names if name not in formats]):
            raise UsageError(f"{others[0]} is not in codes, and is multiplied together with {names[0]}")
    return {name: LinearForm(precision, min(sizes), None) for name in formats}


def imported_static_weights(
    source: WeightSource,
    config: ModelConfig,
    precision: str,
    formats: Mapping[str, BlockFormat],
    matrices: Mapping[str, QuantizedMatrix],
) -> StaticWeights:
    """Take over the codes of a package's variant for a TensorRT graph.

    Args:
        source: the weights that they stand for.
        config: their shape.
        precision: one of blocks.
        formats: of the linears that are in codes, by the checkpoint's names.
        matrices: these codes; each is read now, and again when it is written.

    Raises:
        UsageError: as `imported_forms`; act-order, or scales that are not positive.
    """
    forms = imported_forms(config, precision, formats)

    def make(name: str, form: BlockFormat) -> QuantizedMatrix:
        try:
            return in_static_blocks(matrices[name], form.block_size)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error

    smaller = {name: replace(formats[name], block_size=form.block_size) for name, form in forms.items()}
    for name, form in smaller.items():
        make(name, form)  # what is refused is refused before a graph is written
    blocks = QuantizedWeights(smaller, make, lambda name: stored_weight(source, config, name))
    return StaticWeights(source, config, precision, forms, blocks)


def _block_formats(config: ModelConfig, precision: str) -> tuple[BlockFormat, BlockFormat]:
    """Return the formats of the layers' linears and of the head."""
    bits = static_row(precision).weights.bits
    form = BlockFormat(bits, static_block_size(config, precision), symmetric=True, positive=True)
    return form, replace(form, block_size=min(BLOCK_SIZES))


def static_input_scales(
    source: WeightSource, config: ModelConfig, precision: str, calibration: Path | None
) -> dict[str, float]:
    """Return the scales of the linears' inputs, by the weights' names; arguments and errors as `static_weights`."""
    tokens = calibration_tokens(source, config, calibration, **_CALIBRATION)
    stored = static_row(precision).weights
    assert stored.inputs is not None  # the caller asks of no other
    return input_scales(source, config, tokens, _SCALES[stored.inputs], stored.kept)


def _names(config: ModelConfig, precision: str) -> list[str]:
    kept = static_row(precision).weights.kept
    names = [name for name in weight_shapes(config) if name != EMBEDDING]
    return [name for name in names if not name.removesuffix(".weight").endswith(kept)]
