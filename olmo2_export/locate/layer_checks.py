"""Compare each operation of a layer with PyTorch's, on the inputs that the graph itself gave it.

An error does not travel: an operation is compared on what it was given, so that the one which is wrong is the one that
differs, and what comes after it does not. `expected` is what PyTorch's own arithmetic at the variant's precision makes
of the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from olmo2_export.architecture import Operation, find_kind, norms, within_layer
from olmo2_export.graphs.taps import HIDDEN, layer_name, tap_name
from olmo2_export.locate import explain
from olmo2_export.locate.explain import relative_error
from olmo2_export.locate.segments import Batch, Calls, joined
from olmo2_export.truth.torch_layers import TorchLayer, TorchModel
from olmo2_export.views.openers import Arrays

NORM, LAYER_NORM = find_kind("rms_norm").words, find_kind("layer_norm").words
LINEAR, ROTARY, ATTENTION, CLIP = "linear", "rotary embedding", "attention", "clip"
CACHE, ADD, GATED = "KV cache write", "residual add", "gated activation (SiLU x up)"
EMBEDDING, PICK = "embedding lookup", "choice of the rows that get logits"
POOL = "choice of the token that is scored"
BATCH = "model.norm_input of two rows"
LAYER = "layer as a whole"


@dataclass(frozen=True)
class TensorParity:
    """One tensor of a graph, compared with PyTorch."""

    name: str
    """canonical, the same for the ONNX graph and torch, e.g. model.layers.3.self_attn.q_norm"""
    layer: int | None
    operation: str
    """in words"""
    relative: float
    """RMS(graph - exact) / RMS(exact)"""
    expected: float
    """the same of PyTorch at the variant's precision: the error that is normal"""


@dataclass(frozen=True)
class Checked:
    """A tensor's parity, and what can say more of it."""

    parity: TensorParity
    explain: Callable[[], tuple[str, str | None]]
    """operation, and what about it is wrong"""


Compute = Callable[[TorchLayer], Tensor]


