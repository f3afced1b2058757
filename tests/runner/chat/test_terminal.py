"""A chat as a user has it, in a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.chat import Scripted, chat_package

import runtimes
from runtimes import open_runner
from runtimes.chat.answers import Event, Text, Thought
from runtimes.chat.conversation import Conversation
from runtimes.chat.template import ChatTemplate
from runtimes.chat.terminal import (
    AtPrompt,
    Interrupts,
    Screen,
    Session,
    Terminal,
    _completed,
    pipe_lines,
    read_messages,
    read_turn,
)
from runtimes.cli import main
from runtimes.errors import InputError, UsageError
from runtimes.generation.generate import generate
from runtimes.signals import Interrupted
from runtimes.text.sampling import Sampler
from runtimes.text.tokenizer import Tokenizer

ROOT = Path(runtimes.__file__).parent.parent


def lines_of(*lines: str) -> Callable[[bool], str | None]:
    left = iter(lines)
    return lambda _begun: next(left, None)


class Desk:
    """A session with a model that says given texts, and what is shown of it."""

    def __init__(self, chat: Any, *answers: Any, terminal: bool = True, messages: bool = False, **options: Any) -> None:
        self.out, self.notes = io.StringIO(), io.StringIO()
        runner = Scripted(chat.tokenizer, *answers, max_cache_length=options.pop("longest", 4096))
        self.chat = Conversation(runner, chat.tokenizer, chat.template, system=options.pop("system", None))  # type: ignore[arg-type]
        screen = Screen(self.out, self.notes, terminal=terminal, messages=messages)
        ask = partial(self.chat.ask, sampler=Sampler(), max_new_tokens=options.pop("most", None))
        self.session = Session(self.chat, ask, screen, **options)

    def terminal(self, *lines: str) -> str:
        self.session.run_terminal(lines_of(*lines))
        return re.sub("\x1b\\[\\d+m", "", self.notes.getvalue())

    def pipe(self, text: str) -> str:
        self.session.run_pipe(io.BytesIO(text.encode()))
        return self.notes.getvalue()


@pytest.mark.parametrize(
    ("lines", "turn"),
    [
        (["one"], "one"),
        (["one \\", "two\\", "three", "four"], "one \ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one"""', "x"], "one"),
        (['"""', "one", "two", '"""', "x"], "one\ntwo"),
        (['"""', "", "one", "", '"""', "x"], "\none\n"),
        (['"""', '"""', "x"], ""),
        (['  """one', ' two"""  '], "one\n two"),
        (['"""one', "two"], "one\ntwo"),
        (["", "x"], ""),
        ([], None),
    ],
)
def test_a_turn_of_several_lines(lines: list[str], turn: str | None) -> None:
    assert read_turn(lines_of(*lines)) == turn


def test_lines_of_a_pipe_are_utf8_of_any_system() -> None:
    assert list(pipe_lines(io.BytesIO(b"\xef\xbb\xbfa\r\n\nb"))) == ["a", "", "b"]
    with pytest.raises(InputError, match="stdin, line 2: byte 1 is not UTF-8"):
        list(pipe_lines(io.BytesIO(b"a\nb\xff\n")))


def shown(*events: Event, terminal: bool) -> str:
    out = io.StringIO()
    screen = Screen(out, out, terminal=terminal)
    for event in events:
        screen.event(event)
    screen.answered({})
    return out.getvalue()


def test_thoughts_are_dim_and_apart_in_a_terminal_and_not_in_a_pipe() -> None:
    events = (
        Thought("\n"),
        Thought("Hm"),
        Thought(".\n"),
        Thought("\nSo"),
        Thought("\n\n"),
        Text("Yes"),
        Text("."),
    )
    dim = "".join(f"\x1b[2m{text}\x1b[22m" for text in ("Hm", ".", "\n\nSo"))
    assert shown(*events, terminal=True) == f"{dim}\n\nYes.\n\n"
    assert shown(*events, terminal=False) == "Yes.\n"


def test_what_steers_a_terminal_is_shown_as_its_code_there() -> None:
    assert shown(Text("a\x1b[2J\tb\r\n\x9bé‍"), terminal=True) == "a\\x1b[2J\tb\\r\n\\x9bé‍\n\n"
    assert shown(Text("a\x1b[2J"), terminal=False) == "a\x1b[2J\n"


def test_answers_alone_go_to_stdout_of_a_pipe(olmo3: Any) -> None:
    desk = Desk(olmo3, "One.", "Two.", terminal=False, stats=True)
    notes = desk.pipe("first\n\nsecond\\\nline\n/stats\n")
    assert desk.out.getvalue() == "One.\nTwo.\n"
    assert [m["content"] for m in desk.chat.messages] == ["first", "One.", "second\nline", "Two."]
    first, second, *stats = notes.splitlines()
    assert re.fullmatch(
        r"prompt \d+ tokens \(0 reused\), answer 3, first after [\d.]+ ms, [\d.]+ tokens/s, end: eos", first
    )
    assert "(0 reused)" not in second
    assert re.fullmatch(r"4 messages; the context holds 4096 tokens, \d+ are used", stats[0])
    assert stats[1] == second


