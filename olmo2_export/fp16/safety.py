"""Whether a model fits float16: measure, name what overflows, propose the smallest float32 islands, and prove them.

1. Measured, in float32 on text: max |x| of every value of `architecture`, and max |w| of every weight.
2. Named: what is beyond the margin. Its default, 30000, is less than half of float16's largest number, 65504: on a text
   that was not measured a value may be larger, and the rounded model drifts from the measured one.
3. Proposed: each named value stays float32, with the operation that writes it and those that read it; each named
   weight stays float32, with the operation that multiplies with it. No other operation does.
4. Proved, by PyTorch rounding every value and weight of the graph to float16, to infinity where it does not fit:
   without any island; with all; and with all but one, for each. An island whose absence leaves everything finite is
   there for the margin alone, and the report says so.

What needs no island, because the kernels hold it in float32: the squares in RMSNorm, the sums of products, and the
attention scores. onnxruntime's attention kernels for CUDA, flash, memory-efficient and since pull request 28198 the
unfused one too, keep q.k in float32; what TensorRT's fused attention does is not said. They are measured and reported,
for who runs the weights elsewhere, but do not count.
Source: github.com/microsoft/onnxruntime/pull/28198 and issue 28195, NaN from scores in float16.

GroupQueryAttention takes float16 or bfloat16 on CUDA, and its KV cache has the same dtype: what goes in and out of it
cannot be an island. Where that overflows only bfloat16 helps, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from torch import Tensor

from olmo2_export.architecture import Kind, Operation, around_attention, operations
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.simulate import Simulated, simulate
from olmo2_export.fp16.values import (
    PARAMETERS,
    SCORES,
    Float32Islands,
    Walk,
    Weights,
    islands_of,
    largest_weights,
    walk_all,
)
from olmo2_export.quantize.calibration import calibration_tokens
from olmo2_export.weights.source import WeightSource
from runtimes.errors import FailedError, NumericError, UsageError, first_names

LIMIT = 65504.0
"""the largest float16"""
MARGIN = 30000.0
"""what may be seen on a text and still be called safe"""
TOKENS = 1024
_LENGTH = 256
_PROOF_SEQUENCES = 4
_WRITERS: dict[Kind, str] = {
    "gather": "the lookup",
    "linear": "the linear layer",
    "rms_norm": "the RMSNorm",
    "layer_norm": "the LayerNorm",
    "clip": "the clip",
    "rotary": "the rotary embedding",
    "attention": "the attention",
    "add": "the sum",
    "silu": "the SiLU",
    "multiply": "the product",
}
_TEXT = Path(__file__).parents[1] / "demo" / "calibration.txt"


@dataclass(frozen=True)
class Peak:
    """The largest number of a value, or of a weight."""

    name: str
    """as in `architecture`; of a weight the checkpoint's name"""
    largest: float
    """max |x|"""
    sequence: int | None = None
    position: int | None = None
    """where on the text; None for a weight"""
    channel: int | None = None
    token: str | None = None
    """the text of that token; None without a tokenizer"""

    @property
    def where(self) -> str:
        """In words."""
        if self.position is None:
            return "a weight"
        token = f" {self.token!r}" if self.token is not None else ""
        return f"sequence {self.sequence}, position {self.position}{token}, channel {self.channel}"


@dataclass(frozen=True)
class Island:
    """One value or weight that stays float32, with the operations around it."""

    peak: Peak
    operation: Operation
    """writes the value, or multiplies with the weight"""
    read_by: tuple[str, ...]
    breaks: str | None = None
    """the first value that is not finite when this island alone is missing; None: all stay finite on this text"""

    @property
    def is_weight(self) -> bool:
        return self.peak.position is None

    @property
    def reason(self) -> str:
        """In words."""
        p = self.peak
        size = f"max {p.largest:,.0f}" if p.largest > LIMIT else f"max {p.largest:,.0f}, beyond the margin"
        if self.is_weight:
            return f"{size}, a weight; {_WRITERS[self.operation.kind]} of {', '.join(self.operation.reads)} uses it"
        inputs = " and ".join(self.operation.reads) or "the tokens"
        readers = ", ".join(self.read_by) or "the cast to float32"
        return f"{size} at {p.where}; written by {_WRITERS[self.operation.kind]} of {inputs}, read by {readers}"


