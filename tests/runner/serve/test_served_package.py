"""What a server serves of a package: its texts, its chat template if it has one, and its names."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chat import chat_package

from runtimes import open_package
from runtimes.errors import PackageError
from runtimes.serve.model import Chat, ServedModel, served_model
from runtimes.serve.options import EngineOptions
from runtimes.serve.problems import CallError
from runtimes.serve.requests import Request, Token
from runtimes.serve.worker import open_engine


def test_a_package_without_a_chat_template(demo_package: Path) -> None:
    model = served_model(open_package(demo_package), "demo")
    assert model.chat is None
    assert dict(model.names) == {"demo": None}
    assert model.fingerprint == f"fp_{open_package(demo_package).checksum[:16]}"
    with pytest.raises(CallError, match="there is no 'other'; there is demo") as caught:
        model.adapter("other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_adapters_are_models_of_their_own(demo_package: Path) -> None:
    tokenizer = served_model(open_package(demo_package), "demo").tokenizer
    model = ServedModel("base", "c0ffee", tokenizer, adapters=("one", "two"))
    assert [model.adapter(name) for name in model.names] == [None, "one", "two"]


@pytest.mark.parametrize(("template", "thinks", "tools"), [("olmo2", False, False), ("olmo3_think", True, True)])
def test_a_package_with_one_is_asked_once(
    demo_package: Path, tmp_path: Path, template: str, thinks: bool, tools: bool
) -> None:
    model = served_model(open_package(chat_package(demo_package, tmp_path / "chat", template)), "chat")
    assert isinstance(model.chat, Chat)
    with model.chat.template:
        assert (model.chat.thinks, model.chat.takes_tools) == (thinks, tools)
        assert model.chat.eos_token_ids == model.tokenizer.eos_token_ids  # the demo has no <|im_end|>


def test_a_chat_template_that_does_not_work_is_said_before_anything_is_served(
    demo_package: Path, tmp_path: Path
) -> None:
    package = chat_package(demo_package, tmp_path / "chat")
    (package / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(PackageError, match="chat template"):
        served_model(open_package(package), "chat", check_hashes=False)


def test_an_engine_is_opened_warm_and_with_room_for_all(demo_two_package: Path) -> None:
    options = EngineOptions(str(demo_two_package), variant="q4", max_slots=2, threads=1, kv_tokens=100)
    with open_engine(options) as engine:
        assert (engine.capacity.max_slots, engine.capacity.kv_tokens, engine.capacity.variant) == (2, 100, "q4")
        assert engine.idle
        engine.submit(Request("a", (5, 6, 7), 3))
        events = []
        while not engine.idle:
            events += engine.tick().events
        assert len([e for e in events if isinstance(e, Token)]) == 3
