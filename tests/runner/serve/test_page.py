"""The page at `/`: its files and headers; and in a real browser, where there is one, what it shows and does."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.browser import Browser, Page, find_browser
from support.served import Served, chat_model, serving
from support.serving import until

import runtimes
from runtimes.serve.edge import EdgeLimits
from runtimes.serve.keys import Keys
from runtimes.serve.model import ServedModel
from runtimes.serve.page_files import FILES

FOLDER = Path(runtimes.__file__).parent / "serve" / "page"
AXE = Path(os.environ.get("AXE", "/nowhere/axe.min.js"))
"""axe-core, by `make test-page`"""
GATES = {
    "passed": True,
    "checks": [
        {"name": "kl_mean", "found": 0.012, "limit": 0.03, "at_least": False, "cases": 54, "passed": True},
        {"name": "top1", "found": 0.95, "limit": 0.93, "at_least": True, "cases": 54, "passed": True},
        {"name": "quality", "said": "perplexity 220.150 (+0.4 %)", "passed": True},
    ],
}


class FakeAbout:
    """A package that was verified."""

    def document(self, variant: str) -> dict[str, Any]:
        return {
            "source": {"model": "allenai/Olmo-3-7B-Instruct", "kind": "hub", "revision": "a" * 40},
            "checksum": "c0ffee" * 10,
            "layers": 32,
            "hidden_size": 4096,
            "weights": f"{variant}, 4.60 bits per weight",
            "gates": GATES,
            "parity_report": True,
        }

    def parity(self) -> bytes:
        return b'{"variants": {}}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with chat_model(tmp_path_factory.mktemp("page") / "olmo3") as found:
        yield replace(found, adapters=())


@pytest.fixture(scope="module")
def one(model: ServedModel) -> Iterator[Served]:
    with serving(model, about=FakeAbout()) as found:
        yield found


# Without a browser


def test_the_files_come_with_headers_that_let_a_browser_load_nothing_else(one: Served) -> None:
    for path, (name, kind) in FILES.items():
        status, headers, body = one.raw("GET", path)
        assert (status, headers["content-type"], body) == (200, kind, (FOLDER / name).read_bytes())
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        status, _, body = one.raw("GET", path, if_none_match=headers["etag"])
        assert (status, body) == (304, b"")
        assert one.raw("HEAD", path)[0] == 200


def test_the_files_name_no_other_place_and_are_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {name for name, _ in FILES.values()}
    every = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert sum(map(len, every.values())) < 64 << 10
    for text in every.values():
        assert set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", text)) <= {"http://www.w3.org"}  # of SVG
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"\son\w+=|style=\"", every["index.html"])  # which the policy forbids
    assert set(re.findall(r'(?:src|href)="([^"#:]+)"', every["index.html"])) == {"page.css", "page.js"}


def test_every_id_that_the_script_asks_for_is_in_the_page() -> None:
    ids = set(re.findall(r'\bid="([\w-]+)"', (FOLDER / "index.html").read_text()))
    assert set(re.findall(r'\$\("([\w-]+)"\)', (FOLDER / "page.js").read_text())) <= ids


def test_the_files_are_in_the_wheel() -> None:
    project = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["runtimes.serve"] == ["page/*"]


def test_the_page_needs_no_key_and_what_it_asks_for_does(model: ServedModel) -> None:
    keys = Keys((b"\0" * 32,))
    with serving(model, keys=keys, about=FakeAbout()) as served:
        assert [served.raw("GET", path)[0] for path in FILES] == [200, 200, 200]
        assert [served.raw("GET", path)[0] for path in ("/package", "/parity.json", "/v1/models")] == [401] * 3


def test_there_need_be_no_page(model: ServedModel) -> None:
    with serving(model, page=False) as served:
        assert {served.raw("GET", path)[0] for path in FILES} == {404}


def test_what_the_package_is(one: Served, model: ServedModel) -> None:
    status, found, _ = one.call("GET", "/package")
    assert status == 200
    assert found["about"] == FakeAbout().document("fake")
    assert {name: found[name] for name in ("model", "variant", "max_model_len", "chat", "forms", "labels")} == {
        "model": "olmo",
        "variant": "fake",
        "max_model_len": 256,
        "chat": {"thinks": False, "tools": True},
        "forms": False,
        "labels": [],
    }
    assert one.call("GET", "/parity.json")[1] == {"variants": {}}
    with serving(model) as served:
        status, found, _ = served.call("GET", "/parity.json")
        assert (status, "run olmo2-export verify" in found["error"]["message"]) == (404, True)
        assert served.call("GET", "/package")[1]["about"] is None


# In a browser

in_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser: Browser, one: Served) -> Iterator[Page]:
    until(lambda: not one.engine.busy)
    one.engine.script, one.engine.tick_seconds, one.engine.runner.height = "Hello there.", 0.0, 12.0
    one.engine.runner.broken = set()
    one.engine.requests.clear()
    found = opened(browser, one)
    yield found
    wrong = found.said("Runtime.exceptionThrown", lambda e: e["exceptionDetails"]["text"])
    assert wrong == []
    urls = found.said("Network.requestWillBeSent", lambda e: e["request"]["url"])
    assert {url for url in urls if not url.startswith((f"http://127.0.0.1:{one.port}/", "data:"))} == set()
    refused = [text for text in found.said("Log.entryAdded", lambda e: e["entry"]["text"]) if "Security Policy" in text]
    assert refused == []
    found.close()


def opened(browser: Browser, served: Served, **options: Any) -> Page:
    page = browser.open(f"http://127.0.0.1:{served.port}/", **options)
    page.until("document.querySelector('#facts').textContent")
    return page


def say(page: Page, words: str) -> None:
    page.focus("#prompt")
    page.write(words)
    page.press("Enter")


DONE = "document.querySelector('#send').textContent === 'Send' && document.querySelector('.answer:last-child .under')"


@in_browser
def test_it_streams_an_answer_and_says_what_it_cost(page: Page, one: Served) -> None:
    one.engine.script, one.engine.tick_seconds = "One two three <b>four</b> five six seven.", 0.3
    say(page, "Count <i>please</i>")
    page.until("document.querySelectorAll('.answer .t').length > 1")
    assert page.text("#send") == "Stop"
    assert len(page.text(".answer .text")) < len(one.engine.script)
    page.until(DONE)
    assert page.text(".answer .text") == f"{one.engine.script}<|im_end|>"
    assert page.text(".asked .text") == "Count <i>please</i>"
    count = len(one.model.tokenizer.encode(one.engine.script)) + 1
    assert re.match(
        rf"{count} tokens · [\d.]+ tokens/s · first after [\d.]+ s · ended by itself", page.text(".figures")
    )
    page.until("document.querySelector('#count').textContent.includes(' of 256 tokens')")


@in_browser
def test_stop_ends_it_and_the_engine_hears_of_it(page: Page, one: Served) -> None:
    one.engine.script, one.engine.tick_seconds = "word " * 200, 0.1
    say(page, "Go on")
    page.until("document.querySelectorAll('.answer .t').length > 2")
    page.click("Stop")
    page.until(DONE)
    assert page.text(".figures").endswith("stopped")
    until(lambda: not one.engine.busy)
    one.engine.script, one.engine.tick_seconds = "Now this.", 0.0
    page.click("Regenerate")
    page.until(f"{DONE} && document.querySelector('.answer .text').textContent.startsWith('Now')")
    assert page.texts(".answer .text") == ["Now this.<|im_end|>"]
    assert len(one.engine.requests) == 2


@in_browser
def test_what_was_written_can_be_edited_and_what_followed_is_gone(page: Page, one: Served) -> None:
    for words in ("First", "Second"):
        say(page, words)
        page.until(f"{DONE} && document.querySelectorAll('.turn').length % 2 === 0")
    prompt = one.model.tokenizer.decode(one.engine.requests[-1].prompt_ids)
    assert [words in prompt for words in ("First", "Hello there.", "Second")] == [True] * 3
    page.run("document.querySelector('.asked button').click()")
    page.run("document.activeElement.select()")
    page.write("Other")
    page.press("Enter")
    page.until(f"{DONE} && document.querySelectorAll('.turn').length === 2")
    assert page.texts(".asked .text") == ["Other"]
    prompt = one.model.tokenizer.decode(one.engine.requests[-1].prompt_ids)
    assert ("Other" in prompt, "First" in prompt) == (True, False)
    page.click("New")
    assert page.texts(".turn") == []
    assert page.run("document.activeElement.id") == "prompt"


@in_browser
def test_a_token_tells_how_likely_it_was_by_mouse_and_by_keyboard(page: Page) -> None:
    say(page, "Hi")
    page.until(DONE)
    page.hover(".answer .t", 1)
    page.until("!document.querySelector('#card').hidden")
    assert page.text("#card .chosen code") == "·there"
    assert re.fullmatch(r"[\d.]+ %", page.text("#card .chosen .share"))
    assert len(page.texts("#card li")) == 5
    page.mouse(5, 5)
    page.until("document.querySelector('#card').hidden")
    page.focus(".answer .text")
    for key, token in (("ArrowRight", "Hello"), ("ArrowRight", "·there"), ("End", "<|im_end|>"), ("Home", "Hello")):
        page.press(key)
        assert page.text("#card .chosen code") == token
        assert page.run("document.querySelector('#spoken').textContent").startswith(f"{token}, ")
    page.press("Escape")
    assert page.run("document.querySelector('#card').hidden")


@in_browser
def test_settings_reach_the_server(page: Page, one: Served) -> None:
    for field, value in (("temperature", "0.25"), ("top_p", "0.5"), ("top_k", "7"), ("seed", "3"), ("max_tokens", "2")):
        page.run(f"document.querySelector('#{field}').value = {value!r}")
    page.run("document.querySelector('#system').value = 'Be brief.'")
    page.run("document.querySelector('#stop').value = 'zzz\\nyyy'")
    say(page, "Hi")
    page.until(DONE)
    (request,) = one.engine.requests
    assert (request.temperature, request.top_p, request.top_k, request.seed) == (0.25, 0.5, 7, 3)
    assert (request.max_new_tokens, request.logprobs) == (2, 5)
    assert "Be brief." in one.model.tokenizer.decode(request.prompt_ids)
    assert page.text(".figures").endswith("cut at the limit")


@in_browser
def test_what_is_no_setting_is_said_before_anything_is_sent(page: Page, one: Served) -> None:
    page.run("document.querySelector('#top_k').value = '-4'")
    say(page, "Hi")
    assert page.run("document.activeElement.id") == "top_k"
    page.run("document.querySelector('#top_k').value = ''")
    page.run("document.querySelector('#form-field').hidden = false")
    page.run("document.querySelector('#schema').value = '{'")
    page.focus("#prompt")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "schema"
    assert page.text("#schema-said").startswith("No JSON schema: ")
    assert one.engine.requests == []
    page.run("document.querySelector('#schema').value = '{\"type\": \"boolean\"}'")
    page.focus("#prompt")
    page.press("Enter")
    page.until(DONE)
    assert "install llguidance" in page.text(".wrong")  # the engine of this test holds answers to no form


@in_browser
def test_errors_are_shown_where_the_answer_would_be(page: Page, one: Served) -> None:
    one.engine.runner.broken = set(one.model.tokenizer.encode(" there", add_special_tokens=False))
    say(page, "Hi")
    page.until(DONE)
    assert "NaN or infinite" in page.text(".wrong")
    assert page.run("document.querySelector('.wrong').getAttribute('role')") == "alert"
    one.engine.runner.broken = set()
    page.click("Regenerate")
    page.until(f"{DONE} && !document.querySelector('.wrong')")
    assert page.text(".answer .text") == "Hello there.<|im_end|>"
    say(page, "word " * 300)
    page.until(f"{DONE} && document.querySelector('.wrong')")
    assert "the context holds 256" in page.text(".wrong")


@in_browser
def test_a_server_that_is_gone_is_said(browser: Browser, model: ServedModel) -> None:
    with serving(model) as served:
        page = opened(browser, served)
    say(page, "Hi")
    page.until(DONE)
    assert page.text(".wrong") == "The server cannot be reached. Is it still running?"
    page.close()


@in_browser
def test_it_asks_for_a_key(browser: Browser, model: ServedModel, tmp_path: Path) -> None:
    from runtimes.serve.keys import read_keys

    (tmp_path / "keys").write_text("a key\n")
    with serving(model, keys=read_keys(tmp_path / "keys"), limits=EdgeLimits()) as served:
        page = browser.open(f"http://127.0.0.1:{served.port}/")
        for words, said in (("wrong", "The server does not know this key."), ("a key", "")):
            page.until("document.querySelector('#key-dialog').open")
            page.run(f"document.querySelector('#key').value = {words!r}")
            page.click("Use it")
            page.until(f"document.querySelector('#key-said').textContent === {said!r}" if said else "true")
        page.until("document.querySelector('#facts').textContent")
        say(page, "Hi")
        page.until(DONE)
        assert page.text(".answer .text") == "Hello there.<|im_end|>"
        page.close()


@in_browser
def test_a_model_that_thinks_shows_its_thoughts_apart(browser: Browser, tmp_path: Path) -> None:
    with chat_model(tmp_path / "think", "olmo3_think") as model, serving(model) as served:
        served.engine.script = "Let me see.</think>\n\nSeven."
        page = opened(browser, served)
        assert page.run("document.querySelectorAll('#model option').length") == 2  # with an adapter
        say(page, "What is 3 + 4?")
        page.until(DONE)
        assert page.run("document.querySelector('.thoughts').open") is False
        assert page.run("document.querySelector('.thoughts .text').textContent").startswith("Let me see.")
        assert page.text(".answer > .text").startswith("Seven.")
        page.close()


@in_browser
def test_a_model_without_a_chat_template_goes_on_with_a_text(browser: Browser, model: ServedModel) -> None:
    with serving(replace(model, chat=None)) as served:
        page = opened(browser, served)
        page.click("In the beginning", "#examples")
        page.press("Enter")
        page.until(DONE)
        assert page.text(".answer .text") == "Hello there.<|im_end|>"
        (request,) = served.engine.requests
        assert (served.model.tokenizer.decode(request.prompt_ids), request.max_new_tokens) == ("In the beginning", 128)
        page.hover(".answer .t", 0)
        assert page.text("#card .chosen code") == "Hello"
        page.close()


@in_browser
def test_a_classifier_says_what_to_use(browser: Browser, model: ServedModel) -> None:
    with serving(replace(model, labels=("bad", "good"), chat=None)) as served:
        page = opened(browser, served)
        assert "POST /v1/score" in page.text("#hello")
        assert page.run("document.querySelector('#composer').offsetParent === null")
        page.close()


@in_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_used_by_everybody(browser: Browser, one: Served, width: int, dark: bool) -> None:
    """Nothing is wider than the window; with axe-core, no rule of accessibility is broken."""
    until(lambda: not one.engine.busy)
    one.engine.script, one.engine.runner.height = "A long-word" * 9 + " " + "answer " * 20, 12.0
    page = opened(browser, one, width=width, height=740, dark=dark, phone=width < 500)
    views = [""]
    if AXE.is_file():
        page.run(f"{AXE.read_text()}\n;0")
    say(page, "Hi " * 40)
    page.until(DONE)
    page.focus(".answer .text")
    page.press("ArrowRight")
    views += ["document.querySelector('#toggle').click()"] if width < 500 else []
    views += ["[...document.querySelectorAll('#panel details')].forEach((e) => { e.open = true; })"]
    for view in views:
        page.run(f"{view or 0}")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert (
            page.run(
                "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > "
                "innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
            )
            == []
        )
        if AXE.is_file():
            found = page.run("axe.run().then((r) => r.violations.map((v) => v.id + ': ' + v.nodes[0].html))")
            assert found == []
    if pictures := os.environ.get("PICTURES"):
        page.picture(Path(pictures) / f"{width}-{'dark' if dark else 'light'}.png")
    page.close()
