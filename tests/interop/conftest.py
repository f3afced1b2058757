"""Where the other runtimes are installed: `make test-interop` puts them into the root of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    root = Path(__file__).parents[2]
    parser.addoption("--peers", type=Path, default=root, help="a folder with .venv-peers-* and build/interop")
