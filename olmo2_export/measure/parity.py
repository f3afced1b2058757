"""Numbers that say how far logits are from the reference, and one gate per precision. Arrays in, report out.

KL alone is blind (a graph that ignores one q_norm has a KL of 3e-4) and top-1 alone is coarse, so a gate is a set of
limits and each must hold. The sharpest is the error ratio: the error against float64, measured in units of the error
that PyTorch itself makes at the same precision.

KL and the errors' squares grow with depth, as PyTorch's own do: where rounding to 11 or 8 bits costs more KL than the
limit says, the limit is what the allowed error costs, see `compare`. A faithful bfloat16 graph of 8 layers was red.

That unit is one draw. Where a few weights are a thousand times the others, most of the error comes from few roundings,
and another last bit in its inputs makes PyTorch's own up to 20 times as large; an ordinary model's, over all positions,
stays within 5 %. So a graph that is off is compared again, with the largest of several draws and no absolute limit
that PyTorch itself does not reach: see `compare`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from olmo2_export.measure import error_bars


@dataclass(frozen=True)
class Gate:
    """The limits of one precision; a limit that is None does not apply."""

    error_ratio: float
    """most: RMS error against float64 / that of PyTorch at the same precision"""
    kl_mean: float
    """most: nats per token"""
    top1: float
    """least: share of positions, near-ties counting as agreement"""
    near_tie: float
    """logit gap between the reference's first two tokens below which either is right"""
    nmse: float | None = None
    """most: squared error against float64 / variance of the reference"""
    max_abs: float | None = None
    """most: logit units, against PyTorch"""
    perplexity_rise: float | None = None
    """most: relative, either way, against PyTorch in float32 on text"""

    @property
    def rounded(self) -> bool:
        """Whether the error is that of rounding results to few bits, which a faithful graph does as PyTorch does."""
        return self.nmse is None


GATES: dict[str, Gate] = {
    # Different summation order only: a few times PyTorch's own rounding, and nothing visible in any token.
    "fp32": Gate(
        error_ratio=4.0, nmse=1e-11, max_abs=1e-3, kl_mean=1e-10, top1=1.0, near_tie=1e-4, perplexity_rise=1e-5
    ),
    # Rounding to 11 or 8 bits dominates; a faithful graph rounds in the same places as PyTorch, so 1.5 times is ample.
    "fp16": Gate(error_ratio=1.5, kl_mean=5e-5, top1=0.995, near_tie=2e-2, perplexity_rise=1e-3),
    "bf16": Gate(error_ratio=1.5, kl_mean=2e-4, top1=0.985, near_tie=1.5e-1, perplexity_rise=2e-3),
}
"""reliability gates; see docs/verify.md for where each number comes from"""

# The error against exact arithmetic on the same weights, in units of the error that PyTorch makes when it rounds the
# inputs likewise. Not closer: one code that float32 noise tips over changes all roundings behind it.
KERNELS = Gate(error_ratio=1.5, kl_mean=math.inf, top1=0.0, near_tie=1e-9)
"""the gate of quantised kernels"""

DRAWS = 6
"""of PyTorch's error, besides the first, where a case does not hold its limits"""

_APART = 2.0  # two results that are each so far from the truth may be twice as far from each other
_LAST_BIT = 2.0**-25  # of float32, relative, as a rounding error: of vectors that PyTorch does not round
_SAMPLE = 9  # positions from which a case is held to its gate as it stands


@dataclass(frozen=True)
class CaseResult:
    """One way of running the graph, compared at every position."""

    mode: str
    """prefill | decode | chunked | prefix reuse, behind the name of a form of the graph"""
    batch_size: int
    length: int
    """tokens of the first row; the other rows of a batch are shorter, or longer than 1"""
    positions: int
    """compared, over all rows"""
    max_abs: float
    """against PyTorch at the gate's precision"""
    nmse: float
    """against float64"""
    relative_error: float
    """RMS error against float64 / RMS of the float64 logits"""
    error_ratio: float
    top1: float
    """share of positions, near-ties counting as agreement"""
    top5: float
    """mean share of the reference's first five that are among the test's first five"""
    top10: float
    kl_mean: float
    """nats per token, KL(float64 reference || test)"""
    kl_p99: float
    kl_max: float
    failures: tuple[str, ...]
    """the limits that do not hold, with both numbers"""
    draws: int = 1
    """of PyTorch's error; the largest is the unit of error_ratio"""

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class GreedyResult:
    """Free-running greedy decoding against PyTorch's."""

    prompts: int
    tokens: int
    """compared, over all prompts"""
    equal: int
    near_ties: int
    """prompts whose first difference is between two tokens that the reference holds equal"""
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


