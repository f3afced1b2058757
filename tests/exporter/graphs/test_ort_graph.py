"""The graphs for onnxruntime: each pass alone and all together, what they must leave alone, and how they are fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.checkpoints import make_checkpoint

from olmo2_export.architecture import operations
from olmo2_export.catalog import BlockFormat
from olmo2_export.config import ModelConfig
from olmo2_export.fuse import ONNXRUNTIME, apply, op_counts
from olmo2_export.fuse.gather_block_quantized import gather_block_quantized
from olmo2_export.fuse.group_query_attention import group_query_attention
from olmo2_export.fuse.matmul_integer import matmul_integer
from olmo2_export.fuse.matmul_nbits import matmul_nbits
from olmo2_export.fuse.quantized_kv_cache import quantized_kv_cache
from olmo2_export.fuse.quick_gelu import quick_gelu
from olmo2_export.graphs.files import attach_weights, save_graph
from olmo2_export.graphs.shared import (
    decode_graph,
    prefill_graph,
    shared_graph,
    shared_inputs,
    shared_outputs,
)
from olmo2_export.graphs.stored_blocks import stored_matrices
from olmo2_export.graphs.trace import trace
from olmo2_export.quantize.recipes import quantize
from olmo2_export.truth.reference import int8_blocks, open_reference
from olmo2_export.views.shared_forms import exact_form, stored_int8
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import FailedError, FusionError
from runtimes.manifest import KVCacheSpec, Variant
from runtimes.ort.open import open_ort
from runtimes.ort.shared import SharedRunner

NMSE = 1e-11  # a pass changes the order of float32 operations, nothing else
LENGTHS = (23, 11, 1)

# Shapes with all their sizes different: grouped heads, one KV head each, and a head size that is no power of two.
SHAPES = {
    "grouped": {},
    "plain": {"num_key_value_heads": 6},
    "biased": {"attention_bias": True, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
}


@dataclasses.dataclass
class Case:
    folder: Path
    config: ModelConfig
    traced: ir.Model
    sequences: list[np.ndarray]
    exact: list[np.ndarray]

    def cache(self) -> KVCacheSpec:
        c = self.config
        return KVCacheSpec(
            "shared", "float32", c.num_hidden_layers, c.num_key_value_heads, c.head_dim, c.max_position_embeddings
        )

    def open(self, model: ir.Model, folder: Path, name: str = "model", threads: int | None = 1) -> SharedRunner:
        """Write a graph of the shared form and open it."""
        attach_weights(model, open_checkpoint(str(self.folder)), self.config)
        save_graph(model, folder / f"{name}.onnx")
        cache = self.cache()
        variant = Variant(
            name,
            "fp32",
            f"{name}.onnx",
            (),
            23,
            shared_inputs(self.config.spec, cache),
            shared_outputs(self.config.spec, cache),
            cache,
            {},
        )
        runner = open_ort(folder, variant, self.config.spec, threads)
        assert isinstance(runner, SharedRunner)
        return runner


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / request.param, **SHAPES[request.param])
    config = ModelConfig.from_json(folder / "config.json")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, config.vocab_size, n) for n in LENGTHS]
    with open_reference(open_checkpoint(str(folder)), "fp64") as reference:
        exact = reference.logits(sequences)
    return Case(folder, config, trace(config), sequences, exact)


def nmse(got: np.ndarray, exact: np.ndarray) -> float:
    assert got.shape == exact.shape
    return float(np.mean((got - exact) ** 2) / exact.var())


def run_concat(case: Case, model: ir.Model, folder: Path) -> np.ndarray:
    """Run a graph that still has the portable inputs; return all logits of the first sequence."""
    import onnxruntime as ort

    attach_weights(model, open_checkpoint(str(case.folder)), case.config)
    save_graph(model, folder / "model.onnx")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = case.sequences[0][None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    known = {value.name for value in session.get_inputs()}
    logits: np.ndarray = session.run(["logits"], {k: v for k, v in feeds.items() if k in known})[0][0]
    return logits


@pytest.mark.parametrize("a_pass", [group_query_attention, quick_gelu])
def test_each_pass_alone(case: Case, a_pass: Callable[[ir.Model], int], tmp_path: Path) -> None:
    model = case.traced.clone()
    assert a_pass(model) == case.config.num_hidden_layers
    assert a_pass(model) == 0  # idempotent
    assert nmse(run_concat(case, model, tmp_path), case.exact[0]) <= NMSE


def test_all_passes_together_every_way_of_feeding(case: Case, tmp_path: Path) -> None:
    """Prefill, decode, chunks; alone and ragged; the shared buffer growing underneath."""
    model = shared_graph(case.traced, operations(case.config))
    assert not any(apply(model, ONNXRUNTIME).values())
    assert op_counts(model)["com.microsoft::GroupQueryAttention"] == case.config.num_hidden_layers
    with case.open(model, tmp_path) as runner:
        for count in (1, 3):
            sequences, exact = case.sequences[:count], case.exact[:count]
            whole = runner.prefill(sequences, all_positions=True)
            runner.reset()
            last = runner.prefill(sequences)
            for got, wanted in zip(whole, exact, strict=True):
                assert nmse(got, wanted) <= NMSE
            for got, wanted in zip(last, exact, strict=True):
                assert nmse(got[0], wanted[-1]) <= NMSE
            runner.reset()
        for chunks in ((1, 22), (22, 1), (7, 9, 7)):
            parts = np.split(case.sequences[0], np.cumsum(chunks)[:-1])
            got = np.concatenate([runner.prefill([part], all_positions=True)[0] for part in parts])
            assert nmse(got, case.exact[0]) <= NMSE
            runner.reset()
        first = runner.prefill([s[:1] for s in case.sequences])
        steps = [np.concatenate(first)]
        for n in range(1, LENGTHS[0]):
            steps.append(runner.decode([s[min(n, len(s) - 1)] for s in case.sequences]))
        assert nmse(np.stack(steps)[:, 0], case.exact[0]) <= NMSE
        assert nmse(np.stack(steps)[: LENGTHS[1], 1], case.exact[1]) <= NMSE


def test_the_traced_graph_is_left_alone(case: Case) -> None:
    before = op_counts(case.traced)
    shared_graph(case.traced, operations(case.config))
    assert op_counts(case.traced) == before


def broken_rotation(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "RotaryEmbedding")
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def broken_positions(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "RotaryEmbedding")
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    node.replace_input_with(3, ids)


def softcapped(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def cache_read_elsewhere(model: ir.Model) -> None:
    past = next(v for v in model.graph.inputs if str(v.name) == "past_key_values.0.key")
    extra = ir.node("Shape", [past])
    model.graph.insert_before(next(iter(model.graph)), extra)
    model.graph.outputs.append(extra.outputs[0])


def other_mask(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "Attention")
    negated = ir.node("Not", [node.inputs[3]])
    model.graph.insert_before(node, negated)
    node.replace_input_with(3, negated.outputs[0])


@pytest.mark.parametrize("spoil", [broken_rotation, broken_positions, softcapped, cache_read_elsewhere, other_mask])
def test_group_query_attention_must_not_match(case: Case, spoil: Callable[[ir.Model], None]) -> None:
    model = case.traced.clone()
    spoil(model)
    assert group_query_attention(model) == case.config.num_hidden_layers - 1
    spoiled = case.traced.clone()
    spoil(spoiled)
    with pytest.raises(FusionError, match="group_query_attention: expected 3, applied 2"):
        shared_graph(spoiled, operations(case.config))


def test_quick_gelu_must_not_match(case: Case) -> None:
    """A sigmoid of something else, or one that is read twice."""
    model = case.traced.clone()
    sigmoids = [n for n in model.graph if n.op_type == "Sigmoid"]
    extra = ir.node("Neg", [sigmoids[0].outputs[0]])
    model.graph.insert_after(sigmoids[0], extra)
    model.graph.outputs.append(extra.outputs[0])
    up = next(n for n in model.graph if n.op_type == "MatMul" and "1.mlp.up_proj" in str(n.inputs[1]))
    sigmoids[1].replace_input_with(0, up.outputs[0])
    assert quick_gelu(model) == case.config.num_hidden_layers - 2


@pytest.fixture(scope="module")
def four_bits(case: Case) -> tuple[Case, ir.Model]:
    return case, shared_graph(case.traced, operations(case.config))


FORM = BlockFormat(4, 32, symmetric=False)


def test_quantising_passes_must_not_match(four_bits: tuple[Case, ir.Model]) -> None:
    """Weights that are not named, are shared, or are no constants; a second application."""
    _, shared = four_bits
    name = "model.layers.1.mlp.up_proj.weight"
    for rewrite, key in ((matmul_nbits, {name: FORM}), (matmul_integer, {name})):
        model = shared.clone()
        assert rewrite(model, {} if isinstance(key, dict) else set()) == 0  # type: ignore[operator]
        assert rewrite(model, key) == 1  # type: ignore[operator]
        assert rewrite(model, key) == 0  # type: ignore[operator]
        model = shared.clone()
        gate = next(n for n in model.graph if n.op_type == "MatMul" and "1.mlp.gate_proj" in str(n.inputs[1]))
        gate.replace_input_with(1, model.graph.initializers[name])
        assert rewrite(model, key) == 0  # type: ignore[operator]
    model = shared.clone()
    gather = next(n for n in model.graph if n.op_type == "Gather")
    assert gather_block_quantized(model, {"other": FORM}) == 0
    gather.replace_input_with(1, ir.node("Neg", [gather.inputs[1]]).outputs[0])
    assert gather_block_quantized(model, {"model.embed_tokens.weight": FORM}) == 0
    assert quantized_kv_cache(shared.clone(), {}, 8) == 0


FORMS = [BlockFormat(4, 32, True), BlockFormat(4, 128, False), BlockFormat(8, 64, False)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("level", [0, 4])
def test_the_decode_graph_computes_with_the_dequantised_weights(
    case: Case, form: BlockFormat, level: int, tmp_path: Path
) -> None:
    """Kernel parity. Level 0 is exact. Level 4 rounds the inputs of each product block by block: as PyTorch does here,
    until float32 noise tips one code over; then all later roundings differ, and only the size of the error compares."""
    checkpoint = open_checkpoint(str(case.folder))
    weights = quantize(checkpoint, case.config, "rtn", form=form)
    dequantized = {name: weights.matrix(name).dequantize() for name in weights.formats}
    blocks = {n: int8_blocks(form.block_size) for n in dequantized if n != "model.embed_tokens.weight"}
    with open_reference(checkpoint, "fp64", dequantized) as reference:
        exact = reference.logits(case.sequences)
    with open_reference(checkpoint, "fp64", dequantized, blocks) as reference:
        rounded = reference.logits(case.sequences)
    graph, _ = decode_graph(shared_graph(case.traced, operations(case.config)), weights, operations(case.config))
    with case.open(exact_form(graph) if level == 0 else graph, tmp_path) as runner:
        logits = runner.prefill(case.sequences, all_positions=True)
    if level == 0:
        assert all(nmse(got, wanted) <= 1e-11 for got, wanted in zip(logits, exact, strict=True))
    else:
        got, wanted, own = (np.concatenate(rows) for rows in (logits, exact, rounded))
        assert nmse(got, wanted) <= 1.5 * nmse(own, wanted)


def test_the_int8_graph_computes_with_its_int8_weights(case: Case, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(case.folder))
    weights = quantize(checkpoint, case.config, "search", form=BlockFormat(8, 32, False))
    graph, counts = prefill_graph(shared_graph(case.traced, operations(case.config)), weights, operations(case.config))
    assert counts["MatMulInteger"] == 7 * case.config.num_hidden_layers
    with case.open(graph, tmp_path) as runner:
        logits = runner.prefill(case.sequences, all_positions=True)
    written = ir.load(tmp_path / "model.onnx")
    int8 = dict(stored_int8(written))
    blocks = {name: matrix.dequantize() for name, matrix in stored_matrices(written).items()}
    assert {*int8, *blocks} == set(weights.formats)
    rounding = dict.fromkeys(int8, int8_blocks(0)) | {"lm_head.weight": int8_blocks(32)}
    with open_reference(checkpoint, "fp64", blocks | int8, rounding) as reference:
        exact = reference.logits(case.sequences)
    for got, wanted, original in zip(logits, exact, case.exact, strict=True):
        assert nmse(got, wanted) <= 5e-5
        assert nmse(got, original) <= 5e-3
    with case.open(exact_form(graph), tmp_path) as runner:
        logits = runner.prefill(case.sequences, all_positions=True)
    with open_reference(checkpoint, "fp64", blocks | int8) as reference:
        exact = reference.logits(case.sequences)
    assert all(nmse(got, wanted) <= 1e-11 for got, wanted in zip(logits, exact, strict=True))


def test_a_product_whose_input_is_not_rounded_by_row_has_no_exact_form(four_bits: tuple[Case, ir.Model]) -> None:
    case, shared = four_bits
    weights = quantize(open_checkpoint(str(case.folder)), case.config, "rtn", form=FORM)
    graph, _ = prefill_graph(shared, weights, operations(case.config))
    product = next(n for n in graph.graph if n.op_type == "MatMulInteger")
    product.replace_input_with(0, next(iter(graph.graph.inputs)))
    with pytest.raises(FusionError, match="its input is not rounded by row: no Reshape"):
        exact_form(graph)


def rounded_by(model: ir.Model, x: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Run a product with W, whose parts make the identity: what comes out is x as the kernel rounds it."""
    for part, array in parts.items():
        model.graph.initializers[f"W.{part}"].const_value = ir.tensor(array, name=f"W.{part}")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("block", [0, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 200])
