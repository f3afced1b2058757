"""olmo2-run: every flag, every exit code, and how it ends when it is interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import runtimes
from runtimes import Package, open_package, open_runner
from runtimes.cli import main, parse_args
from runtimes.generation.generate import generate, stream_text
from runtimes.manifest_file import package_checksum
from runtimes.sealed import FORMAT_VERSION, seal
from runtimes.text.logit_rules import Penalties
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer
from runtimes.verbs import generate as generate_verb
from runtimes.verbs import generation

ROOT = Path(runtimes.__file__).parent.parent
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def expected(demo_package: Path) -> str:
    """24 greedy tokens after PROMPT."""
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package) as runner:
        return generate(runner, tokenizer, PROMPT, sampler=Sampler(), max_new_tokens=24).text


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "runtimes", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """Run, expect an exit code, and return the one line of the error."""
    assert main(list(map(str, arguments))) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"olmo2-run: error: [^\n]+\n", err), err
    return err


def test_what_the_runners_say_goes_to_stderr() -> None:
    code = """
import logging
from runtimes.cli import main
assert main(["generate", "nowhere", "--prompt", "x"]) == 2
logging.getLogger("runtimes.trt.open").info("a budget")
logging.getLogger("runtimes.trt.nvidia").debug("a detail")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == ""
    assert result.stderr.splitlines()[1:] == ["a budget"]