@dataclass(frozen=True)
class Safety:
    """The whole finding."""

    tokens: int
    tokens_from: str
    """text | random ids"""
    margin: float
    peaks: dict[str, Peak] = field(hash=False)
    """of values and weights, in the model's order"""
    islands: tuple[Island, ...]
    blocked: tuple[Peak, ...]
    """beyond the margin where no island can be"""
    bare: Simulated | None = None
    """without islands; None: not asked for"""
    held: Simulated | None = None
    """with them"""

    @property
    def safe(self) -> bool:
        return not self.islands and not self.blocked

    @property
    def wide(self) -> Float32Islands:
        """What the graph keeps in float32."""
        return islands_of([island.peak.name for island in self.islands])

    @property
    def reasons(self) -> dict[str, str]:
        """What the graph keeps in float32, and why, for the manifest."""
        return {island.peak.name: island.reason for island in self.islands}

    @property
    def kept_anyway(self) -> list[Peak]:
        """What is beyond float16 inside kernels, which compute it in float32: scores, and the squares of norms."""
        inside = [p for name, p in self.peaks.items() if name.endswith(SCORES)]
        squares = [
            dataclasses.replace(p, name=f"{norm}.squares", largest=p.largest**2)
            for name, p in self.peaks.items()
            if name.endswith((".q_proj", ".k_proj")) and (norm := f"{name.removesuffix('_proj')}_norm") in self.peaks
        ]
        return [p for p in (*inside, *squares) if p.largest > LIMIT]

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form; numbers that are not finite become None."""
        largest = max(self.peaks.values(), key=lambda p: -1.0 if p.name.endswith(SCORES) else p.largest)
        return {
            "safe": self.safe,
            "tokens": self.tokens,
            "tokens_from": self.tokens_from,
            "limit": LIMIT,
            "margin": self.margin,
            "largest": dataclasses.asdict(largest),
            "islands": [
                {
                    **dataclasses.asdict(i.peak),
                    "operation": i.operation.name,
                    "read_by": i.read_by,
                    "first_not_finite_without": i.breaks,
                }
                for i in self.islands
            ],
            "blocked": [dataclasses.asdict(p) for p in self.blocked],
            "kept_float32_inside_kernels": {p.name: p.largest for p in self.kept_anyway},
            "without_islands": _document(self.bare),
            "with_islands": _document(self.held),
            "peaks": {name: p.largest for name, p in self.peaks.items() if not name.endswith(PARAMETERS)},
        }


def _document(found: Simulated | None) -> dict[str, Any] | None:
    if found is None:
        return None
    document = dataclasses.asdict(found) | {"finite": found.finite}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in document.items()}


class _Measure:
    """Remembers the largest number of every value and weight, and where it was."""

    def __init__(self) -> None:
        self.sequence = 0
        self.values: dict[str, Peak] = {}
        self.weights: dict[str, float] = {}

    def value(self, name: str, x: Tensor, first_channel: int = 0, /) -> Tensor:
        low, high = x.aminmax()
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            raise NumericError(f"{name}: not finite in float32; the model does not work, whatever the precision")
        if name not in self.values or largest > self.values[name].largest:
            at = np.unravel_index(int(x.abs().argmax()), tuple(x.shape))
            position = int(at[-2])
            self.values[name] = Peak(name, largest, self.sequence, position, first_channel + int(at[-1]))
        return x

    def weight(self, _row: Operation, name: str, weights: Weights) -> Tensor:
        exact = weights.exact(name)
        if name not in self.weights:
            self.weights[name] = float(exact.abs().max())
        return exact


def safety_tokens(
    checkpoint: WeightSource, config: ModelConfig, text: Path | None, tokens: int = TOKENS
) -> tuple[list[np.ndarray], str]:
    """Return sequences to measure on, int64 [S] each, and what they are: `text` or `random ids`.

    Args:
        checkpoint: for its tokenizer.
        config: for its vocabulary and context.
        text: UTF-8; None: the text that comes with this package, random ids for a checkpoint without a tokenizer.
        tokens: about how many in all.

    Raises:
        UsageError: a text that is unreadable or too short, or too few tokens.
    """
    length = min(_LENGTH, config.max_position_embeddings)
    if tokens < length:
        raise UsageError(f"{tokens} tokens: expected {length} or more, one sequence")
    count = tokens // length
    if text is None and not (checkpoint.folder / "tokenizer.json").is_file():
        drawn = np.random.default_rng(0).integers(0, config.vocab_size, (count, length), dtype=np.int64)
        return list(drawn), "random ids"
    return calibration_tokens(checkpoint, config, text or _TEXT, sequences=count, length=length), "text"


def measure_safety(
    checkpoint: WeightSource,
    config: ModelConfig,
    *,
    text: Path | None = None,
    tokens: int = TOKENS,
    margin: float = MARGIN,
    prove: bool = False,
) -> Safety:
    """Measure a model and say whether it fits float16, and which islands make it fit.

    Args:
        checkpoint: the weights.
        config: their shape.
        text: as in `safety_tokens`.
        tokens: likewise.
        margin: the largest number that is called safe; no more than 65504.
        prove: simulate the graph without, with all, and with all but one of the islands.

    Raises:
        UsageError: a margin beyond float16, or what `safety_tokens` refuses.
        NumericError: a value that is not finite in float32.
    """
    if not 0 < margin <= LIMIT:
        raise UsageError(f"margin {margin:g}: expected more than 0 and no more than {LIMIT:g}, the largest float16")
    sequences, origin = safety_tokens(checkpoint, config, text, tokens)
    measure = _Measure()
    for _ in walk_all(checkpoint, config, [Walk(measure, sequences, 0)], "measuring ranges"):
        pass
    weights = measure.weights | largest_weights(checkpoint, config)
    peaks = _spelled(checkpoint, sequences, measure.values)
    peaks |= {name: Peak(name, largest) for name, largest in weights.items()}
    rows = operations(config)
    fixed = around_attention(rows)
    blocked = tuple(p for name, p in peaks.items() if name in fixed and p.largest > margin)
    found = Safety(
        tokens=sum(map(len, sequences)),
        tokens_from=origin,
        margin=margin,
        peaks=peaks,
        islands=tuple(_islands(rows, peaks, margin)),
        blocked=blocked,
    )
    return _proved(checkpoint, config, sequences, found) if prove else found


def _islands(ops: Sequence[Operation], peaks: Mapping[str, Peak], margin: float) -> list[Island]:
    """Return an island for each value beyond the margin that can have one, and for each weight beyond float16."""
    found = []
    fixed = around_attention(ops)  # it has them in float16, whatever is wished
    for op in ops:
        # A weight is what it is on every text, and rounds to something finite up to the limit.
        for name in (op.weight, op.bias):
            if name is not None and name in peaks and peaks[name].largest > LIMIT:
                found.append(Island(peaks[name], op, ()))
        peak = peaks[op.name]
        if peak.largest > margin and op.name not in fixed:
            readers = tuple(other.name for other in ops if op.name in other.reads)
            found.append(Island(peak, op, readers))
    return found


def _spelled(checkpoint: WeightSource, sequences: Sequence[np.ndarray], peaks: Mapping[str, Peak]) -> dict[str, Peak]:
    """Add the text of each peak's token."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        return dict(peaks)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return {
        name: dataclasses.replace(p, token=tokenizer.decode([int(sequences[p.sequence or 0][p.position or 0])]))
        for name, p in peaks.items()
    }


