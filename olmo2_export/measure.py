"""Run a graph every way it can be fed, all positions, against PyTorch.

| case            | what is fed                                                                     |
|-----------------|---------------------------------------------------------------------------------|
| prefill         | the whole sequence in one call                                                  |
| decode          | token by token (a ragged batch: a prefix each, then token by token to the end)  |
| chunked         | three pieces, of other sizes in every row                                       |
| batch 1, batch 3| the first sequence alone; all three, ragged                                     |
| greedy          | free-running continuation of each sequence's first tokens                       |
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from olmo2_export.checkpoint import Checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.parity import GATES, CaseResult, Gate, ParityReport, compare, compare_greedy, failed_case
from olmo2_export.reference import open_reference
from runtimes import Backend, Runner, open_runner
from runtimes.errors import ConfigError, NumericError, PackageError
from runtimes.manifest import find_variant, load_manifest

SEED = 0
LENGTHS = (61, 37, 13)
"""tokens of the three sequences; odd, and all different"""
MIN_CACHE_LENGTH = 16
"""tokens: below it the cases are not different from each other"""
GREEDY_TOKENS = 24
GREEDY_PROMPT = 5
MODES = ("prefill", "decode", "chunked")
_TEXT = Path(__file__).parent / "demo" / "heldout.txt"


@dataclass(frozen=True)
class Truth:
    """What PyTorch says of the test sequences."""

    sequences: list[np.ndarray]
    """int64 token ids, each [length]"""
    tokens_from: str
    exact: list[np.ndarray]
    """per sequence float64 [length, vocab_size]"""
    own: dict[str, list[np.ndarray]]
    """precision -> per sequence float32 [length, vocab_size]"""
    continuations: list[tuple[np.ndarray, np.ndarray]]
    """greedy tokens after each sequence's first GREEDY_PROMPT, and the gaps by which they were chosen"""


