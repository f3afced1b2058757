"""What quantising costs: KL divergence, top-1 agreement and perplexity against PyTorch in float32, and the gates.

Measured on text (held-out text that comes with this package, in the checkpoint's own tokens), or on random ids where
the checkpoint has no tokenizer, through onnxruntime, at every position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

import olmo2_export.catalog as catalog
from olmo2_export.architecture import operations, tensor_shapes
from olmo2_export.catalog import QualityGate
from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import QUALITY, Check, Gate, PerplexityChange, kl_divergence, perplexity_change
from olmo2_export.tokenizer_file import load_tokenizer
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes.errors import PackageError
from runtimes.manifest import Quality, TokensFrom, Variant
from runtimes.runners.runner import Logits, TokenIds

SEED = 0
PIECE = 32
"""positions at a time: logits of a large vocabulary, in float64, take 0.8 MB each"""
LONG = 4096
"""tokens of a sequence on which a quantised KV cache is measured, where the context holds them"""
_LENGTH = 256
_MOST_OF_ONE = 0.5  # share of a text that may be one token: of a foreign alphabet, all are "unknown"
_LOGITS = 1 << 25  # float32 numbers of reference logits that may be kept: 128 MB
_MOST_TOKENS = 4096
_TEXT = Path(__file__).parents[1] / "demo" / "heldout.txt"
_LARGE = 100_000_000  # weights
_MOST_LOSS = 700.0  # nats: beyond it, on ids that no model expects, a perplexity is no number


def gate_of(variant: Variant, config: ModelConfig) -> QualityGate:
    """Return the gate of a quantised variant for a model of that size.

    Raises:
        VariantNotFoundError: this version does not know the variant.
        PackageError: its weights are not quantised.
    """
    gates = catalog.find(variant.name).weights.gates
    if gates is None:
        raise PackageError(f"variant {variant.name}: its weights are not quantised; there is no gate of their quality")
    return gates[is_large(config)]


def is_large(config: ModelConfig) -> bool:
    """Tell whether a model has the gates of large ones."""
    return sum(map(math.prod, tensor_shapes(operations(config)).values())) > _LARGE


def quality_check(name: str, measured: Measurement, length: int, limits: QualityGate) -> Check:
    """Say what was measured, on sequences of that many tokens, and which limits do not hold."""
    quality = measured.quality
    found = (
        f"KL {quality.kl_mean:.2g}, p99 {quality.kl_p99:.2g}, top-1 {quality.top1:.1%}, "
        f"{describe(measured.perplexity)} in {length}s"
    )
    return Check(name, found, tuple(broken_limits(quality, limits)), QUALITY)


def perplexity_check(change: PerplexityChange, length: int, limits: Gate) -> Check:
    """Say how the perplexity of a graph that is not quantised changed; it counts on text alone."""
    failures = []
    if limits.perplexity_rise is not None and change.tokens_from == "text":
        if not abs(change.relative) <= limits.perplexity_rise:
            failures.append(f"perplexity {change.relative:+.3%}, the gate is ±{limits.perplexity_rise:.3%}")
    elif not math.isfinite(change.relative):
        failures.append("perplexity is no number")
    return Check("quality", f"{describe(change)} in {length}s", tuple(failures), QUALITY)


def describe(change: PerplexityChange) -> str:
    """Return the change in words."""
    interval = "" if math.isnan(change.low) else f", 95 % from {change.low:+.2g} to {change.high:+.2g}"
    return (
        f"perplexity {change.test:.3f} ({change.relative:+.2g}{interval}) on {change.tokens} tokens of "
        f"{change.tokens_from}"
    )


def broken_limits(quality: Quality, limits: QualityGate) -> list[str]:
    """Return the limits that do not hold, with both numbers; perplexity counts on text alone."""
    rise = quality.perplexity / quality.reference_perplexity - 1
    broken = []
    if not quality.kl_mean <= limits.kl_mean:
        broken.append(f"KL mean {quality.kl_mean:.3g}, the gate is {limits.kl_mean:g}")
    if limits.kl_p99 is not None and not quality.kl_p99 <= limits.kl_p99:
        broken.append(f"KL p99 {quality.kl_p99:.3g}, the gate is {limits.kl_p99:g}")
    if not quality.top1 >= limits.top1:
        broken.append(f"top-1 {quality.top1:.2%} ± {top1_error(quality):.2%}, the gate is {limits.top1:.2%}")
    if quality.tokens_from == "text" and not rise <= limits.perplexity_rise:
        broken.append(f"perplexity {rise:+.2%}, the gate is {limits.perplexity_rise:+.2%}")
    return broken


def top1_error(quality: Quality) -> float:
    """Return the standard error of a top-1 agreement, as a share: that of so many positions, each one draw."""
    return math.sqrt(max(0.0, quality.top1 * (1 - quality.top1)) / quality.tokens)


def quality_tokens(
    checkpoint: Checkpoint, config: ModelConfig, *, length: int | None = None, most: int | None = None
) -> tuple[list[np.ndarray], TokensFrom]:
    """Return the token sequences that quality is measured on, and where they come from.

    Args:
        checkpoint: for its tokenizer.
        config: for its vocabulary and context.
        length: tokens of a sequence; None means 256, or the context if that is shorter.
        most: tokens in all; None means 4096, or fewer for a large vocabulary, whose logits would fill the memory.

    Returns:
        int64 [length] each, and `text` or `random ids`.
    """
    length, count = _sequences(config, length, most)
    path = checkpoint.folder / "tokenizer.json"
    if path.is_file():
        ids = load_tokenizer(path).encode(_TEXT.read_text(encoding="utf-8")).ids
        unknown = max(Counter(ids).values(), default=0) > _MOST_OF_ONE * len(ids)  # a text in a foreign alphabet
        if len(ids) >= length and max(ids) < config.vocab_size and not unknown:
            count = min(count, len(ids) // length)
            return [np.array(ids[i * length : (i + 1) * length], np.int64) for i in range(count)], "text"
    drawn = np.random.default_rng(SEED).integers(0, config.vocab_size, (count, length), dtype=np.int64)
    return list(drawn), "random ids"


def _sequences(config: ModelConfig, length: int | None = None, most: int | None = None) -> tuple[int, int]:
    """Return the tokens of a sequence, and how many sequences there are at most; see `quality_tokens`."""
    length = min(length or _LENGTH, config.max_position_embeddings)
    most = most or max(length, min(_MOST_TOKENS, _LOGITS // config.vocab_size))
    return length, max(1, most // length)


def quality_size(config: ModelConfig) -> int:
    """Return the tokens, at most, that `quality_tokens` gives by default."""
    length, count = _sequences(config)
    return length * count


@dataclass(frozen=True)
class Measurement:
    """What was found on text, and the change of perplexity with its interval."""

    quality: Quality
    perplexity: PerplexityChange


class Measured(Protocol):
    """What is asked of a runner here; see `runtimes.runners.runner.Runner`."""

    def reset(self) -> None: ...
    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]: ...
    def decode_block(self, token_ids: TokenIds) -> Logits: ...


def measure_quality(
    runner: Measured,
    sequences: Sequence[np.ndarray],
    reference: Iterable[np.ndarray],
    tokens_from: TokensFrom,
    *,
    alternate: bool = False,
) -> Measurement:
    """Compare a runner with reference logits at every position.

    Args:
        runner: of the quantised graph.
        sequences: int64 [S] each.
        reference: per sequence float32 [S, V].
        tokens_from: for the report.
        alternate: feed every other piece to the decode graph, so that each graph reads what the other wrote.
    """
    kls: list[np.ndarray] = []
    agreements: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for ids, wanted in zip(sequences, reference, strict=True):
        runner.reset()
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            if alternate and start // PIECE % 2:
                test = runner.decode_block(piece)
            else:
                (test,) = runner.prefill([piece], all_positions=True)
            truth = wanted[start : start + PIECE]
            kls.append(kl_divergence(truth, test))
            agreements.append(truth.argmax(-1) == test.argmax(-1))
            following = ids[start + 1 : start + 1 + PIECE]
            losses.append(np.stack([token_losses(x[: len(following)], following) for x in (truth, test)]))
    runner.reset()
    kl = np.concatenate(kls)
    # A loss that is no number on text, on ids that no model expects, is still compared.
    of_reference, of_test = np.concatenate(losses, axis=1).clip(max=_MOST_LOSS)
    change = perplexity_change(of_reference, of_test, tokens_from)
    quality = Quality(
        tokens=len(kl),
        tokens_from=tokens_from,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate(agreements).mean()),
        perplexity=change.test,
        reference_perplexity=change.reference,
    )
    return Measurement(quality, change)


def score_check(scores: np.ndarray, reference: np.ndarray, limit: float, origin: TokensFrom) -> Check:
    """Hold a classifier's scores to a limit of their error.

    Args:
        scores: of the graph, float32 [sequences, labels].
        reference: of PyTorch in float32.
        limit: most: RMS error / standard deviation of a label's scores over the sequences.
        origin: of the sequences, for the report.
    """
    spread = float(np.sqrt(np.mean(reference.astype(np.float64).var(axis=0)))) or 1.0
    error = float(np.sqrt(np.mean(np.square(scores.astype(np.float64) - reference)))) / spread
    order = np.corrcoef(scores[:, 0], reference[:, 0])[0, 1] if len(scores) > 1 else 1.0
    found = (
        f"scores of {len(scores)} sequences of {origin} are off by {error:.2e} of their spread, correlation {order:.5f}"
    )
    failures = () if error <= limit else (f"score error {error:.3g}, the gate is {limit:g}",)
    return Check("quality", found, failures, QUALITY)


def states_check(number: int, states: np.ndarray, reference: np.ndarray, limit: float, origin: TokensFrom) -> Check:
    """Hold hidden states to a limit of their error.

    Args:
        number: of the hidden state.
        states: of the graph, float32 [tokens, hidden].
        reference: of PyTorch in float32.
        limit: most: RMS error / RMS of the reference around its mean.
        origin: of the tokens, for the report.
    """
    wide, truth = states.astype(np.float64), reference.astype(np.float64)
    error = float(np.sqrt(np.square(wide - truth).mean())) / (float(truth.std()) or 1.0)
    cosine = float(wide.mean(0) @ truth.mean(0) / (np.linalg.norm(wide.mean(0)) * np.linalg.norm(truth.mean(0)) or 1.0))
    found = (
        f"of {len(states)} tokens of {origin} are off by {error:.2e} of their spread; their mean has a cosine of "
        f"{cosine:.5f} with PyTorch's"
    )
    failures = () if error <= limit else (f"error {error:.3g}, the gate is {limit:g}",)
    return Check(f"quality of hidden state {number}", found, failures, QUALITY)


def token_losses(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return -log p of the ids, in nats: logits [n, V], ids [n] -> float64 [n]."""
    x = logits.astype(np.float64)
    top = x.max(axis=-1)
    total: np.ndarray = np.log(np.exp(x - top[:, None]).sum(axis=-1)) + top
    return total - np.take_along_axis(x, ids[:, None], axis=-1)[:, 0]