def test_messages_as_json_lines(olmo3: Any, tmp_path: Path) -> None:
    desk = Desk(olmo3, "Ünïcode.", terminal=False, messages=True, system="S")
    assert desk.pipe("Hi\n") == ""
    (tmp_path / "chat.jsonl").write_text(desk.out.getvalue())
    assert read_messages(tmp_path / "chat.jsonl") == desk.chat.messages
    assert '{"role": "assistant", "content": "Ünïcode."}\n' in desk.out.getvalue()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/what", "/what: no such command; /help lists them"),
        ("/save", "/save FILE: which file?"),
        ("/quit now", "/quit takes nothing, found 'now'"),
        ("/load nowhere", "nowhere: no such file"),
    ],
)
def test_what_is_wrong_ends_a_pipe_and_not_a_terminal(olmo3: Any, line: str, words: str) -> None:
    with pytest.raises((UsageError, InputError)) as caught:
        Desk(olmo3, terminal=False).pipe(f"{line}\n")
    assert words in str(caught.value)
    desk = Desk(olmo3, "Still here.")
    assert words in desk.terminal(line, "Hi")
    assert desk.out.getvalue() == "Still here.\n\n"


def test_commands(olmo3: Any, tmp_path: Path) -> None:
    file = tmp_path / "my chat.jsonl"
    desk = Desk(olmo3, "One.", "Two.", system="Be brief.")
    notes = desk.terminal(
        "/help", "Hi", f"/save {file}", "/reset", "/stats", "/system", f"/load {file}", "//etc", f"/save {file}",
        "/system -", "/system Be long.", "/quit", "never",
    )  # fmt: skip
    said = [line for line in notes.splitlines() if line]
    assert said[0] == "/help               this list"
    assert said[8:] == [
        f"3 messages in {file}",
        "what was said is forgotten",
        "1 messages; the context holds 4096 tokens",
        "system prompt: Be brief.",
        f"3 messages from {file}",
        f"5 messages in {file}",
        "no system prompt, but the template may have one",
        "system prompt: Be long.",
    ]
    assert [m["content"] for m in read_messages(file)] == ["Be brief.", "Hi", "One.", "/etc", "Two."]
    assert desk.chat.system == "Be long."


def test_a_file_of_another_is_not_written_over(olmo3: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "there is such a file already; name another" in Desk(olmo3).terminal(f"/save {tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_is_not_there_is_named_and_no_file_beside_it(olmo3: Any, tmp_path: Path) -> None:
    notes = Desk(olmo3).terminal(f"/save {tmp_path / 'no' / 'file'}")
    assert f"no folder {tmp_path / 'no'}; make it, or name another" in notes
    assert ".part" not in notes


@pytest.mark.parametrize(
    ("text", "words"), [("[", "line 1: no JSON"), ("\n3", "line 2: expected an object, found int")]
)
def test_a_file_that_is_no_chat_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InputError, match=words):
        read_messages(tmp_path / "file")


def test_a_full_context_is_one_line_and_what_to_do(olmo3: Any) -> None:
    desk = Desk(olmo3, [1000] * 99, "short", longest=60)
    notes = desk.terminal("Hi", "word " * 60, "/reset", "Hi")
    cut, full, *_ = [line for line in notes.splitlines() if line]
    assert re.fullmatch(r"cut off after \d+ tokens: context full; /reset begins anew, /save FILE keeps .*", cut)
    assert re.match(r"context full: a prompt of \d+ tokens: the context holds 60; /reset begins anew", full)
    assert desk.chat.messages[-1]["content"] == "short"


def test_what_max_new_tokens_cut_off_is_said(olmo3: Any) -> None:
    assert "cut off after 3 tokens: --max-new-tokens\n" in Desk(olmo3, [1000] * 9, most=3).terminal("Hi")


def test_ctrl_c_at_the_prompt_leaves_the_second_time(olmo3: Any) -> None:
    reads: Iterator[str | None] = iter([None, "Hi", None, None])

    def read_line(_begun: bool) -> str:
        line = next(reads)
        if line is None:
            os.kill(os.getpid(), signal.SIGINT)
        return str(line)

    desk = Desk(olmo3, "Hello.")
    desk.session.run_terminal(read_line)
    assert desk.notes.getvalue().count("Ctrl-C again, or Ctrl-D, ends the chat") == 2


def test_ctrl_c_that_takes_back_what_was_typed_does_not_count(olmo3: Any) -> None:
    """Half a line, or a turn of several: the chat is not lost with it."""
    reads = iter([("", 0), ("half a line", 0), ("", 0), ("first \\", 1), ("", 0), ("", 0), ("Hi", 1), (None, 1)])
    behind_the_prompt = ""

    def read_line(_begun: bool) -> str | None:
        nonlocal behind_the_prompt
        behind_the_prompt, whole = next(reads)
        if not whole:
            os.kill(os.getpid(), signal.SIGINT)
        return behind_the_prompt

    desk = Desk(olmo3, "Hello.")
    desk.session.run_terminal(read_line, lambda: bool(behind_the_prompt))
    assert [message["content"] for message in desk.chat.messages] == ["Hi", "Hello."]
    assert desk.notes.getvalue().count("Ctrl-C again, or Ctrl-D, ends the chat") == 3
    assert next(reads, "no more") == "no more"


def test_ctrl_c_stops_an_answer_and_twice_the_program() -> None:
    interrupts = Interrupts(lambda: False)
    with interrupts.installed():
        with interrupts.answering():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.stopped()
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
        with interrupts.answering():
            assert not interrupts.stopped()
        with pytest.raises(AtPrompt):
            os.kill(os.getpid(), signal.SIGINT)


def test_tab_completes_commands_alone() -> None:
    assert [_completed("/s", n) for n in range(4)] == ["/system", "/save", "/stats", None]
    assert _completed("s", 0) is None


def test_a_history_that_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "readline", None)
    Terminal()
    with pytest.raises(UsageError, match="this Python has no readline"):
        Terminal(tmp_path / "typed")