class LayerChecks:
    """Compares the tensors of one layer."""

    def __init__(
        self,
        rows: Sequence[Operation],
        found: Sequence[Arrays],
        calls: Calls,
        exact: TorchLayer,
        own: TorchLayer,
    ) -> None:
        """See `run_segments`; `rows` are those of the layer."""
        self._rows, self._index = {row.name: row for row in rows}, rows[0].layer or 0
        self._found, self._calls = found, calls
        self._exact, self._own = exact, own
        self.x = _tensor(joined(found, HIDDEN))
        self._misshapen = False

    def run(self) -> list[Checked]:
        """Compare everything, in the order of execution; up to a tensor of a wrong shape, which nothing can follow."""
        checks: list[Checked] = []
        for check in self._checks():
            checks.append(check)
            if self._misshapen:
                break
        return checks

    def _checks(self) -> Iterator[Checked]:
        for row in self._rows.values():
            match row.kind:
                case "linear":
                    yield self._linear(row)
                case norm if norm in norms():
                    yield self._norm(row)
                case "clip":
                    yield self._clip(row)
                case "rotary":
                    if self._has(tap_name(row)):
                        yield self._rotary(row)
                case "attention":
                    yield self._key_cache(row)
                    yield self._value_cache(row)
                    yield self._attention(row)
                case "add":
                    yield self._add(row)
                case "multiply":
                    yield self._gated(row)
                case "silu" | "gather":  # a part of the gated activation; not of a layer
                    continue

    def _has(self, name: str) -> bool:
        return layer_name(self._index, name) in self._found[0]

    def _tap(self, name: str) -> Tensor:
        return _tensor(joined(self._found, layer_name(self._index, name)))

    def _value(self, name: str) -> Tensor:
        """Return what an operation of the layer reads, by the name that its row has."""
        row = self._rows.get(name)
        return self.x if row is None else self._tap(tap_name(row))

    def _check(
        self,
        name: str,
        operation: str,
        compute: Compute,
        explainer: Callable[[Tensor, Tensor], tuple[str, str | None]],
        found: Tensor | None = None,
    ) -> Checked:
        graph = self._tap(name) if found is None else found
        exact = compute(self._exact)
        full = layer_name(self._index, name)
        expected = relative_error(compute(self._own), exact)
        if graph.shape != exact.shape:
            self._misshapen = True
            words = f"its shape is {list(graph.shape)}, expected {list(exact.shape)}"
            return Checked(
                TensorParity(full, self._index, operation, float("nan"), expected), lambda: (operation, words)
            )
        parity = TensorParity(full, self._index, operation, relative_error(graph, exact), expected)
        return Checked(parity, lambda: _finite(graph, operation) or explainer(graph, compute(self._exact)))

    def _linear(self, row: Operation) -> Checked:
        name, x = within_layer(row), self._value(row.reads[0])
        others = [
            within_layer(other)
            for other in self._rows.values()
            if other.kind == "linear" and other.reads == row.reads and other is not row
        ]

        def explainer(found: Tensor, exact: Tensor) -> tuple[str, str | None]:
            other = explain.best(found, exact, explain.other_weight(self._exact, others, x))
            return LINEAR, other or explain.linear(found, exact, x)

        return self._check(name, LINEAR, lambda layer: layer.linear(name, x), explainer)

    def _norm(self, row: Operation) -> Checked:
        name, x = within_layer(row), self._value(row.reads[0])
        operation = find_kind(row.kind).words

        def explainer(found: Tensor, exact: Tensor) -> tuple[str, str | None]:
            layer = self._exact
            match row.kind:
                case "rms_norm":
                    mistakes = explain.norm(layer, name, x, lambda eps: layer.norm(name, x, eps), layer.eps)
                case "layer_norm":
                    mistakes = explain.layer_norm(x)
                case _:
                    mistakes = {explain.NOT_APPLIED: lambda: x}
            return operation, explain.best(found, exact, mistakes)

        return self._check(name, operation, lambda layer: layer.norm(name, x), explainer)

    def _clip(self, row: Operation) -> Checked:
        x = self._value(row.reads[0])
        return self._check(
            tap_name(row),
            CLIP,
            lambda layer: layer.clip(x),
            lambda found, exact: (CLIP, explain.best(found, exact, explain.clip(x, found, self._exact.limit))),
        )

    def _gated(self, row: Operation) -> Checked:
        gate, up = (self._value(name) for name in (self._rows[row.reads[0]].reads[0], row.reads[1]))
        return self._check(
            tap_name(row),
            GATED,
            lambda layer: layer.gated(gate, up),
            lambda found, exact: (GATED, explain.best(found, exact, explain.activation(self._exact, gate, up))),
        )

    def _add(self, row: Operation) -> Checked:
        one, other = map(self._value, row.reads)
        return self._check(
            tap_name(row),
            ADD,
            lambda layer: one.to(layer.dtype) + other.to(layer.dtype),
            lambda found, exact: (ADD, explain.best(found, exact, explain.addition(one, other))),
        )

    def _rotary(self, row: Operation) -> Checked:
        x = self._value(row.reads[0])
        return self._check(
            tap_name(row),
            ROTARY,
            lambda layer: layer.rotate(layer.split(x)),
            lambda found, exact: (
                ROTARY,
                explain.best(found, exact, explain.rotary(self._exact, self._exact.split(x))),
            ),
        )

    def _rotated(self, layer: TorchLayer, name: str) -> Tensor:
        """Return query or key as attention reads it: the graph's, or its norm rotated where attention does that."""
        row = self._rows[name]
        if row.kind != "rotary":
            return layer.split(self._value(name))
        if self._has(tap_name(row)):
            return self._value(name).to(layer.dtype)
        return layer.rotate(layer.split(self._value(row.reads[0])))

    def _presents(self, kind: str) -> list[Tensor]:
        return [_tensor(call[layer_name(self._index, f"self_attn.{kind}_cache")]) for call in self._found]

    def _written(self, kind: str) -> Tensor:
        """Return the cache as it is after each call, its tokens alone, joined."""
        spans = self._calls.spans()
        return torch.cat([p[:, :, :stop] for p, (_, stop) in zip(self._presents(kind), spans, strict=True)], dim=2)

    def _history(self, new: Tensor) -> Tensor:
        """Return what a cache should be after each call, joined, from the keys or values of all tokens."""
        return torch.cat([new[:, :, :stop] for _, stop in self._calls.spans()], dim=2)

    def _key_cache(self, row: Operation) -> Checked:
        keys_name = row.reads[1]
        rotary = self._rows[keys_name]

        def explainer(found: Tensor, exact: Tensor) -> tuple[str, str | None]:
            if (swapped := self._swapped(row, found, exact, key=True)) is not None:
                return CACHE, swapped
            fused = rotary.kind == "rotary" and not self._has(tap_name(rotary))
            keys = self._rotated(self._exact, keys_name)
            order = {w: (lambda m=m: self._history(m())) for w, m in explain.head_order(keys).items()}
            if (wrong := explain.best(found, exact, order)) is not None:
                return CACHE, wrong
            if not fused:
                return CACHE, None
            heads = self._exact.split(self._value(rotary.reads[0]))
            turned = {w: (lambda m=m: self._history(m())) for w, m in explain.rotary(self._exact, heads).items()}
            if (wrong := explain.best(found, exact, turned)) is not None:
                return ROTARY, wrong
            first = next(iter(self._calls.spans()))[1]
            right = relative_error(found[:, :, :first], exact[:, :, :first]) < 1e-2 * relative_error(found, exact)
            return (
                (CACHE, "what the first call wrote is right, what is there later is not") if right else (ROTARY, None)
            )

        return self._check(
            "self_attn.key_cache",
            CACHE,
            lambda layer: self._history(self._rotated(layer, keys_name)),
            explainer,
            self._written("key"),
        )

    def _value_cache(self, row: Operation) -> Checked:
        values = self._value(row.reads[2])

        def explainer(found: Tensor, exact: Tensor) -> tuple[str, str | None]:
            if (swapped := self._swapped(row, found, exact, key=False)) is not None:
                return CACHE, swapped
            order = explain.head_order(self._exact.split(values))
            histories = {w: (lambda m=m: self._history(m())) for w, m in order.items()}
            return CACHE, explain.best(found, exact, histories)

        return self._check(
            "self_attn.value_cache",
            CACHE,
            lambda layer: self._history(layer.split(values)),
            explainer,
            self._written("value"),
        )

    def _swapped(self, row: Operation, found: Tensor, exact: Tensor, *, key: bool) -> str | None:
        """Tell whether the two caches are swapped: when they are written, or when the past is read."""
        key_value = [self._rotated(self._exact, row.reads[1]), self._exact.split(self._value(row.reads[2]))]
        own, other = key_value if key else key_value[::-1]
        states: list[Tensor] = []
        past_own, past_other = own[:, :, :0], other[:, :, :0]
        for start, stop in self._calls.spans():
            past_own, past_other = (
                torch.cat([past_other, own[:, :, start:stop]], dim=2),
                torch.cat([past_own, other[:, :, start:stop]], dim=2),
            )
            states.append(past_own)
        kind = "key" if key else "value"
        return explain.best(
            found,
            exact,
            {
                "keys and values are written into each other's cache": lambda: self._history(other),
                "the past keys and values are swapped": lambda: torch.cat(states, dim=2),
                f"the past {kind}s are lost": lambda: torch.zeros_like(found),
            },
        )

    def _attention(self, row: Operation) -> Checked:
        presents = list(zip(self._presents("key"), self._presents("value"), strict=True))
        spans = list(self._calls.spans())

        capacity = max(key.shape[2] for key, _ in presents)

        def attend(
            layer: TorchLayer,
            shift: int = 0,
            window: int | None = row.window,
            scale: float = 1.0,
            kv_heads: list[int] | None = None,
            swapped: bool = False,
        ) -> Tensor:
            query = self._rotated(layer, row.reads[0])
            parts = []
            for (start, stop), (key, value) in zip(spans, presents, strict=True):
                cached, queries = torch.arange(capacity)[None], torch.arange(start, stop)[:, None]
                seen = cached <= queries + shift
                if window is not None:
                    seen &= cached > queries - window
                pair = (value, key) if swapped else (key, value)
                new = query[:, :, start:stop]
                parts.append(layer.attend(new, *pair, seen[:, : key.shape[2]], scale, kv_heads=kv_heads))
            return torch.cat(parts, dim=1)

        def explainer(found: Tensor, exact: Tensor) -> tuple[str, str | None]:
            layer = self._exact
            masked = explain.attention_mask(lambda s, w: attend(layer, s, w), spans[-1][1], row.window)
            mistakes = dict(masked)
            mistakes["keys and values are swapped"] = lambda: attend(layer, swapped=True)
            words = (
                explain.best(found, exact, mistakes)
                or explain.kv_head_map(found, exact, lambda heads: attend(layer, kv_heads=heads), layer)
                or explain.attention_scale(found, exact, lambda scale: attend(layer, scale=scale))
                or next(explain.wrong_places(found, exact), None)
            )
            return ATTENTION, words

        return self._check(tap_name(row), ATTENTION, attend, explainer)


