"""Which template is taken, from which file, and what it may not drop without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat import DATA, EOS, IM_END, TOOLS, chat_package

from runtimes.chat.renderer import Renderer
from runtimes.chat.template import ChatTemplate
from runtimes.errors import InputError, IntegrityError, PackageError
from runtimes.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}


def folder(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_templates_come_from_tokenizer_config_too(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(
        folder(tmp_path, chat_template="a", eos_token={"content": "</s>"}, bos_token="<s>")
    )
    assert (template.templates, template.tokens) == ({"default": "a"}, {"eos_token": "</s>", "bos_token": "<s>"})
    named = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
        {"name": "rag", "template": "c"},
    ]
    template = ChatTemplate.from_folder(folder(tmp_path, chat_template=named))
    assert [template.source(), template.source(with_tools=True), template.source("rag")] == ["a", "b", "c"]
    with pytest.raises(InputError, match="no chat template 'none'; there are default, tool_use, rag"):
        template.source("none")


def test_files_count_before_the_field(tmp_path: Path) -> None:
    folder(tmp_path, chat_template="field")
    (tmp_path / "chat_template.jinja").write_bytes("füle\r\n".encode())
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert ChatTemplate.from_folder(tmp_path).templates == {"tool_use": "tools", "default": "füle\n"}


@pytest.mark.parametrize("value", [7, [], ["x"], [{"name": "x"}], [{"name": "x", "template": 3}]])
def test_a_field_that_is_no_template_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(PackageError, match="neither a text nor a list of named ones"):
        ChatTemplate.from_folder(folder(tmp_path, chat_template=value))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(PackageError, match=r"chat_template.jinja: byte 2 is not UTF-8"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(PackageError, match=r"tokenizer_config.json: not valid JSON"):
        ChatTemplate.from_folder(tmp_path)


def test_a_package_without_a_template_is_told_what_to_do(demo_package: Path) -> None:
    with pytest.raises(PackageError, match=r"no chat template; olmo2-run generate .* put chat_template.jinja beside"):
        ChatTemplate.from_package(demo_package)


def test_a_template_that_was_changed_is_refused(demo_package: Path, tmp_path: Path) -> None:
    package = chat_package(demo_package, tmp_path / "package")
    assert ChatTemplate.from_package(package).tokens["eos_token"] == "<|endoftext|>"
    with (package / "chat_template.jinja").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"chat_template.jinja"):
        ChatTemplate.from_package(package)
    ChatTemplate.from_package(package, check_hashes=False)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "expected at least one"),
        ("Hi", "expected a list of objects, found str"),
        (USER, "expected a list of objects, found dict"),
        (["Hi"], "message 1: expected an object, found str"),
        ([USER, {"role": "robot", "content": "x"}], "message 2: role 'robot', expected one of system, user"),
        ([{"role": "user"}], "message 1: no content"),
        ([{"role": "user", "content": None}], "message 1: no content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content is list, expected a string"),
        ([{"role": "assistant", "content": "x", "thinking": 3}], "thinking is int, expected a string"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls is str, expected a list"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "message 1, call 1: expected"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "are no JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], "are list, expected"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate U+D800"),
    ],
)
def test_messages_that_are_none_are_refused(olmo3: Any, messages: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        olmo3.template.encode(olmo3.tokenizer, messages)
    assert words in str(caught.value)


def test_calls_as_json_text_are_those_as_objects(olmo3: Any) -> None:
    def text(arguments: Any) -> str:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        found: str = olmo3.template.render(
            [USER, {"role": "assistant", "tool_calls": [call]}, {**USER, "role": "tool"}]
        )
        return found

    assert "<function_calls>f(a=[1, null])</function_calls><|im_end|>\n<|im_start|>environment\nHi" in text(
        {"a": [1, None]}
    )
    assert text('{"a": [1, null]}') == text({"a": [1, None]})


def test_what_a_template_would_drop_is_refused(olmo2: Any, olmo3: Any) -> None:
    with pytest.raises(InputError, match=r"ignores tools: .* runtimes.chat.json_tools"):
        olmo2.template.render([USER], tools=TOOLS)
    with pytest.raises(InputError, match="ignores messages of the roles tool and environment"):
        olmo2.template.render([USER, {"role": "environment", "content": "12"}])
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    users_alone = ChatTemplate({"default": source}, renderer=olmo2.template.renderer)
    with pytest.raises(InputError, match="ignores system prompts"):
        users_alone.render([{"role": "system", "content": "S"}, USER])
    assert (olmo2.template.takes_tools(), olmo3.template.takes_tools()) == (False, True)
    assert (olmo2.template.result_role(), olmo3.template.result_role()) == ("tool", "environment")


def test_without_tools_olmo3_says_so_and_with_tools_lists_them(olmo3: Any) -> None:
    assert "<functions></functions><|im_end|>" in olmo3.template.render([USER])
    assert f"<functions>{json.dumps(TOOLS, ensure_ascii=False)}</functions>" in olmo3.template.render(
        [USER], tools=TOOLS
    )


def test_both_ends_of_olmo3_end_an_answer(olmo2: Any, olmo3: Any) -> None:
    assert olmo3.tokenizer.eos_token_ids == (EOS, IM_END)
    assert olmo3.template.turn_ends(olmo3.tokenizer) == (IM_END, EOS)
    assert olmo2.template.turn_ends(olmo2.tokenizer) == (EOS,)


def test_prompts_that_end_in_think_begin_thoughts(olmo3: Any, think: Any) -> None:
    assert (olmo3.template.begins_thinking(), think.template.begins_thinking()) == (False, True)


def test_a_token_of_the_template_that_cannot_be_text_is_refused(dolma2: Tokenizer) -> None:
    """`<|extra_id_0|>` is no special token: the tokenizer finds it in any text."""
    source = "<|extra_id_0|>{{ messages[0].content }}"
    with Renderer() as renderer:
        template = ChatTemplate({"default": source}, renderer=renderer)
        with pytest.raises(InputError, match=r"holds '<\|extra_id_0\|>', which the tokenizer takes for a token"):
            template.encode(dolma2, [{"role": "user", "content": "a <|extra_id_0|>"}])
        other = template.encode(dolma2, [{"role": "user", "content": "a <|extra_id_1|>"}])
    assert (other[0], other[-1]) == (100256, 100266)


def test_variables_and_documents_reach_the_template() -> None:
    source = "{{ messages[0].content }}{{ documents[0].text }}{{ mode }}{{ add_generation_prompt }}"
    with Renderer() as renderer:
        text = ChatTemplate({"default": source}, renderer=renderer).render(
            [USER], documents=[{"text": "D"}], variables={"mode": "m", "messages": "no"}, add_generation_prompt=False
        )
    assert text == "HiDmFalse"


def test_the_templates_of_the_tests_are_in_the_described_form() -> None:
    assert {path.name for path in DATA.glob("*.jinja")} == {"olmo2.jinja", "olmo3_instruct.jinja", "olmo3_think.jinja"}
