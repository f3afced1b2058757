"""Templates are code from anywhere: what each hostile one ends in, how soon, and that the next one is rendered."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.chat import jinja_child
from runtimes.chat.renderer import Renderer, TemplateError
from runtimes.errors import BackendError, InputError


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    with Renderer(seconds=60) as found:  # another test is about time
        found.render("warm", {})
        yield found


def failure(renderer: Renderer, template: str, **variables: object) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        renderer.render(template, variables)
    assert "\n" not in str(caught.value)
    assert renderer.render("{{ x }}", {"x": "still here"}) == "still here"
    return caught.value


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if a %}\n  x\n  {% endif %}\ny\n", "  x\ny"),  # trim_blocks, lstrip_blocks, no newline at the end
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{{ {'é': '<&', 'b': none} | tojson }}", '{"é": "<&", "b": null}'),
        ("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}x{% endgeneration %}{{ dict(a=1) }}", "x{'a': 1}"),
        ("{{ missing }}|{{ tools is none }}", "|True"),
        ("{{ 'ab cd' | wordwrap(2) }}", "ab\ncd"),
    ],
)
def test_a_template_finds_what_transformers_gives_it(renderer: Renderer, template: str, text: str) -> None:
    assert renderer.render(template, {"a": True, "tools": None}) == text


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox", "__class__"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "sandbox", "__init__"),
        ("{% set ns = namespace(__class__=1) %}", "sandbox", "__class__"),
        ("{{ messages.append(1) }}", "sandbox", "append"),
        ("a\n{% if %}", "syntax", "line 2"),
        ("{{ 'a' * 300000000 }}", "memory", "256 MB"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "memory",
            "256",
        ),
        ("{{ 'a' * 9000000 }}", "output", "8388608 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template", "recursion"),
        ("{{ range(1000000) | list }}", "template", "too big"),
        ("\n{{ 1 / 0 }}", "template", "line 2: division by zero"),
        ("{{ x.y.z }}", "template", "undefined"),
    ],
)
def test_hostile_and_broken_templates_are_errors(renderer: Renderer, template: str, kind: str, words: str) -> None:
    error = failure(renderer, template, messages=[])
    assert (error.kind, words in str(error)) == (kind, True), error


@pytest.mark.alone
def test_an_endless_loop_is_ended_in_time() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with Renderer() as renderer:
        renderer.render("warm", {})
        started = time.perf_counter()
        with pytest.raises(TemplateError, match=r"takes longer than 1.5 s"):
            renderer.render(loop, {})
        assert time.perf_counter() - started < 20  # without an end it takes minutes
        assert failure(renderer, loop).kind == "time"  # and the next one is rendered


def test_a_machine_that_does_something_else_is_no_fault_of_the_template(renderer: Renderer) -> None:
    assert renderer._process is not None
    renderer._process.send_signal(signal.SIGSTOP)
    threading.Timer(2.0, renderer._process.send_signal, [signal.SIGCONT]).start()
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_a_template_that_kills_its_process_is_an_error_too(renderer: Renderer) -> None:
    assert renderer._process is not None
    renderer._process.kill()
    assert failure(renderer, "x").kind == "end"


def test_what_raise_exception_says_is_about_the_messages(renderer: Renderer) -> None:
    with pytest.raises(InputError, match=r"refuses the messages: roles must alternate$"):
        renderer.render("{{ raise_exception('roles must alternate') }}", {})


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), b"x"])
def test_what_json_cannot_hold_is_refused(renderer: Renderer, value: object) -> None:
    with pytest.raises(InputError, match="JSON cannot"):
        renderer.render("x", {"x": value})


def test_more_than_a_template_is_given_is_refused(renderer: Renderer) -> None:
    with pytest.raises(InputError, match="at most 8388608 are rendered"):
        renderer.render("x", {"x": "a" * (9 << 20)})


def test_an_interrupted_rendering_leaves_no_answer_for_the_next(
    renderer: Renderer,
) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Stop):
            renderer.render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert renderer.render("next", {}) == "next"


def test_threads_get_their_own_answers(renderer: Renderer) -> None:
    found: dict[int, str] = {}

    def render(number: int) -> None:
        found[number] = renderer.render("{{ x }}", {"x": number})

    threads = [threading.Thread(target=render, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(8)}


def test_the_process_ends_with_the_renderer_and_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Renderer() as renderer:
        renderer.render("x", {})
        process = renderer._process
        assert process is not None
        assert b"hf_secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert process.poll() is not None


@pytest.mark.parametrize(("hello", "words"), [("null", "not installed"), ('{"jinja2": "3.1.4"}', "3.1.6 or later")])
def test_jinja2_that_is_missing_or_old_is_named(
    hello: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "child.py"
    script.write_text(f"print('''{hello}''', flush=True)\ninput()\n")
    monkeypatch.setattr("runtimes.chat.renderer._CHILD", script)
    with Renderer() as renderer, pytest.raises(BackendError, match=words) as caught:
        renderer.render("x", {})
    assert "pip install 'olmo2-export[chat]'" in str(caught.value)


def test_the_words_of_a_template_are_found_in_its_text_and_constants(renderer: Renderer) -> None:
    template = "{# <|c|> #}<|a|>{{ '<|b|>' + x }}{{ '<|' + 'd|>' }}"
    assert renderer.words_in(template, ["<|a|>", "<|b|>", "<|c|>", "<|d|>"]) == ["<|a|>", "<|b|>"]


def test_limits_are_as_the_docs_say() -> None:
    assert (jinja_child.MEMORY >> 20, jinja_child.OUTPUT) == (256, 8 << 20)
