"""The static-cache graph: what it computes (onnxruntime against transformers), its precisions, its passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.checkpoints import make_checkpoint
from transformers import Olmo2ForCausalLM

from olmo2_export.catalog import precisions
from olmo2_export.config import ModelConfig
from olmo2_export.fuse import TENSORRT, apply, op_counts
from olmo2_export.fuse.drop_unused import drop_unused
from olmo2_export.fuse.float32_logits import float32_logits
from olmo2_export.fuse.float32_norm import float32_norm
from olmo2_export.fuse.float32_rotary import float32_rotary
from olmo2_export.fuse.gather_logit_row import gather_logit_row
from olmo2_export.fuse.plain_reshape import plain_reshape
from olmo2_export.fuse.set_cache_length import set_cache_length
from olmo2_export.fuse.set_precision import WeightRounding, set_precision
from olmo2_export.fuse.static_cache import static_cache
from olmo2_export.fuse.top_candidates import top_candidates
from olmo2_export.fuse.trt_attention import DOMAIN, NAME, trt_attention_function
from olmo2_export.fuse.write_index_positions import write_index_positions
from olmo2_export.graphs.files import attach_weights, save_graph
from olmo2_export.graphs.static import load_static_graph, static_graph
from olmo2_export.graphs.trace import trace
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import FailedError, FusionError
from runtimes.manifest import Precision
from runtimes.package import open_package

# max abs difference of logits of order 3 from transformers' float32. Both add the same few hundred products in float32,
# in another order; measured up to 6e-6. A wrong mask or position gives more than 1e-2.
FP32_TOLERANCE = 1e-4
# RMS error over transformers' own in float16, both from float32: measured 0.60 to 0.74, as the graph rounds q and k
# once instead of twice. It says nothing of a GPU: onnxruntime's CPU kernels compute float16 in float32, node by node.
FP16_RATIO = 1.0

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1, "num_hidden_layers": 1},
    "bias": {"attention_bias": True},
    "odd": {"hidden_size": 70, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 33,
            "vocab_size": 37, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 1},
}  # fmt: skip


class StaticRunner:
    """Calls a static-cache graph on onnxruntime, and feeds each present back as the next past."""

    def __init__(self, graph: Path, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # each TensorScatter warns that it copies, as here it must
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.caches = {
            i.name: np.zeros([batch, *i.shape[1:]], dtypes[i.type])
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def __call__(self, ids: np.ndarray, write: Sequence[int], last: Sequence[int]) -> np.ndarray:
        feeds = {
            "input_ids": ids.astype(np.int64),
            "write_indices": np.array(write, np.int64),
            "logit_index": np.array(last, np.int64)[:, None],
            **self.caches,
        }
        logits, self.top_ids, self.top_logits, *presents = self.session.run(None, feeds)
        self.caches = dict(zip(self.caches, presents, strict=True))
        return np.asarray(logits)


@pytest.fixture(scope="module")
def config(tiny_package: Path) -> ModelConfig:
    return ModelConfig.from_json(tiny_package / "config.json")


@pytest.fixture
def portable(tiny_package: Path) -> ir.Model:
    return ir.load(tiny_package / "onnx" / "model.onnx")


def write_graph(package: Path, precision: Precision, capacity: int, folder: Path, top_k: int = 1) -> Path:
    graph, rounding = load_static_graph(package, open_package(package).manifest, precision, capacity, top_k)
    path = folder / f"model_{precision}.onnx"
    save_graph(graph, path)
    rounding.check()
    return path


def write_from_trace(checkpoint: Path, capacity: int, folder: Path) -> Path:
    config = ModelConfig.from_json(checkpoint / "config.json")
    model = trace(config)
    attach_weights(model, open_checkpoint(str(checkpoint)), config)
    graph, _ = static_graph(model, config, "fp32", capacity)
    save_graph(graph, folder / "model_fp32.onnx")
    return folder / "model_fp32.onnx"


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[..., Any]]:
    """A float32 graph with a cache of 13 tokens, and transformers' logits [B, S, V] for the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "checkpoint", **SHAPES[request.param])
    return write_from_trace(checkpoint, 13, folder), reference(checkpoint, torch.float32)


def reference(checkpoint: Path, dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    model = Olmo2ForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.float().numpy()

    return logits


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 37, (batch, length))


