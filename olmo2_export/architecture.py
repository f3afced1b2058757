"""What the model computes, as rows of data, made from a config: whoever must know what a layer is asks here.

OLMo 2 and 3:

| operation                               | kind      | reads                                                    |
|-----------------------------------------|-----------|----------------------------------------------------------|
| model.embed_tokens                      | gather    | the tokens                                               |
| model.layers.N.self_attn.{q,k,v}_proj   | linear    | the embedding, or mlp_residual of the layer before       |
| model.layers.N.self_attn.{q,k}_norm     | rms_norm  | q_proj; k_proj                                           |
| model.layers.N.self_attn.{q,k}_rotary   | rotary    | q_norm; k_norm                                           |
| model.layers.N.self_attn.attention      | attention | q_rotary, k_rotary, v_proj                               |
| model.layers.N.self_attn.o_proj         | linear    | attention                                                |
| model.layers.N.post_attention_layernorm | rms_norm  | o_proj                                                   |
| model.layers.N.attention_residual       | add       | what q, k and v read, and post_attention_layernorm       |
| model.layers.N.mlp.{gate,up}_proj       | linear    | attention_residual                                       |
| model.layers.N.mlp.act_fn               | silu      | gate_proj                                                |
| model.layers.N.mlp.product              | multiply  | act_fn, up_proj                                          |
| model.layers.N.mlp.down_proj            | linear    | product                                                  |
| model.layers.N.post_feedforward_layernorm | rms_norm | down_proj                                               |
| model.layers.N.mlp_residual             | add       | attention_residual, post_feedforward_layernorm           |
| model.norm                              | rms_norm  | mlp_residual of the last layer                           |
| lm_head                                 | linear    | model.norm                                               |

A classifier has `score` in the place of lm_head, a linear too, [labels, hidden]; it reads one token of a row.

OLMo 1, where it differs:

| operation                               | kind       | reads                                                   |
|-----------------------------------------|------------|---------------------------------------------------------|
| model.layers.N.input_layernorm          | layer_norm | the embedding, or mlp_residual of the layer before      |
| model.layers.N.self_attn.{q,k,v}_proj   | linear     | input_layernorm                                         |
| model.layers.N.self_attn.{q,k,v}_clip   | clip       | q_proj; k_proj; v_proj; where the config has clip_qkv   |
| model.layers.N.attention_residual       | add        | what input_layernorm reads, and o_proj                  |
| model.layers.N.post_attention_layernorm | layer_norm | attention_residual                                      |
| model.layers.N.mlp.{gate,up}_proj       | linear     | post_attention_layernorm                                |
| model.layers.N.mlp_residual             | add        | attention_residual, down_proj                           |
| model.norm                              | layer_norm | mlp_residual of the last layer                          |

From the rows follow, each in its own file: how often every operator must occur in a graph and a network; names and
shapes of the checkpoint's tensors; the linears that are merged, or quantised on one input; a layer run by itself; the
walk that finds what overflows float16; the tensors that `locate` compares. `model.olmo` says the same in equations, and
a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from olmo2_export.config import ModelConfig

Kind = Literal["gather", "linear", "rms_norm", "layer_norm", "clip", "rotary", "attention", "add", "silu", "multiply"]
EMBED, FINAL_NORM, LOGITS, SCORE = "model.embed_tokens", "model.norm", "lm_head", "score"


@dataclass(frozen=True)
class KindRow:
    """One kind of operation."""

    name: Kind
    words: str
    """for people"""
    operator: str | None
    """of ONNX, its first node in the portable graph; None: it is found by what is around it"""
    is_norm: bool = False


KINDS: tuple[KindRow, ...] = (
    KindRow("gather", "lookup", "Gather"),
    KindRow("linear", "linear layer", "MatMul"),
    KindRow("rms_norm", "RMS norm", "RMSNormalization", is_norm=True),
    KindRow("layer_norm", "layer norm", "LayerNormalization", is_norm=True),  # without a weight
    KindRow("clip", "clip", "Clip"),
    KindRow("rotary", "rotary embedding", None),
    KindRow("attention", "attention", None),
    KindRow("add", "sum", "Add"),
    KindRow("silu", "SiLU", "Sigmoid"),
    KindRow("multiply", "product", "Mul"),
)
"""read at each call"""


@dataclass(frozen=True)
class Operation:
    """One operation; the value that it writes has its name."""

    name: str
    kind: Kind
    reads: tuple[str, ...]
    """values, in the order of the equation"""
    layer: int | None = None
    """None: before the layers or after them"""
    weight: str | None = None
    """the checkpoint's name"""
    shape: tuple[int, ...] = ()
    """of the weight; of a linear [out, in]"""
    bias: str | None = None
    """the checkpoint's name; it has as many numbers as the weight has rows"""
    rope: str = ""
    """of a rotary: which of the config's `ropes`"""
    window: int | None = None
    """of an attention: the tokens that each sees, itself among them; None: all up to itself"""
    limit: float | None = None
    """of a clip: the largest magnitude"""
    times: int = 1
    """in a graph: the last norm is applied to all tokens, too, where their last hidden states are given"""


