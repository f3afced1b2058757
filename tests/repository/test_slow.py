"""What make test leaves out is there, and make test-all runs it."""

from __future__ import annotations

from pathlib import Path

from support.slow import SLOW, UNKNOWN

ROOT = Path(__file__).parents[2]


def test_every_slow_test_has_the_name_that_it_is_listed_by() -> None:
    assert UNKNOWN == []
    for file in SLOW:
        assert (ROOT / "tests" / file).is_file(), file


def test_make_test_all_leaves_nothing_out() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nFAST := and not slow\n" in text
    assert "\ntest-all: FAST :=\n" in text
    assert text.count("'not alone $(FAST)'") == text.count("'alone $(FAST)'") == 1
