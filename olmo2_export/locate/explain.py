"""Say what about an operation is wrong: try known mistakes in PyTorch, and name the one that gives these numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # it has no types
from torch import Tensor

from olmo2_export.truth.torch_layers import TorchLayer

Candidates = Mapping[str, Callable[[], Tensor]]
"""what is wrong, in words -> the numbers that it would give"""
_EXPLAINED = 0.1
"""share of the error that a mistake may leave over, to be named"""
NOT_APPLIED = "it is not applied: its input is what the next operation reads"
LAYER_NORM_EPS = 1e-5
"""of OLMo 1"""
_EPS = (1e-4, 1e-5, 1e-7, 1e-8)
_THETAS = (10_000.0, 50_000.0, 100_000.0, 500_000.0, 1_000_000.0)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return RMS(found - exact) / RMS(exact), in float64; NaN where anything is not finite."""
    found, exact = found.double(), exact.double()
    size = exact.square().mean().sqrt()
    return float((found - exact).square().mean().sqrt() / size.clamp_min(1e-30))


def best(found: Tensor, exact: Tensor, candidates: Candidates) -> str | None:
    """Return the mistake that reproduces `found`; None if none does."""
    error = relative_error(found, exact)
    left: dict[str, float] = {}
    for words, make in candidates.items():
        candidate = make()
        if candidate.shape == found.shape:
            left[words] = relative_error(candidate, found)
    words, least = min(left.items(), key=lambda item: item[1], default=("", float("inf")))
    return words if least < _EXPLAINED * error else None


def norm(layer: TorchLayer | None, name: str, x: Tensor, apply: Callable[[float], Tensor], eps: float) -> Candidates:
    """Return mistakes of a norm."""
    made: dict[str, Callable[[], Tensor]] = {NOT_APPLIED: lambda: x}
    for other in _EPS:
        made[f"its epsilon is {other:g}, the config says {eps:g}"] = lambda other=other: apply(other)  # type: ignore[misc]
    if layer is not None:
        wide = x.double()
        made["its weight is not applied"] = lambda: wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        made["each head is normalised by itself"] = lambda: _per_head(layer, name, wide, eps)
    return made


