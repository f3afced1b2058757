"""Packages of quantised checkpoints: the integers are taken over, and what a graph computes is what they say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bugs.edits import change, scaled
from support.matrix import refused
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
from support.rebuilt_packages import rebuilt, rebuilt_trt, with_trt_graph

from olmo2_export.catalog import Q4, Q8, BlockFormat
from olmo2_export.cli import main
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.stored_blocks import folded_orders, stored_matrices
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.locate.stored_values import weight_check
from olmo2_export.package import imported, variants
from olmo2_export.package.export import export
from olmo2_export.package.graph_sizes import engine_graph_bytes
from olmo2_export.package.plan import plan_export
from olmo2_export.package.trt_variants import TrtOptions, check_trt_options
from olmo2_export.package.weight_choice import Options
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.imported import held_form, in_blocks, in_static_blocks
from olmo2_export.quantize.static import imported_forms, imported_static_weights
from olmo2_export.stored_graph import load_graph
from olmo2_export.summary.package import describe
from olmo2_export.summary.plan_text import plan_lines
from olmo2_export.summary.text import plain
from olmo2_export.verify.variant import measure_variant
from olmo2_export.verify.verify import format_reports
from olmo2_export.views.static_forms import stored_linears, stored_tensors
from olmo2_export.views.weight_checks import check_imported, in_stored_order, weight_checks
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from olmo2_export.weights.quantized.codes import Codes
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


SYMMETRIC = GPTQ | {"sym": True, "desc_act": False}
OUT = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def symmetric(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A symmetric GPTQ checkpoint, scales of o_proj in more bits than bfloat16 has; and its q4. Do not change them."""
    folder = tmp_path_factory.mktemp("symmetric")
    make_quantized(folder / "c", base, SYMMETRIC, gptq)
    stored = load_file(folder / "c" / "model.safetensors")
    scales = stored[OUT.replace("weight", "scales")]
    assert scales.dtype == torch.float16
    scales.view(torch.int16).bitwise_or_(3)  # the last of 11 bits
    save_file(stored, folder / "c" / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "quality_tokens", partial(variants.quality_tokens, most=256))
        export(open_checkpoint(str(folder / "c")), folder / "p", variants=["fp32", "q4"])
    return folder / "c", folder / "p"


@pytest.fixture(scope="module")
def with_int4(symmetric: tuple[Path, Path]) -> Path:
    """That package with the graph that TensorRT compiles in int4. Do not change it."""
    out = symmetric[1].parent / "trt"
    return with_trt_graph(symmetric[1], out, TrtOptions("int4", 256))


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
    graph = load_graph(tmp_path / "p" / entry.graph)
    matrices, ordered = stored_matrices(graph), in_stored_order(graph, checkpoint)
    for name, weight in wanted.items():
        assert np.array_equal(checkpoint.tensor(name).numpy(), weight), name
        assert torch.equal(matrices[name].dequantize(), ordered.tensor(name)), name
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
        "mlp.gate_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    ]


