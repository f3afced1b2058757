"""How positions are told: the kinds of RoPE, and the forms in which config.json says which one.

| form                                                   | of                  | who has it                      |
|--------------------------------------------------------|---------------------|---------------------------------|
| rope_theta, rope_scaling: {rope_type, factor, ...}     | transformers 4, AI2 | Olmo 3: full attention alone    |
| rope_parameters: {rope_type, rope_theta, factor, ...}  | transformers 5      | all layers; refused for Olmo 3  |
| rope_parameters: {full_attention, sliding_attention}   | transformers 5      | the layers of each type         |

transformers 5.23 reads some of these otherwise than the model was trained, without a word; they are refused by name:

- Olmo 3 with one table for all layers: it takes plain RoPE of theta 500000, whatever the table says;
- Olmo 3 with another rope_theta outside the tables: it reaches the layers of full attention alone;
- Olmo 3 with "type" for "rope_type" in rope_scaling, and with "truncate": false in a table: neither is read;
- original_max_position_embeddings outside the tables, where it differs: it goes before that of the table, and for
  Olmo 3 it is not read.

`model.rotary` makes the numbers of each kind. Two kinds change with the length of the text, as no table of a graph can:

- dynamic is plain RoPE up to max_position_embeddings, bit for bit, and a package goes no further;
- longrope has a second list of factors for texts beyond its original length. Cached keys would keep the first list, so
  that a prompt and its continuation disagree; the package has the first list, and ends at the original length.

Source: transformers, modeling_rope_utils.py and models/olmo3/configuration_olmo3.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from olmo2_export.fields import Fields, short

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
LayerType = Literal["full_attention", "sliding_attention"]
FULL, SLIDING = get_args(LayerType)

_THETA = 10_000.0
_OLMO3_THETA = 500_000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_LONGEST = 1 << 22
_OWN: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate".split()
    ),
    "longrope": frozenset("factor original_max_position_embeddings attention_factor short_factor long_factor".split()),
}
"""kind -> the fields that mean something for it"""
_ORIGINAL = "original_max_position_embeddings"
_KINDS_OF_LENGTH = tuple(kind for kind, own in _OWN.items() if _ORIGINAL in own)
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True)
class Rope:
    """One kind of RoPE with its numbers."""

    rope_type: RopeType = "default"
    theta: float = _THETA
    factor: float = 1.0
    """linear, llama3, yarn: by how much positions are stretched"""
    original_length: int = 0
    """llama3, yarn, longrope: tokens that the model was trained on before"""
    attention_factor: float = 1.0
    """yarn, longrope: multiplies cos and sin"""
    beta_fast: float = _BETA_FAST
    beta_slow: float = _BETA_SLOW
    """yarn: turns over the original length, between which it changes from one scale to the other"""
    truncate: bool = True
    """yarn: those bounds are rounded to whole channels"""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    """llama3"""
    factors: tuple[float, ...] = ()
    """longrope: of each pair of channels, up to the original length"""


@dataclass(frozen=True)
class Ropes:
    """The RoPE of each type of layer, and how far the tables reach."""

    full: Rope
    sliding: Rope
    longest: int
    """tokens: max_position_embeddings, or less where a kind ends before"""


def read_ropes(fields: Fields, context: int, head_dim: int, *, by_layer_type: bool) -> Ropes:
    """Read every form; problems and warnings go to `fields`.

    Args:
        fields: of config.json.
        context: max_position_embeddings.
        head_dim: of a head.
        by_layer_type: Olmo 3, where each type of layer has its own.
    """
    _refuse_partial(fields, fields.raw, "")
    tables = _tables(fields)
    if by_layer_type:
        full, sliding = _olmo3(fields, tables, context, head_dim)
    else:
        full = sliding = _one_for_all(fields, tables, context, head_dim)
    if fields.raw.get(_ORIGINAL) is not None and not any(
        rope.rope_type in _KINDS_OF_LENGTH for rope in (full, sliding)
    ):
        fields.said.append(f"{_ORIGINAL} means nothing for {full.rope_type}, here as in transformers")
    ends = {rope.original_length for rope in (full, sliding) if rope.rope_type == "longrope"}
    longest = min([context, *ends])
    if longest < context:
        fields.said.append(
            f"longrope: the package ends at {longest} tokens, as beyond them transformers takes other factors for all "
            "tokens, and the cache has keys of the first ones"
        )
    return Ropes(full, sliding, longest)


def both_forms(raw: Mapping[str, Any], *, by_layer_type: bool) -> dict[str, Any]:
    """Return the fields of config.json that say its RoPE in the form of transformers 4 and in that of 5.

    A reader of the other version would take plain RoPE of theta 10000 without a word.

    Args:
        raw: config.json, which `read_ropes` has read without a problem.
        by_layer_type: Olmo 3. Its form of transformers 4, AI2's own, is read by both; its tables by layer type have
            such a form only where sliding layers are plain and theta is the one that transformers 4 takes for all.

    Returns:
        Some of rope_theta, rope_scaling and rope_parameters; {}: what is there is all that can be said.
    """
    scaling, parameters = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if by_layer_type:
        full, sliding = (dict(parameters.get(kind) or {}) for kind in (FULL, SLIDING))
        given = {table.pop("rope_theta", _OLMO3_THETA) for table in (full, sliding)}
        plain = sliding.get("rope_type", "default") == "default"
        if scaling or not full or given != {_OLMO3_THETA} or not plain:
            return {}
        return {
            "rope_theta": _OLMO3_THETA,
            "rope_scaling": None if full.get("rope_type", "default") == "default" else full,
        }
    table = dict(scaling or parameters)
    said = [place["rope_theta"] for place in (table, raw) if place.get("rope_theta") is not None]
    theta = float(said[0]) if said else _THETA
    kind = table.pop("rope_type", table.pop("type", "default"))
    own = {"rope_type": kind} | {name: value for name, value in table.items() if name not in _COMMON}
    if raw.get(_ORIGINAL) is not None and kind in _KINDS_OF_LENGTH:
        own[_ORIGINAL] = raw[_ORIGINAL]  # transformers 4 reads that of the table alone
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else own,
        "rope_parameters": {"rope_theta": theta, **own},
    }


def _tables(fields: Fields) -> dict[str, Mapping[str, Any]]:
    """Return rope_scaling and rope_parameters, where they are there; the first goes before the second."""
    found = {name: fields.raw.get(name) for name in ("rope_scaling", "rope_parameters")}
    for name, table in found.items():
        fields.require(table is None or isinstance(table, Mapping), f"{name} {short(table)} (an object)")
    return {name: table for name, table in found.items() if isinstance(table, Mapping) and table}


def _one_for_all(fields: Fields, tables: Mapping[str, Mapping[str, Any]], context: int, head_dim: int) -> Rope:
    places = [*list(tables.values())[:1], fields.raw]
    source = next((place for place in places if place.get("rope_theta") is not None), None)
    theta = _THETA if source is None else fields.number("rope_theta", source=source)
    for other in (fields.raw, *tables.values()):
        if other.get("rope_theta") not in (None, theta):
            fields.problems.append(
                f"rope_theta {short(other['rope_theta'])} beside {theta:g}, which transformers takes; say one"
            )
    for name, table in tables.items():
        nested = sorted(table.keys() & {FULL, SLIDING})
        fields.require(not nested, f"{name}: {', '.join(nested)} (tables by layer type, which olmo3 alone has)")
    tables = {name: _with_outer_length(fields, name, table) for name, table in tables.items()}
    ropes = [_read(fields, name, table, theta, context, head_dim) for name, table in tables.items()]
    if len(ropes) == 2 and ropes[0] != ropes[1] and not fields.problems:
        fields.problems.append("rope_scaling and rope_parameters differ; transformers takes rope_scaling; say one")
    return ropes[0] if ropes else Rope(theta=theta)


def _with_outer_length(fields: Fields, name: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a table with the original length that the file says outside it, as transformers takes it."""
    outer, inner = fields.raw.get(_ORIGINAL), table.get(_ORIGINAL)
    if outer is None or table.get("rope_type", table.get("type")) not in _KINDS_OF_LENGTH:
        return table
    fields.require(
        inner in (None, outer),
        f"{_ORIGINAL} {short(inner)} in {name} beside {short(outer)}, which transformers takes; say one",
    )
    return {**table, _ORIGINAL: outer}