@dataclass(frozen=True)
class InputGroup:
    """Linears of a layer that read one value."""

    linears: tuple[Operation, ...]
    reads: str
    start: str
    """the last value from which alone this one, and all that follows in the layer, can be computed"""


def operations(config: ModelConfig) -> tuple[Operation, ...]:
    """Return the rows of a model, in the order in which it runs them; see the top of this file."""
    table = (config.vocab_size, config.hidden_size)
    rows = [Operation(EMBED, "gather", (), None, f"{EMBED}.weight", table)]
    for layer in range(config.num_hidden_layers):
        rows += layer_operations(config, layer, rows[-1].name)
    last = _norm(config, FINAL_NORM, rows[-1].name, config.hidden_size, None)
    last = replace(last, times=1 + (config.num_hidden_layers in config.hidden_states))
    name, rows_of_head = head(config)
    shape = (rows_of_head, config.hidden_size)
    return (*rows, last, Operation(name, "linear", (FINAL_NORM,), None, f"{name}.weight", shape))


def hidden_state_name(config: ModelConfig, number: int) -> str:
    """Return the value that a hidden state is: of the embedding, of a layer counted from 1, or of the last norm."""
    if number == config.num_hidden_layers:
        return FINAL_NORM
    return f"model.layers.{number - 1}.mlp_residual" if number else EMBED


def head(config: ModelConfig) -> tuple[str, int]:
    """Return the name of the last linear, and how many numbers it gives for a token."""
    return (SCORE, len(config.labels)) if config.labels else (LOGITS, config.vocab_size)


def layer_operations(config: ModelConfig, layer: int, x: str) -> tuple[Operation, ...]:
    """Return the rows of one layer; it reads `x`, and its last row writes what the next one reads."""
    p = f"model.layers.{layer}."
    h, y = f"{p}attention_residual", f"{p}mlp_residual"

    def norm(name: str, reads: str) -> Operation:
        return _norm(config, f"{p}{name}", reads, config.hidden_size, layer)

    if config.norms_first:
        before, between = norm("input_layernorm", x), norm("post_attention_layernorm", h)
        attention = _attention_operations(config, layer, before.name)
        mlp = _mlp_operations(config, layer, between.name)
        added = (Operation(h, "add", (x, attention[-1].name), layer), Operation(y, "add", (h, mlp[-1].name), layer))
        return before, *attention, added[0], between, *mlp, added[1]
    attention, mlp = _attention_operations(config, layer, x), _mlp_operations(config, layer, h)
    after = norm("post_attention_layernorm", attention[-1].name), norm("post_feedforward_layernorm", mlp[-1].name)
    added = (Operation(h, "add", (x, after[0].name), layer), Operation(y, "add", (h, after[1].name), layer))
    return *attention, after[0], added[0], *mlp, after[1], added[1]


def _attention_operations(config: ModelConfig, layer: int, x: str) -> tuple[Operation, ...]:
    """From what q, k and v read to o_proj."""
    hidden, biased = config.hidden_size, config.attention_bias
    query, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    a = f"model.layers.{layer}.self_attn."
    rows: list[Operation] = []

    def add(row: Operation) -> str:
        rows.append(row)
        return row.name

    sizes = {"q": query, "k": key_value, "v": key_value}
    made = {n: add(_linear(f"{a}{n}_proj", x, (size, hidden), layer, biased)) for n, size in sizes.items()}
    if config.clip_qkv is not None:
        limit = config.clip_qkv
        made = {n: add(Operation(f"{a}{n}_clip", "clip", (made[n],), layer, limit=limit)) for n in sizes}
    if not config.norms_first:
        made |= {n: add(_norm(config, f"{a}{n}_norm", made[n], sizes[n], layer)) for n in "qk"}
    rope = config.rope_of(layer)
    made |= {n: add(Operation(f"{a}{n}_rotary", "rotary", (made[n],), layer, rope=rope)) for n in "qk"}
    read = (made["q"], made["k"], made["v"])
    attention = add(Operation(f"{a}attention", "attention", read, layer, window=config.window(layer)))
    add(_linear(f"{a}o_proj", attention, (hidden, query), layer, biased))
    return tuple(rows)


def _mlp_operations(config: ModelConfig, layer: int, h: str) -> tuple[Operation, ...]:
    """From what gate and up read to down_proj."""
    hidden, inner = config.hidden_size, config.intermediate_size
    m = f"model.layers.{layer}.mlp."
    return (
        _linear(f"{m}gate_proj", h, (inner, hidden), layer),
        _linear(f"{m}up_proj", h, (inner, hidden), layer),
        Operation(f"{m}act_fn", "silu", (f"{m}gate_proj",), layer),
        Operation(f"{m}product", "multiply", (f"{m}act_fn", f"{m}up_proj"), layer),
        _linear(f"{m}down_proj", f"{m}product", (hidden, inner), layer),
    )


