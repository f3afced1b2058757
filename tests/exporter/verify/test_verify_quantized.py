"""Quantised variants: what verify shows of a good one, and the bugs that must turn it red."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.bugs.edits import Bug
from support.bugs.quantized import (
    EXACT_BUGS,
    GRAPH,
    PADDING_BUGS,
    PORTABLE_GRAPH,
    PREFILL_GRAPH,
    WEIGHT_BUGS,
    attention_scale_wrong,
    inputs_rounded_to_six_bits,
    int8_scale_shifted,
    key_and_value_cache_swapped,
    kv_heads_misread,
    norm_weight_nan,
    one_scale_shifted,
    post_attention_norm_ignored,
    q_norm_ignored,
    rope_theta_wrong,
)
from support.checkpoints import make_checkpoint
from support.rebuilt_packages import rebuilt

from olmo2_export.catalog import INT4_BLOCKS
from olmo2_export.measure.parity import DRAWS, ParityReport
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify.feeds import MODES
from olmo2_export.verify.variant import measure_variant
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("remembered")

CAPACITY = 64
"""tokens of the longest rows: more than those of the others; `test_verify` fills whole caches"""


@pytest.fixture(scope="module")
def package(q4_package: Path) -> Path:
    """q4 of the random model, both graphs. Its quality is poor, as random weights are hard to round."""
    return q4_package


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> str:
    return str(tiny_checkpoint)


def red(report: ParityReport) -> set[str]:
    """The parts of a report that failed: exact, kernels, int8, greedy, and checks by name."""
    views = {c.mode: c.mode.split()[0] for c in report.cases} | dict.fromkeys(MODES, "exact")
    parts = {views[c.mode] for c in report.cases if not c.passed}
    return parts | ({"greedy"} if not report.greedy.passed else set()) | {c.name for c in report.checks if not c.passed}


@pytest.mark.usefixtures("little_text")
def test_a_rebuilt_package_without_a_bug_is_red_in_nothing_but_quality(
    package: Path, checkpoint: str, tmp_path: Path
) -> None:
    report = measure_variant(
        rebuilt(package, tmp_path / "p", lambda _: None, GRAPH), "q4", open_checkpoint(checkpoint), longest=CAPACITY
    )
    assert red(report) <= set(QUALITY)
    modes = [c.mode for c in report.cases]
    cases = {f"{view}{mode}": 8 for view in VIEWS for mode in MODES}
    cases |= {f"{view} {mode}": count for view in PORTABLE for mode, count in OTHER_RUNTIMES.items()}
    assert {mode: modes.count(mode) for mode in modes} == cases
    assert all(c.nmse < 1e-11 for c in report.cases if c.mode.startswith("portable exact"))
    assert all(c.nmse < 1e-11 for c in report.cases if c.mode.removeprefix("int8 exact ") in MODES)
    assert {c.draws for c in report.cases} == {1}  # PyTorch is asked again of what is off alone


VIEWS = ["", "kernels ", "int8 exact ", "int8 "]
PORTABLE = ["portable exact", "portable"]
OF_WEIGHTS = (rope_theta_wrong, norm_weight_nan)
"""bugs in the file of the weights, which both graphs have"""
OTHER_RUNTIMES = {"alone": 3, "left padded": 2, "right padded": 2}
QUALITY = ["quality", "int8 quality", "quality of both in turns"]


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize("bug", EXACT_BUGS, ids=lambda bug: bug.__name__)
def test_bug_in_the_decode_graph_turns_exact_parity_red(
    package: Path, checkpoint: str, tmp_path: Path, bug: Bug
) -> None:
    report = measure_variant(
        rebuilt(package, tmp_path / "p", bug, GRAPH), "q4", open_checkpoint(checkpoint), longest=CAPACITY
    )
    assert "exact" in red(report), format_reports([report])


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize("bug", WEIGHT_BUGS, ids=lambda bug: bug.__name__)
def test_wrong_weights_turn_the_weights_check_red(package: Path, checkpoint: str, tmp_path: Path, bug: Bug) -> None:
    """The graph computes what they say, so that parity with the dequantised weights cannot see it."""
    report = measure_variant(
        rebuilt(package, tmp_path / "p", bug, GRAPH), "q4", open_checkpoint(checkpoint), longest=CAPACITY
    )
    assert "exact" not in red(report)
    assert "weights" in red(report), format_reports([report])


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize(
    ("bug", "part"),
    [
        (int8_scale_shifted, "int8 weights"),
        (q_norm_ignored, "int8"),
        (post_attention_norm_ignored, "int8"),
        (rope_theta_wrong, "int8"),
        (kv_heads_misread, "int8"),
        (key_and_value_cache_swapped, "int8"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_bug_in_the_prefill_graph_turns_it_red(
    package: Path, checkpoint: str, tmp_path: Path, bug: Bug, part: str
) -> None:
    broken = rebuilt(package, tmp_path / "p", bug, PREFILL_GRAPH)
    report = measure_variant(broken, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert part in red(report), format_reports([report])


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize(
    "bug", [*(b for b in EXACT_BUGS if b not in OF_WEIGHTS), *PADDING_BUGS], ids=lambda bug: bug.__name__
)
def test_bug_in_the_portable_graph_turns_it_red_and_no_other(
    package: Path, checkpoint: str, tmp_path: Path, bug: Bug
) -> None:
    broken = rebuilt(package, tmp_path / "p", bug, PORTABLE_GRAPH)
    report = measure_variant(broken, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert "portable" in red(report), format_reports([report])
    assert red(report) <= {"portable", *QUALITY}
    if bug in PADDING_BUGS:
        exact = [c for c in report.cases if c.mode.startswith("portable exact")]
        assert {c.mode.removeprefix("portable exact ") for c in exact if not c.passed} == PADDING_BUGS[bug]


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """q4 of a random model with one weight of 1e4, a norm's, and its checkpoint.

    8 bits for an input beside it are an error of 60 % in the logits, and PyTorch's own float32 is wrong by more than
    the gate of NMSE.
    """
    folder = tmp_path_factory.mktemp("outlier")
    make_checkpoint(folder / "checkpoint")
    path = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.post_feedforward_layernorm.weight"][7] = 1e4
    save_file(tensors, path, {"format": "pt"})
    export(
        open_checkpoint(str(folder / "checkpoint")),
        folder / "package",
        variants=["q4"],
        options=Options(kv_caches=("float32",)),
    )
    return folder / "package", str(folder / "checkpoint")


@pytest.mark.usefixtures("little_text")
def test_one_extreme_weight_is_no_false_alarm(outlier: tuple[Path, str]) -> None:
    """It was: kernels 131 x PyTorch's error, as codes of the embedding halfway between two were rounded otherwise, and
    an NMSE beyond the gate, as PyTorch's own is."""
    package, checkpoint = outlier
    report = measure_variant(package, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert red(report) <= set(QUALITY), format_reports([report])
    rounded = [c for c in report.cases if c.mode.startswith(("kernels", "int8")) and "exact" not in c.mode]
    assert max(c.relative_error for c in rounded) > 0.3
    assert max(c.error_ratio for c in rounded) < 1.5
    assert {c.draws for c in report.cases if c.mode in MODES} == {1 + DRAWS}


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize(
    ("bug", "graph", "part"),
    [
        (q_norm_ignored, GRAPH, "exact"),
        (attention_scale_wrong, GRAPH, "exact"),
        (one_scale_shifted, GRAPH, "weights"),
        (q_norm_ignored, PREFILL_GRAPH, "int8"),
        (attention_scale_wrong, PREFILL_GRAPH, "int8"),
        (kv_heads_misread, PREFILL_GRAPH, "int8"),
        (key_and_value_cache_swapped, PREFILL_GRAPH, "int8"),
        (int8_scale_shifted, PREFILL_GRAPH, "int8 weights"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_bug_beside_an_extreme_weight_is_red(
    outlier: tuple[Path, str], tmp_path: Path, bug: Bug, graph: str, part: str
) -> None:
    package, checkpoint = outlier
    broken = rebuilt(package, tmp_path / "p", bug, graph)
    report = measure_variant(broken, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert part in red(report), format_reports([report])


@pytest.mark.usefixtures("little_text")
def test_inputs_that_are_rounded_too_coarsely_turn_the_int8_graph_red(
    package: Path, checkpoint: str, tmp_path: Path
) -> None:
    """The exact form has no rounding: that is for the graph as it is to show."""
    broken = rebuilt(package, tmp_path / "p", inputs_rounded_to_six_bits, PREFILL_GRAPH)
    report = measure_variant(broken, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert "int8" in red(report), format_reports([report])
    assert all(c.passed for c in report.cases if c.mode.startswith("int8 exact"))


@pytest.mark.usefixtures("little_text")
def test_the_demo_passes_all_with_gptq_and_an_8_bit_cache(tmp_path: Path) -> None:
    """The whole way: calibrated weights, both graphs, quantised cache; and the gate is the one of the issue.

    The export measures quality on all of the text, verify again on a sequence that fills the cache.
    """
    out, demo = tmp_path / "demo", open_checkpoint("demo")
    manifest = export(demo, out, variants=["q4"], options=Options(recipe="gptq", kv_caches=("int8",)))
    variant = manifest.variants["q4"]
    assert variant.kv_cache.dtype == "int8"
    assert variant.prefill is not None
    assert variant.quality is not None
    assert INT4_BLOCKS.gates is not None
    assert variant.quality.kl_mean < 0.005 < INT4_BLOCKS.gates[0].kl_mean
    (report,) = verify(out, demo, longest=CAPACITY)
    assert report.passed, format_reports([report])
    text = format_reports([report])
    assert "q4 weights: 44 tensors" in text
    assert "in 1024s: ok" in text  # the cache is measured on the whole context


def test_each_graph_is_measured_and_both_on_one_cache(package: Path, checkpoint: str) -> None:
    """Random weights are hard to round to 4 bits: the gate of 4 bits is not met, and verify says so."""
    report = measure_variant(package, "q4", open_checkpoint(checkpoint), longest=CAPACITY)
    assert [c.name for c in report.checks if "quality" in c.name] == QUALITY
    assert set(QUALITY) <= red(report)