KERNEL_PARITY, QUALITY = "kernel parity", "quality"
"""the two verdicts: the graph computes what its weights say; those weights say what the checkpoint's do"""


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity against PyTorch's in float32, on the same tokens."""

    reference: float
    test: float
    relative: float
    """test / reference - 1"""
    low: float
    """of the 95 % interval of `relative`, by paired bootstrap over blocks of tokens; NaN of one token"""
    high: float
    tokens: int
    tokens_from: str
    """text | random ids"""


@dataclass(frozen=True)
class Check:
    """Something else that a variant must show."""

    name: str
    found: str
    """in words and numbers"""
    failures: tuple[str, ...]
    verdict: str = KERNEL_PARITY
    """the verdict that it is part of"""

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class ParityReport:
    """All that was measured of one variant on one backend."""

    variant: str
    backend: str
    precision: str
    graph_sha256: str
    """of the ONNX file that was run"""
    sequences: tuple[int, ...]
    """lengths of the token sequences"""
    tokens_from: str
    """text | random ids"""
    seed: int
    gate: Gate
    cases: tuple[CaseResult, ...]
    greedy: GreedyResult
    libraries: dict[str, str] = field(hash=False)
    capacity: int = 0
    """tokens of the longest rows: the cache's, unless verify was told to use less"""
    max_cache_length: int = 0
    """tokens that the cache holds"""
    perplexity: PerplexityChange | None = None
    """of the graph as users run it; of two graphs, the decode graph"""
    checks: tuple[Check, ...] = ()
    """of weights, scales and quality"""
    coverage: str = ""
    """what was left out, and why; empty: everything was run"""
    own_error_of: str = "transformers"
    """what computed in the gate's precision, so that its error is the unit of error_ratio"""

    @property
    def verdicts(self) -> dict[str, bool]:
        """Whether the graph computes what its weights say, and whether these say what the checkpoint's do."""
        kernels = all(case.passed for case in self.cases) and self.greedy.passed
        return {
            KERNEL_PARITY: kernels and all(c.passed for c in self.checks if c.verdict == KERNEL_PARITY),
            QUALITY: all(c.passed for c in self.checks if c.verdict == QUALITY),
        }

    @property
    def passed(self) -> bool:
        return all(self.verdicts.values())

    def to_document(self) -> dict[str, Any]:
        """Return the JSON form; numbers that are not finite become strings."""
        document = asdict(self) | {"verdicts": self.verdicts, "passed": self.passed}
        for part in (document["gate"], document["perplexity"] or {}, *document["cases"]):
            part |= {k: str(v) for k, v in part.items() if isinstance(v, float) and not math.isfinite(v)}
        return document


@dataclass(frozen=True)
class Scale:
    """What errors are measured in, where a case has too few numbers to tell by itself: taken over all cases."""

    own_error: float
    """RMS error of PyTorch at the gate's precision; of several draws the largest"""
    variance: float
    """of what is true"""


def scale_of(exact: Sequence[np.ndarray], *draws: Sequence[np.ndarray]) -> Scale:
    """Return the scale of PyTorch's answers `draws` at the gate's precision, to the same questions as `exact`."""
    truth, *others = (np.concatenate(list(a)).astype(np.float64) for a in (exact, *draws))
    return Scale(max(_rms(other - truth) for other in others), float(truth.var()))


