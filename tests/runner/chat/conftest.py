"""AI2's tokenizer with chat templates; a process that renders them, for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.chat import EOS, IM_END, template_folder

from runtimes.chat.template import ChatTemplate
from runtimes.text.tokenizer import Tokenizer

MODEL_TYPES = {"olmo2": "olmo2", "olmo3_instruct": "olmo3", "olmo3_think": "olmo3"}


class Chat(NamedTuple):
    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    return {
        name: template_folder(root / name, name, model_type=model_type, eos=[EOS, IM_END] if "3" in name else EOS)
        for name, model_type in MODEL_TYPES.items()
    }


@pytest.fixture(scope="package")
def dolma2(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_folder(folders["olmo3_instruct"])


@pytest.fixture(scope="package")
def chats(folders: dict[str, Path], dolma2: Tokenizer) -> Iterator[dict[str, Chat]]:
    found = {name: Chat(folder, dolma2, ChatTemplate.from_folder(folder)) for name, folder in folders.items()}
    yield found
    for chat in found.values():
        chat.template.close()


@pytest.fixture
def olmo2(chats: dict[str, Chat]) -> Chat:
    return chats["olmo2"]


@pytest.fixture
def olmo3(chats: dict[str, Chat]) -> Chat:
    return chats["olmo3_instruct"]


@pytest.fixture
def think(chats: dict[str, Chat]) -> Chat:
    return chats["olmo3_think"]