def _olmo3(fields: Fields, tables: Mapping[str, Mapping[str, Any]], context: int, head_dim: int) -> tuple[Rope, Rope]:
    parameters, scaling = tables.get("rope_parameters", {}), tables.get("rope_scaling", {})
    fields.require(
        not scaling or fields.raw.get("rope_parameters") != {},
        "rope_scaling beside rope_parameters {} (transformers fails; remove rope_parameters)",
    )
    nested = parameters.keys() <= {FULL, SLIDING}
    outer = fields.raw.get("rope_theta")
    fields.require(
        outer in (None, _OLMO3_THETA),
        f"rope_theta {short(outer)} (for olmo3 transformers gives it to full attention alone, and {_OLMO3_THETA:g} to "
        "sliding windows; write rope_parameters with a table for each)",
    )
    if not nested:
        plain = parameters.get("rope_type", "default") == "default" and not parameters.keys() - _COMMON
        same = parameters.get("rope_theta") in (None, _OLMO3_THETA) and not scaling
        fields.require(
            plain and same,
            f"rope_parameters {short(dict(parameters))} (one table for all layers: for olmo3 transformers takes plain "
            f"RoPE of theta {_OLMO3_THETA:g} instead; AI2's own form is rope_theta and rope_scaling, or write a table "
            f"for {FULL} and one for {SLIDING})",
        )
        parameters = {}
    fields.require(
        "rope_type" in scaling or "type" not in scaling,
        f"rope_scaling: type {short(scaling.get('type'))} (for olmo3 transformers reads rope_type alone, and takes "
        "plain RoPE)",
    )
    fields.require(
        not scaling or not parameters or FULL in parameters,
        f"rope_scaling beside rope_parameters without {FULL} (transformers fails; say one)",
    )
    found = []
    for kind in (FULL, SLIDING):
        table = parameters.get(kind) or {}
        if not isinstance(table, Mapping):
            fields.problems.append(f"rope_parameters: {kind} {short(table)} (an object)")
            table = {}
        name = f"rope_parameters.{kind}"
        if kind == FULL and scaling:
            differ = sorted(n for n in table.keys() & scaling.keys() if table[n] != scaling[n] and n != "rope_type")
            fields.require(not differ, f"rope_scaling beside {name}: {', '.join(differ)} differ; say one")
            table, name = {**table, **scaling}, "rope_scaling"
        if table.get("truncate") is False:
            fields.problems.append(f"{name}: truncate false (transformers does not read it there, and truncates)")
        length = fields.raw.get(_ORIGINAL)
        fields.require(
            length in (None, table.get(_ORIGINAL, context)) or table.get("rope_type") not in _KINDS_OF_LENGTH,
            f"{_ORIGINAL} {short(length)} (for olmo3 transformers reads it in {name} alone; write it there)",
        )
        theta = fields.number("rope_theta", default=_OLMO3_THETA, source=table)
        found.append(_read(fields, name, table, theta, context, head_dim))
    return found[0], found[1]