# With a model


@pytest.fixture(scope="module")
def package(demo_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_package(demo_package, tmp_path_factory.mktemp("chat") / "package")


def run(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return main(["chat", *map(str, arguments)])


def test_the_command_answers_as_generate_does(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "Who?\nAnd why?\n", package, "--system", "S", "--max-new-tokens", "7", "--stats") == 0
    out, err = capsys.readouterr()
    tokenizer = Tokenizer.from_package(package)
    with open_runner(package) as runner:
        prompt = "<|endoftext|><|system|>\nS\n<|user|>\nWho?\n<|assistant|>\n"
        same = generate(runner, tokenizer, prompt, sampler=Sampler(), max_new_tokens=7, parse_special=True)
    assert out.startswith(same.text + "\n")
    assert next(line for line in err.splitlines() if line.startswith("prompt")).startswith(
        f"prompt {len(same.prompt_token_ids)} tokens (0 reused), answer 7"
    )
    used = len(same.prompt_token_ids) + 7
    assert f"({used - 1} reused)" in err  # the last token that was drawn is in no cache


def test_the_command_uses_its_flags(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--json", "--max-new-tokens", "9", "--temperature", "1.5", "--seed", "3", "--speculate", "lookup"]
    assert (
        run(monkeypatch, "Who?\n", package, *flags, "--template", "default", "--stop", "xyzzy", "--threads", "1") == 0
    )
    user, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert (user, answer["role"]) == ({"role": "user", "content": "Who?"}, "assistant")
    assert len(answer["content"]) > 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--template", "rag"], "no chat template 'rag'; there are default"),
        (["--variant", "q9"], "no variant 'q9'"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--history", "typed"], "--history typed: stdin and stdout are no terminal"),
    ],
)
def test_what_the_command_refuses(
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert run(monkeypatch, "", package, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"olmo2-run: error: [^\n]*{re.escape(words)}[^\n]*\n", err), err


def test_a_package_without_a_template_is_one_line(
    demo_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "Hi\n", demo_package) == 2
    assert re.fullmatch(
        r"olmo2-run: error: [^\n]*: no chat template; [^\n]*export the package again\n", capsys.readouterr().err
    )


def test_a_template_that_does_not_work_is_refused_before_the_model_is_opened(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        pytest.fail("the model was opened")

    broken = ChatTemplate({"default": "{% if %}"})
    monkeypatch.setattr(ChatTemplate, "from_package", lambda *_, **__: broken)
    monkeypatch.setattr("runtimes.verbs.generation.open_runner", opened)
    assert run(monkeypatch, "Hi\n", package) == 2
    assert "chat template, line 1: " in capsys.readouterr().err


@pytest.mark.alone
def test_a_terminal(package: Path, tmp_path: Path) -> None:
    """Through a real one: a banner, an answer that Ctrl-C ends, and Ctrl-D."""
    here, there = pty.openpty()
    own_terminal = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    code = f"{own_terminal}; from runtimes.cli import main; sys.exit(main())"
    arguments = ["chat", str(package), "--history", str(tmp_path / "typed")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,  # so that the terminal is its own, and Ctrl-C is for it
    )
    os.close(there)
    seen = ""

    def until(words: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([here], [], [], 0.1)[0]:
                seen += os.read(here, 4096).decode(errors="replace")

    try:
        until("/help lists commands, Ctrl-D ends")
        until("> ")
        seen = ""
        os.write(here, b"In the beginning\n")
        until("\n")
        until(" of ")  # it answers
        os.write(here, b"\x03")
        until("stopped")
        for typed in (b"half a line", b"and another"):
            until("> ")
            os.write(here, typed)
            until(typed.decode())
            seen = ""
            os.write(here, b"\x03")
        until("> ")
        os.write(here, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(here)
    assert (tmp_path / "typed").read_text() == "In the beginning\n"