def test_prefill_gives_the_logits_of_the_wanted_row(case: tuple[Path, Any]) -> None:
    graph, expected = case
    ids = tokens(2, 13)  # exactly the cache
    last = [12, 4]
    logits = StaticRunner(graph, 2)(ids, [0, 0], last)
    assert np.abs(logits - expected(ids)[[0, 1], last]).max() <= FP32_TOLERANCE


def test_token_by_token_equals_the_full_forward(case: tuple[Path, Any]) -> None:
    graph, expected = case
    ids = tokens(2, 13)
    runner = StaticRunner(graph, 2)
    steps = [runner(ids[:, i : i + 1], [i, i], [0, 0]) for i in range(13)]
    assert np.abs(np.stack(steps, axis=1) - expected(ids)).max() <= FP32_TOLERANCE


def test_chunked_prefill_equals_the_full_forward(case: tuple[Path, Any]) -> None:
    graph, expected = case
    ids = tokens(1, 13)
    runner = StaticRunner(graph, 1)
    full = expected(ids)
    for start, end in ((0, 3), (3, 8), (8, 9), (9, 13)):
        logits = runner(ids[:, start:end], [start], [end - start - 1])
        assert np.abs(logits - full[:, end - 1]).max() <= FP32_TOLERANCE


def test_ragged_batch_equals_its_rows(case: tuple[Path, Any]) -> None:
    """Right padding, then decode steps at a slot of its own in each row, over the padding."""
    graph, expected = case
    ids, lengths = tokens(3, 11), np.array([7, 1, 4])
    padded = np.where(np.arange(7) < lengths[:, None], ids[:, :7], 36)
    runner = StaticRunner(graph, 3)
    steps = [runner(padded, [0, 0, 0], lengths - 1)]
    for step in range(4):
        at = lengths + step
        steps.append(runner(ids[[0, 1, 2], at][:, None], at, [0, 0, 0]))
    for row, length in enumerate(lengths):
        alone = expected(ids[row : row + 1, : length + 4])[0, length - 1 :]
        assert np.abs(np.stack(steps)[:, row] - alone).max() <= FP32_TOLERANCE


@pytest.mark.parametrize("top_k", [1, 5, 131])
def test_candidates_are_the_largest_logits_in_order(top_k: int, tiny_package: Path, tmp_path: Path) -> None:
    runner = StaticRunner(write_graph(tiny_package, "fp32", 13, tmp_path, top_k), 3)
    logits = runner(tokens(3, 7), [0, 0, 0], [6, 2, 4])
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    assert runner.top_ids.dtype == np.int64
    assert runner.top_ids.tolist() == order.tolist()
    assert runner.top_ids[:, 0].tolist() == logits.argmax(1).tolist()
    assert np.array_equal(runner.top_logits, np.take_along_axis(logits, order, axis=1))


def test_of_equal_logits_the_lower_id_is_first(tiny_package: Path, tmp_path: Path) -> None:
    path = write_graph(tiny_package, "fp32", 13, tmp_path, 131)
    model = ir.load(path)
    head = model.graph.initializers["lm_head.weight"]
    head.const_value = ir.tensor(np.zeros((96, 131), np.float32), name="lm_head.weight")
    save_graph(model, tmp_path / "zeros.onnx")
    runner = StaticRunner(tmp_path / "zeros.onnx", 1)
    runner(tokens(1, 3), [0], [2])
    assert runner.top_ids[0].tolist() == list(range(131))


def test_candidates_are_picked_once_and_of_logits_alone(portable: ir.Model) -> None:
    assert top_candidates(portable, 4) == 0  # logits of three dimensions
    apply(portable, TENSORRT)
    assert top_candidates(portable, 4) == 1
    assert top_candidates(portable, 4) == 0
    assert [v.name for v in portable.graph.outputs][:4] == ["logits", "top_ids", "top_logits", "present.0.key"]


def test_fp16_is_as_exact_as_transformers_in_fp16(tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path) -> None:
    graph = write_graph(tiny_package, "fp16", 29, tmp_path)
    ids = tokens(2, 29)
    runner = StaticRunner(graph, 2)
    ours = np.stack([runner(ids[:, i : i + 1], [i, i], [0, 0]) for i in range(29)], axis=1)
    exact = reference(tiny_checkpoint, torch.float32)(ids)
    theirs = reference(tiny_checkpoint, torch.float16)(ids)
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    assert np.square(ours - exact).mean() ** 0.5 <= FP16_RATIO * np.square(theirs - exact).mean() ** 0.5