def _proved(checkpoint: WeightSource, config: ModelConfig, sequences: Sequence[np.ndarray], found: Safety) -> Safety:
    """Add what the simulations say, on the sequences that have the peaks, up to the last peak of each."""
    ends: dict[int, int] = {}
    for p in [i.peak for i in found.islands] + list(found.blocked):
        if p.sequence is not None and p.position is not None:
            ends[p.sequence] = max(ends.get(p.sequence, 0), p.position + 1)
    for index in range(len(sequences)):
        if len(ends) < min(_PROOF_SEQUENCES, len(sequences)):
            ends.setdefault(index, 0)
    chosen = [sequences[index][: max(end, _LENGTH // 4)] for index, end in sorted(ends.items())]
    wide = found.wide
    less = [wide.without(i.operation.name, weight=i.is_weight) for i in found.islands]
    settings = [Float32Islands(), wide, *less] if found.islands else [Float32Islands()]
    results = simulate(checkpoint, config, chosen, settings)
    bare, held, dropped = results[0], results[min(1, len(results) - 1)], results[2:]
    islands = tuple(
        dataclasses.replace(island, breaks=result.first_not_finite)
        for island, result in zip(found.islands, dropped, strict=True)
    )
    return dataclasses.replace(found, islands=islands, bare=bare, held=held)


def refuse_overflow(found: Safety, what: str, *, can_have_islands: bool = True) -> None:
    """Refuse a float16 graph that would overflow.

    Args:
        found: what was measured.
        what: is refused, for the message.
        can_have_islands: the graph that is wanted can keep tensors in float32.

    Raises:
        FailedError: naming the values and what to do.
    """
    if found.safe:
        return
    worst = sorted([i.peak for i in found.islands] + list(found.blocked), key=lambda p: -p.largest)
    names = first_names(f"{p.name} {p.largest:,.0f}" for p in worst)
    remedy = "use bf16, which has the range of float32"
    if found.blocked:
        remedy += "; the attention has no float32 kernel on GPUs"
    elif can_have_islands:
        remedy += ", or float32 islands: olmo2-export fp16 MODEL --apply --out DIR"
    raise FailedError(
        f"{what}: {len(worst)} tensors beyond {found.margin:,.0f} on {found.tokens} tokens of {found.tokens_from}, "
        f"float16 ends at {LIMIT:,.0f}: {names}; {remedy}"
    )