def embedding_check(found: Sequence[Arrays], calls: Calls, exact: TorchModel, own: TorchModel) -> Checked:
    """Compare the embedding."""
    graph, ids = _tensor(joined(found, "model.embed_tokens")), torch.from_numpy(np.maximum(calls.ids, 0))
    rows = len(exact.weights("model.embed_tokens.weight"))
    wanted = embedded(exact, calls)
    parity = TensorParity(
        "model.embed_tokens",
        None,
        EMBEDDING,
        relative_error(graph, wanted),
        relative_error(embedded(own, calls), wanted),
    )

    def explainer() -> tuple[str, str | None]:
        shifted = {
            f"it looks up the row of the token id {shift:+d}": partial(_shifted, exact, ids, shift, rows)
            for shift in (-1, 1)
        }
        if calls.vectors is not None:
            shifted["it takes token 0 in the place of each vector"] = partial(exact.embed, ids)
        wrong = explain.best(graph, wanted, shifted) or next(explain.wrong_places(graph, wanted), None)
        return _finite(graph, EMBEDDING) or (EMBEDDING, wrong)

    return Checked(parity, explainer)


def embedded(model: TorchModel, calls: Calls) -> Tensor:
    """Return what the first layer reads, [1, S, hidden]: embeddings of tokens, or the vectors in their place."""
    x = model.embed(torch.from_numpy(np.maximum(calls.ids, 0)))
    if calls.vectors is not None:
        given = torch.from_numpy(calls.ids < 0)
        x[0, given] = torch.from_numpy(calls.vectors)[given].to(x.dtype)
    return x


