"""olmo2-run score and embed: texts, JSON and ids in, a line of JSON out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtimes import open_package, open_runner
from runtimes.cli import main
from runtimes.documents import Document, read_documents, written
from runtimes.errors import InputError
from runtimes.manifest import MANIFEST_NAME
from runtimes.runners.embeddings import embed
from runtimes.serve.model import served_model
from runtimes.serve.options import EngineOptions
from runtimes.serve.requests import Measured, Request, Started, Texts, Token
from runtimes.serve.worker import open_engine
from runtimes.text.tokenizer import Tokenizer

TEXTS = ["And it came to pass", "the works of the Son of God", "x"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a head of two labels in the place of its own."""
    torch = pytest.importorskip("torch")
    from transformers import Olmo2Config, Olmo2ForSequenceClassification

    from olmo2_export.package.export import export
    from olmo2_export.weights.checkpoint import open_checkpoint

    out, demo = tmp_path_factory.mktemp("scorer"), open_checkpoint("demo").folder
    shutil.copytree(demo, out / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    config = Olmo2Config.from_pretrained(demo, id2label={0: "bad", 1: "good"}, pad_token_id=0, num_hidden_layers=1)
    Olmo2ForSequenceClassification(config).save_pretrained(out / "c")
    export(open_checkpoint(str(out / "c")), out / "p", variants=["fp32"])
    return out / "p"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, whose graph gives two hidden states."""
    pytest.importorskip("torch")
    from olmo2_export.package.export import export
    from olmo2_export.package.weight_choice import Options
    from olmo2_export.weights.checkpoint import open_checkpoint

    out = tmp_path_factory.mktemp("embedder") / "p"
    export(open_checkpoint("demo"), out, variants=["fp32"], options=Options(hidden_states=(2, -1)))
    return out


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_of_text_are_scored(scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\r\n", encoding="utf-8")
    assert main(["score", str(scorer), str(tmp_path / "in.txt")]) == 0
    found = lines(capsys.readouterr().out)
    tokenizer = Tokenizer.from_package(scorer)
    with open_runner(scorer) as runner:
        expected = runner.score([tokenizer.encode(text) for text in TEXTS])
    assert [line["text"] for line in found] == TEXTS
    assert [line["tokens"] for line in found] == [len(tokenizer.encode(text)) for text in TEXTS]
    assert [list(line["scores"]) for line in found] == [["bad", "good"]] * 3  # type: ignore[call-overload]
    scores = [list(line["scores"].values()) for line in found]  # type: ignore[attr-defined]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert len({round(row[0], 4) for row in scores}) == 3


def test_lines_of_json_keep_their_fields(scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = Tokenizer.from_package(scorer).encode(TEXTS[0])
    given = [TEXTS[0], {"id": 7, "text": TEXTS[0]}, {"id": "b", "token_ids": ids}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    assert main(["score", str(scorer), str(tmp_path / "in.jsonl")]) == 0
    first, second, third = lines(capsys.readouterr().out)
    assert (second["id"], third["id"], third.get("text")) == (7, "b", None)
    assert first["scores"] == second["scores"] == third["scores"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: expected a text, or an object with one of"),
        ('{"text": "a", "token_ids": [1]}', "line 1: expected a text, or an object with one of"),
        ('{"text": 3}', '"text" is int, expected a string'),
        ('{"token_ids": [-1]}', "line 1: token_ids, position 0: token id -1"),
        ('{"token_ids": []}', "expected at least one token id"),
    ],
)
def test_what_is_no_document_is_refused(
    line: str, words: str, scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(line, encoding="utf-8")
    assert main(["score", str(scorer), str(tmp_path / "in.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def read(text: str, found: str = "scores") -> list[Document]:
    """Read JSON, whose texts nothing here encodes."""

    def tokenizer() -> Tokenizer:
        raise AssertionError("a blank line is refused before a text is encoded")

    return list(read_documents(text, tokenizer, jsonl=True, vocab_size=9, longest=4, found=found))


def test_a_blank_line_is_refused_before_any_is_read() -> None:
    """Dropped, it would move every answer behind it up by a line."""
    ids = '{"token_ids": [3]}'
    for text, words in (
        (f'"a text"\n\n{ids}\n', "line 2: blank; each line is a text, and is answered by a line"),
        (f"{ids}\n \t\n{ids}\n\n", "line 2, 4: blank"),
        ("\n", "line 1: blank"),
    ):
        with pytest.raises(InputError, match=words):
            read(text)
    assert [document.line for document in read(f"{ids}\n{ids}")] == [1, 2]
    assert [document.line for document in read(f"{ids}\n{ids}\n")] == [1, 2]
    assert read("") == []


def test_a_field_that_would_be_overwritten_is_refused_by_name() -> None:
    for line, found, words in (
        ('{"token_ids": [3], "scores": 1}', "scores", '"scores": what is written of a text has that name'),
        ('{"token_ids": [3], "tokens": 1}', "scores", '"tokens": what is written'),
        ('{"token_ids": [3], "embedding": 1, "tokens": 2}', "embedding", '"tokens" and "embedding": what is written'),
    ):
        with pytest.raises(InputError, match=f"line 2: {words}"):
            read(f'{{"token_ids": [3]}}\n{line}', found)
    (document,) = read('{"token_ids": [3], "embedding": 1}')  # of the other command
    assert json.loads(written(document, "scores", {"good": 0.5})) == {
        "embedding": 1,
        "tokens": 1,
        "scores": {"good": 0.5},
    }


def test_ids_need_no_tokenizer(scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = Path(shutil.copytree(scorer, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    (tmp_path / "in.jsonl").write_text('{"token_ids": [3, 1, 4]}\n{"token_ids": [4]}', encoding="utf-8")
    assert main(["score", str(bare), str(tmp_path / "in.jsonl"), "--skip-hash-check"]) == 0
    assert [line["tokens"] for line in lines(capsys.readouterr().out)] == [3, 1]
    (tmp_path / "in.jsonl").write_text('"a text"', encoding="utf-8")
    assert main(["score", str(bare), str(tmp_path / "in.jsonl"), "--skip-hash-check"]) != 0
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_text_that_does_not_fit_is_named(scorer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("x\n" + "and " * 5000, encoding="utf-8")
    assert main(["score", str(scorer), str(tmp_path / "in.txt")]) == 2
    assert "line 2: 50" in capsys.readouterr().err


def test_each_command_names_the_other(
    scorer: Path, demo_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("x", encoding="utf-8")
    assert main(["score", str(demo_package), str(tmp_path / "in.txt")]) == 2
    assert "a language model, which gives no scores; use olmo2-run generate" in capsys.readouterr().err
    assert main(["generate", str(scorer), "--prompt", "x"]) == 2
    assert "a classifier, which gives scores and no logits; generate needs a language model" in capsys.readouterr().err
    assert (scorer / MANIFEST_NAME).is_file()


def test_lines_are_embedded(embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_package(embedder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    given = [{"id": 3, "text": TEXTS[0]}, TEXTS[1], {"token_ids": ids[2]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    found: dict[str, list[dict[str, object]]] = {}
    for name, options in {"mean": [], "last": ["--pooling", "last", "--hidden-state", "2", "--normalize"]}.items():
        assert main(["embed", str(embedder), str(tmp_path / "in.jsonl"), *options]) == 0
        found[name] = lines(capsys.readouterr().out)
    with open_runner(embedder) as runner:
        mean = embed(runner, ids)
        last = embed(runner, ids, pooling="last", hidden_state=2, normalize=True)
    for name, vectors in (("mean", mean), ("last", last)):
        assert [line["tokens"] for line in found[name]] == [len(row) for row in ids]
        assert found[name][0]["id"] == 3
        given_back = np.array([line["embedding"] for line in found[name]], np.float32)
        np.testing.assert_allclose(given_back, vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verb", ["score", "embed"])
def test_the_size_of_a_batch_changes_no_answer(
    verb: str, scorer: Path, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS * 2), encoding="utf-8")
    command = [verb, str(scorer if verb == "score" else embedder), str(tmp_path / "in.txt")]
    found = []
    for size in ("1", "2", "6"):
        assert main([*command, "--batch-size", size]) == 0
        found.append(lines(capsys.readouterr().out))
    name = "scores" if verb == "score" else "embedding"
    alone, *together = (
        [list(line[name].values()) if verb == "score" else line[name] for line in answers]  # type: ignore[attr-defined]
        for answers in found
    )
    for values in together:
        np.testing.assert_allclose(values, alone, atol=2e-5)
    assert [line["text"] for line in found[2]] == TEXTS * 2
    assert main([*command, "--batch-size", "0"]) == 2
    assert "--batch-size 0: expected at least 1" in capsys.readouterr().err


def test_a_package_without_hidden_states_is_refused(
    demo_package: Path, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("x", encoding="utf-8")
    assert main(["embed", str(demo_package), str(tmp_path / "in.txt")]) == 2
    assert "its graphs give no hidden states; export it with --hidden-states last" in capsys.readouterr().err
    assert main(["embed", str(embedder), str(tmp_path / "in.txt"), "--hidden-state", "1"]) == 2
    assert "hidden state 1: variant fp32 gives 2, " in capsys.readouterr().err


def test_a_server_gives_the_same_vectors_and_goes_on_with_answers(embedder: Path) -> None:
    sequences = ((5, 17, 99), (11, 2), (3, 4, 5, 6, 7, 8, 9, 10, 11))
    with open_runner(embedder) as runner:
        expected = embed(runner, sequences, normalize=True)
    with open_engine(EngineOptions(str(embedder), threads=1)) as engine:
        assert engine.capacity.hidden_size == expected.shape[1]
        engine.submit(Request("before", (5, 6, 7, 8, 9, 10, 11, 12, 13), 3))
        engine.submit(Texts("texts", sequences, "vectors", normalize=True))
        engine.submit(Request("behind", (5, 6, 7, 8, 9, 10, 11, 12, 13), 3))
        events = []
        while not engine.idle:
            events += engine.tick().events
    found = {p: v for e in events if isinstance(e, Measured) for p, v in zip(e.places, e.values, strict=True)}
    np.testing.assert_allclose([found[place] for place in range(3)], expected, atol=2e-5)
    answers = {
        name: [e.token_id for e in events if isinstance(e, Token) and e.request == name]
        for name in ("before", "behind")
    }
    assert answers["before"] == answers["behind"]
    assert len(answers["before"]) == 3


def test_a_server_gives_the_same_scores(scorer: Path) -> None:
    sequences = ((5, 17, 99), (11, 2))
    with open_runner(scorer) as runner:
        expected = runner.score(sequences)
    with open_engine(EngineOptions(str(scorer), threads=1)) as engine:
        engine.submit(Texts("texts", sequences, "scores"))
        (started, measured) = engine.tick().events
    assert isinstance(started, Started)
    assert isinstance(measured, Measured)
    np.testing.assert_allclose([measured.values[n] for n in np.argsort(measured.places)], expected, atol=1e-5)
    assert served_model(open_package(scorer), "scorer").labels == ("bad", "good")
