"""Run a graph in every way that `feeds.py` has, against PyTorch, and let it decode freely; one report per variant."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from olmo2_export.config import ModelConfig, config_of
from olmo2_export.measure.parity import (
    DRAWS,
    CaseResult,
    Gate,
    ParityReport,
    Scale,
    compare,
    compare_greedy,
    compare_states,
    failed_case,
    scale_of,
)
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.truth.reference import Rounding, open_reference
from olmo2_export.verify.beside import NOTHING, Beside, ask_by_layer, ask_reference, feed_beside, questions
from olmo2_export.verify.feeds import MIN_CAPACITY, ModeResult, compared_positions, feed_all, row_lengths
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import head_weight, linear_names
from runtimes import Runner, open_package
from runtimes.errors import ConfigError, FailedError, PackageError
from runtimes.package import AnyPackage

SEED = 0
LONGEST = 4096
"""tokens of the longest rows where a cache holds more; PyTorch in float64 has to compute them too"""
_KEPT = 64 << 20
"""bytes of logits, at most, that are kept for a second comparison"""
GREEDY_TOKENS = 24
GREEDY_PROMPT = 5
_TEXT = Path(__file__).parents[1] / "demo" / "heldout.txt"


Draws = Callable[[], list[list[np.ndarray]]]
"""asks PyTorch for its logits again, several times, each with other last bits: see `parity.compare`"""

_LAST_BIT, _TIE = 2.0**-25, 2.0**-13  # moves less than float32 rounds; moves the largest of 127 codes by 0.016


@dataclass(frozen=True)
class Truth:
    """What PyTorch says of the test sequences."""

    sequences: list[np.ndarray]
    """int64 token ids, each [length]"""
    positions: list[np.ndarray]
    """per sequence int64 [n]: those of which there are logits here"""
    capacity: int
    """tokens of the longest rows"""
    tokens_from: str
    beside: Beside
    """what else was asked"""
    exact: list[np.ndarray]
    """per sequence float64 [n, vocab_size], or [n, labels]; behind them the answers to `beside`"""
    own: dict[str, list[np.ndarray]]
    """precision -> the same in float32"""
    continuations: list[tuple[np.ndarray, np.ndarray]]
    """greedy tokens after each sequence's first GREEDY_PROMPT, and the gaps by which they were chosen; () of scores"""
    draws: Draws
    """of `own` in fp32"""


