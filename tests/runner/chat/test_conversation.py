"""Conversations with a model that says given texts: what it is fed, what becomes of its answers, tools round and round.

The model is a script, so what is shown is the way of a call and of its result, not that a model would make it.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.chat import EOS, IM_END, TOOLS, Scripted

from runtimes.chat.answers import Call, Text, Thought
from runtimes.chat.conversation import Conversation
from runtimes.errors import ContextLengthError, InputError, UsageError
from runtimes.text.sampling import Sampler

GREEDY = Sampler()


def begin(
    chat: Any, *answers: Any, end: int = IM_END, longest: int = 4096, **options: Any
) -> tuple[Conversation, Scripted]:
    runner = Scripted(chat.tokenizer, *answers, end=end, max_cache_length=longest)
    return Conversation(runner, chat.tokenizer, chat.template, **options), runner  # type: ignore[arg-type]


def test_a_second_turn_feeds_only_what_is_new(olmo3: Any) -> None:
    chat, runner = begin(olmo3, "An ocean is water.", "It is salt.", system="Be brief.")
    first = chat.ask("What is an ocean?", sampler=GREEDY)
    assert (first.text, first.generation.finish_reason, first.generation.reused_tokens) == (
        "An ocean is water.",
        "eos",
        0,
    )
    second = chat.ask("And the sea?", sampler=GREEDY)
    fed = olmo3.tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nAnd the sea?<|im_end|>\n<|im_start|>assistant\n", parse_special=True
    )
    assert runner.prompts[1] == fed
    whole = olmo3.template.encode(olmo3.tokenizer, chat.messages[:-1])
    assert list(second.generation.prompt_token_ids) == whole
    assert second.generation.reused_tokens == len(whole) - len(fed)


def test_what_the_model_said_otherwise_than_it_is_encoded_is_still_reused(olmo3: Any) -> None:
    """A model may spell a word by other tokens than the tokenizer would."""
    letters = [i for letter in "ocean" for i in olmo3.tokenizer.encode(letter)]
    assert letters != olmo3.tokenizer.encode("ocean")
    chat, _ = begin(olmo3, letters, "x")
    used = len(chat.ask("What?", sampler=GREEDY).generation.prompt_token_ids)
    assert chat.ask("And?", sampler=GREEDY).generation.reused_tokens == used + len(letters)


@pytest.mark.parametrize("change", ["text", "system"])
def test_a_conversation_that_was_changed_is_computed_anew(olmo3: Any, change: str) -> None:
    chat, _ = begin(olmo3, "one", "two", system="A.")
    chat.ask("What?", sampler=GREEDY)
    if change == "text":
        chat.messages[-1]["content"] = "another"
    else:
        chat.system = "B."
    made = chat.ask("And?", sampler=GREEDY).generation
    assert list(made.prompt_token_ids) == olmo3.template.encode(olmo3.tokenizer, chat.messages[:-1])


@pytest.mark.parametrize("end", [EOS, IM_END])
def test_either_end_of_olmo3_ends_an_answer(olmo3: Any, end: int) -> None:
    chat, _ = begin(olmo3, "Yes.", end=end)
    assert chat.ask("Well?", sampler=GREEDY).generation.finish_reason == "eos"


def test_the_end_of_a_turn_is_the_templates_where_the_config_names_another(olmo2: Any, olmo3: Any) -> None:
    tokenizer = type(olmo3.tokenizer).from_folder(olmo2.folder)
    assert tokenizer.eos_token_ids == (EOS,)
    runner = Scripted(tokenizer, "Yes.", end=IM_END)
    chat = Conversation(runner, tokenizer, olmo3.template)  # type: ignore[arg-type]
    assert chat.ask("Well?", sampler=GREEDY).text == "Yes."


def test_thoughts_are_told_apart_and_not_shown_again(think: Any) -> None:
    events: list[Any] = []
    chat, _ = begin(think, "Hm, salt.</think>\n\nSalt water.", "x</think>y")
    answer = chat.ask("What is the sea?", sampler=GREEDY, on_event=events.append)
    assert (answer.thought, answer.text) == ("Hm, salt.", "Salt water.")
    assert {type(event) for event in events} == {Thought, Text}
    assert answer.message == {"role": "assistant", "content": "Salt water.", "reasoning_content": "Hm, salt."}
    chat.ask("And?", sampler=GREEDY)
    assert "Hm, salt" not in think.template.render(chat.messages)


def test_calls_go_round(olmo3: Any) -> None:
    inner = "get-weather.now(town=\"Zürich\", days=[1, null])\nget-weather.now(town='Oslo')"
    call = f"<function_calls>{inner}</function_calls>"
    chat, runner = begin(olmo3, "Let me see.\n" + call, "12 and 7 degrees.", tools=TOOLS)
    answer = chat.ask("How warm?", sampler=GREEDY)
    assert answer.calls == (
        Call("get-weather.now", {"town": "Zürich", "days": [1, None]}),
        Call("get-weather.now", {"town": "Oslo"}),
    )
    assert (answer.text, answer.broken_calls) == ("Let me see.\n", ())
    with pytest.raises(UsageError, match="2 calls wait for their results"):
        chat.ask(sampler=GREEDY)
    with pytest.raises(InputError, match="1 results of 2 calls"):
        chat.add_results(["12"])
    with pytest.raises(InputError, match="expected a list of strings"):
        chat.add_results([12, 7])  # type: ignore[list-item]
    chat.add_results(["12", "7"])
    assert chat.ask(sampler=GREEDY).text == "12 and 7 degrees."
    fed = olmo3.tokenizer.decode(runner.prompts[1])
    assert fed == "\nenvironment\n12\nenvironment\n7\nassistant\n"  # and nothing of the call, which it holds
    text = olmo3.template.render(chat.messages[:2], tools=TOOLS, add_generation_prompt=False)
    assert f"<|im_start|>assistant\nLet me see.\n{call}" in text
    with pytest.raises(UsageError, match="calls no tool"):
        chat.add_results(["12"])


def test_a_call_that_is_cut_off_is_no_call(olmo3: Any) -> None:
    chat, _ = begin(olmo3, "<function_calls>get-weather.now(town='Os", tools=TOOLS)
    answer = chat.ask("How warm?", sampler=GREEDY)
    assert (answer.calls, [broken.reason for broken in answer.broken_calls]) == ((), ["cut off"])


def test_a_model_whose_template_has_no_tools_is_asked_for_json(olmo2: Any) -> None:
    call = '{"name": "get-weather.now", "arguments": {"town": "Oslo"}}'
    chat, runner = begin(olmo2, call, "It is 7 degrees.", end=EOS, tools=TOOLS, system="Be brief.")
    answer = chat.ask("How warm?", sampler=GREEDY)
    assert answer.calls == (Call("get-weather.now", {"town": "Oslo"}),)
    prompt = olmo2.tokenizer.decode(runner.prompts[0])
    assert prompt.startswith("<|system|>\nBe brief.\n\nYou can call functions.")
    chat.add_results(["7"])
    assert chat.ask(sampler=GREEDY).text == "It is 7 degrees."
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == call
    assert chat.messages[3]["content"] == "The function get-weather.now returned:\n7"


def test_an_answer_that_is_stopped_is_kept(olmo3: Any) -> None:
    chat, _ = begin(olmo3, "one two three four", "x")
    seen: list[Any] = []
    answer = chat.ask("Count", sampler=GREEDY, on_event=seen.append, cancelled=lambda: len(seen) == 2)
    assert (answer.text, answer.generation.finish_reason) == ("one two", "cancelled")
    assert chat.messages[-1]["content"] == "one two"
    assert chat.ask("Go on", sampler=GREEDY).text == "x"


def test_a_call_that_raises_leaves_the_messages(olmo3: Any) -> None:
    chat, _ = begin(olmo3, "never said", longest=40)
    before = list(chat.messages)
    with pytest.raises(ContextLengthError, match="the context holds 40"):
        chat.ask("word " * 50, sampler=GREEDY)
    with pytest.raises(InputError, match="max_new_tokens"):
        chat.ask("x", sampler=GREEDY, max_new_tokens=-1)
    assert chat.messages == before


def test_more_new_tokens_than_fit_are_as_many_as_fit(olmo3: Any) -> None:
    chat, _ = begin(olmo3, [1000] * 100, longest=60)
    made = chat.ask("Hi", sampler=GREEDY, max_new_tokens=500).generation
    assert (len(made.prompt_token_ids) + len(made.token_ids), made.finish_reason) == (60, "length")


def test_reset_load_and_system(olmo3: Any) -> None:
    chat, _ = begin(olmo3, "a", system="S")
    chat.ask("Hi", sampler=GREEDY)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "S"}]
    chat.system = None
    assert (chat.messages, chat.system) == ([], None)
    with pytest.raises(InputError, match="message 1: role"):
        chat.load([{"role": "x", "content": "y"}])
    chat.load([{"role": "user", "content": "Hi"}])
    assert chat.messages == [{"role": "user", "content": "Hi"}]
