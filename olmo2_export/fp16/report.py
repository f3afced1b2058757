"""Say in words whether a model fits float16."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from olmo2_export.fp16.safety import LIMIT, Island, Peak, Safety
from olmo2_export.fp16.simulate import Simulated
from olmo2_export.fp16.values import PARAMETERS, SCORES

_ROWS = 8
_RESIDUAL = ("attention_residual", "mlp_residual")


def safety_lines(model: str, found: Safety) -> list[str]:
    """Return the report as lines."""
    lines = [
        f"{model}: float16 ends at {LIMIT:,.0f}, the margin is {found.margin:,.0f}; "
        f"measured on {found.tokens} tokens of {found.tokens_from}",
        "",
        *_table(found),
    ]
    if found.kept_anyway:
        largest = max(found.kept_anyway, key=lambda p: p.largest)
        lines += [
            "",
            f"beyond float16, but in float32 inside onnxruntime's kernels: {len(found.kept_anyway)} tensors, up to "
            f"{largest.largest:,.0f} in {largest.name}",
        ]
    if found.blocked:
        lines += ["", "beyond the margin where no island can be (the attention and its KV cache are float16):"]
        lines += [f"  {p.name}: {p.largest:,.0f} at {p.where}" for p in found.blocked]
    if found.islands and not found.blocked:
        lines += ["", f"float32 islands: {len(found.islands)} tensors", *_island_lines(found.islands)]
    lines += ["", *_proof(found), _verdict(found)]
    return lines


def _table(found: Safety) -> list[str]:
    """The largest values and weights, and everything that is beyond the margin."""
    graph = [p for name, p in found.peaks.items() if not name.endswith(SCORES)]
    values = sorted((p for p in graph if not p.name.endswith(PARAMETERS)), key=lambda p: -p.largest)
    weights = sorted((p for p in graph if p.name.endswith(PARAMETERS)), key=lambda p: -p.largest)
    shown = [p for i, p in enumerate(values) if i < _ROWS or p.largest > found.margin]
    shown += [p for i, p in enumerate(weights) if i < 1 or p.largest > LIMIT]
    rows = [("tensor", "max |x|", "of float16", "", "where"), *(_row(p, found.margin) for p in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:<{widths[3]}}  {r[4]}".rstrip()
        for r in rows
    ]


def _row(p: Peak, margin: float) -> tuple[str, str, str, str, str]:
    near = p.largest > margin and p.position is not None
    verdict = "OVERFLOWS" if p.largest > LIMIT else "near" if near else "ok"
    return p.name, f"{p.largest:,.1f}", f"{p.largest / LIMIT:.1%}", verdict, p.where


def _island_lines(islands: Sequence[Island]) -> list[str]:
    """A line per island; the residual stream, whose tensors follow each other, as one."""
    lines: list[str] = []
    stream = [i for i in islands if i.peak.name.endswith(_RESIDUAL)]
    if len(stream) > 1:
        lines.append(
            f"  residual stream, {stream[0].peak.name} .. {stream[-1].peak.name} ({len(stream)} tensors): up to "
            f"{max(i.peak.largest for i in stream):,.0f}"
        )
    for island in islands:
        needed = f"without it {island.breaks} is not finite" if island.breaks else "finite without it on this text"
        lines.append(f"  {island.peak.name}: {island.reason}; {needed}")
    return lines


def _proof(found: Safety) -> Iterable[str]:
    if found.bare is not None:
        yield f"rounded to float16 without islands: {_simulated(found.bare)}"
    if found.held is not None and found.islands:
        yield f"rounded to float16 with islands: {_simulated(found.held)}"


def _simulated(result: Simulated) -> str:
    if not result.finite:
        first = result.first_not_finite or "the logits"
        return (
            f"NOT finite, first in {first}; logits broken at {result.bad_positions} of {result.positions} positions, "
            'where argmax says token 0: "!" in OLMo 2\'s vocabulary'
        )
    gate = "; ".join(result.failures) or "within the fp16 gate"
    return (
        f"finite; KL {result.kl_mean:.1e}, top-1 {result.top1:.2%} against float32 at {result.positions} positions, "
        f"{gate}"
    )


def _verdict(found: Safety) -> str:
    if found.safe:
        return "fits float16"
    if found.blocked:
        return "does NOT fit float16, and no island helps: export it with --variant bf16"
    return (
        "does NOT fit float16 without these islands (--apply --out DIR writes it with them); --variant bf16 needs none"
    )