def ask_pytorch(
    package: Path,
    checkpoint: Checkpoint,
    precisions: Collection[str],
    capacity: int | None = None,
    bar: tqdm[Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Truth:
    """Compute what is compared against, once for all variants.

    Args:
        package: for its tokenizer and its shape.
        checkpoint: the reference weights.
        precisions: of the variants to be measured.
        capacity: tokens that the smallest of their caches holds; None means the context.
        bar: advanced after each PyTorch model.
        weights: to compute with instead of the reference's, by the checkpoint's names.

    Raises:
        ConfigError: package and reference are not of one shape.
    """
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    spec = load_manifest(package).model
    if spec != config.spec:
        different = [k for k, v in vars(config.spec).items() if getattr(spec, k) != v]
        raise ConfigError(f"{package}: not of the reference's shape: {', '.join(different)} differ")
    capacity = config.max_position_embeddings if capacity is None else capacity
    if capacity < MIN_CACHE_LENGTH:
        raise PackageError(f"{package}: a cache of {capacity} tokens; verification needs {MIN_CACHE_LENGTH}")
    sequences, origin = _sequences(package, config.vocab_size, capacity)
    new_tokens = min(GREEDY_TOKENS, capacity - GREEDY_PROMPT)
    exact: list[np.ndarray] = []
    own: dict[str, list[np.ndarray]] = {}
    continuations: list[tuple[np.ndarray, np.ndarray]] = []
    for precision in ["fp64", *sorted({"fp32", *precisions})]:
        with open_reference(checkpoint, precision, weights) as torch_model:
            logits = torch_model.logits(sequences)
            if precision == "fp32":
                continuations = [torch_model.greedy(ids[:GREEDY_PROMPT], new_tokens) for ids in sequences]
        if precision == "fp64":
            exact = logits
        else:
            own[precision] = logits
        if bar is not None:
            bar.update()
    return Truth(sequences, origin, exact, own, continuations)


def measure(package: Path, variant: str, truth: Truth, backend: Backend = "ort") -> ParityReport:
    """Run one variant through every case and compare.

    Args:
        package: the package folder.
        variant: its name.
        truth: what `ask_pytorch` found.
        backend: what runs the graph.

    Raises:
        IntegrityError: the variant's files changed.
    """
    entry, files = find_variant(package, variant)
    with open_runner(package, variant=variant, backend=backend) as runner:
        return measure_runner(runner, truth, entry.precision, variant, files[entry.graph].sha256, backend)


def measure_runner(
    runner: Runner,
    truth: Truth,
    precision: str,
    label: str,
    graph_sha256: str,
    backend: str = "ort",
    gate: Gate | None = None,
) -> ParityReport:
    """Run every case on an open runner and compare.

    Args:
        runner: of any graph.
        truth: what `ask_pytorch` found, with that precision among its own.
        precision: a name out of `GATES`, unless a gate is given.
        label: the report's name of the variant.
        graph_sha256: of the ONNX file that is run.
        backend: what runs it.
        gate: the limits; None: those of the precision.
    """
    gate, own = gate or GATES[precision], truth.own[precision]
    cases = feed(runner, truth.sequences, truth.exact, own, gate)
    tokens = [
        _greedy(runner, ids[:GREEDY_PROMPT], len(wanted))
        for ids, (wanted, _) in zip(truth.sequences, truth.continuations, strict=True)
    ]
    return ParityReport(
        variant=label,
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
    )


def feed(
    runner: Runner,
    sequences: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    gate: Gate,
) -> list[CaseResult]:
    """Feed the sequences in every way, the first alone and all together, and compare at all positions.

    Args:
        runner: of any graph.
        sequences: int64 [length] each.
        exact: per sequence [length, vocab_size].
        own: the same at the gate's precision.
        gate: the limits.
    """
    return [
        _case(runner, mode, list(sequences[:batch]), list(exact[:batch]), list(own[:batch]), gate)
        for batch in dict.fromkeys((1, len(sequences)))
        for mode in MODES
    ]


def _case(
    runner: Runner,
    mode: str,
    sequences: list[np.ndarray],
    exact: list[np.ndarray],
    own: list[np.ndarray],
    gate: Gate,
) -> CaseResult:
    runner.reset()
    try:
        return compare(mode, _FEEDS[mode](runner, sequences), exact, own, gate)
    except NumericError as error:
        return failed_case(mode, len(sequences), str(error))


def _prefill(runner: Runner, sequences: list[np.ndarray]) -> list[np.ndarray]:
    return runner.prefill(sequences, all_positions=True)


def _decode(runner: Runner, sequences: list[np.ndarray]) -> list[np.ndarray]:
    steps = min(len(s) for s in sequences) - 1
    rows = [[logits] for logits in runner.prefill([s[: len(s) - steps] for s in sequences], all_positions=True)]
    for step in range(steps, 0, -1):
        logits = runner.decode([int(s[-step]) for s in sequences])  # (B, V)
        for row, last in zip(rows, logits, strict=True):
            row.append(last[None])
    return [np.concatenate(row) for row in rows]


def _chunked(runner: Runner, sequences: list[np.ndarray]) -> list[np.ndarray]:
    pieces = []
    for row, ids in enumerate(sequences):
        first, second = len(ids) // (3 + row), len(ids) // 2 + row
        pieces.append([ids[:first], ids[first:second], ids[second:]])
    chunks = [runner.prefill(list(chunk), all_positions=True) for chunk in zip(*pieces, strict=True)]
    return [np.concatenate(row) for row in zip(*chunks, strict=True)]


_FEEDS = {"prefill": _prefill, "decode": _decode, "chunked": _chunked}


def _greedy(runner: Runner, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    """Return greedy tokens; where the logits stop being finite, -1, which no token is."""
    found: list[int] = []
    runner.reset()
    try:
        found.append(int(runner.prefill([prompt])[0][-1].argmax()))
        while len(found) < new_tokens:
            found.append(int(runner.decode(found[-1:])[0].argmax()))
    except NumericError:
        found += [-1] * (new_tokens - len(found))
    return np.array(found, dtype=np.int64)


def _sequences(package: Path, vocab_size: int, capacity: int) -> tuple[list[np.ndarray], str]:
    """Return the token sequences: text where the package has a tokenizer, the last row always random ids."""
    generator = np.random.default_rng(SEED)
    lengths = [min(n, capacity - i) for i, n in enumerate(LENGTHS)]
    rows = [generator.integers(0, vocab_size, n, dtype=np.int64) for n in lengths]
    tokenizer_file = package / "tokenizer.json"
    if not tokenizer_file.exists():
        return rows, "random ids"
    text = _TEXT.read_text(encoding="utf-8")[: 50 * sum(lengths)]
    ids = np.array(Tokenizer.from_file(str(tokenizer_file)).encode(text, add_special_tokens=False).ids, dtype=np.int64)
    rows[:-1] = np.split(ids[: sum(lengths[:-1])], np.cumsum(lengths[:-2]))
    return rows, "text, the last row random ids"