def compare(
    mode: str,
    lengths: Sequence[int],
    test: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    torch_logits: Sequence[np.ndarray],
    gate: Gate,
    draws: Sequence[Sequence[np.ndarray]] = (),
    scale: Scale | None = None,
) -> CaseResult:
    """Compare logits at some positions of all sequences.

    Args:
        mode: how `test` was computed, for the report.
        lengths: tokens of each sequence, for the report.
        test: per sequence, float32 [positions, vocab_size].
        exact: the same from PyTorch in float64.
        torch_logits: the same from PyTorch at the gate's precision.
        gate: the limits. Few positions are a small sample: see `_few`. Where results are rounded, KL may be what an
            error of `error_ratio` times PyTorch's costs, if that is more: it is the square of an error.
        draws: `torch_logits` again, their last bits other ones. The largest error of all is the unit; and where that is
            near an absolute limit, the limit follows it.
        scale: of scores, of which a case has few; None: what the case's own logits give. Where PyTorch's own error at
            the very positions of the case is larger, that is the unit: rounding to 8 bits costs more at some tokens
            than at others, and graph and PyTorch, who round likewise, are off there by the same.

    Returns:
        The metrics and the limits that do not hold. Logits of another shape, or not finite, fail.
    """
    shapes = [a.shape for a in test], [a.shape for a in exact]
    if shapes[0] != shapes[1]:
        return failed_case(mode, lengths, f"shapes {shapes[0]}, expected {shapes[1]}")
    got, truth, own = (np.concatenate(list(a)).astype(np.float64) for a in (test, exact, torch_logits))  # (N, V)
    if not np.isfinite(got).all():
        count = int((~np.isfinite(got)).any(axis=1).sum())
        return failed_case(mode, lengths, f"{count} of {len(got)} positions not finite")
    error = _rms(got - truth)
    off = [own - truth, *(np.concatenate(list(draw)).astype(np.float64) - truth for draw in draws)]
    if scale is None:
        scale = Scale(max(_rms(x) for x in off), float(truth.var()))
    else:
        scale = replace(scale, own_error=max(scale.own_error, _rms(np.stack(off))))
    own_error = scale.own_error
    kl = kl_divergence(truth, got)
    if draws:
        gate = _reachable(gate, truth, off, scale)
    elif gate.rounded:
        gate = replace(gate, kl_mean=max(gate.kl_mean, gate.error_ratio**2 * float(kl_divergence(truth, own).mean())))
    values = {
        "error_ratio": error / own_error if own_error > 0 else (0.0 if error == 0 else math.inf),
        "nmse": error**2 / scale.variance,
        "max_abs": float(np.abs(got - own).max()),
        "kl_mean": float(kl.mean()),
        "top1": _top1_agreement(truth, got, gate.near_tie),
    }
    return CaseResult(
        mode=mode,
        batch_size=len(test),
        length=lengths[0],
        positions=len(got),
        relative_error=error / _rms(truth),
        top5=_topk_agreement(truth, got, 5),
        top10=_topk_agreement(truth, got, 10),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        failures=_broken_limits(values, _few(gate, len(got))),
        draws=len(off),
        **values,
    )


def compare_states(
    mode: str,
    lengths: Sequence[int],
    test: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    torch_states: Sequence[np.ndarray],
    gate: Gate,
    draws: Sequence[Sequence[np.ndarray]] = (),
) -> CaseResult:
    """Compare vectors, which say of no token how likely it is: their error alone, in units of PyTorch's own.

    What PyTorch does not round, such as an embedding that is looked up, is held to the last bit of float32.

    Args:
        mode, lengths, gate: as `compare`.
        test: per sequence, float32 [positions, hidden].
        exact: the same from PyTorch in float64.
        torch_states: the same from PyTorch at the gate's precision.
        draws: `torch_states` again, their last bits other ones.

    Returns:
        The error, and NaN for what only logits have.
    """
    shapes = [a.shape for a in test], [a.shape for a in exact]
    if shapes[0] != shapes[1]:
        return failed_case(mode, lengths, f"shapes {shapes[0]}, expected {shapes[1]}")
    got, truth, *own = (np.concatenate(list(a)).astype(np.float64) for a in (test, exact, torch_states, *draws))
    if not np.isfinite(got).all():
        count = int((~np.isfinite(got)).any(axis=1).sum())
        return failed_case(mode, lengths, f"{count} of {len(got)} positions not finite")
    error, size = _rms(got - truth), _rms(truth)
    unit = max(*(_rms(x - truth) for x in own), _LAST_BIT * size)
    ratio = error / unit if unit > 0 else (0.0 if error == 0 else math.inf)
    limits = replace(_few(gate, len(got)), nmse=None, max_abs=None)
    return CaseResult(
        mode=mode,
        batch_size=len(test),
        length=lengths[0],
        positions=len(got),
        max_abs=float(np.abs(got - own[0]).max()),
        nmse=float(error**2 / truth.var()) if truth.var() > 0 else 0.0,
        relative_error=error / size if size > 0 else 0.0,
        error_ratio=ratio,
        top1=math.nan,
        top5=math.nan,
        top10=math.nan,
        kl_mean=math.nan,
        kl_p99=math.nan,
        kl_max=math.nan,
        failures=_broken_limits({"error_ratio": ratio}, limits),
        draws=len(own),
    )


def _reachable(gate: Gate, truth: np.ndarray, off: Sequence[np.ndarray], scale: Scale) -> Gate:
    """Return the gate with no absolute limit below what PyTorch's own errors `off` leave to anyone."""
    largest = scale.own_error**2 / scale.variance
    kl = max(float(kl_divergence(truth, truth + x).mean()) for x in off)
    return replace(
        gate,
        nmse=None if gate.nmse is None else max(gate.nmse, _APART**2 * largest),
        max_abs=None if gate.max_abs is None else max(gate.max_abs, _APART * max(float(np.abs(x).max()) for x in off)),
        kl_mean=max(gate.kl_mean, _APART**2 * kl),
    )


