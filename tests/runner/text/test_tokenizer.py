"""Text in, text out: what streams is what decodes, and broken files and texts are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError, IntegrityError, PackageError, PackageNotFoundError
from runtimes.generation.generate import encode_prompt
from runtimes.manifest import MANIFEST_NAME
from runtimes.sealed import hash_files, read_sealed, seal
from runtimes.text.tokenizer import Tokenizer

TEXTS = {
    "latin": "In the beginning God created the heaven and the earth.",
    "emoji": "a 👩‍👩‍👧‍👦 family, 🏳️‍🌈 and 🇫🇷",
    "cjk": "太初に言があった。말씀이 하나님과 함께",
    "combining": "e\u0301 n\u0303o\u0302\u0323 \u0915\u094d\u0937\u093f z\u0351\u036b\u0343\u036a",
    "replacement": "a real \ufffd in the text, and one at the end \ufffd",
    "controls": "tab\t newline\n\n nul\x00 del\x7f nbsp\u00a0 bom\ufeff",
}


@pytest.fixture(scope="module")
def tokenizer(demo_package: Path) -> Tokenizer:
    return Tokenizer.from_package(demo_package)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def edit(package: Path, out: Path, **files: Any) -> Path:
    """A copy of a package's text files, some replaced (None: removed), with a manifest that vouches for them."""
    out.mkdir()
    manifest = read_sealed(package / MANIFEST_NAME)
    names = [n for n in manifest["files"] if not n.startswith("onnx/")]
    for name in names:
        shutil.copyfile(package / name, out / name)
    for key, content in files.items():
        path = out / f"{key}.json"
        if content is None:
            path.unlink()
            names.remove(path.name)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    entries = hash_files(out, names)
    manifest["files"] = {name: vars(entry) for name, entry in entries.items()}
    (out / MANIFEST_NAME).write_bytes(seal(manifest))
    return out


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(stream(tokenizer, ids)) == text


@pytest.mark.parametrize("name", ["emoji", "cjk"])
def test_stream_never_gives_half_a_character(tokenizer: Tokenizer, name: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(TEXTS[name]))
    assert len(pieces) > len(TEXTS[name]) / 2
    assert not any("\ufffd" in piece for piece in pieces)


def test_flush_gives_what_was_never_completed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👍")[:-1]
    decoder = tokenizer.stream()
    assert "".join(decoder.push(i) for i in ids) == "a"
    assert decoder.flush() == tokenizer.decode(ids)[1:] == "\ufffd"
    assert decoder.flush() == ""


def test_stream_of_random_ids_equals_decode(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    pieces_of_characters = [i for i in range(4096) if "\ufffd" in tokenizer.decode([i])]
    assert len(pieces_of_characters) > 100
    for _ in range(500):
        broken = random.choice(pieces_of_characters, 12)
        ids = np.where(random.random(12) < 0.6, broken, random.integers(0, 4096, 12)).tolist()
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    ids = [*tokenizer.encode("one"), eos, *tokenizer.encode(" two")]
    assert tokenizer.decode(ids) == "one two"
    assert "".join(stream(tokenizer, ids)) == "one two"


def test_text_that_looks_like_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert not set(ids) & set(tokenizer.eos_token_ids)
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_special_tokens_of_a_rendered_prompt_are_parsed_when_asked_for(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    parsed = tokenizer.encode("<|endoftext|>hi", parse_special=True)
    assert parsed == [eos, *tokenizer.encode("hi")]
    assert tokenizer.encode("<|endoftext|>hi") != parsed  # nothing has changed for the next text
    assert tokenizer.special_in("a<|endoftext|>b") == ["<|endoftext|>"]
    assert tokenizer.special_in("no <|end") == []


def test_a_token_that_begins_a_text_is_not_doubled(demo_package: Path, tmp_path: Path) -> None:
    document = json.loads((demo_package / "tokenizer.json").read_text())
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    package = edit(demo_package, tmp_path / "p", tokenizer=document, generation_config={"bos_token_id": 0})
    begins = Tokenizer.from_package(package)
    plain = begins.encode("hi", add_special_tokens=False)
    assert encode_prompt(begins, "hi") == [0, *plain]
    assert encode_prompt(begins, "<|endoftext|>hi", parse_special=True) == [0, *plain]
    assert encode_prompt(begins, "<|endoftext|><|endoftext|>hi", parse_special=True) == [0, 0, *plain]


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"character 2 is the lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800")


def test_encode_equals_transformers(tokenizer: Tokenizer, demo_package: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(demo_package)
    for text in TEXTS.values():
        assert tokenizer.encode(text) == other(text)["input_ids"]


def test_truncation_left_over_from_training_does_not_cut_the_prompt(
    tokenizer: Tokenizer, demo_package: Path, tmp_path: Path
) -> None:
    document = json.loads((demo_package / "tokenizer.json").read_text())
    document["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    document["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    left_over = Tokenizer.from_package(edit(demo_package, tmp_path / "p", tokenizer=document))
    assert left_over.encode(TEXTS["latin"]) == tokenizer.encode(TEXTS["latin"])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (7,)),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, (7, 8)),
        ({"eos_token_id": None}, {"eos_token_id": 9}, (9,)),
        ({}, {"eos_token_id": [9]}, (9,)),
        ({}, {}, ()),
        (None, {"eos_token_id": 9}, (9,)),
    ],
)
def test_eos_comes_from_generation_config_first(
    demo_package: Path, tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    package = edit(demo_package, tmp_path / "p", generation_config=generation, config=config)
    assert Tokenizer.from_package(package).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation", "config", "own", "said"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": 0}, "<|endoftext|>", None),
        ({"eos_token_id": [0, 7]}, {"eos_token_id": 0}, None, None),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {"content": "<|endoftext|>"}, None),
        (
            {"eos_token_id": 7},
            {"eos_token_id": [0, 7]},
            None,
            "at token id 7, not at 0 (<|endoftext|>) of config.json;",
        ),
        ({"eos_token_id": 0}, {}, "<|pad|>", "at token id 0, not at 1 (<|pad|>) of tokenizer_config.json;"),
        (
            {"eos_token_id": 0},
            {},
            {"content": "<|pad|>"},
            "at token id 0, not at 1 (<|pad|>) of tokenizer_config.json;",
        ),
        ({}, {}, "<|pad|>", "at token id none, not at 1 (<|pad|>) of tokenizer_config.json;"),
        ({"eos_token_id": 0}, {}, "no token", None),
    ],
)
def test_files_that_disagree_on_what_ends_a_text_are_one_line(
    demo_package: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    generation: Any,
    config: Any,
    own: Any,
    said: Any,
) -> None:
    package = edit(
        demo_package,
        tmp_path / "p",
        generation_config=generation,
        config=config,
        tokenizer_config={"eos_token": own},
    )
    Tokenizer.from_package(package)
    assert len(caplog.messages) == (said is not None)
    assert all(said in message and "stop string" in message for message in caplog.messages)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_a_tokenizer_config_that_cannot_be_read_ends_nothing(
    demo_package: Path, tmp_path: Path, content: bytes
) -> None:
    assert Tokenizer.from_package(edit(demo_package, tmp_path / "p", tokenizer_config=content)).eos_token_ids == (0,)


