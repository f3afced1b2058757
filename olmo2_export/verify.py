"""Run a package against PyTorch: every way of feeding the graph, all positions, one verdict per variant.

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
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from olmo2_export.checkpoint import Checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.parity import GATES, CaseResult, Gate, ParityReport, compare, compare_greedy, failed_case
from olmo2_export.reference import open_reference
from runtimes import Runner, open_runner
from runtimes.errors import ConfigError, NumericError, PackageError
from runtimes.manifest import (
    FORMAT_VERSION,
    PARITY_NAME,
    check_files,
    find_variant,
    load_manifest,
    package_checksum,
    read_sealed,
    seal,
)

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


def verify(
    package: Path, checkpoint: Checkpoint, *, variants: Sequence[str] = (), backend: Literal["ort"] = "ort"
) -> list[ParityReport]:
    """Compare variants of a package with PyTorch on the reference weights, and write `parity.json` beside the manifest.

    Args:
        package: the package folder; all its files are checked against the manifest first.
        checkpoint: the reference weights.
        variants: which; none means all of the export.
        backend: what runs the graphs.

    Returns:
        One report per variant; look at `passed`.

    Raises:
        IntegrityError: a file of the package changed.
        ConfigError: package and reference are not of one shape.
    """
    manifest = load_manifest(package)
    checksum = package_checksum(package)
    check_files(package, manifest.files)
    names = list(dict.fromkeys(variants)) or list(manifest.variants)
    precisions = {find_variant(package, name)[0].precision for name in names}
    if unknown := precisions - GATES.keys():
        raise PackageError(f"{package}: precision {', '.join(sorted(unknown))}; there are gates for {', '.join(GATES)}")
    with tqdm(total=1 + len(precisions | {"fp32"}) + len(names), desc="verifying", unit="step", leave=False) as bar:
        capacity = min(find_variant(package, name)[0].kv_cache.max_cache_length for name in names)
        truth = ask_pytorch(package, checkpoint, precisions, capacity, bar)
        reports = []
        for name in names:
            reports.append(measure(package, name, truth, backend))
            bar.update()
    _write(package, checksum, checkpoint, reports)
    return reports


def ask_pytorch(
    package: Path,
    checkpoint: Checkpoint,
    precisions: Collection[str],
    capacity: int | None = None,
    bar: tqdm[Any] | None = None,
) -> Truth:
    """Compute what is compared against, once for all variants.

    Args:
        package: for its tokenizer and its shape.
        checkpoint: the reference weights.
        precisions: of the variants to be measured.
        capacity: tokens that the smallest of their caches holds; None means the context.
        bar: advanced after each PyTorch model.

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
        with open_reference(checkpoint, precision) as torch_model:
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


def measure(package: Path, variant: str, truth: Truth, backend: Literal["ort"] = "ort") -> ParityReport:
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
    precision = entry.precision
    gate, own = GATES[precision], truth.own[precision]
    with open_runner(package, variant=variant, backend=backend) as runner:
        cases = [
            _case(runner, mode, truth.sequences[:batch], truth.exact[:batch], own[:batch], gate)
            for batch in (1, len(truth.sequences))
            for mode in MODES
        ]
        tokens = [
            _greedy(runner, ids[:GREEDY_PROMPT], len(wanted))
            for ids, (wanted, _) in zip(truth.sequences, truth.continuations, strict=True)
        ]
    return ParityReport(
        variant=variant,
        backend=backend,
        precision=precision,
        graph_sha256=files[entry.graph].sha256,
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


def format_reports(reports: Sequence[ParityReport]) -> str:
    """Return the table that the command line prints: a line per case, then the greedy verdicts and what failed."""
    head = "variant case batch positions max_abs NMSE err/torch top-1 top-5 KL_mean KL_p99 verdict".split()
    rows, notes = [head], []
    for report in reports:
        for c in report.cases:
            numbers = [f"{c.max_abs:.1e}", f"{c.nmse:.1e}", f"{c.error_ratio:.2f}", f"{c.top1:.1%}", f"{c.top5:.1%}"]
            numbers += [f"{c.kl_mean:.1e}", f"{c.kl_p99:.1e}"]
            verdict = "ok" if c.passed else "FAIL"
            rows.append([report.variant, c.mode, str(c.batch_size), str(c.positions), *numbers, verdict])
            notes += [f"{report.variant} {c.mode} batch {c.batch_size}: {failure}" for failure in c.failures]
        g = report.greedy
        ties = f" ({g.near_ties} prompts part at a near-tie)" if g.near_ties else ""
        notes.append(f"{report.variant} greedy: {g.equal} of {g.tokens} tokens equal over {g.prompts} prompts{ties}")
        notes += [f"{report.variant} greedy: {failure}" for failure in g.failures]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = {0, 1, len(head) - 1}
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([line.rstrip() for line in lines] + notes)


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


def _write(package: Path, checksum: str, checkpoint: Checkpoint, reports: Sequence[ParityReport]) -> None:
    """Write parity.json, keeping what it says of other variants of the same export."""
    path = package / PARITY_NAME
    if package_checksum(package) != checksum:
        raise PackageError(f"{package}: was replaced while it was verified; verify it again")
    kept: dict[str, Any] = {}
    if path.is_file():
        try:
            before = read_sealed(path)
        except PackageError:  # damaged or of another version: it is only a report, and is written anew
            before = {}
        same = before.get("package_checksum") == checksum and isinstance(before.get("variants"), dict)
        kept = before["variants"] if same else {}
    document = {
        "format_version": FORMAT_VERSION,
        "package_checksum": checksum,
        "reference": {"model": checkpoint.model, "revision": checkpoint.revision},
        "variants": kept | {report.variant: report.to_document() for report in reports},
    }
    for leftover in package.glob(f".{PARITY_NAME}.*"):  # of a killed process
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{PARITY_NAME}.{os.getpid()}")
    temporary.write_bytes(seal(document))
    temporary.replace(path)
