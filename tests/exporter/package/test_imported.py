"""Packages of quantised checkpoints: the integers are taken over, and what a graph computes is what they say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.bugs.edits import change
from support.quantized import (
    Writer,
    awq,
    compressed,
    gptq,
    int_quantized,
    make_base,
    make_quantized,
    pack_quantized,
)

from olmo2_export.cli import main
from olmo2_export.config import ModelConfig
from olmo2_export.package import variants
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.quantize.imported import held_form, in_blocks
from olmo2_export.stored_graph import load_graph
from olmo2_export.summary.package import describe
from olmo2_export.summary.plan_text import plan_lines
from olmo2_export.summary.text import plain
from olmo2_export.verify.variant import measure_variant
from olmo2_export.verify.verify import format_reports
from olmo2_export.views.shared_forms import stored_matrices
from olmo2_export.views.weight_checks import check_imported, weight_checks
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import UsageError
from runtimes.package import open_package

pytestmark = pytest.mark.usefixtures("remembered", "little")

MADE = Path(__file__).parents[2] / "data" / "quantized"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
ORDERED = {"act_order": True, "symmetric": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
BYTES = compressed("int-quantized", 8, group=-1, symmetric=True)

CASES: dict[str, tuple[str, dict[str, Any], Writer, dict[str, Any]]] = {
    "gptq, act-order": ("q4", GPTQ, gptq, ORDERED),
    "awq": ("q4", AWQ, awq, {"symmetric": False}),
    "bytes, a scale per row": ("q8", BYTES, int_quantized, {"bits": 8, "group": -1}),
    "4 bits in 8": ("q8", GPTQ, gptq, ORDERED),
    "groups of 16": ("q4", compressed("pack-quantized", 4, group=16, symmetric=True), pack_quantized, {"group": 16}),
}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export measures quality on 256 tokens."""
    monkeypatch.setattr(variants, "quality_tokens", partial(variants.quality_tokens, most=256))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ordered(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GPTQ checkpoint with act-order, and its q4. Do not change them."""
    folder = tmp_path_factory.mktemp("ordered")
    make_quantized(folder / "c", base, GPTQ, gptq, act_order=True, symmetric=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "quality_tokens", partial(variants.quality_tokens, most=256))
        export(
            open_checkpoint(str(folder / "c")),
            folder / "p",
            variants=["fp32", "q4"],
            options=Options(kv_caches=("float32",)),
        )
    return folder / "c", folder / "p"


@pytest.mark.parametrize("case", CASES)
def test_the_graph_holds_the_integers_and_computes_what_they_say(base: Path, tmp_path: Path, case: str) -> None:
    variant, config, write, fields = CASES[case]
    wanted = make_quantized(tmp_path / "c", base, config, write, **fields)
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    manifest = export(checkpoint, tmp_path / "p", variants=[variant])
    entry = manifest.variants[variant]
    assert entry.prefill is None
    assert entry.quantization is not None
    assert entry.quantization.recipe == "imported"
    assert entry.quantization.tensors.keys() == wanted.keys()
    assert {tensor.nmse for tensor in entry.quantization.tensors.values()} == {0.0}
    matrices = stored_matrices(load_graph(tmp_path / "p" / entry.graph))
    for name, weight in wanted.items():
        assert np.array_equal(matrices[name].dequantize().numpy(), weight), name
    ids = np.array([[3, 8, 13, 18, 2, 7, 12]])
    exact = exact_logits(tmp_path / "p", entry.graph, ids)
    truth = reference(tmp_path / "c", ids)[-1]
    assert exact.shape == truth.shape
    assert np.abs(exact - truth).max() < 2e-5 * np.abs(truth).max()


def exact_logits(package: Path, graph: str, ids: np.ndarray) -> np.ndarray:
    """The graph's logits with inputs that are not rounded."""
    from olmo2_export.views.runners import open_view
    from olmo2_export.views.table import variant_views
    from runtimes.targets import find_target

    opened = open_package(package)
    entry = next(v for v in opened.manifest.variants.values() if v.graph == graph)
    source = open_checkpoint(str(package.parent / "c"))
    config = ModelConfig.from_json(source.folder / "config.json")
    views = variant_views(opened, entry, source, config, find_target("ort"))
    assert [view.label for view in views] == ["exact", "kernels"]
    with open_view(opened, views[0], find_target("ort")) as runner:
        found: np.ndarray = runner.prefill([ids[0]])[0][-1]
    return found


def reference(folder: Path, ids: np.ndarray) -> np.ndarray:
    from olmo2_export.truth.reference import open_reference

    with open_reference(open_checkpoint(str(folder)), "fp32") as model:
        return model.logits([ids[0]])[0]


@pytest.mark.usefixtures("little_text", "short_rows")
def test_verify_passes_act_order_in_its_own_blocks_of_inputs(ordered: tuple[Path, Path]) -> None:
    checkpoint, package = ordered
    report = measure_variant(package, "q4", open_checkpoint(str(checkpoint)), longest=32)
    assert all(case.passed for case in report.cases), format_reports([report])
    checks = {check.name: check.found for check in report.checks if check.passed}
    assert checks["imported weights"] == "7 tensors, 0 differ from the checkpoint's"


def test_linears_of_one_input_share_one_gather(ordered: tuple[Path, Path]) -> None:
    graph = load_graph(ordered[1] / "onnx" / "model_q4.onnx")
    orders = [name for name in graph.graph.initializers if name.endswith(".order")]
    assert sorted(name.removeprefix("model.layers.0.").removesuffix(".weight.order") for name in orders) == [
        "mlp.down_proj",
        "mlp.gate_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    ]


Q = "model.layers.0.self_attn.q_proj.weight"


def neighbouring_scale(model: ir.Model) -> None:
    change(model, f"{Q}.scales", lambda scales: np.roll(scales, 1, axis=1))


def zero_points_off_by_one(model: ir.Model) -> None:
    change(model, f"{Q}.zero_points", lambda zeros: zeros ^ 1)


def halves_swapped(model: ir.Model) -> None:
    change(model, f"{Q}.packed", lambda packed: (packed << 4) | (packed >> 4))


def order_ignored(model: ir.Model) -> None:
    change(model, f"{Q}.order", lambda order: np.arange(len(order), dtype=order.dtype))


@pytest.mark.parametrize(
    "bug", [neighbouring_scale, zero_points_off_by_one, halves_swapped, order_ignored], ids=lambda bug: bug.__name__
)
def test_a_graph_with_a_bug_turns_imported_weights_red(
    ordered: tuple[Path, Path], bug: Callable[[ir.Model], None]
) -> None:
    """Parity computes with what the graph says, and cannot see it."""
    checkpoint = open_checkpoint(str(ordered[0]))
    graph = load_graph(ordered[1] / "onnx" / "model_q4.onnx")
    assert check_imported(stored_matrices(graph), checkpoint).passed
    bug(graph)
    assert not check_imported(stored_matrices(graph), checkpoint).passed


def test_against_the_model_before_it_was_quantised_scales_are_compared_and_not_every_number(
    ordered: tuple[Path, Path], base: Path
) -> None:
    package = open_package(ordered[1])
    config = ModelConfig.from_json(base / "config.json")
    names = [c.name for c in weight_checks(package, package.variant("q4"), open_checkpoint(str(base)), config)]
    assert names == ["weights"]


@pytest.mark.parametrize(
    ("name", "variant", "error"),
    [("torchao_int8", "q8", 0.05), ("torchao_intx4", "q4", 0.05), ("bnb_nf4", "fp32", 1e-5), ("bnb_int8", "fp32", 0.1)],
)
def test_logits_are_those_of_transformers_running_that_very_checkpoint(
    tmp_path: Path, name: str, variant: str, error: float
) -> None:
    """Recorded where the libraries are; q4 and q8 round inputs to 8 bits, and so does bitsandbytes' int8 itself."""
    wanted = np.array(json.loads((MADE / name / "expected.json").read_text())["logits"])
    ids = np.array([3, 8, 13, 18, 2, 7, 12, 17, 1, 6, 11])
    export(open_checkpoint(str(MADE / name)), tmp_path / "p", variants=[variant])
    with open_runner(tmp_path / "p", variant=variant) as runner:
        found = runner.prefill([ids])[0]
    assert np.sqrt(np.square(found - wanted[-1]).mean() / np.square(wanted[-1]).mean()) < error
    truth = reference(MADE / name, ids[None])
    if name != "bnb_int8":
        assert np.abs(truth - wanted).max() < 2e-5


@pytest.mark.parametrize(
    ("library", "name", "error"),
    [
        ("torchao", "torchao_int8", 2e-5),
        ("torchao", "torchao_intx4", 2e-5),
        ("bitsandbytes", "bnb_nf4", 2e-5),
        ("bitsandbytes", "bnb_int8", 0.2),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of the libraries, about themselves
def test_the_library_of_today_gives_the_logits_of_our_dequantised_weights(
    library: str, name: str, error: float
) -> None:
    """Where it is installed: transformers runs the quantised checkpoint; bitsandbytes rounds inputs to int8."""
    pytest.importorskip(library)
    from transformers import AutoModelForCausalLM

    ids = np.array([3, 8, 13, 18, 2, 7, 12, 17, 1, 6, 11])
    model: Any = AutoModelForCausalLM.from_pretrained(MADE / name, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    assert np.abs(reference(MADE / name, ids[None]) - wanted).max() < error


def test_q4_of_8_bits_is_refused_and_made_when_asked_for(base: Path, tmp_path: Path) -> None:
    make_quantized(tmp_path / "c", base, BYTES, int_quantized, bits=8, group=-1)
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    with pytest.raises(UsageError) as caught:
        export(checkpoint, tmp_path / "p", variants=["q4"])
    assert "its weights have 8 bits; q8 and fp32 hold them exactly, and --requantize makes q4" in str(caught.value)
    assert not (tmp_path / "p").exists()
    arguments = [str(tmp_path / "c"), "--out", str(tmp_path / "p"), "--variant", "q4", "--requantize"]
    assert main(["export", *arguments, "--no-prefill-graph"]) == 0
    entry = open_package(tmp_path / "p").variant("q4")
    assert entry.quantization is not None
    assert entry.quantization.recipe == "search"
    assert all(tensor.nmse > 1e-4 for tensor in entry.quantization.tensors.values())
    assert entry.quality is not None


@pytest.mark.parametrize(
    ("name", "options", "variant", "said"),
    [
        ("bnb_nf4", Options(), "q4", "its values are those of no integers; fp32 hold"),
        ("torchao_intx4", Options(), "q4f16", "its weights have 4 bits; q4, q8 and fp32 hold them exactly"),
        ("torchao_intx4", Options(block_size=64), "q4", "--block-size: q4 takes over the weights of torchao_intx4"),
        ("torchao_intx4", Options(recipe="gptq"), "q4", "--recipe gptq: q4 takes over the weights"),
        ("demo", Options(requantize=True), "q4", "--requantize: demo is not quantised; leave it out"),
    ],
)
def test_what_goes_with_no_import_is_refused(name: str, options: Options, variant: str, said: str) -> None:
    checkpoint = open_checkpoint(name if name == "demo" else str(MADE / name))
    with pytest.raises(UsageError) as caught:
        plan_export(checkpoint, variants=[variant], options=options)
    assert said in str(caught.value)


def test_groups_that_no_block_divides_are_refused_with_a_remedy(base: Path, tmp_path: Path) -> None:
    config = compressed("pack-quantized", 4, group=8, symmetric=True)
    make_quantized(tmp_path / "c", base, config, pack_quantized, group=8, only=["self_attn.q_proj"])
    with pytest.raises(UsageError, match=r"q_proj\.weight: groups of 8 columns: blocks of 16, .*use --variant fp32"):
        plan_export(open_checkpoint(str(tmp_path / "c")), variants=["q4"])


def test_a_plan_names_the_format_and_says_the_bytes(ordered: tuple[Path, Path]) -> None:
    plan = plan_export(open_checkpoint(str(ordered[0])), variants=["q4"])
    lines = list(plan_lines(plan))
    assert lines[1] == "quantised: gptq, 4 bits, groups of 32, act-order"
    (files,) = plan.variants[0].graphs.values()
    assert files.data == (ordered[1] / "onnx" / "model_q4.onnx_data").stat().st_size
    text = plain(describe(ordered[1]))
    assert "gptq, 4 bits, groups of 32, act-order" in text


def test_a_plan_from_headers_alone_says_what_it_guesses(ordered: tuple[Path, Path]) -> None:
    there = dataclasses.replace(open_checkpoint(str(ordered[0])), _stamps={})
    (variant,) = plan_export(there, variants=["q4"]).variants
    assert variant.notes == (
        "its codes are taken over: their groups are in the files, and taken to be the variant's own blocks",
    )


def test_a_recipe_is_for_embedding_and_head(base: Path, tmp_path: Path) -> None:
    wanted = make_quantized(tmp_path / "c", base, AWQ, awq, symmetric=False)
    export(open_checkpoint(str(tmp_path / "c")), tmp_path / "p", variants=["q4"], options=Options(recipe="rtn"))
    entry = open_package(tmp_path / "p").variant("q4")
    assert entry.quantization is not None
    errors = {name: tensor.nmse for name, tensor in entry.quantization.tensors.items()}
    assert errors.keys() - wanted.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name, error in errors.items() if error == 0} == wanted.keys()


def test_one_linear_that_is_not_quantised_stays_float(base: Path, tmp_path: Path) -> None:
    only = ["self_attn.q_proj", "mlp.down_proj"]
    make_quantized(tmp_path / "c", base, AWQ, awq, symmetric=False, only=only)
    manifest = export(open_checkpoint(str(tmp_path / "c")), tmp_path / "p", variants=["q4"])
    assert manifest.variants["q4"].op_counts["com.microsoft::MatMulNBits"] == 2
    assert manifest.variants["q4"].op_counts["MatMul"] == 6


def test_codes_of_4_bits_in_8_keep_their_zero_points_and_their_symmetry() -> None:
    from olmo2_export.catalog import Q8
    from olmo2_export.weights.quantized.codes import Codes

    codes = np.array([[0, 8, 15, 7] * 8], np.uint8)
    stored = Codes(4, codes, np.array([[0.5]], np.float32), np.array([[8]], np.uint8), np.zeros(32, np.int64))
    form = held_form(stored, Q8)
    assert form.symmetric
    matrix = in_blocks(stored, form)
    assert matrix.zero_points is None
    assert torch.equal(matrix.dequantize(), torch.from_numpy(stored.dequantize()))