def test_the_order_of_down_proj_is_folded_and_gives_the_same_bits(
    ordered: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where adapters are added to gate, up and down, whose columns are in the checkpoint's order, nothing is folded."""
    monkeypatch.setattr(imported, "switchable_adapters", lambda _: ["one"])
    checkpoint = open_checkpoint(str(ordered[0]))
    export(checkpoint, tmp_path / "p", variants=["q4"])
    ids = [np.array([3, 8, 13, 18, 2, 7, 12])]
    logits = []
    for package, gathers in ((ordered[1], 3), (tmp_path / "p", 4)):
        for path in ("onnx/model_q4.onnx", "onnx/model_q4_shared.onnx"):
            names = [name for name in load_graph(package / path).graph.initializers if name.endswith(".order")]
            assert len(names) == gathers
        with open_runner(package, variant="q4", kv_cache="float32") as runner:
            logits.append(np.concatenate([runner.prefill(ids)[0].ravel(), runner.decode([5])[0].ravel()]))
    assert len(logits[0]) == 42
    assert np.array_equal(logits[0], logits[1])
    graph = load_graph(ordered[1] / "onnx" / "model_q4_shared.onnx")
    down = "model.layers.0.mlp.down_proj.weight"
    codes = checkpoint.codes(down)
    assert codes is not None
    assert folded_orders(graph).keys() == {down}
    assert np.array_equal(folded_orders(graph)[down], codes.order)
    assert not check_imported(stored_matrices(graph), checkpoint).passed  # not in the checkpoint's own order


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
    stored = in_stored_order(graph, checkpoint)
    assert check_imported(stored_matrices(graph), stored).passed
    bug(graph)
    assert not check_imported(stored_matrices(graph), stored).passed


def test_against_the_model_before_it_was_quantised_scales_are_compared_and_not_every_number(
    ordered: tuple[Path, Path], base: Path
) -> None:
    package = open_package(ordered[1])
    config = ModelConfig.from_json(base / "config.json")
    (check,) = weight_checks(package, package.variant("q4"), open_checkpoint(str(base)), config)
    assert check.name == "weights"


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


HELD: dict[str, tuple[dict[str, Any], Writer, dict[str, Any], int]] = {
    "gptq": (SYMMETRIC, gptq, {}, 32),
    "awq": (AWQ, awq, {"scales": torch.bfloat16}, 32),
    "groups of 64": (
        compressed("pack-quantized", 4, group=64, symmetric=True),
        pack_quantized,
        {"group": 64, "scales": torch.bfloat16},
        64,
    ),
    "a scale per row": (
        compressed("pack-quantized", 4, group=-1, symmetric=True),
        pack_quantized,
        {"group": -1, "scales": torch.bfloat16},
        64,
    ),
}


def in_q4(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, QuantizedMatrix]:
    """What a q4 stores of a checkpoint."""
    found = {}
    for name in names:
        codes = checkpoint.codes(name)
        assert codes is not None
        found[name] = in_blocks(codes, held_form(codes, Q4))
    return found


@pytest.mark.parametrize("case", HELD)
def test_int4_for_tensorrt_holds_the_codes_in_every_bit(base: Path, tmp_path: Path, case: str) -> None:
    config, write, fields, block = HELD[case]
    wanted = make_quantized(tmp_path / "c", base, config, write, **fields)
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    matrices = in_q4(checkpoint, wanted)
    shape = ModelConfig.from_json(base / "config.json")
    formats = {name: matrix.form for name, matrix in matrices.items()}
    weights = imported_static_weights(checkpoint, shape, "int4", formats, matrices)
    assert {form.block_size for form in weights.forms.values()} == {block}
    assert {tensor.nmse for tensor in weights.tensors().values()} == {0.0}
    for name, weight in wanted.items():
        assert np.array_equal(weights.linear(name).dequantize().numpy(), weight), name


def test_a_package_gives_its_codes_to_the_graph_for_tensorrt(symmetric: tuple[Path, Path], with_int4: Path) -> None:
    checkpoint, opened = open_checkpoint(str(symmetric[0])), open_package(with_int4)
    entry = opened.variant("trt_int4")
    config = ModelConfig.from_json(symmetric[0] / "config.json")
    assert entry.quantization is not None
    assert entry.quantization.recipe == "imported"
    assert entry.quantization.bits_per_weight == 4.5
    nmse = {name: tensor.nmse for name, tensor in entry.quantization.tensors.items()}
    assert 1e-7 < nmse.pop(OUT) < 257**-2
    assert len(nmse) == 6
    assert set(nmse.values()) == {0.0}
    graph = load_graph(with_int4 / entry.graph)
    linears = stored_linears(graph, config)
    assert linears.keys() == {OUT, *nmse}
    for name in nmse:
        assert torch.equal(linears[name].dequantize(), checkpoint.tensor(name)), name
    assert stored_tensors(graph)["lm_head.weight"].dtype == torch.bfloat16
    found = weight_checks(opened, entry, checkpoint, config)
    assert [check.name for check in found] == ["weights", "scales", "input scales", "imported weights"]
    assert all(check.passed for check in found)


def test_a_graph_for_tensorrt_is_predicted_to_the_byte(
    symmetric: tuple[Path, Path], ordered: tuple[Path, Path], with_int4: Path
) -> None:
    config = ModelConfig.from_json(symmetric[0] / "config.json")
    checkpoint, names = open_checkpoint(str(symmetric[0])), ["fp32", "q4"]
    found = engine_graph_bytes("int4", checkpoint, config, names, Options())
    assert found is not None
    assert found.data == (with_int4 / "trt" / "model_int4.onnx_data").stat().st_size
    assert engine_graph_bytes("int4", open_checkpoint(str(ordered[0])), config, names, Options()) is None


def test_scales_that_bfloat16_has_not_are_said(symmetric: tuple[Path, Path], tmp_path: Path, caplog: Any) -> None:
    with_trt_graph(symmetric[1], tmp_path / "p", TrtOptions("int4", 64))
    assert "the codes of 1 linears are the checkpoint's, and their scales are rounded to bfloat16: no weight" in (
        caplog.text
    )


def test_what_tensorrt_does_not_hold_is_refused_with_a_remedy(ordered: tuple[Path, Path]) -> None:
    opened = open_package(ordered[1])
    with pytest.raises(UsageError) as caught:
        check_trt_options(ordered[1], opened.manifest, TrtOptions("int4", 64))
    assert "(gptq, 4 bits, groups of 32, act-order): model.layers.0.mlp.down_proj.weight: zero points" in (
        str(caught.value)
    )
    assert str(caught.value).endswith("--recipe rtn or search or gptq quantises its float32 weights again")
    check_trt_options(ordered[1], opened.manifest, TrtOptions("int4", 64, recipe="search"))
    check_trt_options(ordered[1], opened.manifest, TrtOptions("bf16", 64))
    alone = dataclasses.replace(opened.manifest, variants={"fp32": opened.manifest.variants["fp32"]})
    with pytest.raises(UsageError, match="no variant q4 that has its codes; export it with --variant fp32 --variant"):
        check_trt_options(ordered[1], alone, TrtOptions("int4", 64))


@pytest.mark.parametrize(
    ("names", "form", "said"),
    [
        ("qkv", BlockFormat(4, 16, symmetric=True), "blocks of 16 in 64 columns, expected whole ones of 32, 64, 128"),
        ("qkv", BlockFormat(8, 64, symmetric=True), "codes of 8 bits, expected 4"),
        ("qk", Q4, r"v_proj\.weight is not in codes, and is multiplied together with .*q_proj"),
    ],
)
def test_formats_that_tensorrt_has_not_are_refused(base: Path, names: str, form: BlockFormat, said: str) -> None:
    config = ModelConfig.from_json(base / "config.json")
    formats = {f"model.layers.0.self_attn.{name}_proj.weight": form for name in names}
    with pytest.raises(UsageError, match=said):
        imported_forms(config, "int4", formats)


def test_act_order_and_negative_scales_are_no_codes_of_tensorrt(base: Path, tmp_path: Path) -> None:
    make_quantized(tmp_path / "c", base, GPTQ, gptq, act_order=True)
    matrix = in_q4(open_checkpoint(str(tmp_path / "c")), [Q])[Q]
    with pytest.raises(UsageError, match="act-order"):
        in_static_blocks(matrix, 32)
    with pytest.raises(UsageError, match=r"a scale of -0\.\d+, and TensorRT's are positive"):
        in_static_blocks(dataclasses.replace(matrix, order=None, scales=-matrix.scales), 32)


def one_scale_wrong(model: ir.Model) -> None:
    """By a tenth, which is less than a recipe's scales may be off."""
    change(model, f"{UP}.scales", scaled((3, 0), 1.1))


def test_locate_names_the_matrix_with_one_wrong_scale(symmetric: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(symmetric[0]))
    good = locate(symmetric[1], checkpoint, "q4")
    assert good.first is None, format_location(good)
    bad = rebuilt(symmetric[1], tmp_path / "p", one_scale_wrong, open_package(symmetric[1]).variant("q4").graph)
    found = locate(bad, checkpoint, "q4")
    assert found.first is not None
    assert (found.first.name, found.first.operation) == (UP, "stored weight (imported weights)")
    assert "30 numbers are not what the checkpoint's codes say, the first in row 3, column 0" in found.explanation


def test_locate_names_the_matrix_of_a_graph_for_tensorrt(
    symmetric: tuple[Path, Path], with_int4: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(symmetric[0]))
    good = locate(with_int4, checkpoint, "trt_int4")
    assert good.first is None, format_location(good)

    def codes_off(model: ir.Model) -> None:
        change(model, "model.layers.0.mlp.down_proj.weight.codes", lambda codes: np.roll(codes, 1, axis=0))

    bad = open_package(rebuilt_trt(with_int4, tmp_path / "p", codes_off, "int4"))
    config = ModelConfig.from_json(symmetric[0] / "config.json")
    found = weight_check(bad, bad.variant("trt_int4"), checkpoint, config)
    assert found is not None
    assert found[0].name == "model.layers.0.mlp.down_proj.weight"


def test_q4_of_8_bits_is_refused_and_made_when_asked_for(
    base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make_quantized(tmp_path / "c", base, BYTES, int_quantized, bits=8, group=-1)
    checkpoint = open_checkpoint(str(tmp_path / "c"))
    with pytest.raises(UsageError) as caught:
        export(checkpoint, tmp_path / "p", variants=["q4"])
    assert "its weights have 8 bits; q8 and fp32 hold them exactly, and --requantize makes q4" in str(caught.value)
    refused(request, "weights of 8 bits in `q4`", str(caught.value).replace(" of c ", " of MODEL "))
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
        "an estimate: of the codes that it takes over, zero points and act-order are in the files alone",
    )
    assert variant.bits_per_weight == 5.0  # blocks of 32, as the headers say, and q4's own would be of 128


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
    codes = np.array([[0, 8, 15, 7] * 8], np.uint8)
    stored = Codes(4, codes, np.array([[0.5]], np.float32), np.array([[8]], np.uint8), np.zeros(32, np.int64))
    form = held_form(stored, Q8)
    assert form.symmetric
    matrix = in_blocks(stored, form)
    assert matrix.zero_points is None
    assert torch.equal(matrix.dequantize(), torch.from_numpy(stored.dequantize()))