def ask_pytorch(
    package: AnyPackage,
    checkpoint: Checkpoint,
    precisions: Collection[str],
    capacity: int | None = None,
    bar: tqdm[Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    by_layer: bool = False,
) -> Truth:
    """Compute what is compared against, once for all variants.

    Args:
        package: for its tokenizer and its shape.
        checkpoint: the reference weights.
        precisions: of the variants to be measured.
        capacity: tokens of the longest rows, which fill the smallest of their caches; None means the context, or
            LONGEST if that is less.
        bar: advanced after each PyTorch model.
        weights: to compute with instead of the reference's, by the checkpoint's names.
        by_layer: with one layer in memory at a time; there are no continuations then.

    Raises:
        ConfigError: package and reference are not of one shape.
    """
    opened = open_package(package)
    spec = opened.model
    config = config_of(checkpoint.folder, spec)
    if spec != config.spec:
        different = [k for k, v in vars(config.spec).items() if getattr(spec, k) != v]
        raise ConfigError(f"{opened.folder}: not of the reference's shape: {', '.join(different)} differ")
    capacity = min(config.max_position_embeddings, LONGEST) if capacity is None else capacity
    if capacity < MIN_CAPACITY:
        raise PackageError(f"{opened.folder}: a cache of {capacity} tokens; verification needs {MIN_CAPACITY}")
    sequences, origin = _sequences(opened.folder, config, row_lengths(capacity))
    beside = questions(config, sequences, capacity)
    positions = compared_positions(capacity)
    new_tokens = min(GREEDY_TOKENS, capacity - GREEDY_PROMPT)
    exact: list[np.ndarray] = []
    own: dict[str, list[np.ndarray]] = {}
    continuations: list[tuple[np.ndarray, np.ndarray]] = []
    for precision in ["fp64", *sorted({"fp32", *precisions})]:
        if by_layer:
            layered = LayeredReference(checkpoint, config, precision, weights)
            logits = ask_by_layer(layered, config, sequences, positions, beside)
        else:
            with open_reference(checkpoint, precision, weights) as torch_model:
                logits = ask_reference(torch_model, sequences, positions, beside)
                if precision == "fp32" and not config.labels:
                    continuations = [torch_model.greedy(ids[:GREEDY_PROMPT], new_tokens) for ids in sequences]
        if precision == "fp64":
            exact = logits
        else:
            own[precision] = logits
        if bar is not None:
            bar.update()
    draw = draw_by_layer if by_layer else draw_logits
    draws = partial(draw, checkpoint, sequences, positions, weights or {}, dict.fromkeys(_linears(config)), beside)
    return Truth(sequences, positions, capacity, origin, beside, exact, own, continuations, draws)


def draw_logits(
    checkpoint: Checkpoint,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    weights: Mapping[str, torch.Tensor],
    rounding: Mapping[str, Rounding | None],
    beside: Beside = NOTHING,
) -> list[list[np.ndarray]]:
    """Run PyTorch in float32 DRAWS times, the inputs of its linears moved a little, each time otherwise.

    Args:
        checkpoint: the reference weights.
        sequences: int64 token ids, each [length].
        positions: per sequence int64 [n], where logits are wanted.
        weights: to compute with instead of the reference's.
        rounding: by the linears' names, what rounds their inputs; None: nothing does.
        beside: what else is asked.

    Returns:
        Per draw and sequence float32 [n, vocab_size]; behind them the answers to `beside`.
    """
    with open_reference(checkpoint, "fp32", weights, _moved(rounding)) as reference:
        return [ask_reference(reference, sequences, positions, beside) for _ in range(DRAWS)]


def draw_by_layer(
    checkpoint: Checkpoint,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    weights: Mapping[str, torch.Tensor],
    rounding: Mapping[str, Rounding | None],
    beside: Beside = NOTHING,
) -> list[list[np.ndarray]]:
    """As `draw_logits`, with one layer in memory at a time."""
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    reference = LayeredReference(checkpoint, config, "fp32", weights, _moved(rounding))
    return [ask_by_layer(reference, config, sequences, positions, beside) for _ in range(DRAWS)]


def _moved(rounding: Mapping[str, Rounding | None]) -> dict[str, Rounding]:
    """Return what moves the inputs of linears a little, and then rounds them where they are."""
    generator = torch.Generator().manual_seed(SEED)

    def moved(rounds: Rounding | None) -> Rounding:
        size = _LAST_BIT if rounds is None else _TIE

        def move(x: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = (x * (1 + size * noise)).float()
            return x if rounds is None else rounds(x)

        return move

    return {name: moved(rounds) for name, rounds in rounding.items()}


def _linears(config: ModelConfig) -> list[str]:
    return [*linear_names(config), head_weight(config)]


def measure_runner(
    runner: Runner,
    truth: Truth,
    own: Sequence[np.ndarray],
    gate: Gate,
    draws: Draws | None,
    variant: str,
    precision: str,
    graph_sha256: str,
    backend: str = "ort",
) -> ParityReport:
    """Run every case on an open runner, and let it decode freely; compare.

    Args:
        runner: of any graph.
        truth: what `ask_pytorch` found.
        own: per sequence float32 [n, vocab_size], PyTorch's logits in the arithmetic that the gate is for.
        gate: the limits.
        draws: of `own`; None: its error is taken as it is.
        variant: the report's name of the variant.
        precision: of the variant.
        graph_sha256: of the ONNX file that is run.
        backend: what runs it.
    """
    cases = feed(runner, truth, truth.exact, own, gate, draws)
    tokens = [
        _greedy(runner, ids[:GREEDY_PROMPT], len(wanted))
        for ids, (wanted, _) in zip(truth.sequences, truth.continuations, strict=bool(truth.continuations))
    ]
    limit = runner.max_cache_length
    return report_of(truth, gate, cases, tokens, variant, precision, graph_sha256, limit, backend=backend)


def report_of(
    truth: Truth,
    gate: Gate,
    cases: Sequence[CaseResult],
    tokens: Sequence[np.ndarray],
    variant: str,
    precision: str,
    graph_sha256: str,
    max_cache_length: int,
    *,
    backend: str = "ort",
    coverage: str = "",
) -> ParityReport:
    """Make the report of what was measured.

    Args:
        truth: what `ask_pytorch` found.
        gate: the limits.
        cases: compared already.
        tokens: the greedy ones, where there are continuations to compare with; int64 each.
        variant, precision, graph_sha256, backend: see `measure_runner`.
        max_cache_length: tokens that the cache holds.
        coverage: what was not run, and why; empty: all was.
    """
    return ParityReport(
        variant=variant,
        backend=backend,
        precision=precision,
        graph_sha256=graph_sha256,
        sequences=tuple(len(s) for s in truth.sequences),
        tokens_from=truth.tokens_from,
        seed=SEED,
        gate=gate,
        cases=tuple(cases),
        greedy=compare_greedy(
            tokens, [wanted for wanted, _ in truth.continuations], [gaps for _, gaps in truth.continuations], gate
        ),
        libraries={name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "transformers")},
        capacity=truth.capacity,
        max_cache_length=max_cache_length,
        coverage=coverage,
    )


def feed(
    runner: Runner,
    truth: Truth,
    exact: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    gate: Gate,
    draws: Draws | None = None,
) -> list[CaseResult]:
    """Run every case of `feeds.feed_all` and compare; if one is off, all again with several draws of PyTorch's error.

    What the runner gave is compared again as it is where it is small; else it runs again.

    Args:
        runner: of any graph.
        truth: for its sequences, and the positions that are compared.
        exact: per sequence [positions, vocab_size], what is true.
        own: the same at the gate's precision.
        gate: the limits.
        draws: of `own`; None: its error is taken as it is.
    """
    return compare_fed(lambda: _feed_all(runner, truth), truth, exact, own, gate, draws)


def compare_fed(
    run: Callable[[], Iterable[ModeResult]],
    truth: Truth,
    exact: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    gate: Gate,
    draws: Draws | None = None,
) -> list[CaseResult]:
    """As `feed`; `run` gives the cases, anew at each call."""
    cases: list[CaseResult] = []
    kept: list[ModeResult] | None = []
    held = 0
    scale = _scale(truth, exact, own)
    for fed in run():
        cases.append(_compared(fed, truth, exact, own, gate, (), scale))
        held += sum(logits.nbytes for logits in fed.logits)
        kept = [*kept, fed] if kept is not None and held <= _KEPT else None
    if draws is None or all(case.passed for case in cases):
        return cases
    drawn = draws()
    again = kept if kept is not None else run()
    scale = _scale(truth, exact, own, *drawn)
    return [_compared(fed, truth, exact, own, gate, drawn, scale) for fed in again]


def _feed_all(runner: Runner, truth: Truth) -> Iterator[ModeResult]:
    yield from feed_all(runner, truth.sequences, truth.capacity)
    yield from feed_beside(runner, truth.beside)


def compare_padded(
    whole: Callable[[np.ndarray, np.ndarray], np.ndarray],
    truth: Truth,
    exact: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    gate: Gate,
    draws: Draws | None,
    *,
    left: bool,
) -> list[CaseResult]:
    """Run padded batches as other runtimes feed a graph, without any runner; arguments as `feed`.

    Args:
        whole: ids and mask, int64 [B, S] -> scores float32 [B, labels].
        left: whether it takes padding on the left.
    """
    batches = [
        (n, batch) for n, batch in enumerate(truth.beside.padded, len(truth.sequences)) if left or not batch.left
    ]
    found = [(n, batch, whole(batch.ids, batch.mask)) for n, batch in batches]

    def compared(drawn: Sequence[Sequence[np.ndarray]]) -> list[CaseResult]:
        scale = _scale(truth, exact, own, *drawn)
        return [
            compare(f"graph, {batch.name}", batch.lengths, [scores], [exact[n]], [own[n]], gate,
                    [[draw[n]] for draw in drawn], scale)
            for n, batch, scores in found
        ]  # fmt: skip

    cases = compared(())
    return cases if draws is None or all(case.passed for case in cases) else compared(draws())


def _scale(truth: Truth, exact: Sequence[np.ndarray], *own: Sequence[np.ndarray]) -> Scale | None:
    """Return what errors of scores are measured in; None: there are logits."""
    if not truth.beside.padded:
        return None
    end = len(truth.sequences) + truth.beside.first_state
    return scale_of(exact[:end], *(answers[:end] for answers in own))


def _compared(
    fed: ModeResult,
    truth: Truth,
    exact: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    gate: Gate,
    draws: Sequence[Sequence[np.ndarray]],
    scale: Scale | None,
) -> CaseResult:
    if fed.error:
        return failed_case(fed.mode, fed.lengths, fed.error)
    if fed.beside is not None:
        start = len(truth.sequences) + fed.beside
        true, pytorch, *again = (a[start : start + len(fed.logits)] for a in (exact, own, *draws))
        if truth.beside.has_logits(fed.beside):  # of a classifier the last alone
            cut = [[a[-len(x) :] for a, x in zip(rows, fed.logits, strict=True)] for rows in (true, pytorch, *again)]
            return compare(fed.mode, fed.lengths, fed.logits, cut[0], cut[1], gate, cut[2:], scale)
        if fed.beside < truth.beside.first_state:
            return compare(fed.mode, fed.lengths, fed.logits, true, pytorch, gate, again, scale)
        return compare_states(fed.mode, fed.lengths, fed.logits, true, pytorch, gate, again)
    rows = range(fed.first, fed.first + len(fed.positions))
    found = [np.searchsorted(truth.positions[row], at) for row, at in zip(rows, fed.positions, strict=True)]
    wanted, ours, *others = (
        [a[row][index] for row, index in zip(rows, found, strict=True)] for a in (exact, own, *draws)
    )
    return compare(fed.mode, fed.lengths, fed.logits, wanted, ours, gate, others, scale)


def _greedy(runner: Runner, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    """Return greedy tokens; where the logits stop being finite, -1, which no token is."""
    found: list[int] = []
    runner.reset()
    try:
        found.append(int(runner.prefill([prompt])[0][-1].argmax()))
        while len(found) < new_tokens:
            found.append(int(runner.decode(found[-1:])[0].argmax()))
    except FailedError:
        found += [-1] * (new_tokens - len(found))
    return np.array(found, dtype=np.int64)


def _sequences(package: Path, config: ModelConfig, lengths: Sequence[int]) -> tuple[list[np.ndarray], str]:
    """Return the token sequences: text where the package has a tokenizer, the last row always random ids.

    A text that is too short for the first begins again. To a classifier none of them is padding.
    """
    rows, origin = _drawn_sequences(package, config.vocab_size, lengths)
    pad = config.pad_token_id
    if config.labels and pad is not None:
        for row in rows:
            row[row == pad] = (pad + 1) % config.vocab_size
    return rows, origin


def _drawn_sequences(package: Path, vocab_size: int, lengths: Sequence[int]) -> tuple[list[np.ndarray], str]:
    generator = np.random.default_rng(SEED)
    rows = [generator.integers(0, vocab_size, n, dtype=np.int64) for n in lengths]
    tokenizer_file = package / "tokenizer.json"
    if not tokenizer_file.exists():
        return rows, "random ids"
    text = _TEXT.read_text(encoding="utf-8")[: 50 * sum(lengths)]
    ids = np.array(Tokenizer.from_file(str(tokenizer_file)).encode(text, add_special_tokens=False).ids, dtype=np.int64)
    rows[:-1] = np.split(np.resize(ids, sum(lengths[:-1])), np.cumsum(lengths[:-2]))
    return rows, "text, the last row random ids"