def test_inputs_halfway_between_two_codes_are_rounded_as_pytorch_does(block: int, rows: int) -> None:
    """What a quantised embedding gives, whole numbers times a scale, is halfway in one code of thirty."""
    columns = 96
    generator = np.random.default_rng(0)
    whole = generator.integers(-8, 9, (1, rows, columns))
    x = (whole * generator.uniform(0.01, 0.2, (1, rows, 1))).astype(np.float32)
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("x", [1, rows, columns]), ("W", [columns, columns]), ("y", [1, rows, columns]))
    ]
    product = ir.node("MatMul", values[:2], outputs=values[2:])
    graph = ir.Graph(values[:1], values[2:], nodes=[product], initializers=[values[1]], opset_imports={"": 23})
    model = ir.Model(graph, ir_version=10)
    if block:
        form = BlockFormat(8, block, True)
        assert matmul_nbits(model, {"W": form}) == 1
        one = np.full((columns, form.blocks(columns) * block), 128, np.uint8)
        one[np.arange(columns), np.arange(columns)] = 129
        scales = np.ones((columns, form.blocks(columns)), np.float32)
        parts = {"packed": one.reshape(columns, -1, block), "scales": scales}
    else:
        assert matmul_integer(model, {"W"}) == 1
        parts = {"int8": np.eye(columns, dtype=np.int8), "channel_scales": np.ones(columns, np.float32)}
    rounded = rounded_by(model, x, parts)
    size = np.abs(x).max(-1, keepdims=True)
    for dtype in (torch.float32, torch.float64):
        expected = int8_blocks(block)(torch.from_numpy(x).to(dtype)).numpy()
        assert (np.abs(rounded - expected) < 1e-3 * size).all()  # a code is 8e-3


def test_an_id_beyond_the_vocabulary_is_still_an_error(four_bits: tuple[Case, ir.Model], tmp_path: Path) -> None:
    """GatherBlockQuantized alone would give zeros; asked of the graph itself, behind the runner's own check."""
    case, shared = four_bits
    weights = quantize(open_checkpoint(str(case.folder)), case.config, "rtn", form=FORM)
    graph, _ = decode_graph(shared, weights, operations(case.config))
    with case.open(graph, tmp_path) as runner:
        runner.prefill([[case.config.vocab_size - 1]])
        with pytest.raises(FailedError, match="indices element out of data bounds"):
            runner._call(0, 1, np.array([[case.config.vocab_size]]), np.array([2]), keep=1)