def test_text_goes_to_stdout_and_nothing_else(
    demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(demo_package), "--prompt", PROMPT, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr() == (expected + "\n", "")


def test_module_is_the_same_as_the_command(demo_package: Path, expected: str) -> None:
    process = start("generate", demo_package, "--prompt", PROMPT, "--max-new-tokens", "24")
    assert process.communicate(timeout=60) == ((expected + "\n").encode(), b"")
    assert process.returncode == 0


def test_prompt_from_stdin_loses_one_newline(
    demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
    assert main(["generate", str(demo_package), "--prompt", "-", "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_stdin_that_is_not_utf8_is_refused(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "stdin: byte 2 is not UTF-8" in refused(capsys, "generate", demo_package, "--prompt", "-")


def test_sampling_flags_are_used(demo_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "16"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package) as runner:
        same = generate(runner, tokenizer, PROMPT, sampler=Sampler(1.2, 50, 0.9, 5), max_new_tokens=16).text
        other = generate(runner, tokenizer, PROMPT, sampler=Sampler(1.2, 50, 0.9, 6), max_new_tokens=16).text
    assert capsys.readouterr().out == same + "\n" != other + "\n"


@pytest.mark.parametrize(
    ("flags", "min_p", "penalties"),
    [
        (["--min-p", "0.4"], 0.4, None),
        (["--repetition-penalty", "1.5"], 0.0, Penalties(repetition=1.5)),
        (["--presence-penalty", "2"], 0.0, Penalties(presence=2.0)),
        (["--frequency-penalty", "1.5"], 0.0, Penalties(frequency=1.5)),
    ],
)
def test_min_p_and_penalties_are_used(
    demo_package: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    min_p: float,
    penalties: Penalties | None,
) -> None:
    usual = ["--temperature", "1.4", "--seed", "5", "--max-new-tokens", "24"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *usual, *flags]) == 0
    tokenizer = Tokenizer.from_package(demo_package)
    with open_runner(demo_package) as runner:
        sampler = Sampler(1.4, seed=5, min_p=min_p)
        rules = [] if penalties is None else [penalties]
        same = generate(runner, tokenizer, PROMPT, sampler=sampler, max_new_tokens=24, rules=rules).text
        other = generate(runner, tokenizer, PROMPT, sampler=Sampler(1.4, seed=5), max_new_tokens=24).text
    assert capsys.readouterr().out == same + "\n" != other + "\n"


def test_json_has_a_line_for_each_sample_with_its_log_probabilities(
    demo_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--temperature", "1.1", "--seed", "5", "--max-new-tokens", "6", "--json", "--logprobs", "2"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *usual, "--samples", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert len({line["text"] for line in lines}) == 3
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *usual, "--prompt-logprobs", "0"]) == 0
    (first,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["token_ids"] == lines[0]["token_ids"]
    assert first["finish_reason"] == "length"
    assert [token["token_id"] for token in first["logprobs"]] == first["token_ids"]
    assert {len(token["top"]) for token in first["logprobs"]} == {2}
    assert first["prompt_logprobs"][0] is None
    assert len(first["prompt_logprobs"]) == first["prompt_tokens"]


def test_a_bias_excludes_a_token(demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    (first, *_) = Tokenizer.from_package(demo_package).encode(expected, add_special_tokens=False)
    flags = ["--max-new-tokens", "24", "--logit-bias", f"{first}=-inf"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    assert capsys.readouterr().out != expected + "\n"


@pytest.mark.parametrize(
    ("flag", "content", "pattern"),
    [
        ("--json-schema", '{"type": "array", "items": {"type": "boolean"}, "maxItems": 3}', r"\[(true|false|, )*\]"),
        ("--regex", None, "[ab]{3}"),
        ("--choice", None, "[ab]{3}"),
        ("--grammar", 'start: "begat" | "went"', "begat|went"),
    ],
)
def test_structured_output_flags_are_used(
    demo_package: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, content: str | None, pattern: str
) -> None:
    pytest.importorskip("llguidance")
    source = {"--regex": "[ab]{3}", "--choice": "aba"}.get(flag, str(tmp_path / "source"))
    if content is not None:
        (tmp_path / "source").write_text(content)
    assert main(["generate", str(demo_package), "--prompt", PROMPT, flag, source]) == 0
    assert re.fullmatch(pattern, capsys.readouterr().out.removesuffix("\n"))


def test_a_text_that_is_cut_off_before_its_form_is_complete_is_said(
    demo_package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("llguidance")
    assert (
        main(["generate", str(demo_package), "--prompt", PROMPT, "--regex", "[ab]{9}x", "--max-new-tokens", "2"]) == 0
    )
    assert "cut off before it was what it has to look like: raise --max-new-tokens" in caplog.text
    caplog.clear()
    assert main(["generate", str(demo_package), "--prompt", PROMPT, "--regex", "[ab]{2}"]) == 0
    assert "cut off" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--samples", "2"], "--samples: has no place in a text that streams; add --json"),
        (["--logprobs", "2"], "--logprobs: has no place"),
        (["--prompt-logprobs", "2"], "--prompt-logprobs: has no place"),
        (["--samples", "2", "--json", "--speculate", "lookup"], "--speculate: not with --samples 2"),
        (["--samples", "2", "--json", "--prompt-logprobs", "1"], "--prompt-logprobs: not with --samples 2"),
        (["--logprobs", "-1", "--json"], "logprobs -1: expected an integer from 0"),
        (["--logit-bias", "5"], "'5': expected ID=B"),
        (["--logit-bias", "a=1"], "'a=1': expected ID=B"),
        (["--logit-bias", "5=1", "--logit-bias", "5=-1"], "token 5 is given more than once"),
        (["--logit-bias", "9999999=1"], "token id 9999999, the vocabulary has 0 to"),
        (["--regex", "(a"], "regex: "),
        (["--json-schema", "nowhere.json"], "nowhere.json"),
        (["--regex", "a", "--choice", "b"], "not allowed with argument"),
    ],
)
def test_options_of_samples_and_structure_that_mean_nothing_are_refused(
    demo_package: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in refused(capsys, "generate", demo_package, "--prompt", PROMPT, *flags)


def test_stop_flag_may_be_repeated(demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = expected[10:15]
    flags = ["--stop", "never in this text", "--stop", stop, "--max-new-tokens", "24", "--stats"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == expected[: expected.index(stop)] + "\n"
    assert "finish reason stop" in err


def test_stats_are_one_line_on_stderr(demo_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(demo_package), "--prompt", PROMPT, "--max-new-tokens", "9", "--stats"]) == 0
    pattern = (
        r"\d+ prompt tokens \(0 reused\), 9 new tokens \(0 drafted, 0 accepted\), "
        r"time to first token \d+\.\d ms, \d+\.\d tokens/s, finish reason length"
    )
    pages = r"(no huge pages: .+|\d+\.\d of \d+\.\d MB of weights in huge pages)"
    assert re.fullmatch(f"{pattern}, {pages}, variant fp32, KV cache float32\n", capsys.readouterr().err)
    flags = ["--max-new-tokens", "9", "--stats", "--no-huge-pages"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    assert re.fullmatch(f"{pattern}, variant fp32, KV cache float32\n", capsys.readouterr().err)
    assert main(["generate", str(demo_package), "--prompt", PROMPT, "--max-new-tokens", "0", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "\n"
    assert "0 new tokens (0 drafted, 0 accepted), time to first token - ms, - tokens/s, finish reason length" in err


def test_prompts_of_windows_editors_are_the_same_prompt(
    demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in (b"\r\n", b"\n", b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + PROMPT.encode() + data)))
        assert main(["generate", str(demo_package), "--prompt", "-", "--max-new-tokens", "24"]) == 0
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("prompt", ["And it\r\ncame", "\ufeffAnd it\r\ncame", "And it\r\ncame\r"])
def test_a_prompt_from_a_windows_file_on_the_command_line_is_the_same_prompt(
    demo_package: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    """The last is what $(cat FILE) gives."""
    outputs = []
    for text in ("And it\ncame", prompt):
        command = ["generate", str(demo_package), "--prompt", text, "--max-new-tokens", "4", "--stats"]
        assert main(command) == 0
        out, err = capsys.readouterr()
        outputs.append((out, err.split(" prompt tokens")[0]))
    assert outputs[0] == outputs[1]


def test_a_stop_string_of_windows_ends_at_a_line_of_any(demo_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(*_: object, stop: list[str], **__: object) -> None:
        seen.extend(stop)

    monkeypatch.setattr(generate_verb, "generate", spy)
    assert main(["generate", str(demo_package), "--prompt", "x", "--stop", "\r\nUser:", "--stop", "\r"]) == 0
    assert seen == ["\r\nUser:", "\nUser:", "\r", "\n"]


@pytest.mark.parametrize("stop", ["\r\n", "\r\nUser:"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_no_half_of_a_line_end_is_given_out(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stop: str, end: str
) -> None:
    """Where the model ends its lines as the stop string does, and where it does not."""
    tokenizer = Tokenizer.from_package(demo_package)
    text = f"Yes{end}User: no"

    def scripted(*_: object, stop: list[str], on_text: Callable[[str], object], **__: object) -> None:
        for piece in stream_text(tokenizer, tokenizer.encode(text), stop=stop):
            on_text(piece.text)

    monkeypatch.setattr(generate_verb, "generate", scripted)
    assert main(["generate", str(demo_package), "--prompt", "x", "--stop", stop]) == 0
    assert capsys.readouterr().out == "Yes\n"


def test_a_special_token_in_a_prompt_is_text_and_said_or_the_token(demo_package: Path) -> None:
    command = ["generate", demo_package, "--prompt", "<|endoftext|>In", "--max-new-tokens", "2", "--stats"]
    said = start(*command).communicate(timeout=60)[1].decode()
    assert "the prompt holds <|endoftext|>, taken as text; with --special-tokens it is the special token" in said
    assert not re.search(r"^2 prompt tokens", said, re.MULTILINE)
    said = start(*command, "--special-tokens").communicate(timeout=60)[1].decode()
    assert "taken as text" not in said
    assert re.match(r"2 prompt tokens", said)


@pytest.fixture(scope="module")
def two_variants(demo_two_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in fp32 and q4, verified by nobody, for tests that write verdicts into it."""
    return Path(shutil.copytree(demo_two_package, tmp_path_factory.mktemp("two") / "demo"))


@pytest.mark.parametrize(
    ("verdicts", "chosen", "said"),
    [
        ({}, "q4", ""),
        ({"fp32": True, "q4": True}, "q4", ""),
        ({"fp32": True}, "fp32", "variant q4: not verified yet; fp32 is taken"),
        ({"fp32": True, "q4": False}, "fp32", "variant q4: failed when it was verified; fp32 is taken"),
        ({"q4": False}, "fp32", "variant q4: failed when it was verified; fp32 is taken"),
        ({"fp32": False, "q4": False}, "q4", "variant q4 failed when it was verified, and there is no other"),
    ],
)
def test_the_default_is_the_fastest_variant_that_is_verified(
    two_variants: Path, verdicts: dict[str, bool], chosen: str, said: str
) -> None:
    document = {
        "format_version": FORMAT_VERSION,
        "package_checksum": package_checksum(two_variants),
        "variants": {name: {"passed": passed} for name, passed in verdicts.items()},
    }
    report = two_variants / "parity.json"
    report.write_bytes(seal(document))
    with open_runner(two_variants) as runner:
        assert runner.variant.name == chosen
    command = [
        sys.executable,
        "-m",
        "runtimes",
        "generate",
        str(two_variants),
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
    ]
    result = subprocess.run([*command, "--stats"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert re.search(f", variant {chosen}, KV cache (float32|int8)$", result.stderr.rstrip())
    assert said in result.stderr
    assert (len(result.stderr.splitlines()) == 1) == (not said)
    for damaged in (b"", b"{}", seal(document | {"package_checksum": "of another"}), report.read_bytes()[:-9]):
        report.write_bytes(damaged)
        with open_runner(two_variants) as runner:
            assert runner.variant.name == "q4"


def test_variant_backend_and_threads_are_used(
    demo_package: Path, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def spy(package: str, **options: object) -> object:
        seen.update(options)
        return open_runner(package, **options)

    monkeypatch.setattr(generation, "open_runner", spy)
    flags = [
        "--variant",
        "fp32",
        "--backend",
        "ort",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--skip-hash-check",
        "--max-new-tokens",
        "24",
    ]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    assert capsys.readouterr().out == expected + "\n"
    memory = {"huge_pages": True, "prepared": True}
    given = {
        "variant": "fp32",
        "kv_cache": None,
        "backend": "ort",
        "device": "cpu",
        "threads": 1,
        "check_hashes": False,
    }
    assert seen == {**given, **memory}
    flags = ["--max-new-tokens", "1", "--no-huge-pages", "--no-prepared"]
    assert main(["generate", str(demo_package), "--prompt", PROMPT, *flags]) == 0
    given = dict.fromkeys(("variant", "kv_cache", "device", "threads")) | {"backend": "ort", "check_hashes": True}
    assert seen == {**given, "huge_pages": False, "prepared": False}


REPEATING = "And God saw the light, that it was good. " * 6 + "And God saw"


def drafted_accepted(err: str) -> tuple[int, int]:
    found = re.search(r"\((\d+) drafted, (\d+) accepted\)", err)
    assert found is not None
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.7", "--seed", "3"]])
def test_speculation_gives_the_same_text(
    demo_package: Path, capsys: pytest.CaptureFixture[str], kind: str, sampling: list[str]
) -> None:
    flags = [
        "generate",
        str(demo_package),
        "--prompt",
        REPEATING,
        "--max-new-tokens",
        "50",
        "--threads",
        "1",
        *sampling,
    ]
    assert main(flags) == 0
    plain = capsys.readouterr().out
    assert main([*flags, "--speculate", "none", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert (out, drafted_accepted(err)) == (plain, (0, 0))
    speculate = ["--speculate", "lookup"] if kind == "lookup" else ["--draft", str(demo_package)]
    assert main([*flags, *speculate, "--stats"]) == 0
    out, err = capsys.readouterr()
    drafted, accepted = drafted_accepted(err)
    assert out == plain
    assert accepted <= drafted
    assert sampling or accepted > 0


def test_draft_model_is_opened_like_the_model(demo_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(package: str | Package, **options: object) -> object:
        seen.append((open_package(package).folder, options))
        return open_runner(package, **options)

    monkeypatch.setattr(generation, "open_runner", spy)
    flags = ["--variant", "fp32", "--threads", "1", "--skip-hash-check", "--max-new-tokens", "3"]
    assert main(["generate", str(demo_package), "--prompt", "x", "--draft", f"{demo_package}/", *flags]) == 0
    memory = {"huge_pages": True, "prepared": True}
    same = {"backend": "ort", "device": None, "threads": 1, "check_hashes": False, **memory}
    assert seen == [(demo_package, {"variant": "fp32", "kv_cache": None, **same}), (demo_package, same)]


def test_draft_model_of_another_vocabulary_is_one_line(
    demo_package: Path, tiny_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "generate", demo_package, "--prompt", "x", "--draft", tiny_package)
    assert "the draft model has 131 token ids, the model 4096" in error
    assert "no such folder" in refused(capsys, "generate", demo_package, "--prompt", "x", "--draft", "nowhere")


def test_default_length_gives_way_to_the_context_and_an_asked_one_does_not(
    demo_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_package(demo_package)
    prompt = tokenizer.decode(tokenizer.encode("Lord " * 2000)[:1021])
    tokens = len(tokenizer.encode(prompt))
    assert 1000 < tokens < 1024
    assert main(["generate", str(demo_package), "--prompt", prompt, "--stats"]) == 0
    new = int(re.search(r"(\d+) new tokens", capsys.readouterr().err)[1])
    assert new <= 1024 - tokens
    error = refused(capsys, "generate", demo_package, "--prompt", prompt, "--max-new-tokens", 1025 - tokens)
    assert f"a prompt of {tokens} tokens and {1025 - tokens} new ones make 1025: the context holds 1024" in error
    error = refused(capsys, "generate", demo_package, "--prompt", "Lord " * 2000)
    assert "the context holds 1024" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "-1"], "max_new_tokens -1"),
        (["--max-new-tokens", "1e3"], "invalid int value: '1e3'"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--temperature", "nan"], "temperature nan"),
        (["--top-k", "-3"], "top_k -3"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--min-p", "2"], "min_p 2.0"),
        (["--repetition-penalty", "0"], "repetition penalty 0.0"),
        (["--seed", "-1"], "seed -1"),
        (["--stop", ""], "none of them empty"),
        (["--backend", "cuda"], "backend 'cuda': there is ort, trt_rtx, trt"),
        (["--device", "gpu"], "device 'gpu': there is cpu, cuda, nv-rtx"),
        (["--backend", "trt", "--device", "cpu"], "device cpu: backend trt runs on the GPU, as device cuda"),
        (["--backend", "trt_rtx", "--threads", "2"], "threads 2: backend trt_rtx runs on the GPU; leave them out"),
        (["--backend", "trt_rtx"], "no engine for backend trt_rtx, it has none; run: olmo2-export build "),
        (["--variant", "q9"], "no variant 'q9'; it has fp32"),
        (["--threads", "0"], "threads 0"),
        (["--speculate", "guess"], "invalid choice: 'guess'"),
        (["--speculate", "lookup", "--draft", "x"], "--draft: not allowed with argument --speculate"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
    ],
)
def test_bad_usage_is_one_line(
    demo_package: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in refused(capsys, "generate", demo_package, "--prompt", PROMPT, *flags)


def test_missing_arguments_are_one_line(demo_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "VERB" in refused(capsys)
    assert "invalid choice: 'dance'" in refused(capsys, "dance")
    assert "--prompt" in refused(capsys, "generate", demo_package)


def test_package_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a package" in refused(capsys, "generate", tmp_path, "--prompt", "x")
    assert "no such folder" in refused(capsys, "generate", tmp_path / "line\nbreak", "--prompt", "x")


def test_package_without_tokenizer_is_one_line(tiny_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no tokenizer.json" in refused(capsys, "generate", tiny_package, "--prompt", "x")


def test_unreadable_file_is_one_line(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "manifest.json")

    monkeypatch.setattr(generation, "open_runner", denied)
    assert "Permission denied: 'manifest.json'" in refused(capsys, "generate", demo_package, "--prompt", "x")


def test_failure_of_the_model_is_exit_code_1(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise runtimes.NumericError("row 0, position 3: NaN")

    monkeypatch.setattr(generate_verb, "generate", broken)
    assert "position 3" in refused(capsys, "generate", demo_package, "--prompt", "x", code=1)


def test_no_memory_is_exit_code_1(
    demo_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(generation, "open_runner", greedy)
    assert "out of memory" in refused(capsys, "generate", demo_package, "--prompt", "x", code=1)


def test_an_adapter_that_is_not_there_is_refused_before_the_model_runs(
    demo_package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "generate", demo_package, "--prompt", "x", "--adapter", "chat")
    assert "adapter 'chat': this runner has none; export the package with --lora-inputs" in said


def test_debug_shows_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("olmo2-run: error: ")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_help_is_exit_code_0(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: olmo2-run" in capsys.readouterr().out


def test_defaults() -> None:
    args = vars(parse_args(["generate", "folder", "--prompt", "x"]))
    assert callable(args.pop("run"))
    assert args == {
        "verb": "generate",
        "package": Path("folder"),
        "prompt": "x",
        "special_tokens": False,
        "variant": None,
        "kv_cache": None,
        "adapter": None,
        "max_new_tokens": None,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": [],
        "seed": None,
        "json_schema": None,
        "regex": None,
        "choice": None,
        "grammar": None,
        "samples": 1,
        "json": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "stop": [],
        "backend": "ort",
        "device": None,
        "threads": None,
        "no_huge_pages": False,
        "no_prepared": False,
        "speculate": "none",
        "draft": None,
        "skip_hash_check": False,
        "stats": False,
        "debug": False,
    }


@pytest.fixture(scope="module")
def endless_package(demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo without a token that ends its texts; run it with --skip-hash-check."""
    package = Path(shutil.copytree(demo_package, tmp_path_factory.mktemp("endless") / "demo"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = json.loads((package / name).read_text())
        config.pop("eos_token_id", None)
        config.pop("eos_token", None)
        (package / name).write_text(json.dumps(config))
    return package


def start_endless(package: Path) -> subprocess.Popen[bytes]:
    return start("generate", package, "--prompt", PROMPT, "--max-new-tokens", "1000", "--skip-hash-check")


@pytest.mark.alone
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupt_ends_quietly(endless_package: Path, name: str, code: int) -> None:
    process = start_endless(endless_package)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == code


@pytest.mark.alone
def test_reader_that_goes_away_is_no_error(endless_package: Path) -> None:
    process = start_endless(endless_package)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


def test_terminal_that_cannot_show_a_character_does_not_end_the_text(
    demo_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    def emoji(*_: object, on_text: object, **__: object) -> None:
        on_text("a👍b")

    monkeypatch.setattr(generate_verb, "generate", emoji)
    assert main(["generate", str(demo_package), "--prompt", "x"]) == 0
    assert raw.getvalue() == b"a?b\n"


def test_sigterm_handler_is_put_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        refused(capsys, "generate", tmp_path, "--prompt", "x")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_prompt_that_is_not_unicode_is_one_line(demo_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "lone surrogate" in refused(capsys, "generate", demo_package, "--prompt", os.fsdecode(b"ab\xff"))
