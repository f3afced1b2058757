"""Each bug that OLMo 1 or Olmo 3 alone can have turns parity red, and locate names it, in every kind of graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.bugs import family
from support.bugs.edits import Bug
from support.rebuilt_packages import rebuilt, rebuilt_trt

from olmo2_export.locate.layer_checks import ATTENTION, CLIP, LAYER_NORM, ROTARY
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint

pytestmark = pytest.mark.usefixtures("short_rows")

DECODE = "onnx/model_q4_shared.onnx"
Named = tuple[Bug, int | None, str, str, str]
"""the bug, and where locate finds it: layer, tensor, operation, words"""

OLMO1: list[Named] = [
    (family.layer_norm_is_an_rms_norm, 1, "input_layernorm", LAYER_NORM, "it is an RMS norm"),
    (family.layer_norm_ignored, 1, "input_layernorm", LAYER_NORM, "it is not applied"),
    (family.last_norm_has_another_epsilon, None, "model.norm", LAYER_NORM, "its epsilon is 0.001"),
    (family.clip_ignored, 1, "self_attn.k_clip", CLIP, "it is not applied"),
    (family.clip_has_another_limit, 1, "self_attn.v_clip", CLIP, "its limit is 1.4, the config says 1.5"),
]
_WINDOW = "the config says 8"
OLMO3: list[Named] = [
    (family.window_off_by_one, 0, "self_attn.attention", ATTENTION, f"it sees a window of 9 tokens, {_WINDOW}"),
    (family.window_without_the_token_itself, 0, "self_attn.attention", ATTENTION, f"a window of 7 tokens, {_WINDOW}"),
    (family.window_ignored_in_one_layer, 1, "self_attn.attention", ATTENTION, "its window of 8 tokens is not applied"),
    (family.full_layer_has_a_window, 3, "self_attn.attention", ATTENTION, "it sees only a window of 8 tokens"),
    (family.yarn_in_all_layers, 0, "self_attn.q_rotary", ROTARY, "it is that of the layers of full_attention"),
    (family.yarn_in_no_layer, 3, "self_attn.q_rotary", ROTARY, "it is that of the layers of sliding_attention"),
    (family.attention_factor_of_yarn_forgotten, 3, "self_attn.q_rotary", ROTARY, ""),
]


def in_decode(row: Named) -> Named:
    """There the attention rotates queries and keys itself: the first that shows it are the keys in the cache."""
    bug, layer, name, operation, words = row
    return bug, layer, "self_attn.key_cache" if operation == ROTARY else name, operation, words


def test_every_bug_is_located() -> None:
    assert [row[0] for row in OLMO1] == family.OLMO1_BUGS
    assert [row[0] for row in OLMO3] == family.OLMO3_BUGS


def check(package: Path, checkpoint: Checkpoint, variant: str, row: Named, out: Path) -> None:
    _, layer, name, operation, words = row
    (report,) = verify(package, checkpoint, variants=[variant], longest=64, out=out)
    assert not report.verdicts[KERNEL_PARITY]
    location = locate(package, checkpoint, variant)
    assert location.first is not None
    full = name if layer is None else f"model.layers.{layer}.{name}"
    assert (location.first.name, location.first.operation) == (full, operation), format_location(location)
    assert words in location.explanation


def ids(value: object) -> str:
    return getattr(value[0], "__name__", "") if isinstance(value, tuple) else str(value)


ALL = [("olmo", row) for row in OLMO1] + [("olmo3", row) for row in OLMO3]


@pytest.mark.parametrize(("name", "row"), ALL, ids=ids)
def test_bug_in_the_portable_graph(
    name: str,
    row: Named,
    family_checkpoint: Callable[[str], Path],
    family_package: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bad = rebuilt(family_package(name), tmp_path / "p", row[0])
    check(bad, open_checkpoint(str(family_checkpoint(name))), "fp32", row, tmp_path / "parity.json")


@pytest.mark.parametrize(("name", "row"), ALL, ids=ids)
def test_bug_in_the_decode_graph(
    name: str,
    row: Named,
    family_checkpoint: Callable[[str], Path],
    family_package: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bad = rebuilt(family_package(name), tmp_path / "p", row[0], DECODE)
    check(bad, open_checkpoint(str(family_checkpoint(name))), "q4", in_decode(row), tmp_path / "parity.json")


@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, row in ALL if row[0] is not family.full_layer_has_a_window], ids=ids
)
def test_bug_in_the_graph_for_tensorrt(
    name: str,
    row: Named,
    family_checkpoint: Callable[[str], Path],
    family_trt_package: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    bad = rebuilt_trt(family_trt_package(name, "fp32"), tmp_path / "p", row[0])
    check(bad, open_checkpoint(str(family_checkpoint(name))), "trt_fp32", row, tmp_path / "parity.json")
