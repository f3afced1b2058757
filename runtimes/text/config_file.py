"""The JSON files beside tokenizer.json: an object each, in which a token is its text, or an object around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.errors import PackageError


def read_config(path: Path) -> dict[str, Any]:
    """Return what a file says; {} where there is none.

    Raises:
        PackageError: it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path}: not valid JSON ({type(error).__name__}); export the package again") from error
    if not isinstance(document, dict):
        raise PackageError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def token_text(token: Any) -> str | None:
    """Return the text of a token, by what a file says of it; None: it says none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
