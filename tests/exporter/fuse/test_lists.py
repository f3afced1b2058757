"""How often passes must apply: a number for each, or a name in the list of those that need none."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from olmo2_export.fuse import check_applied
from runtimes.errors import FusionError

MODEL = ir.Model(ir.Graph([], [], nodes=[], name="toy"), ir_version=10)
TABLE = "expected_passes in graphs/toy.py"


def test_a_pass_without_a_number_is_named_with_the_table_to_edit() -> None:
    with pytest.raises(
        FusionError, match=r"must apply: made_up; add it to expected_passes in graphs/toy\.py, or"
    ) as caught:
        check_applied(MODEL, {"norm": 1, "made_up": 0, "drop_unused": 3}, {"norm": 2}, TABLE)
    assert "\n" not in str(caught.value)


def test_each_pass_that_applied_more_or_less_often_is_named() -> None:
    with pytest.raises(
        FusionError, match="graph toy: norm: expected 2, applied 1 times; rope: expected 0, applied 4 ti"
    ):
        check_applied(MODEL, {"norm": 1, "rope": 4, "drop_unused": 3}, {"norm": 2, "rope": 0}, TABLE)


def test_numbers_of_passes_that_are_in_another_list_are_no_matter() -> None:
    check_applied(MODEL, {"norm": 2, "drop_unused": 0}, {"norm": 2, "quick_gelu": 3}, TABLE)