def layer_norm(x: Tensor) -> Candidates:
    """Return mistakes of a layer norm without weight and bias."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    made: dict[str, Callable[[], Tensor]] = {
        NOT_APPLIED: lambda: x,
        "it is an RMS norm: the mean is not subtracted": lambda: (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
        ),
    }
    for eps in (1e-3, 1e-4, 1e-6, 1e-8):
        made[f"its epsilon is {eps:g}, that of OLMo 1 is {LAYER_NORM_EPS:g}"] = lambda eps=eps: (  # type: ignore[misc]
            centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        )
    return made


def clip(x: Tensor, found: Tensor, limit: float) -> Candidates:
    """Return mistakes of a clip to `limit`; `found` is what the graph gave."""
    largest = float(found.abs().max())
    return {
        "it is not applied": lambda: x,
        f"its limit is {largest:.4g}, the config says {limit:g}": lambda: x.clamp(-largest, largest),
        "it has no lower limit": lambda: x.clamp(max=limit),
        "it has no upper limit": lambda: x.clamp(min=-limit),
    }


def _per_head(layer: TorchLayer, name: str, x: Tensor, eps: float) -> Tensor:
    if not name.startswith("self_attn"):
        return x[..., :0]
    heads = x.view(*x.shape[:2], -1, layer.head_dim)
    normed: Tensor = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps)
    return normed.flatten(2) * layer.module.get_submodule(name).get_parameter("weight").double()


def linear(found: Tensor, exact: Tensor, x: Tensor) -> str | None:
    """Say which output channels of a linear are off, and which of their weights; all [1, S, *]."""
    error, x = (found.double() - exact.double())[0], x.double()[0]
    energy = error.square().sum(0)
    typical = exact.double()[0].square().sum(0).mean()
    worst = int(energy.argmax())
    rest = torch.cat([energy[:worst], energy[worst + 1 :]])
    if float(rest.sum()) > _EXPLAINED**2 * float(energy[worst]):
        bad = int((energy > 1e-2 * energy[worst]).sum())
        ratio = float((found.double()[0] * exact.double()[0]).sum() / exact.double()[0].square().sum())
        size = float((energy.sum() / (typical * len(energy))).sqrt())
        channels = f"{bad} of its {len(energy)} output channels are off"
        return f"{channels}, by {size:.1e} of their size; fitted factor {ratio:.4g}"
    along = error[:, worst]
    fits = (x * along[:, None]).sum(0) / x.square().sum(0).clamp_min(1e-30)
    left = (along[:, None] - fits * x).square().sum(0)
    column = int(left.argmin())
    if float(left[column]) < _EXPLAINED**2 * float(along.square().sum()):
        return f"one weight is off: output channel {worst}, input {column}, by {float(fits[column]):+.2g}"
    return f"only output channel {worst} of its {len(energy)} is off"


def other_weight(layer: TorchLayer, others: Iterable[str], x: Tensor) -> Candidates:
    """Return what the other linears of the same input would give."""
    return {
        f"it multiplies with the weight of {other}": lambda other=other: layer.linear(other, x)  # type: ignore[misc]
        for other in others
    }


def rotary(layer: TorchLayer, x: Tensor) -> Candidates:
    """Return mistakes of the rotary embedding of `x`, heads before it."""
    made: dict[str, Callable[[], Tensor]] = {
        "it is interleaved (pairs of neighbours), not of halves": lambda: _interleaved(layer, x),
        "it is not applied": lambda: x,
        "positions are one too large": lambda: layer.rotate(x, shift=1),
        "positions are one too small": lambda: layer.rotate(x, shift=-1),
        "it turns the other way": lambda: _backwards(layer, x),
    }
    for kind in layer.other_kinds:
        words = f"it is that of the layers of {kind}, this one is of {layer.kind}"
        made[words] = lambda kind=kind: layer.rotate(x, kind=kind)  # type: ignore[misc]
    for theta in _THETAS:
        if theta != layer.theta:
            words = f"its theta is {theta:g}, the config says {layer.theta:g}"
            made[words] = lambda theta=theta: layer.rotate(x, theta=theta)  # type: ignore[misc]
    return made


def _interleaved(layer: TorchLayer, x: Tensor) -> Tensor:
    halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    rotated = layer.rotate(halves)
    half = x.shape[-1] // 2
    return torch.stack([rotated[..., :half], rotated[..., half:]], dim=-1).flatten(-2)


def _backwards(layer: TorchLayer, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    mirrored = torch.cat([x[..., :half], -x[..., half:]], dim=-1)
    rotated = layer.rotate(mirrored)
    return torch.cat([rotated[..., :half], -rotated[..., half:]], dim=-1)


def head_order(heads: Tensor) -> Candidates:
    """Return orders of heads that are not the right one; [1, heads, S, head_dim]."""
    count = heads.shape[1]
    made: dict[str, Callable[[], Tensor]] = {}
    for shift in range(1, count):
        words = f"its heads are in another order, shifted by {shift}"
        made[words] = lambda shift=shift: heads.roll(shift, dims=1)  # type: ignore[misc]
    made["its heads are in reverse order"] = lambda: heads.flip(1)
    return made


def activation(layer: TorchLayer, gate: Tensor, up: Tensor) -> Candidates:
    """Return mistakes of SiLU(gate) * up."""
    gate, up = gate.double(), up.double()
    return {
        "gate and up are swapped": lambda: layer.gated(up, gate),
        "SiLU is not applied": lambda: gate * up,
        "SiLU is applied to both": lambda: layer.gated(gate, torch.nn.functional.silu(up)),
        "it is GELU, not SiLU": lambda: torch.nn.functional.gelu(gate) * up,
        "it is QuickGELU (alpha 1.702), not SiLU": lambda: gate * torch.sigmoid(1.702 * gate) * up,
        "it is the sigmoid alone": lambda: torch.sigmoid(gate) * up,
    }


def addition(one: Tensor, other: Tensor) -> Candidates:
    """Return mistakes of a residual add."""
    return {
        "the residual is not added": lambda: other,
        "only the residual is there": lambda: one,
        "it subtracts": lambda: one.double() - other.double(),
        "it subtracts the residual": lambda: other.double() - one.double(),
        "it adds its other input twice, and no residual": lambda: 2 * other.double(),
    }


def attention_mask(attend: Callable[[int, int | None], Tensor], tokens: int, right: int | None = None) -> Candidates:
    """Return mistakes of the causal mask, and of its window.

    Args:
        attend: (shift, window) -> output, where a query sees `window` slots, or all, up to its own + shift.
        tokens: of the whole sequence.
        right: the window that it should have; None: none.
    """
    made: dict[str, Callable[[], Tensor]] = {
        "its causal mask is off by +1: each token sees the next one": lambda: attend(1, right),
        "its causal mask is off by -1: no token sees itself": lambda: attend(-1, right),
        "it has no causal mask": lambda: attend(tokens, right),
    }
    if right is not None:
        made[f"its window of {right} tokens is not applied: it sees all before"] = lambda: attend(0, None)
    for window in range(1, tokens):
        words = f"it sees only a window of {window} tokens"
        if right is not None:
            words = f"it sees a window of {window} tokens, the config says {right}"
        if window != right:
            made[words] = lambda window=window: attend(0, window)  # type: ignore[misc]
    return made


def kv_head_map(found: Tensor, exact: Tensor, attend: Callable[[list[int]], Tensor], layer: TorchLayer) -> str | None:
    """Find the KV head that each query head reads; `attend` computes with such a map."""
    heads, count = layer.heads, layer.kv_heads
    wanted = found.view(*found.shape[:2], heads, -1)
    errors = [
        (attend([kv] * heads).view_as(wanted) - wanted).square().sum((0, 1, 3)).nan_to_num(torch.inf)
        for kv in range(count)
    ]
    read = torch.stack(errors).argmin(0).tolist()
    right = [head * count // heads for head in range(heads)]
    words = f"query heads read the KV heads {read}, the right ones are {right}"
    return best(found, exact, {words: lambda: attend(read)}) if read != right else None


def attention_scale(found: Tensor, exact: Tensor, attend: Callable[[float], Tensor]) -> str | None:
    """Fit the scale of the scores."""
    fit = minimize_scalar(
        lambda scale: relative_error(attend(scale), found),
        bounds=(0.1, 10.0),
        method="bounded",
        options={"xatol": 1e-6},
    )
    if not fit.fun < _EXPLAINED * relative_error(found, exact):
        return None
    return f"its scale is {fit.x:.4g} times 1 / sqrt(head_dim)"


def not_finite(found: Tensor) -> str | None:
    """Say where a tensor stops being finite."""
    bad = ~torch.isfinite(found)
    if not bool(bad.any()):
        return None
    first = [int(i) for i in bad.nonzero()[0]]
    return f"{int(bad.sum())} of {bad.numel()} numbers are not finite, the first at {first}"


def wrong_places(found: Tensor, exact: Tensor) -> Iterator[str]:
    """Say at which tokens a [1, S, *] tensor is off, if it is not at all of them."""
    error = (found.double() - exact.double()).square().sum(-1)[0]
    bad = error > 1e-4 * error.max()
    count = int(bad.sum())
    if count < len(error):
        yield f"{count} of {len(error)} tokens are off, the first is token {int(bad.nonzero()[0])}"
