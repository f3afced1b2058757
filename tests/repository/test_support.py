"""The support matrix: what stands in its tables, and that a page which says something else fails the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.matrix import PAGES, ROPE, Matrix, Seen, overview, refused, seen_rope, whole, written


def lines(*cells: Seen) -> list[str]:
    return whole(cells).splitlines()


def test_what_says_more_stands_in_the_cell() -> None:
    table, verified = (Seen("yarn", ROPE, "olmo2", state) for state in ("same table", "verified"))
    for cells in ((table, verified), (verified, table)):
        assert "| `yarn` | - | verified | - |" in lines(*cells)
    assert "| `yarn` | - | same table | - |" in lines(table)


def test_a_refusal_stands_in_its_cell_and_with_its_words() -> None:
    found = lines(
        Seen("olmo", "TensorRT for RTX", "fp8", "refused", "a | b"),
        Seen("another", "", "", "refused", "no graph here"),
        Seen("and another", "", "", "refused", "no graph here"),
    )
    assert "| OLMo 1 | - | - | - | - | - | refused |" in found
    assert "| OLMo 1, TensorRT for RTX, `fp8` | a \\| b |" in found
    assert "| and another; another | no graph here |" in found
    assert "| refused | with the words |" not in lines(Seen("olmo", "onnxruntime", "q4", "verified"))


def test_the_overview_lists_no_refusal() -> None:
    refusal = Seen("olmo", "onnxruntime", "q8", "refused", "why")
    found = overview([Seen("olmo", "onnxruntime", "q4", "verified"), refusal]).splitlines()
    assert found[2] == "| OLMo 1 | verified: `q4` | - | - |"


def test_the_place_of_an_error_is_left_out() -> None:
    request: Any = SimpleNamespace(node=SimpleNamespace(user_properties=[]))
    for error in (
        "olmo2-export: error: /tmp/a-b/m/config.json: model_type olmoe: a mixture",
        "config.json: model_type olmoe: a mixture",
        "model_type olmoe: a mixture",
    ):
        refused(request, "OLMoE", error)
    assert {cell[-1] for _, cell in request.node.user_properties} == {"model_type olmoe: a mixture"}


def test_every_rope_of_a_config_is_seen() -> None:
    request: Any = SimpleNamespace(node=SimpleNamespace(user_properties=[]))
    tables = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {"rope_type": "default"}}
    for given in ({"rope_parameters": tables}, {"rope_scaling": {"rope_type": "linear"}}, {"rope_parameters": None}):
        seen_rope(request, {"model_type": "olmo3"} | given, "verified")
    assert [cell[0] for _, cell in request.node.user_properties] == ["yarn", "default", "linear", "default"]


@pytest.mark.parametrize("mode", ["check", "write"])
def test_a_stale_page_fails_the_run_or_is_written(mode: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text("before\n<!-- support -->\nold\n<!-- end of support -->\nbehind\n")
    matrix, session = Matrix(mode, tmp_path), SimpleNamespace(exitstatus=0)
    passed = SimpleNamespace(
        when="call", passed=True, user_properties=[("support", ["olmo", "onnxruntime", "q4", "verified", ""])]
    )
    matrix.pytest_runtest_logreport(passed)  # type: ignore[arg-type]  # what of a report is read
    matrix.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert matrix.stale == (list(PAGES) if mode == "check" else [])
    assert session.exitstatus == (pytest.ExitCode.TESTS_FAILED if mode == "check" else 0)
    text = (tmp_path / "docs/support.md").read_text()
    assert ("| OLMo 1 | - | verified | - | - | - | - |" in text) == (mode == "write")
    assert text.startswith("before\n")
    assert text.endswith("behind\n")


def test_what_a_page_has_is_read_back() -> None:
    text = (Path(__file__).parents[2] / "docs/support.md").read_text(encoding="utf-8")
    cells = written(text)
    assert len(cells) > 100
    assert f"<!-- support -->\n{whole(cells)}<!-- end of support -->" in text
