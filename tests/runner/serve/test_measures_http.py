"""/v1/embeddings, /v1/score and /v1/rerank over sockets, of models with and without what they need."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.chat import EOS, IM_END, template_folder
from support.served import Served, serving
from support.serving import FAKE_SIZE, fake_state, until

from runtimes.serve.model import ServedModel
from runtimes.serve.texts import Patience
from runtimes.text.tokenizer import Tokenizer


def mean(served: Served, text: str) -> list[float]:
    """The vector of a text, before it has length 1."""
    states = [fake_state(token_id) for token_id in served.model.tokenizer.encode(text)]
    return (3 * np.mean(states, axis=0)).tolist()


def unit(served: Served, text: str) -> list[float]:
    vector = np.array(mean(served, text))
    return (vector / np.linalg.norm(vector)).tolist()


def post(served: Served, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    status, found, _ = served.post(path, {"model": "olmo", **body})
    return status, found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("measures") / "olmo3"
    tokenizer = Tokenizer.from_folder(template_folder(folder, "olmo3_instruct", model_type="olmo3", eos=[EOS, IM_END]))
    return ServedModel("olmo", "c0ffee" * 10, tokenizer, adapters=("first",))


@pytest.fixture(scope="module")
def embedder(base: ServedModel) -> Iterator[Served]:
    with serving(replace(base, hidden_states=(1, 2))) as found:
        yield found


@pytest.fixture(scope="module")
def scorer(base: ServedModel) -> Iterator[Served]:
    with serving(replace(base, labels=("bad", "good"), adapters=())) as found:
        yield found


def test_openais_client_gets_vectors_of_length_one(embedder: Served) -> None:
    create = embedder.client.embeddings.create
    found = create(model="olmo", input=["Once upon a time", "Twice"])  # base64, as it asks
    floats = create(model="olmo", input="Twice", encoding_format="float", dimensions=FAKE_SIZE)
    assert [entry.index for entry in found.data] == [0, 1]
    np.testing.assert_allclose(found.data[0].embedding, unit(embedder, "Once upon a time"), rtol=1e-6)
    shortest = [float(str(np.float32(x))) for x in found.data[1].embedding]
    assert shortest == floats.data[0].embedding
    count = sum(len(embedder.model.tokenizer.encode(text)) for text in ("Once upon a time", "Twice"))
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (count, count)


def test_what_else_a_vector_may_be(embedder: Served) -> None:
    ids = embedder.model.tokenizer.encode("Once upon")
    _, found = post(embedder, "/v1/embeddings", input=[ids, [7]], pooling="last", hidden_state=1, normalize=False)
    assert [entry["embedding"] for entry in found["data"]] == [[2 * x for x in fake_state(i)] for i in (ids[-1], 7)]


def test_pairs_of_texts_are_likened_by_the_cosine(embedder: Served) -> None:
    _, found = post(embedder, "/v1/score", text_1="Once", text_2=["Once", "Twice upon"])
    expected = [1.0, float(np.dot(unit(embedder, "Once"), unit(embedder, "Twice upon")))]
    np.testing.assert_allclose([entry["score"] for entry in found["data"]], expected, rtol=1e-6)
    _, each = post(embedder, "/v1/score", text_1=["Once", "Once"], text_2=["Once", "Twice upon"])
    assert each["data"] == found["data"]
    assert found["object"] == "list"


def test_documents_are_ranked_the_best_first(embedder: Served) -> None:
    documents = ["Twice upon", "Once", "Never at all"]
    _, found = post(embedder, "/v1/rerank", query="Once", documents=documents)
    scores = [result["relevance_score"] for result in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert found["results"][0] == {"index": 1, "document": {"text": "Once"}, "relevance_score": pytest.approx(1.0)}
    _, best = post(embedder, "/v1/rerank", query="Once", documents=documents, top_n=1, return_documents=False)
    assert best["results"] == [{"index": 1, "relevance_score": pytest.approx(1.0)}]


def test_a_classifier_scores_texts_and_pairs(scorer: Served) -> None:
    encode = scorer.model.tokenizer.encode
    _, found = post(scorer, "/v1/score", input=["Once upon", "Twice"])
    last = [fake_state(encode(text)[-1]) for text in ("Once upon", "Twice")]
    assert [e["scores"] for e in found["data"]] == [{"bad": s[0], "good": s[1]} for s in last]
    _, found = post(scorer, "/v1/score", text_1="Once", text_2=[" upon", " a"], label="good")
    assert [e["score"] for e in found["data"]] == [fake_state(encode(text)[-1])[1] for text in (" upon", " a")]
    assert found["usage"]["prompt_tokens"] == sum(len(encode("Once")) + len(encode(t)) for t in (" upon", " a"))
    _, found = post(scorer, "/v1/rerank", query="Once", documents=[" upon", " a"], label="good")
    assert {r["index"]: r["relevance_score"] for r in found["results"]} == {
        n: fake_state(encode(text)[-1])[1] for n, text in enumerate((" upon", " a"))
    }


def test_a_classifier_makes_no_texts(scorer: Served) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": []})):
        status, said, _ = scorer.refused(f"/v1/{path}", **body)
        assert (status, said) == (404, "this model is a classifier, which makes no texts; use /v1/score")


def test_a_model_without_the_output_says_which_flag_gives_it(base: ServedModel) -> None:
    with serving(base) as served:
        for path in ("embeddings", "score", "rerank"):
            status, said, _ = served.refused(f"/v1/{path}", input="x")
            assert (status, "export it with --hidden-states last" in said) == (404, True)


@pytest.mark.parametrize(
    ("path", "body", "said", "param"),
    [
        ("embeddings", {}, "input: expected one text or a list of up to 2048 texts or lists of token ids", "input"),
        ("embeddings", {"input": ""}, "input: expected one text", "input"),
        ("embeddings", {"input": ["a", []]}, "input: expected one text", "input"),
        ("embeddings", {"input": [1, "a"]}, "input: expected one text", "input"),
        ("embeddings", {"input": ["a"] * 2049}, "input: expected one text", "input"),
        ("embeddings", {"input": [[2**40]]}, "text 0", None),
        ("embeddings", {"input": [5] * 257}, "257", None),
        ("embeddings", {"input": "x", "dimensions": 9}, "vectors of this model have 3", "dimensions"),
        ("embeddings", {"input": "x", "encoding_format": "int8"}, "expected float or base64", "encoding_format"),
        ("embeddings", {"input": "x", "pooling": "max"}, "pooling: expected mean or last", "pooling"),
        ("embeddings", {"input": "x", "hidden_state": 7}, "hidden_state: this model gives 1, 2", "hidden_state"),
        ("embeddings", {"input": "x", "normalize": "no"}, "normalize: expected true or false", "normalize"),
        ("embeddings", {"input": "x", "truncate": 5}, "truncate: a field that this server does not know", "truncate"),
        ("embeddings", {"input": "x", "model": "first"}, "first is a LoRA adapter", "model"),
        ("score", {"input": "x"}, "give text_1 and text_2", "input"),
        ("score", {"text_1": ["a", "b"], "text_2": "c"}, "2 texts for 1 of text_2", "text_1"),
        ("score", {"text_1": "a"}, "text_2: expected one text", "text_2"),
        ("score", {"text_1": "a", "text_2": "b", "label": "x"}, "label: a field", "label"),
        ("rerank", {"documents": ["a"]}, "query: expected a text", "query"),
        ("rerank", {"query": "a", "documents": []}, "documents: expected", "documents"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "top_n"),
        ("rerank", {"query": "a", "documents": ["b"], "return_documents": 1}, "return_documents", "return_documents"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    embedder: Served, path: str, body: dict[str, Any], said: str, param: str | None
) -> None:
    status, message, named = embedder.refused(f"/v1/{path}", **body)
    assert (status, named) == (400, param)
    assert said in message
    assert not embedder.engine.busy


def test_a_label_must_be_named_where_there_are_several(scorer: Served) -> None:
    for label in ({}, {"label": "ugly"}):
        status, said, param = scorer.refused("/v1/score", text_1="a", text_2="b", **label)
        assert (status, said, param) == (400, "label: expected one of bad, good", "label")


def test_numbers_that_break_are_an_error_and_the_next_call_is_answered(embedder: Served) -> None:
    embedder.engine.runner.broken = {7}
    status, said, _ = embedder.refused("/v1/embeddings", input=[[5], [7]])
    embedder.engine.runner.broken = set()
    assert (status, "NaN or infinite" in said) == (500, True)
    assert post(embedder, "/v1/embeddings", input=[[5], [7]])[0] == 200


def test_who_waits_too_long_or_goes_away_leaves_nothing_behind(base: ServedModel) -> None:
    patience = Patience(queue=0.2, generation=0.4)
    with serving(replace(base, hidden_states=(1,)), patience=patience) as served:
        served.engine.tick_seconds = 0.3
        status, said, _ = served.refused("/v1/embeddings", input="x")
        assert (status, "was not begun" in said) == (503, True)
        until(lambda: not served.engine.busy)
    with serving(replace(base, hidden_states=(1,)), max_slots=1) as served:
        served.engine.tick_seconds = 0.05
        body = json.dumps({"model": "olmo", "input": [[5]] * 500})
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/embeddings", body)
        until(lambda: len(served.engine.runner.batches) > 1)
        connection.close()
        until(lambda: not served.engine.busy)
        assert len(served.engine.runner.batches) < 400