@pytest.mark.parametrize(("heads", "kv_heads", "new", "capacity"), [(6, 2, 4, 9), (3, 3, 1, 5), (4, 1, 7, 7)])
def test_function_body_is_the_documented_mask(heads: int, kv_heads: int, new: int, capacity: int) -> None:
    """Query i of row b sees the slots j <= kv_lengths[b] - S + i, whatever the others hold."""
    rng = np.random.default_rng(1)
    batch, head_dim = 3, 8
    q = rng.standard_normal((batch, heads, new, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, kv_heads, capacity, head_dim)).astype(np.float32)
    kv_lengths = np.array([new, capacity, (new + capacity) // 2], np.int32)
    arrays = {"q": q, "k": k, "v": v, "kv_lengths": kv_lengths}
    values = {n: ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype)))
              for n, a in arrays.items()}  # fmt: skip
    node = ir.node(
        NAME, [values["q"], values["k"], values["v"], None, None, values["kv_lengths"]],
        {"causal_kind": "lower_right", "TRT_decomposable": 1}, domain=DOMAIN,
    )  # fmt: skip
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(q.shape)
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports={"": 24, DOMAIN: 1}, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=12, functions=[trt_attention_function(24)]))
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, arrays)[0]

    for b in range(batch):
        for h in range(heads):
            for i in range(new):
                seen = kv_lengths[b] - new + i + 1
                keys, vals = k[b, h // (heads // kv_heads), :seen], v[b, h // (heads // kv_heads), :seen]
                weights = np.exp(keys @ q[b, h, i])
                assert np.allclose(found[b, h, i], weights @ vals / weights.sum(), atol=2e-5)


# How the precisions differ.

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def structure(model: ir.Model) -> list[object]:
    """Everything of a graph but dtypes and weights."""

    def names(values: Iterable[ir.Value | None]) -> list[object]:
        return [value and (value.name, str(value.shape)) for value in values]

    def nodes(graph: ir.Graph | ir.Function) -> list[object]:
        return [
            (node.domain, node.op_type, node.name, names(node.inputs), names(node.outputs),
             [(k, str(a)) for k, a in sorted(node.attributes.items()) if (node.op_type, k) != ("Cast", "to")])
            for node in graph
        ]  # fmt: skip

    graph, functions = model.graph, [(name, names(f.inputs), nodes(f)) for name, f in model.functions.items()]
    weights = names(graph.initializers.values())
    return [nodes(graph), functions, names(graph.inputs), names(graph.outputs), weights, dict(model.opset_imports)]


def dtypes(model: ir.Model) -> list[ir.DataType | None]:
    """The dtypes of all values, and what the casts cast to, in the order of the graph."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    casts = [ir.DataType(node.attributes["to"].as_int()) for node in graph if node.op_type == "Cast"]
    return [*(value.dtype for value in values), *casts]


def test_precisions_differ_in_dtypes_alone(tiny_package: Path, tmp_path: Path) -> None:
    bf16, fp16, fp32 = (ir.load(write_graph(tiny_package, p, 40, tmp_path)) for p in ("bf16", "fp16", "fp32"))
    assert structure(bf16) == structure(fp16) == structure(fp32)
    for other, dtype in ((fp16, ir.DataType.FLOAT16), (fp32, ir.DataType.FLOAT)):
        assert dtypes(other) == [dtype if d == ir.DataType.BFLOAT16 else d for d in dtypes(bf16)]
    assert dtypes(bf16).count(ir.DataType.BFLOAT16) > 100


def test_what_has_the_precision_and_what_stays_float32(tiny_package: Path, tmp_path: Path) -> None:
    model = ir.load(write_graph(tiny_package, "bf16", 40, tmp_path))
    exact = {n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    rounded = {n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.BFLOAT16}
    norms = {n for n in exact if n.endswith(("norm.weight", "layernorm.weight"))}
    assert exact - norms == {"rotary_cos", "rotary_sin", "query_scale"}
    assert len(norms) == 13
    assert len(rounded) == 3 * 7 + 2
    computed = {n.op_type: n.outputs[0].dtype for n in model.graph if n.op_type != "Cast"}
    float32 = {op for op, dtype in computed.items() if dtype == ir.DataType.FLOAT}
    assert {"RMSNormalization", "RotaryEmbedding"} <= float32
    for op in ("Gather", "MatMul", "TensorScatter", "TRT_Attention", "Sigmoid", "GatherND"):
        assert computed[op] == ir.DataType.BFLOAT16, op
    residual = [n for n in model.graph if n.op_type == "Add" and n.outputs[0].dtype not in _INTEGERS]
    assert [n.outputs[0].dtype for n in residual] == [ir.DataType.BFLOAT16] * 6


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_as_torch_rounds_them(
    precision: Precision, dtype: torch.dtype, tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    model = ir.load(write_graph(tiny_package, precision, 40, tmp_path))
    stored = open_checkpoint(str(tiny_checkpoint))
    for name, transposed in (("model.embed_tokens.weight", False), ("model.layers.1.mlp.down_proj.weight", True)):
        found = model.graph.initializers[name].const_value
        assert found is not None
        expected = stored.tensor(name).to(dtype)
        expected = expected.T if transposed else expected
        assert np.array_equal(found.numpy().astype(np.float32), expected.float().numpy())


def test_rounding_is_to_nearest_even() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # half-way between two bfloat16
    rounded = WeightRounding(ir.DataType.BFLOAT16)("w", ir.tensor(ties), ir.DataType.BFLOAT16).numpy()
    assert rounded.astype(np.float32).tolist() == [1.0, 1 + 2**-6]
    assert rounded.dtype == ml_dtypes.bfloat16


def test_weights_beyond_float16_are_listed(portable: ir.Model, config: ModelConfig, tmp_path: Path) -> None:
    for name in ("lm_head.weight", "model.layers.2.mlp.up_proj.weight"):
        value = portable.graph.initializers[name]
        assert value.const_value is not None
        data = value.const_value.numpy().copy()
        data[3, 5] = -65520  # rounds to infinity; 65504 is the largest
        value.const_value = ir.tensor(data, name=name)
    norm = portable.graph.initializers["model.norm.weight"]
    assert norm.const_value is not None
    norm.const_value = ir.tensor(norm.const_value.numpy() * 1e6, name="model.norm.weight")  # stays float32
    graph, rounding = static_graph(portable, config, "fp16", 40)
    save_graph(graph, tmp_path / "model_fp16.onnx")
    with pytest.raises(
        FailedError, match=r"float16 in 2 of the tensors: lm_head.weight, model.*up_proj.weight; use bf16"
    ):
        rounding.check()


# The passes.


def test_passes_report_what_they_did(portable: ir.Model) -> None:
    assert apply(portable, TENSORRT) == {
        "gather_logit_row": 1,
        "write_index_positions": 6,
        "static_cache": 3,
        "float32_norm": 13,
        "float32_rotary": 6,
        "float32_logits": 1,
        "plain_reshape": 12,
        "drop_unused": 33,
    }


def test_passes_are_idempotent(portable: ir.Model) -> None:
    apply(portable, TENSORRT)
    before = op_counts(portable)
    assert set(apply(portable, TENSORRT).values()) == {0}
    assert op_counts(portable) == before


def test_graph_is_valid_onnx_without_local_paths(tiny_package: Path, tmp_path: Path) -> None:
    path = write_graph(tiny_package, "bf16", 40, tmp_path)
    onnx.checker.check_model(str(path))
    serialised = path.read_bytes()
    for foreign in (str(tmp_path), str(tiny_package), str(Path(__file__).parent.parent)):
        assert foreign.encode() not in serialised


def node_of(model: ir.Model, op_type: str, index: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][index]


def rename_input(model: ir.Model, name: str) -> None:
    next(v for v in model.graph.inputs if v.name == name).name = "something_else"


def other_axis(model: ir.Model) -> None:
    node = node_of(model, "Slice", -1)
    node.replace_input_with(3, ir.Value(name="axis_of_another_graph"))


def positions_as_data(model: ir.Model) -> None:
    positions = next(v for v in model.graph.inputs if v.name == "position_ids")
    model.graph.append(ir.node("Cast", [positions], {"to": 1}))


def softcap(model: ir.Model) -> None:
    for index in range(3):
        node_of(model, "Attention", index).attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def no_mask(model: ir.Model) -> None:
    for index in range(3):
        node_of(model, "Attention", index).replace_input_with(3, None)


def foreign_mask(model: ir.Model) -> None:
    for index in range(3):
        node_of(model, "Attention", index).replace_input_with(3, ir.Value(name="mask_of_another_graph"))


def past_read_twice(model: ir.Model) -> None:
    for value in list(model.graph.inputs)[3:9]:
        model.graph.append(ir.node("Identity", [value]))


def logits_through_identity(model: ir.Model) -> None:
    logits = model.graph.outputs[0]
    node = ir.node("Identity", [logits])
    node.outputs[0].name, logits.name = "logits", "before"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


def batch_of_another_input(model: ir.Model) -> None:
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    node_of(model, "Shape", 0).replace_input_with(0, mask)


@pytest.mark.parametrize(
    ("a_pass", "change"),
    [
        (gather_logit_row, lambda model: rename_input(model, "num_logits_to_keep")),
        (gather_logit_row, other_axis),
        (write_index_positions, lambda model: rename_input(model, "position_ids")),
        (write_index_positions, positions_as_data),
        (static_cache, softcap),
        (static_cache, no_mask),
        (static_cache, foreign_mask),
        (static_cache, past_read_twice),
        (static_cache, lambda model: rename_input(model, "attention_mask")),
        (float32_logits, logits_through_identity),
        (plain_reshape, batch_of_another_input),
    ],
)
def test_pass_leaves_another_graph_alone(
    a_pass: Callable[[ir.Model], int], change: Callable[[ir.Model], None], portable: ir.Model
) -> None:
    change(portable)
    before = structure(portable)
    assert a_pass(portable) == 0
    assert structure(portable) == before


def test_a_rotation_without_a_norm_before_it_gets_a_cast_of_its_own_once(portable: ir.Model) -> None:
    """As in OLMo 1; in OLMo 2 the cast of the norm moves behind the rotation."""
    casts, rotations = op_counts(portable)["Cast"], op_counts(portable)["RotaryEmbedding"]
    assert float32_rotary(portable) == rotations
    assert op_counts(portable)["Cast"] == casts + 2 * rotations
    assert float32_rotary(portable) == 0


def test_layers_with_another_scale_are_left_alone(portable: ir.Model) -> None:
    node_of(portable, "Attention", 1).attributes["scale"] = ir.AttrFloat32("scale", 0.5)
    assert static_cache(portable) == 2
    assert op_counts(portable)["Attention"] == 1


def test_float32_norm_is_applied_once(portable: ir.Model) -> None:
    assert float32_norm(portable) == 13
    assert float32_norm(portable) == 0


def test_drop_unused_keeps_what_is_used(portable: ir.Model) -> None:
    before = structure(portable)
    assert drop_unused(portable) == 0
    assert structure(portable) == before


def test_set_precision_refuses_a_mixture(portable: ir.Model) -> None:
    apply(portable, TENSORRT)
    cast = next(
        node for node in portable.graph if node.name and node.name.endswith("rounded") and node.op_type == "Cast"
    )
    cast.meta.clear()
    with pytest.raises(FusionError, match="reads BFLOAT16 and FLOAT"):
        set_precision(portable, ir.DataType.BFLOAT16)


def test_set_cache_length_counts_the_caches(portable: ir.Model) -> None:
    assert set_cache_length(portable, 40) == 0
    apply(portable, TENSORRT)
    assert set_cache_length(portable, 40) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: node_of(model, "Attention").attributes.pop("scale"),
            "static_cache: expected 3, applied 2 times",
        ),
        (lambda model: rename_input(model, "num_logits_to_keep"), "gather_logit_row: expected 1, applied 0 times"),
        (lambda model: apply(model, TENSORRT), "it is not a graph of this exporter"),
    ],
)
def test_another_graph_is_refused(
    change: Callable[[ir.Model], object], message: str, portable: ir.Model, config: ModelConfig
) -> None:
    change(portable)
    with pytest.raises(FusionError, match=message):
        static_graph(portable, config, "bf16", 40)


def test_another_interface_is_refused(portable: ir.Model, config: ModelConfig) -> None:
    portable.graph.outputs[1].name = "present.0.keys"
    with pytest.raises(FusionError, match=r"present\.0\.keys.*expected.*present\.0\.key"):
        static_graph(portable, config, "bf16", 40)


def test_precisions_are_the_documented_ones() -> None:
    assert precisions() == ("bf16", "fp16", "fp32", "int4", "int8", "fp8")