def test_a_byte_order_mark_in_a_config_is_no_json_error(demo_package: Path, tmp_path: Path) -> None:
    package = edit(demo_package, tmp_path / "p", generation_config=b'\xef\xbb\xbf{"eos_token_id": 5}')
    assert Tokenizer.from_package(package).eos_token_ids == (5,)


def test_bos_and_pad_are_read_likewise(demo_package: Path, tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "pad_token_id": 2}
    package = edit(demo_package, tmp_path / "p", generation_config={"bos_token_id": 5}, config=config)
    tokenizer = Tokenizer.from_package(package)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (5, 2)


@pytest.mark.parametrize(("value", "expected"), [(-1, ()), (4096, ()), ([5, 4096, -1], (5,))])
def test_an_id_that_the_vocabulary_lacks_ends_nothing(
    demo_package: Path, tmp_path: Path, value: Any, expected: tuple[int, ...]
) -> None:
    package = edit(demo_package, tmp_path / "p", generation_config={"eos_token_id": value})
    assert Tokenizer.from_package(package).eos_token_ids == expected


@pytest.mark.parametrize("value", ["7", True, 1.0, [3, None]])
def test_eos_of_another_type_is_refused(demo_package: Path, tmp_path: Path, value: Any) -> None:
    package = edit(demo_package, tmp_path / "p", generation_config={"eos_token_id": value})
    with pytest.raises(PackageError, match="eos_token_id"):
        Tokenizer.from_package(package)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer", b"<html>", "cannot load it"),
        ("tokenizer", b"", "cannot load it"),
        ("tokenizer", b"\xff\xfe", "cannot load it"),
        ("tokenizer", {"version": "1.0", "model": {"type": "Nonsense"}}, "cannot load it"),
        ("generation_config", b"{", "not valid JSON"),
        ("generation_config", b"[1]", "expected a JSON object"),
        ("config", b"[" * 200_000, "not valid JSON"),
    ],
)
def test_broken_file_is_one_line(demo_package: Path, tmp_path: Path, name: str, content: Any, message: str) -> None:
    package = edit(demo_package, tmp_path / "p", **{name: content})
    with pytest.raises(PackageError, match=message) as caught:
        Tokenizer.from_package(package)
    assert f"{name}.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_regex_is_a_package_error(demo_package: Path, tmp_path: Path) -> None:
    document = json.loads((demo_package / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "((("},
        "behavior": "Isolated",
        "invert": False,
    }
    with pytest.raises(PackageError, match="cannot load it"):
        Tokenizer.from_package(edit(demo_package, tmp_path / "p", tokenizer=document))


class PanicException(BaseException):
    """Named as pyo3's, which cannot be imported."""


@pytest.mark.parametrize("kind", [PanicException, KeyboardInterrupt, MemoryError])
def test_a_panic_is_a_package_error_and_an_interrupt_stays_one(
    demo_package: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    class Broken:
        @staticmethod
        def from_file(path: str) -> None:
            raise kind(path)

    monkeypatch.setattr("tokenizers.Tokenizer", Broken)
    with pytest.raises(PackageError if kind is PanicException else kind):
        Tokenizer.from_package(demo_package)


def test_changed_tokenizer_is_refused_unless_told_not_to_look(demo_package: Path, tmp_path: Path) -> None:
    package = edit(demo_package, tmp_path / "p")
    (package / "tokenizer.json").write_text((package / "tokenizer.json").read_text() + " ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        Tokenizer.from_package(package)
    assert Tokenizer.from_package(package, check_hashes=False).encode("x")


def test_package_without_tokenizer_says_so(tiny_package: Path) -> None:
    with pytest.raises(PackageError, match=r"no tokenizer\.json"):
        Tokenizer.from_package(tiny_package)


def test_folder_that_is_no_package_says_so(tmp_path: Path) -> None:
    with pytest.raises(PackageNotFoundError):
        Tokenizer.from_package(tmp_path)
