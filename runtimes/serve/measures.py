"""/v1/embeddings, /v1/score and /v1/rerank: bodies to texts that are measured, what was measured to answers.

| route      | in a body                                      | of           | in an answer              |
|------------|------------------------------------------------|--------------|---------------------------|
| embeddings | input, encoding_format, dimensions, user       | OpenAI's API | data: embedding           |
|            | pooling, hidden_state, normalize               | our own      |                           |
| score      | text_1, text_2: a text or a list each          | vLLM         | data: score, of each pair |
|            | input: a text or a list; label                 | our own      | data: scores, one a label |
| rerank     | query, documents, top_n, return_documents      | Cohere, Jina | results: relevance_score  |

What is likened is, by a model that gives hidden states, the cosine of two vectors; by a classifier, the score of both
texts behind each other, of the one label that there is or that is named.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from runtimes.generation.generate import encode_prompt
from runtimes.runners.embeddings import Pooling
from runtimes.serve.model import ServedModel
from runtimes.serve.problems import CallError
from runtimes.serve.requests import Texts
from runtimes.serve.strict_json import Fields

MOST_TEXTS = 2048
"""of a call"""

Text: TypeAlias = str | tuple[int, ...]
Values: TypeAlias = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class MeasureCall:
    """What a body wants measured, and how the answer looks."""

    model: str
    texts: tuple[tuple[Text, ...], ...]
    """each is one text, or the pieces that make one"""
    measured: Texts
    """without id and texts"""
    pairs: tuple[tuple[int, int], ...] = ()
    """texts whose vectors are likened"""
    label: int | None = None
    """place of the label that is asked for; None: all are"""
    encoded: bool = False
    """vectors are base64 of float32, little-endian, as OpenAI's client asks for them"""
    documents: tuple[str, ...] = ()
    """of which the best are told"""
    best: int = 0
    tells_documents: bool = False


def read_embeddings(body: Mapping[str, Any], model: ServedModel, hidden_size: int) -> MeasureCall:
    """Read a body of /v1/embeddings.

    Args:
        body: parsed.
        model: that is served.
        hidden_size: numbers of a vector.

    Raises:
        CallError: a field is not what it must be, or the model gives no vectors.
    """
    if not model.hidden_states:
        raise _missing("vectors: its graphs give no hidden states; export it with --hidden-states last")
    fields = Fields(body)
    name = _model(fields, model)
    texts = _texts(fields, "input", ids=True)
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise CallError("encoding_format: expected float or base64", "encoding_format")
    size = fields.integer("dimensions", 1, 1 << 31)
    if size not in (None, hidden_size):
        raise CallError(f"dimensions: vectors of this model have {hidden_size}; leave it out", "dimensions")
    fields.text("user")
    pooling = fields.text("pooling") or "mean"
    if pooling not in get_args(Pooling):
        raise CallError(f"pooling: expected {' or '.join(get_args(Pooling))}", "pooling")
    number = fields.integer("hidden_state", 0, 1 << 31)
    if number is not None and number not in model.hidden_states:
        known = ", ".join(map(str, model.hidden_states))
        raise CallError(f"hidden_state: this model gives {known}", "hidden_state")
    normalize = fields.flag("normalize", missing=True)
    fields.done()
    wanted = Texts(
        "",
        (),
        "vectors",
        pooling="last" if pooling == "last" else "mean",
        hidden_state=number,
        normalize=normalize,
    )
    return MeasureCall(name, tuple((text,) for text in texts), wanted, encoded=encoding == "base64")


def read_score(body: Mapping[str, Any], model: ServedModel) -> MeasureCall:
    """Read a body of /v1/score.

    Raises:
        CallError: as `read_embeddings`, or the model gives neither scores nor vectors.
    """
    _check_likens(model)
    fields = Fields(body)
    name = _model(fields, model)
    if body.get("input") is not None:
        if not model.labels:
            raise CallError("input: this model likens texts; give text_1 and text_2", "input")
        texts = _texts(fields, "input", ids=True)
        label = _label(fields, model, needed=False)
        fields.done()
        return MeasureCall(name, tuple((text,) for text in texts), Texts("", (), "scores"), label=label)
    first, second = _texts(fields, "text_1"), _texts(fields, "text_2")
    if len(first) not in (1, len(second)):
        raise CallError(f"text_1: {len(first)} texts for {len(second)} of text_2; give one, or as many", "text_1")
    call = _likened(name, first, second, model, fields)
    fields.done()
    return call


def read_rerank(body: Mapping[str, Any], model: ServedModel) -> MeasureCall:
    """Read a body of /v1/rerank.

    Raises:
        CallError: as `read_score`.
    """
    _check_likens(model)
    fields = Fields(body)
    name = _model(fields, model)
    query = fields.text("query")
    if not query:
        raise CallError("query: expected a text, found none", "query")
    documents = _texts(fields, "documents")
    best = fields.integer("top_n", 0, 1 << 31)
    tells = fields.flag("return_documents", missing=True)
    call = _likened(name, [query], documents, model, fields)
    fields.done()
    return MeasureCall(
        call.model,
        call.texts,
        call.measured,
        pairs=call.pairs,
        label=call.label,
        documents=tuple(str(text) for text in documents),
        best=best or len(documents),
        tells_documents=tells,
    )


