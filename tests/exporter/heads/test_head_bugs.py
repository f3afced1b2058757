"""A classifier that pools the wrong token, or mixes its labels up, turns parity red, and locate names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.bugs import heads
from support.bugs.edits import Bug
from support.rebuilt_packages import rebuilt, rebuilt_trt

from olmo2_export.locate.layer_checks import BATCH, LINEAR, POOL
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint

NAMED: list[tuple[Bug, str, str, str]] = [
    (heads.pooled_at_the_last_token, "model.norm_input", POOL, "it takes the last token, padding or not"),
    (heads.pooled_at_the_first_token, "model.norm_input", POOL, "it takes the first token"),
    (heads.pooled_where_the_first_row_is, BATCH, POOL, "it takes the first row's token of every row"),
    (heads.labels_swapped, "score", LINEAR, ""),
]
GRAPHS = {"fp32": "onnx/model.onnx", "q4": "onnx/model_q4_shared.onnx", "trt_fp32": ""}

pytestmark = pytest.mark.usefixtures("short_rows", "little_text")


def test_every_bug_is_located() -> None:
    assert [row[0] for row in NAMED] == heads.HEAD_BUGS


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row[0].__name__)
@pytest.mark.parametrize("variant", GRAPHS)
def test_a_bug_of_the_head_is_red_and_named(
    variant: str,
    row: tuple[Bug, str, str, str],
    classifier: Callable[[str], Path],
    classifier_package: Callable[[str], Path],
    classifier_trt: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bug, name, operation, words = row
    if GRAPHS[variant]:
        bad = rebuilt(classifier_package("olmo2"), tmp_path / "p", bug, GRAPHS[variant])
    else:
        bad = rebuilt_trt(classifier_trt("fp32"), tmp_path / "p", bug)
    checkpoint = open_checkpoint(str(classifier("olmo2")))
    (report,) = verify(bad, checkpoint, variants=[variant], longest=64, out=tmp_path / "parity.json")
    assert not report.verdicts[KERNEL_PARITY]
    location = locate(bad, checkpoint, variant)
    assert location.first is not None
    assert (location.first.name, location.first.operation) == (name, operation), format_location(location)
    assert words in location.explanation