def _linear(name: str, reads: str, shape: tuple[int, int], layer: int, biased: bool = False) -> Operation:
    return Operation(name, "linear", (reads,), layer, f"{name}.weight", shape, f"{name}.bias" if biased else None)


def _norm(config: ModelConfig, name: str, reads: str, size: int, layer: int | None) -> Operation:
    if config.norms_first:
        return Operation(name, "layer_norm", (reads,), layer)
    return Operation(name, "rms_norm", (reads,), layer, f"{name}.weight", (size,))


def find_kind(name: Kind) -> KindRow:
    """Return the row of a kind."""
    return next(row for row in KINDS if row.name == name)


def norms() -> tuple[Kind, ...]:
    """Return the kinds that are norms."""
    return tuple(row.name for row in KINDS if row.is_norm)


def norm_operators() -> frozenset[str]:
    """Return the ONNX operators that are norms."""
    return frozenset(row.operator for row in KINDS if row.is_norm and row.operator is not None)


def within_layer(row: Operation) -> str:
    """Return a row's name without its layer's, as in `mlp.up_proj`."""
    return row.name.removeprefix(f"model.layers.{row.layer}.")


def after_layers(rows: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return what is done with the output of the last layer: the last norm, and lm_head or score."""
    return tuple(row for row in rows if row.layer is None and row.kind != "gather")


def quantizable(rows: Iterable[Operation]) -> tuple[Operation, ...]:
    """Return what may be stored in few bits: embedding, linears and lm_head; score has too few weights to gain."""
    return tuple(row for row in rows if row.kind in ("gather", "linear") and row.name != SCORE)


def of_layer(rows: Iterable[Operation], layer: int) -> tuple[Operation, ...]:
    """Return the rows of one layer."""
    return tuple(row for row in rows if row.layer == layer)


def count(rows: Iterable[Operation], *kinds: Kind) -> int:
    """Return how often operations of these kinds are in a graph."""
    return sum(row.times for row in rows if row.kind in kinds)


def norm_counts(rows: Sequence[Operation]) -> dict[str, int]:
    """Return how often each ONNX operator of a norm occurs, of those that the model has."""
    found = {row.operator: count(rows, row.name) for row in KINDS if row.is_norm and row.operator is not None}
    return {operator: n for operator, n in found.items() if n}


def tensor_shapes(rows: Iterable[Operation]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every weight and bias, in the order in which the model runs them."""
    found: dict[str, tuple[int, ...]] = {}
    for row in rows:
        if row.weight is not None:
            found[row.weight] = row.shape
        if row.bias is not None:
            found[row.bias] = row.shape[:1]
    return found


def shared_inputs(rows: Iterable[Operation]) -> list[tuple[Operation, ...]]:
    """Return the linears, those that read one value together: of a layer q, k, v; o; gate, up; down."""
    groups: dict[tuple[str, ...], list[Operation]] = {}
    for row in rows:
        if row.kind == "linear":
            groups.setdefault(row.reads, []).append(row)
    return [tuple(group) for group in groups.values()]


def around_attention(rows: Iterable[Operation]) -> frozenset[str]:
    """Return what a fused attention reads, computes inside and writes: it rotates queries and keys itself."""
    rotary = {row.name: row.reads for row in rows if row.kind == "rotary"}
    attention = [row for row in rows if row.kind == "attention"]
    read = {value for row in attention for value in row.reads}
    return frozenset({row.name for row in attention} | read | {v for name in read for v in rotary.get(name, ())})


def between(rows: Sequence[Operation], start: str, wanted: Collection[str]) -> list[Operation]:
    """Return the rows that compute the values `wanted` from the value `start`, in order."""
    needed = set(wanted) - {start}
    found: list[Operation] = []
    for row in reversed(rows):
        if row.name in needed:
            found.append(row)
            needed.update(value for value in row.reads if value != start)
    return found[::-1]


def input_groups(rows: Sequence[Operation]) -> list[InputGroup]:
    """Return the linears of a layer in groups that read one value, and from where that is computed.

    Args:
        rows: of one layer.
    """
    place = {row.name: i + 1 for i, row in enumerate(rows)}  # and 0 what the layer reads
    names = [rows[0].reads[0], *place]
    earliest = [min(place.get(value, 0) for row in rows[i:] for value in row.reads) for i in range(len(rows))]
    alone = [i for i, least in enumerate(earliest) if least == i]  # no later row reads what is before it
    groups = shared_inputs(rows)
    starts = [max(i for i in alone if i <= place.get(group[0].reads[0], 0)) for group in groups]
    return [InputGroup(group, group[0].reads[0], names[i]) for group, i in zip(groups, starts, strict=True)]