def _shifted(model: TorchModel, ids: Tensor, shift: int, rows: int) -> Tensor:
    return model.embed((ids + shift) % rows)


def head_checks(found: Sequence[Arrays], calls: Calls, exact: TorchModel, own: TorchModel) -> list[Checked]:
    """Compare the choice of rows, or of a classifier's token, the last norm and the logits, or scores."""
    answer = "score" if "score" in found[0] else "logits"
    hidden = [_tensor(call[HIDDEN]) for call in found]
    rows = [_rows(call["model.norm_input"]) for call in found]
    wanted = [
        h if row.shape[1] == h.shape[1] else h[:, calls.logit_index(h.shape[1])][:, None]
        for h, row in zip(hidden, rows, strict=True)
    ]
    x, picked = torch.cat(rows, dim=1), torch.cat(wanted, dim=1)
    normed = torch.cat([_rows(call["model.norm"]) for call in found], dim=1)
    logits = torch.cat([_rows(call[answer]) for call in found], dim=1)

    def other_row(choose: Callable[[int], int]) -> Callable[[], Tensor]:
        """The rows that another choice gives, by the tokens of a call."""
        return lambda: torch.cat([h[:, choose(h.shape[1])][:, None] for h in hidden], dim=1)

    asked = calls.logit_index
    mistakes: explain.Candidates = {"it takes the last row, not the one asked for": other_row(lambda size: size - 1)}
    if answer == "score":
        mistakes = {
            "it takes the last token, padding or not": other_row(lambda size: size - 1),
            "it takes the first token": other_row(lambda _: 0),
            "it takes the token before the last that is no padding": other_row(lambda size: max(asked(size) - 1, 0)),
            "it takes the token behind the last that is no padding": other_row(
                lambda size: min(asked(size) + 1, size - 1)
            ),
        }
    checks: list[tuple[str, str, Callable[[TorchModel], Tensor], Tensor, Callable[[], str | None]]] = [
        (
            "model.norm_input",
            PICK if answer == "logits" else POOL,
            lambda _: picked,
            x,
            lambda: explain.best(x, picked, mistakes),
        ),
        (
            "model.norm",
            NORM if exact.norm_eps is not None else LAYER_NORM,
            lambda model: model.norm(x),
            normed,
            lambda: explain.best(normed, exact.norm(x), _norm_mistakes(exact, x)),
        ),
        (answer, LINEAR, lambda model: model.head(normed), logits, lambda: _head_words(logits, exact, normed)),
    ]
    return [_head_check(exact, own, *check) for check in checks]


