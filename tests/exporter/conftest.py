"""What all tests of the exporter share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def traced_once(traces: None) -> None:
    """Nothing here looks at how long tracing takes."""
