"""Every generation with other outputs: graphs for TensorRT, OLMo 1 in 8 bits; engines in every precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import OLMO1, OLMO3, make_checkpoint
from support.matrix import seen
from support.rebuilt_packages import with_trt_graph
from support.workers import Shared

from olmo2_export.catalog import precisions
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.measure.parity import KERNEL_PARITY
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.package.weight_choice import Options
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.package import open_package

TWO = {"num_hidden_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "olmo": OLMO1 | TWO,
    "olmo2": TWO,
    "olmo3": OLMO3 | TWO | {"layer_types": ["sliding_attention", "full_attention"]},
}
BLOCKS = {"olmo": ["q8"], "olmo3": []}  # Olmo 3 has q4 elsewhere
MODES = {
    "score": {"score, right padded", "score, padding alone"},
    "hidden": {"hidden state 2, in pieces", "embedding 2, last", "hidden state 0, vectors among tokens"},
    "vectors": {"vectors", "vectors among tokens"},
}

ENGINES = [(name, outputs) for name in SHAPES for outputs in ("plain", "score", "hidden-vectors")]
ENGINES.remove(("olmo2", "plain"))  # tests of engines compile it in every precision

_FEW = [f"trt_{precision}" for precision in ("bf16", "fp16", "int4", "int8", "fp8")]
OTHERS = [
    (name, outputs, variant)
    for name, on_cpus in (("olmo", "q4"), ("olmo3", "q8"))
    for outputs in ("score", "hidden-vectors")
    for variant in (on_cpus, "bf16", "fp16", "q4f16", *_FEW)
] + [("olmo2", "hidden-vectors", variant) for variant in _FEW]
"""those that no other test has"""
OUTPUTS = {
    "plain": Options(),
    "score": Options(),
    "hidden-vectors": Options(inputs_embeds=True, hidden_states=(0, -1)),
}

pytestmark = pytest.mark.usefixtures("short_rows", "little_text")


@pytest.mark.parametrize("outputs", [("score",), ("hidden", "vectors")], ids="-".join)
@pytest.mark.parametrize("name", ["olmo", "olmo3"])
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


@pytest.fixture(scope="session")
def one_of(classifier: Callable[[str], Path], shared: Shared) -> Callable[[str, str], Path]:
    """An `fp32` package of a generation with some outputs. Do not change it."""

    def of(name: str, outputs: str) -> Path:
        def make(out: Path) -> None:
            folder = classifier(name) if outputs == "score" else make_checkpoint(out.with_name("c"), **SHAPES[name])
            export(open_checkpoint(str(folder)), out, options=OUTPUTS[outputs])

        return shared.made("package", f"engines_{name}_{outputs}", make)

    return of


@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize(("name", "outputs"), ENGINES)
def test_tensorrt_compiles_it(
    request: pytest.FixtureRequest,
    name: str,
    outputs: str,
    precision: str,
    one_of: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    package = Path(shutil.copytree(one_of(name, outputs), tmp_path / "p"))
    options = EngineOptions(precision, compute_capabilities=["8.9"], max_cache_length=64)  # type: ignore[arg-type]
    report = build(package, options, progress=False)
    opened = open_package(package)
    assert report.engine.layer_counts["KV_CACHE_UPDATE"] == 2 * opened.manifest.model.num_hidden_layers
    (variant,) = opened.trt.variants.values()  # type: ignore[union-attr]  # it was built
    assert variant.answer == ("score" if outputs == "score" else "logits")
    assert bool(variant.hidden_states) == ("hidden" in outputs)
    for output in ("",) if outputs == "plain" else outputs.split("-"):
        seen(request, f"{name} {output}".strip(), "TensorRT for RTX", precision, "compiled")


@pytest.mark.parametrize(("name", "outputs", "variant"), OTHERS)
def test_every_other_variant_passes_its_gates(
    request: pytest.FixtureRequest,
    name: str,
    outputs: str,
    variant: str,
    classifier: Callable[[str], Path],
    one_of: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    folder = classifier(name) if outputs == "score" else make_checkpoint(tmp_path / "c", **SHAPES[name])
    checkpoint, package = open_checkpoint(str(folder)), tmp_path / "p"
    backend, _, precision = variant.rpartition("_")
    if backend:
        with_trt_graph(one_of(name, outputs), package, TrtOptions(precision, 16))  # type: ignore[arg-type]
    else:
        export(checkpoint, package, variants=[variant], options=OUTPUTS[outputs])
    (report,) = verify(package, checkpoint, variants=[variant], longest=16)
    failed = [(case.mode, case.failures) for case in report.cases if not case.passed]
    assert report.verdicts[KERNEL_PARITY], (failed, report.checks)
    for output in outputs.split("-"):
        assert MODES[output] <= {case.mode for case in report.cases}
        title = "graph for TensorRT" if backend else "onnxruntime"
        seen(request, f"{name} {output}", title, precision, "verified")