def batch_check(taken: np.ndarray, batch: Batch, answer: str) -> Checked:
    """Compare which rows and tokens of a batch the last norm reads; alone, every row is the first."""
    x, hidden = _rows(taken), _tensor(batch.hidden)
    rows = range(len(hidden))
    whole = x.shape[1] == hidden.shape[1]
    wanted = hidden if whole else torch.stack([hidden[b, batch.asked[b]] for b in rows])[:, None]
    mistakes = {"it takes the first row for every row": lambda: wanted[:1].expand_as(wanted)}
    if not whole:
        mistakes["it takes the first row's token of every row"] = lambda: hidden[:, batch.asked[0]][:, None]
    operation = PICK if answer == "logits" else POOL
    same = x.shape == wanted.shape
    parity = TensorParity(BATCH, None, operation, relative_error(x, wanted) if same else float("nan"), 0.0)

    def explainer() -> tuple[str, str | None]:
        words = f"its shape is {list(x.shape)}, expected {list(wanted.shape)}"
        return operation, explain.best(x, wanted, mistakes) if same else words

    return Checked(parity, explainer)


def _head_check(
    exact: TorchModel,
    own: TorchModel,
    name: str,
    operation: str,
    compute: Callable[[TorchModel], Tensor],
    graph: Tensor,
    words: Callable[[], str | None],
) -> Checked:
    right = compute(exact)
    expected = relative_error(compute(own), right)
    parity = TensorParity(name, None, operation, relative_error(graph, right), expected)
    return Checked(parity, lambda: _finite(graph, operation) or (operation, words()))


def _norm_mistakes(exact: TorchModel, x: Tensor) -> explain.Candidates:
    if exact.norm_eps is None:
        return explain.layer_norm(x)
    return explain.norm(None, "", x, lambda eps: exact.norm(x, eps), exact.norm_eps)


def _head_words(logits: Tensor, exact: TorchModel, normed: Tensor) -> str | None:
    return explain.linear(logits, exact.head(normed), normed)


def _finite(graph: Tensor, operation: str) -> tuple[str, str | None] | None:
    words = explain.not_finite(graph)
    return None if words is None else (operation, words)


def _rows(array: np.ndarray) -> Tensor:
    """Return [1, rows, width]; a static-cache graph has one row, without the axis."""
    tensor = _tensor(array)
    return tensor[:, None] if tensor.ndim == 2 else tensor


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array).astype(np.float64))
