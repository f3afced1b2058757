"""OLMo 1 and Olmo 3 with other outputs and inputs: their graphs for TensorRT, and OLMo 1 in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import OLMO1, OLMO3, make_checkpoint
from support.matrix import seen
from support.rebuilt_packages import with_trt_graph

from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint

TWO = {"num_hidden_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "olmo": OLMO1 | TWO,
    "olmo3": OLMO3 | TWO | {"layer_types": ["sliding_attention", "full_attention"]},
}
BLOCKS = {"olmo": ["q8"], "olmo3": []}  # Olmo 3 has q4 elsewhere
MODES = {
    "score": {"score, right padded", "score, padding alone"},
    "hidden": {"hidden state 2, in pieces", "embedding 2, last", "hidden state 0, vectors among tokens"},
    "vectors": {"vectors", "vectors among tokens"},
}

pytestmark = pytest.mark.usefixtures("short_rows", "little_text")


@pytest.mark.parametrize("outputs", [("score",), ("hidden", "vectors")], ids="-".join)
@pytest.mark.parametrize("name", SHAPES)
def test_their_outputs_pass_their_gates(
    request: pytest.FixtureRequest,
    name: str,
    outputs: tuple[str, ...],
    classifier: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    scores = "score" in outputs
    folder = classifier(name) if scores else make_checkpoint(tmp_path / "c", **SHAPES[name])
    checkpoint = open_checkpoint(str(folder))
    options = Options() if scores else Options(inputs_embeds=True, hidden_states=(0, -1))
    export(checkpoint, tmp_path / "plain", variants=["fp32", *BLOCKS[name]], options=options)
    package = with_trt_graph(tmp_path / "plain", tmp_path / "p", TrtOptions("fp32", 16))
    for report in verify(package, checkpoint, variants=[*BLOCKS[name], "trt_fp32"], longest=16):
        failed = [(case.mode, case.failures) for case in report.cases if not case.passed]
        assert report.verdicts[KERNEL_PARITY], (report.variant, failed, report.checks)
        backend, _, variant = report.variant.rpartition("_")
        for output in outputs:
            assert MODES[output] <= {case.mode for case in report.cases}
            title = "graph for TensorRT" if backend else "onnxruntime"
            seen(request, f"{name} {output}", title, variant, "verified")
