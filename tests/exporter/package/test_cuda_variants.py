"""bf16, fp16 and q4f16: what is in their graphs, what they compute on the CPU, and what their verification catches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import assert_full_matrix, large
from support.checkpoints import make_checkpoint
from support.rebuilt_packages import rebuilt

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.fuse import DEVICE, check_op_counts, op_counts
from olmo2_export.fuse.float32_lengths import float32_lengths
from olmo2_export.fuse.grouped_top_candidates import grouped_top_candidates
from olmo2_export.fuse.host_logit_count import host_logit_count
from olmo2_export.graphs.device import device_graph
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.shared import shared_graph
from olmo2_export.graphs.stored_blocks import stored_matrices
from olmo2_export.graphs.trace import trace
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.truth.reference import open_reference
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import BackendError, FailedError, UsageError
from runtimes.package import open_package

pytestmark = pytest.mark.usefixtures("remembered")

LAYERS, VOCAB = 3, 131
CAPACITY = 64
SMALL = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16, "q4f16": ir.DataType.FLOAT16}


OPTIONS = Options(prefill_graph=False, kv_caches=("float32",))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint


@pytest.fixture(scope="module")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package") / "package"
    export(open_checkpoint(str(checkpoint)), out, variants=("q4", *SMALL), options=OPTIONS)
    return out


@pytest.mark.parametrize("name", SMALL)
def test_the_graph_has_one_kernel_per_norm_and_no_float32_between(package: Path, name: str) -> None:
    model = ir.load(package / f"onnx/model_{name}.onnx")
    quantized = name == "q4f16"
    products = {"com.microsoft::MatMulNBits": 7 * LAYERS + 1} if quantized else {"MatMul": 4 * LAYERS + 1}
    expected = {
        "RMSNormalization": 4 * LAYERS + 1,
        "com.microsoft::GroupQueryAttention": LAYERS,
        "Sigmoid": LAYERS,
        "com.microsoft::QuickGelu": 0,  # onnxruntime finds it, and TensorRT for RTX has none
        "Split": 0 if quantized else 2 * LAYERS,
        "Add": 2 * LAYERS,
        "Cast": 5,  # the mask and its sum, to and from float32 and to int32; the mask's length; the logits
        "TopK": 1,
        "Neg": 0,
        "Reshape": 0,
    }
    check_op_counts(model, products | expected)
    floats = {value.dtype for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    floats = {dtype for dtype in floats if dtype is not None and dtype.is_floating_point()}
    assert floats == {SMALL[name], ir.DataType.FLOAT}
    in_float32 = [n.op_type for n in model.graph if any(v.dtype == ir.DataType.FLOAT for v in n.outputs)]
    assert in_float32 == ["Cast", "ReduceSum", "Cast", "TopK"]  # the mask; the logits
    weights = [v.dtype for v in model.graph.initializers.values() if v.dtype is not None]
    assert {dtype for dtype in weights if dtype.is_floating_point()} == {SMALL[name]}


@pytest.mark.parametrize("name", SMALL)
def test_the_manifest_says_what_the_graph_has(package: Path, name: str) -> None:
    names = {
        ir.DataType.FLOAT: "float32",
        ir.DataType.INT64: "int64",
        ir.DataType.FLOAT16: "float16",
        ir.DataType.BFLOAT16: "bfloat16",
    }
    variant = open_package(package).manifest.variants[name]
    model = ir.load(package / variant.graph)
    for specs, values in ((variant.inputs, model.graph.inputs), (variant.outputs, model.graph.outputs)):
        assert {spec.name: spec.dtype for spec in specs} == {str(v.name): names[v.dtype] for v in values if v.dtype}
    assert [spec.name for spec in variant.outputs[:3]] == ["logits", "top_ids", "top_logits"]
    assert variant.top_k == 1
    assert variant.kv_cache.form == "shared"


def test_q4f16_has_the_codes_of_q4_and_its_scales_rounded(package: Path) -> None:
    ours = stored_matrices(ir.load(package / "onnx/model_q4f16.onnx"))
    theirs = stored_matrices(ir.load(package / "onnx/model_q4_shared.onnx"))
    assert len(ours) == 7 * LAYERS + 1
    assert theirs.keys() - ours.keys() == {"model.embed_tokens.weight"}
    for name, matrix in ours.items():
        assert np.array_equal(matrix.packed, theirs[name].packed)
        assert matrix.scales.dtype == np.float16
        assert np.array_equal(matrix.scales, theirs[name].scales.astype(np.float16))
    quantization = open_package(package).manifest.variants["q4f16"].quantization
    assert quantization is not None
    stored = sum(part.nbytes for m in ours.values() for part in (m.packed, m.scales, m.zero_points) if part is not None)
    weights = sum(m.rows * m.columns for m in ours.values())
    assert quantization.bits_per_weight == pytest.approx(8 * stored / weights, rel=1e-12)


@pytest.mark.usefixtures("little_text")
def test_every_variant_is_verified_on_the_cpu(package: Path, checkpoint: Path) -> None:
    reports = verify(package, open_checkpoint(str(checkpoint)), variants=list(SMALL), longest=CAPACITY)
    by_name = {report.variant: report for report in reports}
    for name, report in by_name.items():
        assert_full_matrix(report)
        assert all(case.passed for case in report.cases), name
        assert report.greedy.passed
        assert max(case.error_ratio for case in large(report)) < 1.3
    assert [check.name for check in by_name["q4f16"].checks] == ["weights", "quality"]
    assert by_name["q4f16"].checks[0].passed


def ignore_a_q_norm(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    norm = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert norm is not None
    node.replace_input_with(0, norm.inputs[0])


def swap_gate_and_up(model: ir.Model) -> None:
    split = [n for n in model.graph if n.op_type == "Split" and len(n.outputs) == 2][1]
    gate, up = split.outputs
    users = [(use.node, use.idx) for use in up.uses()], [(use.node, use.idx) for use in gate.uses()]
    for value, uses in zip((gate, up), users, strict=True):
        for node, index in uses:
            node.replace_input_with(index, value)


def shift_the_lengths(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "Sub" and n.outputs[0].name == "last_slots")
    cast = next(n for n in model.graph if n.outputs[0].name == "seqlens_k")
    cast.replace_input_with(0, node.inputs[0])


@pytest.mark.usefixtures("little_text", "short_rows")
@pytest.mark.parametrize(
    ("name", "bug"),
    [("bf16", ignore_a_q_norm), ("bf16", swap_gate_and_up), ("bf16", shift_the_lengths), ("fp16", ignore_a_q_norm)],
)
def test_a_bug_in_the_graph_fails(
    package: Path, checkpoint: Path, tmp_path: Path, name: str, bug: Callable[[ir.Model], None]
) -> None:
    broken = rebuilt(package, tmp_path / "broken", bug, f"onnx/model_{name}.onnx")
    (report,) = verify(broken, open_checkpoint(str(checkpoint)), variants=[name], longest=CAPACITY)
    assert not report.passed


def test_candidates_are_those_of_the_logits(package: Path) -> None:
    for name in ("fp16", "q4f16"):
        with open_runner(package, variant=name, threads=1) as runner:
            assert runner.top_k == 1
            runner.prefill([[1, 2, 3, 4], [7, 8]])
            ids, values = runner.decode_top([5, 9])
            runner.truncate([4, 2])
            logits = runner.decode([5, 9])
            assert ids.tolist() == logits.argmax(axis=1)[:, None].tolist()
            assert values.tolist() == logits.max(axis=1)[:, None].tolist()


def top_graph(vocab_size: int, k: int, group: int) -> ir.Model:
    """A graph that gives its input back as logits, and the candidates."""
    shape = ir.Shape(["batch_size", "num_logits", vocab_size])
    source = ir.Value(name="source", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    node = ir.node("Identity", [source], outputs=[logits])
    model = ir.Model(ir.Graph([source], [logits], nodes=[node], opset_imports={"": 23}, name="top"), ir_version=10)
    assert grouped_top_candidates(model, k, group) == 1
    assert grouped_top_candidates(model, k, group) == 0  # idempotent
    return model


@pytest.mark.parametrize(
    ("vocab_size", "k", "group", "stages"), [(131, 1, 2048, 1), (132, 1, 44, 2), (132, 3, 40, 2), (131, 2, 64, 1)]
)
def test_candidates_in_groups(vocab_size: int, k: int, group: int, stages: int) -> None:
    """Ties too: the lower id is first, also across groups. A prime vocabulary cannot be cut."""
    model = top_graph(vocab_size, k, group)
    assert op_counts(model)["TopK"] == stages
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    source = np.random.default_rng(0).integers(0, 9, (2, 5, vocab_size)).astype(np.float32)
    ids, values = session.run(["top_ids", "top_logits"], {"source": source})
    wanted = np.argsort(-source, axis=-1, kind="stable")[..., :k]
    assert ids.tolist() == wanted.tolist()
    assert values.tolist() == np.take_along_axis(source, wanted, axis=-1).tolist()


def test_passes_must_not_match_what_is_something_else(checkpoint: Path) -> None:
    config = ModelConfig.from_json(checkpoint / "config.json")
    shared = shared_graph(trace(config), operations(config), DEVICE)
    for rewrite in (float32_lengths, host_logit_count):
        model = shared.clone()
        assert rewrite(model) == 1
        assert rewrite(model) == 0
    model = shared.clone()
    start = next(n for n in model.graph if n.op_type == "Neg")
    start.replace_input_with(0, ir.node("Abs", [start.inputs[0]]).outputs[0])
    assert host_logit_count(model) == 0
    model = shared.clone()
    total = next(n for n in model.graph if n.op_type == "ReduceSum")
    total.replace_input_with(0, ir.node("Abs", [total.inputs[0]]).outputs[0])
    assert float32_lengths(model) == 0


def test_one_shared_graph_serves_every_precision(checkpoint: Path, tmp_path: Path) -> None:
    """A clone shares its types with the original: giving one a precision must not change the other."""
    source, config = open_checkpoint(str(checkpoint)), ModelConfig.from_json(checkpoint / "config.json")
    shared = shared_graph(trace(config), operations(config), DEVICE)
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT):
        model, rounding, _ = device_graph(shared, source, config, dtype)
        save_graph(model, tmp_path / f"{dtype.name}.onnx")
        rounding.check()
        assert {v.dtype for v in model.graph.inputs if str(v.name).startswith("past")} == {dtype}
    assert {v.dtype for v in shared.graph.inputs if str(v.name).startswith("past")} == {ir.DataType.FLOAT}


def test_unrounded_it_is_the_model_itself(checkpoint: Path, tmp_path: Path) -> None:
    source, config = open_checkpoint(str(checkpoint)), ModelConfig.from_json(checkpoint / "config.json")
    model, _, _ = device_graph(
        shared_graph(trace(config), operations(config), DEVICE), source, config, ir.DataType.FLOAT
    )
    save_graph(model, tmp_path / "model.onnx")
    ids = np.random.default_rng(1).integers(0, VOCAB, 23)
    with open_reference(source, "fp64") as reference:
        (exact,) = reference.logits([ids])
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, 23), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    for keep in (0, 1, 7, 23):
        (logits,) = session.run(["logits"], feeds | {"num_logits_to_keep": np.array(keep)})
        wanted = exact[-keep:]
        assert logits[0].shape == wanted.shape
        assert np.mean((logits[0] - wanted) ** 2) <= 1e-11 * exact.var()


def test_two_exports_are_byte_identical(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    export(
        open_checkpoint(str(checkpoint)),
        tmp_path / "again",
        variants=("q4", *SMALL),
        options=OPTIONS,
    )
    assert open_package(tmp_path / "again").manifest == open_package(package).manifest


def test_weights_beyond_float16_are_refused_and_bf16_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.tensor(7e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedError, match=r"up_proj.*use bf16"):
        export(open_checkpoint(str(folder)), tmp_path / "out", variants=("fp16",))
    assert not (tmp_path / "out").exists()
    export(open_checkpoint(str(folder)), tmp_path / "out", variants=("bf16",))


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (("bf16",), Options(recipe="gptq"), "are for q4, q8 and q4f16"),
        (("q4f16",), Options(kv_caches=("int8",)), "are for q4 and q8"),
        (("q4f16", "bf16"), Options(prefill_graph=False), "are for q4 and q8"),
    ],
)
def test_options_that_a_variant_has_no_use_for(
    checkpoint: Path, tmp_path: Path, variants: tuple[str, ...], options: Options, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(open_checkpoint(str(checkpoint)), tmp_path / "out", variants=variants, options=options)


def test_a_variant_that_the_device_does_not_run_is_refused_with_what_does(package: Path) -> None:
    with pytest.raises(BackendError, match="bfloat16 KV cache does not run on device cpu; it runs on cuda, nv-rtx"):
        open_runner(package, variant="bf16")
    with pytest.raises(BackendError, match="float32 KV cache does not run on device cuda; it runs on cpu, and bf16"):
        open_runner(package, variant="q4", device="cuda")


def test_the_config_for_genai_names_the_provider(package: Path, checkpoint: Path, tmp_path: Path) -> None:
    def decoder(folder: Path) -> dict[str, object]:
        found: dict[str, object] = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        return found

    export(open_checkpoint(str(checkpoint)), tmp_path / "bf16", variants=("bf16",))
    assert decoder(tmp_path / "bf16")["session_options"] == {"provider_options": [{"cuda": {}}]}
    assert decoder(package)["session_options"] == {"provider_options": []}
