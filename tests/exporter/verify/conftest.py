"""What verify's tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is asked the same only once, see `support.remembered`."""
    from support.remembered import remember

    remember(monkeypatch)