def encoded_texts(call: MeasureCall, model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Return the ids of the texts of a call.

    Raises:
        InputError: one is empty, and the model has no token that begins a text; one is not valid Unicode.
    """

    def ids(pieces: Sequence[Text]) -> tuple[int, ...]:
        first, *others = pieces
        found = list(first) if isinstance(first, tuple) else encode_prompt(model.tokenizer, first)
        for piece in others:
            found += piece if isinstance(piece, tuple) else model.tokenizer.encode(piece, add_special_tokens=False)
        return tuple(found)

    return tuple(ids(pieces) for pieces in call.texts)


def embeddings_answer(call: MeasureCall, found: Values, tokens: int) -> dict[str, Any]:
    """Return the answer of /v1/embeddings; `found`: float32 [texts, hidden_size]."""
    vectors = found.astype("<f4", copy=False)
    each = [base64.b64encode(v.tobytes()).decode() if call.encoded else _shortest(v) for v in vectors]
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(each)]
    return {"object": "list", "data": data, "model": call.model, "usage": _usage(tokens)}


def score_answer(call: MeasureCall, found: Values, tokens: int, labels: Sequence[str], name: str) -> dict[str, Any]:
    """Return the answer of /v1/score; `name`: of the call."""
    if call.label is None and not call.pairs:
        rows = [dict(zip(labels, _shortest(row), strict=True)) for row in found]
        data: list[dict[str, Any]] = [{"scores": row} for row in rows]
    else:
        data = [{"score": score} for score in _scores(call, found)]
    return {
        "id": f"score-{name}",
        "object": "list",
        "created": int(time.time()),
        "model": call.model,
        "data": [{"index": n, "object": "score", **row} for n, row in enumerate(data)],
        "usage": _usage(tokens),
    }


def rerank_answer(call: MeasureCall, found: Values, tokens: int, name: str) -> dict[str, Any]:
    """Return the answer of /v1/rerank, the best first; `name`: of the call."""
    scores = _scores(call, found)
    order = sorted(range(len(scores)), key=lambda n: -scores[n])[: call.best]
    results = []
    for number in order:
        told = {"document": {"text": call.documents[number]}} if call.tells_documents else {}
        results.append({"index": number, **told, "relevance_score": scores[number]})
    return {"id": f"rerank-{name}", "model": call.model, "results": results, "usage": _usage(tokens)}


def _scores(call: MeasureCall, found: Values) -> list[float]:
    """Return one number of each pair or text."""
    if not call.pairs:
        return _shortest(found[:, call.label or 0])
    first, second = (found[[pair[side] for pair in call.pairs]].astype(np.float64) for side in (0, 1))
    return [float(x) for x in (first * second).sum(axis=-1).clip(-1.0, 1.0)]  # they have length 1


def _shortest(values: Values) -> list[float]:
    """Return float32 as the shortest decimals that are the same."""
    return [float(str(x)) for x in values.astype(np.float32, copy=False)]


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _likened(
    name: str, first: Sequence[Text], second: Sequence[Text], model: ServedModel, fields: Fields
) -> MeasureCall:
    """Return what likens each of `second` with its own of `first`, or the only one."""
    firsts = [0] * len(second) if len(first) == 1 else list(range(len(second)))
    if model.labels:
        label = _label(fields, model, needed=True)
        joined = tuple((first[n], text) for n, text in zip(firsts, second, strict=True))
        return MeasureCall(name, joined, Texts("", (), "scores"), label=label)
    places = tuple((n, len(first) + number) for number, n in enumerate(firsts))
    texts: tuple[tuple[Text, ...], ...] = tuple((text,) for text in (*first, *second))
    return MeasureCall(name, texts, Texts("", (), "vectors", normalize=True), pairs=places)


def _label(fields: Fields, model: ServedModel, *, needed: bool) -> int | None:
    label = fields.text("label")
    if label is None and (not needed or len(model.labels) == 1):
        return 0 if needed else None
    if label not in model.labels:
        raise CallError(f"label: expected one of {', '.join(model.labels)}", "label")
    return model.labels.index(label)


def _model(fields: Fields, model: ServedModel) -> str:
    name = fields.text("model")
    if name is None:
        raise CallError("model: expected the name of one, found none", "model")
    if model.adapter(name) is not None:
        raise CallError(f"model: {name} is a LoRA adapter; vectors and scores are of {model.name} alone", "model")
    return name


def _texts(fields: Fields, field: str, *, ids: bool = False) -> list[Text]:
    """Return a text, or several; `ids`: token ids may stand for one."""
    given = fields.any(field)
    what = "texts or lists of token ids" if ids else "texts"
    wrong = CallError(f"{field}: expected one text or a list of up to {MOST_TEXTS} {what}, none of them empty", field)
    if ids and isinstance(given, list) and given and all(type(i) is int for i in given):
        return [tuple(given)]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not 0 < len(texts) <= MOST_TEXTS:
        raise wrong
    found: list[Text] = []
    for text in texts:
        if isinstance(text, str) and text:
            found.append(text)
        elif ids and isinstance(text, list) and text and all(type(i) is int for i in text):
            found.append(tuple(text))
        else:
            raise wrong
    return found


def _check_likens(model: ServedModel) -> None:
    if not model.labels and not model.hidden_states:
        raise _missing("scores: it is no classifier, and gives no hidden states; export it with --hidden-states last")


def _missing(what: str) -> CallError:
    return CallError(f"this model gives no {what}", status=404, code="not_served")