def _few(gate: Gate, positions: int) -> Gate:
    """Return the gate of a case with few positions: one position has its own size of error, and is right or wrong.

    The errors of a position's logits go up and down together, so that it takes some positions to average them. Below
    _SAMPLE of them the limit of the error is larger by sqrt(_SAMPLE / positions), and those of its square accordingly;
    where tokens may differ at all, one may.
    """
    if positions >= _SAMPLE:
        return gate
    slack = _SAMPLE / positions
    return replace(
        gate,
        error_ratio=gate.error_ratio * math.sqrt(slack),
        kl_mean=gate.kl_mean * slack,
        nmse=None if gate.nmse is None else gate.nmse * slack,
        top1=gate.top1 if gate.top1 == 1.0 else min(gate.top1, 1 - 1 / positions),
    )


def compare_greedy(
    test: Sequence[np.ndarray], reference: Sequence[np.ndarray], gaps: Sequence[np.ndarray], gate: Gate
) -> GreedyResult:
    """Compare greedy continuations token by token, up to each prompt's first difference.

    Args:
        test: per prompt int64 [new_tokens].
        reference: the same from PyTorch.
        gaps: per prompt float [new_tokens]: the reference's logit gap between its first and second choice.
        gate: for its near-tie margin.
    """
    equal = near_ties = 0
    failures: list[str] = []
    for row, (got, wanted, gap) in enumerate(zip(test, reference, gaps, strict=True)):
        different = np.flatnonzero(got != wanted)
        first = int(different[0]) if len(different) else len(wanted)
        equal += first
        if first == len(wanted):
            continue
        if gap[first] < gate.near_tie:
            near_ties += 1
        else:
            failures.append(f"prompt {row}: token {first} is {got[first]}, PyTorch says {wanted[first]}")
    return GreedyResult(len(test), sum(len(r) for r in reference), equal, near_ties, tuple(failures))


def kl_divergence(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return KL(reference || test) per position, in nats.

    Args:
        reference: logits [N, V].
        test: logits [N, V].
    """
    log_p, log_q = _shifted(reference), _shifted(test)  # each but for a constant
    p, q = np.exp(log_p), np.exp(log_q).sum(axis=-1)
    total = p.sum(axis=-1)
    np.subtract(log_p, log_q, out=log_p)
    divergence: np.ndarray = np.vecdot(p, log_p) / total + np.log(q / total)
    np.maximum(divergence, 0.0, out=divergence)  # rounding can make a zero slightly negative
    return divergence


def _shifted(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x.astype(np.float64)
    result -= result.max(axis=-1, keepdims=True)
    return result


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _top1_agreement(reference: np.ndarray, test: np.ndarray, near_tie: float) -> float:
    chosen = test.argmax(axis=-1)
    behind = reference.max(axis=-1) - np.take_along_axis(reference, chosen[:, None], axis=-1)[:, 0]
    return float(np.mean(behind < near_tie))


def _topk_agreement(reference: np.ndarray, test: np.ndarray, k: int) -> float:
    k = min(k, reference.shape[-1])
    best_reference = np.argpartition(-reference, k - 1, axis=-1)[:, :k]
    best_test = np.argpartition(-test, k - 1, axis=-1)[:, :k]
    common = (best_reference[:, :, None] == best_test[:, None, :]).sum(axis=(1, 2))  # (N,): a token is in each once
    return float(np.mean(common)) / k


def _broken_limits(values: dict[str, float], gate: Gate) -> tuple[str, ...]:
    broken = []
    for name, value in values.items():
        limit: float | None = getattr(gate, name)
        if limit is None:
            continue
        good = value >= limit if name == "top1" else value <= limit
        if not good:
            broken.append(f"{name} {value:.3g}, the gate is {limit:g}")
    return tuple(broken)


def failed_case(mode: str, lengths: Sequence[int], reason: str) -> CaseResult:
    """Return the result of a case that gave no logits to compare."""
    metrics = "max_abs nmse relative_error error_ratio top1 top5 top10 kl_mean kl_p99 kl_max".split()
    numbers = dict.fromkeys(metrics, math.nan)
    return CaseResult(mode, len(lengths), lengths[0], 0, failures=(reason,), draws=1, **numbers)


def perplexity_change(reference: np.ndarray, test: np.ndarray, tokens_from: str) -> PerplexityChange:
    """Compare perplexities over the same tokens.

    Args:
        reference: nats per token of PyTorch, float64 [N], in the order of the text.
        test: the same of the graph.
        tokens_from: for the report.

    Returns:
        The change and its interval, as `error_bars` has it.
    """
    change = error_bars.perplexity_change(test, reference)
    low, high = (math.nan if bound is None else bound for bound in (change.low, change.high))
    before, after = (error_bars.perplexity(losses).value for losses in (reference, test))
    return PerplexityChange(before, after, change.value, low, high, len(test), tokens_from)