def _read(fields: Fields, name: str, table: Mapping[str, Any], theta: float, context: int, head_dim: int) -> Rope:
    """Read one table; `name` is what the file calls it."""
    kind = table.get("rope_type", table.get("type", "default"))
    if kind not in get_args(RopeType):
        fields.problems.append(f"{name}: rope_type {short(kind)} (one of {', '.join(get_args(RopeType))})")
        return Rope(theta=theta)
    if _refuse_partial(fields, table, f"{name}: "):
        return Rope(theta=theta)
    extra = sorted(table.keys() - _COMMON - _OWN[kind])
    named = "rope_type" in table or "type" in table
    fields.require(named or not extra, f"{name}: {', '.join(extra)} (without a rope_type)")
    if extra and named:
        what = "plain RoPE" if kind == "default" else kind
        fields.said.append(f"{name}: {', '.join(extra)} mean nothing for {what}, here as in transformers")
    plain = Rope(kind, theta)
    if kind == "default":
        return plain
    if kind == "longrope":
        return _longrope(fields, name, table, plain, context, head_dim)
    factor = fields.number("factor", source=table)
    if kind == "dynamic":
        fields.said.append(
            f"{name}: dynamic is plain RoPE up to max_position_embeddings, where the package ends: beyond it, "
            "transformers turns new tokens otherwise than those that the cache has"
        )
    if kind == "dynamic" or (kind == "linear" and factor == 1):
        return Rope(theta=theta)
    if kind == "linear":
        return replace(plain, factor=factor)
    original = fields.integer("original_max_position_embeddings", 1, _LONGEST, default=context, source=table)
    if kind == "llama3":
        low, high = (fields.number(f"{end}_freq_factor", source=table) for end in ("low", "high"))
        fields.require(low < high, f"{name}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
        return replace(plain, factor=factor, original_length=original, low_freq_factor=low, high_freq_factor=high)
    fields.require(theta != 1, f"{name}: rope_theta 1 (yarn takes its logarithm)")
    return replace(
        plain,
        factor=factor,
        original_length=original,
        attention_factor=_yarn_attention_factor(fields, table, factor),
        beta_fast=fields.number("beta_fast", default=_BETA_FAST, source=table),
        beta_slow=fields.number("beta_slow", default=_BETA_SLOW, source=table),
        truncate=fields.boolean("truncate", table, default=True),
    )


def _yarn_attention_factor(fields: Fields, table: Mapping[str, Any], factor: float) -> float:
    def scale(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    if table.get("attention_factor") is not None:
        return fields.number("attention_factor", source=table)
    if table.get("mscale") and table.get("mscale_all_dim"):
        one, all_dim = (fields.number(field, source=table) for field in ("mscale", "mscale_all_dim"))
        return scale(one) / scale(all_dim)
    return scale(1)


def _longrope(fields: Fields, name: str, table: Mapping[str, Any], plain: Rope, context: int, head_dim: int) -> Rope:
    original = fields.integer("original_max_position_embeddings", 2, _LONGEST, default=context, source=table)
    for which in ("short_factor", "long_factor"):
        numbers = table.get(which)
        fields.require(
            isinstance(numbers, list)
            and len(numbers) == head_dim // 2
            and all(type(n) in (int, float) and 0 < n < 1e30 for n in numbers),
            f"{name}: {which} {short(numbers)} (a list of {head_dim // 2} positive numbers, half of head_dim)",
        )
    if fields.problems:
        return plain
    factor = fields.number("factor", default=context / original, source=table)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        plain,
        original_length=original,
        attention_factor=fields.number("attention_factor", default=default, source=table),
        factors=tuple(float(n) for n in table["short_factor"]),
    )


def _refuse_partial(fields: Fields, table: Mapping[str, Any], where: str) -> bool:
    part = table.get("partial_rotary_factor")
    fields.require(
        part in (None, 1),
        f"{where}partial_rotary_factor {short(part)} (only 1: no OLMo was trained to rotate a part of a head)",
    )
    return part not in (None, 1)
