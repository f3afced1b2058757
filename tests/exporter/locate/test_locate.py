"""For each injected bug `locate` must name the layer, the tensor and the operation; in a good variant, nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.bugs import portable, quantized, static
from support.bugs.edits import Bug
from support.checkpoints import make_checkpoint
from support.rebuilt_packages import rebuilt, rebuilt_trt, with_int8_cache_alone, with_trt_graph

from olmo2_export.architecture import operations
from olmo2_export.catalog import precisions
from olmo2_export.cli import main
from olmo2_export.config import ModelConfig
from olmo2_export.debug.debug import onnxruntime_runner
from olmo2_export.graphs.taps import cut, find_segments
from olmo2_export.locate import locate as locate_module
from olmo2_export.locate.locate import Location, TensorParity, format_location, locate, locate_all
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.truth.torch_layers import TorchModel
from olmo2_export.views import openers
from olmo2_export.views.openers import Run, onnxruntime_opener, tensorrt_opener
from olmo2_export.views.static_forms import rounded_form
from olmo2_export.weights.checkpoint import Checkpoint, open_checkpoint
from runtimes.errors import ConfigError, PackageError, UsageError, VariantNotFoundError
from runtimes.manifest import Precision
from runtimes.ort.devices import Device, find_device
from runtimes.package import open_package

CAPACITY = 64
VARIANTS = ["fp32", "q4", "q8", "bf16", "fp16", "q4f16"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def package(package_of: Callable[[str], Path]) -> Path:
    """Every variant of the random model."""
    return package_of("tiny_all")


def assert_nothing(location: Location, layers: int = 3) -> None:
    assert location.first is None, format_location(location)
    assert location.tensors == ()
    assert location.explanation.startswith("Nothing departs")
    outputs = [f"model.layers.{i}.output" for i in range(layers)]
    assert [p.name for p in location.layers] == ["model.embed_tokens", *outputs, "model.norm", "logits"]
    assert [p.layer for p in location.layers] == [None, *range(layers), None, None]
    for parity in location.layers[1:]:
        assert 0 < parity.relative < 2 * parity.expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_departs_in_a_good_variant(variant: str, package: Path, checkpoint: Checkpoint) -> None:
    location = locate(package, checkpoint, variant)
    assert_nothing(location)
    assert (location.variant, location.backend) == (variant, "ort")
    least = {"fp32": 1e-7, "q4": 1e-3, "q8": 1e-3, "bf16": 1e-3, "fp16": 1e-4, "q4f16": 1e-4}[variant]
    assert least < location.layers[-1].relative < 100 * least  # of the graph as users run it


@pytest.mark.parametrize("precision", precisions())
def test_nothing_departs_in_a_good_trt_graph(
    precision: Precision, trt_package: Callable[[Precision], Path], checkpoint: Checkpoint
) -> None:
    assert_nothing(locate(trt_package(precision), checkpoint, f"trt_{precision}"))


def test_nothing_departs_in_the_demo(demo_package: Path) -> None:
    location = locate(demo_package, open_checkpoint("demo"), "fp32")
    assert_nothing(location, layers=len(location.layers) - 3)


def test_nothing_departs_in_the_quantised_demo(package_of: Callable[[str], Path]) -> None:
    """Where the sigmoid of onnxruntime is 3 times as far from exact as PyTorch's."""
    location = locate(package_of("demo_q4"), open_checkpoint("demo"), "q4")
    assert_nothing(location, layers=len(location.layers) - 3)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": True},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True},
    ],
    ids=["tied, no groups", "one KV head, biases"],
)
def test_nothing_departs_in_other_shapes(shape: dict[str, object], tmp_path: Path) -> None:
    model = open_checkpoint(str(make_checkpoint(tmp_path / "model", **shape)))
    export(model, tmp_path / "package")
    for location in locate_all(tmp_path / "package", model):
        assert_nothing(location)
    trt = with_trt_graph(tmp_path / "package", tmp_path / "trt", TrtOptions("int4", 24))
    assert_nothing(locate(trt, model, "trt_int4"))


def test_a_quantised_cache_is_looked_at_without_its_codes(
    checkpoint: Checkpoint, package_of: Callable[[str], Path], tmp_path: Path
) -> None:
    good = with_int8_cache_alone(package_of("tiny_q4_caches"), tmp_path / "good")
    assert_nothing(locate(good, checkpoint, "q4"))
    bad = rebuilt(good, tmp_path / "bad", quantized.key_and_value_cache_swapped, quantized.INT8_CACHE)
    found = first_of(bad, checkpoint, "q4")[0]
    assert (found.name, found.operation) == ("model.layers.1.self_attn.key_cache", "KV cache write")


def first_of(package: Path, checkpoint: Checkpoint, variant: str) -> tuple[TensorParity, str]:
    location = locate(package, checkpoint, variant)
    assert location.first is not None, format_location(location)
    assert location.first in location.tensors
    assert "<- the first that departs" in format_location(location)
    return location.first, location.explanation


NORM, LINEAR, ROTARY, ATTENTION, CACHE = "RMS norm", "linear", "rotary embedding", "attention", "KV cache write"
GATED, PICK = "gated activation (SiLU x up)", "choice of the rows that get logits"
NOT_APPLIED = "it is not applied"

PORTABLE: list[tuple[Bug, int | None, str, str, str]] = [
    (portable.q_norm_ignored, 1, "self_attn.q_norm", NORM, NOT_APPLIED),
    (portable.post_attention_norm_ignored, 1, "post_attention_layernorm", NORM, NOT_APPLIED),
    (portable.gate_and_up_swapped, 1, "mlp.gated", GATED, "gate and up are swapped"),
    (portable.eps_ten_times_too_large, 0, "self_attn.q_norm", NORM, "its epsilon is 1e-05, the config says 1e-06"),
    (portable.rope_interleaved, 0, "self_attn.q_rotary", ROTARY, "it is interleaved"),
    (portable.rope_theta_wrong, 0, "self_attn.q_rotary", ROTARY, "its theta is 10000, the config says 500000"),
    (
        portable.kv_heads_interleaved_instead_of_grouped,
        1,
        "self_attn.attention",
        ATTENTION,
        "query heads read the KV heads [0, 0, 1, 0, 1, 1], the right ones are [0, 0, 0, 1, 1, 1]",
    ),
    (portable.attention_scale_wrong, 1, "self_attn.attention", ATTENTION, "its scale is 1.02 times 1 / sqrt(head_dim)"),
    (portable.causal_mask_shows_the_next_token, 0, "self_attn.attention", ATTENTION, "off by +1: each token sees"),
    (portable.causal_mask_hides_the_token_itself, 0, "self_attn.attention", ATTENTION, "off by -1: no token sees"),
    (portable.key_and_value_cache_swapped, 1, "self_attn.key_cache", CACHE, "the past keys and values are swapped"),
    (
        portable.one_weight_off_by_a_thousandth,
        1,
        "self_attn.o_proj",
        LINEAR,
        "one weight is off: output channel 5, input 3, by +0.001",
    ),
    (portable.head_gives_nan, None, "model.norm", NORM, "numbers are not finite, the first at [0, 0, 0]"),
]
TRT: list[tuple[Bug, int | None, str, str, str]] = [
    *PORTABLE[:5],
    (portable.query_scale_wrong, 1, "self_attn.attention", ATTENTION, "its scale is 1.02 times"),
    (portable.kv_lengths_one_too_large, 0, "self_attn.attention", ATTENTION, "off by +1: each token sees the next"),
    (
        portable.key_and_value_written_into_each_others_cache,
        1,
        "self_attn.key_cache",
        CACHE,
        "keys and values are written into each other's cache",
    ),
    (portable.logit_index_ignored, None, "model.norm_input", PICK, "it takes the last row, not the one asked for"),
]
DECODE: list[tuple[Bug, int | None, str, str, str]] = [
    (quantized.q_norm_ignored, 1, "self_attn.q_norm", NORM, NOT_APPLIED),
    (quantized.post_attention_norm_ignored, 1, "post_attention_layernorm", NORM, NOT_APPLIED),
    (quantized.gate_and_up_swapped, 1, "mlp.gated", GATED, "gate and up are swapped"),
    (quantized.eps_ten_times_too_large, 0, "self_attn.q_norm", NORM, "its epsilon is 1e-05"),
    (quantized.rope_interleaved, 0, "self_attn.key_cache", ROTARY, "it is interleaved"),
    (quantized.rope_theta_wrong, 0, "self_attn.key_cache", ROTARY, "its theta is 10000"),
    (quantized.attention_scale_wrong, 1, "self_attn.attention", ATTENTION, "its scale is 1.02 times"),
    (quantized.attention_sees_a_window, 1, "self_attn.attention", ATTENTION, "it sees only a window of 9 tokens"),
    (quantized.kv_heads_misread, 1, "self_attn.key_cache", CACHE, "its heads are in another order, shifted by 1"),
    (quantized.key_and_value_cache_swapped, 1, "self_attn.key_cache", CACHE, "the past keys and values are swapped"),
    (quantized.norm_weight_nan, None, "model.norm", NORM, "not finite"),
]
_IN_PREFILL = (quantized.q_norm_ignored, quantized.rope_theta_wrong, quantized.key_and_value_cache_swapped)
PREFILL = [row for row in DECODE if row[0] in _IN_PREFILL]
STORED = "stored weight (weights)"
WEIGHTS: list[tuple[Bug, int | None, str, str, str]] = [
    (quantized.tensor_zeroed, 1, "mlp.down_proj.weight", STORED, "row 0, block 0: its scale is off by 100%"),
    (quantized.one_scale_shifted, 1, "mlp.up_proj.weight", STORED, "row 3, block 0: its scale is off by 28%"),
    (quantized.scales_rolled_by_one_block, 1, "mlp.down_proj.weight", STORED, "is off by"),
    (quantized.nibbles_swapped, 1, "self_attn.v_proj.weight", STORED, "is off by"),
    (quantized.zero_points_ignored, None, "lm_head.weight", STORED, "is off by"),
    (quantized.embedding_scale_shifted, None, "model.embed_tokens.weight", STORED, "row 17, block 1: its scale"),
]
SCALES, INPUT = "stored weight (scales)", "quantisation of the input"
STATIC: list[tuple[Precision, Bug, int | None, str, str, str]] = [
    ("int4", static.one_scale_shifted, 1, "self_attn.o_proj.weight", SCALES, "channel 3, block 2"),
    ("int4", static.gate_and_up_swapped_inside_the_merged_weight, 1, "mlp.gate_proj.weight", SCALES, "is off by"),
    ("int4", static.query_and_key_split_at_the_wrong_place, 1, "self_attn.q_proj", LINEAR, "shape is [1, 24, 32]"),
    ("int4", static.embedding_shifted_by_a_token, None, "model.embed_tokens", "embedding lookup", "token id -1"),
    ("int8", static.one_activation_scale_doubled, 1, "mlp.gate_proj.weight", INPUT, "the manifest's scale is"),
    ("int8", static.inputs_not_quantised, 0, "self_attn.k_proj.weight", INPUT, "is not rounded to 8 bits"),
    ("int8", static.one_kept_weight_off_by_a_bit, None, "logits", LINEAR, "output channel 4, input 17"),
    ("int8", static.eps_ten_times_too_large, 0, "self_attn.q_norm", NORM, "its epsilon is 1e-05"),
    ("fp8", static.one_channel_scale_wrong, 1, "self_attn.q_proj.weight", SCALES, "channel 5, block 0"),
    ("fp8", static.q_norm_ignored, 1, "self_attn.q_norm", NORM, NOT_APPLIED),
    ("bf16", static.q_norm_ignored, 1, "self_attn.q_norm", NORM, NOT_APPLIED),
    ("fp16", static.eps_ten_times_too_large, 0, "self_attn.q_norm", NORM, "its epsilon is 1e-05"),
]


def check(found: tuple[TensorParity, str], layer: int | None, name: str, operation: str, words: str) -> None:
    first, explanation = found
    full = name if layer is None else f"model.layers.{layer}.{name}"
    assert (first.layer, first.name, first.operation) == (layer, full, operation), explanation
    assert words in explanation
    if not operation.startswith("stored"):  # one scale of many is less than the rounding of all weights
        assert not first.relative <= 2 * first.expected


def test_every_injected_bug_is_located() -> None:
    assert [row[0] for row in PORTABLE] == portable.BUGS
    assert [row[0] for row in TRT] == portable.TRT_BUGS
    assert [row[0] for row in DECODE] == quantized.EXACT_BUGS
    assert {row[0] for row in WEIGHTS} == set(quantized.WEIGHT_BUGS)


def ids(value: object) -> str | None:
    return getattr(value, "__name__", None) or ""


@pytest.mark.parametrize(("bug", "layer", "name", "operation", "words"), PORTABLE, ids=ids)
def test_bug_in_the_portable_graph(
    bug: Bug, layer: int | None, name: str, operation: str, words: str,
    tiny_package: Path, checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    bad = rebuilt(tiny_package, tmp_path / "p", bug)
    check(first_of(bad, checkpoint, "fp32"), layer, name, operation, words)


@pytest.mark.parametrize(("bug", "layer", "name", "operation", "words"), TRT, ids=ids)
def test_bug_in_the_trt_graph(
    bug: Bug, layer: int | None, name: str, operation: str, words: str,
    trt_package: Callable[[Precision], Path], checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    bad = rebuilt_trt(trt_package("fp32"), tmp_path / "p", bug)
    check(first_of(bad, checkpoint, "trt_fp32"), layer, name, operation, words)


@pytest.mark.parametrize(("bug", "layer", "name", "operation", "words"), [*DECODE, *WEIGHTS], ids=ids)
def test_bug_in_the_decode_graph(
    bug: Bug, layer: int | None, name: str, operation: str, words: str,
    package: Path, checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    bad = rebuilt(package, tmp_path / "p", bug, quantized.GRAPH)
    check(first_of(bad, checkpoint, "q4"), layer, name, operation, words)


@pytest.mark.parametrize(("bug", "layer", "name", "operation", "words"), PREFILL, ids=ids)
def test_bug_in_the_prefill_graph(
    bug: Bug, layer: int | None, name: str, operation: str, words: str,
    package: Path, checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    """It has int8 products, which the decode graph's bugs for MatMulNBits do not know."""
    bad = rebuilt(package, tmp_path / "p", bug, quantized.PREFILL_GRAPH)
    found = first_of(bad, checkpoint, "q4")
    check(found, layer, name, operation, words)
    assert found[1].startswith("In the int8 view, ")


def test_a_wrong_int8_scale(package: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    bad = rebuilt(package, tmp_path / "p", quantized.int8_scale_shifted, quantized.PREFILL_GRAPH)
    words = "channel 3: its scale is off by 29%"
    check(first_of(bad, checkpoint, "q4"), 1, "mlp.up_proj.weight", "stored weight (int8 weights)", words)


@pytest.mark.parametrize(("precision", "bug", "layer", "name", "operation", "words"), STATIC, ids=ids)
def test_bug_in_a_trt_graph_of_fewer_bits(
    precision: Precision, bug: Bug, layer: int | None, name: str, operation: str, words: str,
    trt_package: Callable[[Precision], Path], checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    bad = rebuilt_trt(trt_package(precision), tmp_path / "p", bug, precision)
    check(first_of(bad, checkpoint, f"trt_{precision}"), layer, name, operation, words)


_ON_DEVICES = (quantized.post_attention_norm_ignored, quantized.rope_interleaved, quantized.attention_scale_wrong)
DEVICE_BUGS = [row for row in DECODE if row[0] in _ON_DEVICES]


@pytest.mark.parametrize(("bug", "layer", "name", "operation", "words"), DEVICE_BUGS, ids=ids)
def test_bug_in_a_graph_for_gpus(
    bug: Bug, layer: int | None, name: str, operation: str, words: str,
    package: Path, checkpoint: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    bad = rebuilt(package, tmp_path / "p", bug, "onnx/model_bf16.onnx")
    check(first_of(bad, checkpoint, "bf16"), layer, name, operation, words)


def test_what_one_operation_cannot_tell_shows_in_the_growth(
    tiny_package: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate_module, "GROWN", 0.5)  # no operation departs, and all together do
    location = locate(tiny_package, checkpoint, "fp32")
    assert location.first is not None
    assert (location.first.name, location.first.operation) == ("model.layers.0.output", "layer as a whole")
    assert "each operation is right on its own inputs, but up to model.layers.0.output errors add up" in (
        location.explanation
    )


def test_the_layer_is_its_operations(checkpoint: Checkpoint) -> None:
    """What is compared one by one is, put together, what transformers' layer computes."""
    model = TorchModel(checkpoint.folder, checkpoint.tensor, "fp64")
    layer = model.layer(1)
    x = model.embed(torch.arange(20))
    with torch.inference_mode():
        q, k = (layer.norm(f"self_attn.{n}_norm", layer.linear(f"self_attn.{n}_proj", x)) for n in "qk")
        v = layer.split(layer.linear("self_attn.v_proj", x))
        visible = torch.ones(20, 20, dtype=torch.bool).tril()
        attended = layer.attend(layer.rotate(layer.split(q)), layer.rotate(layer.split(k)), v, visible)
        h = x + layer.norm("post_attention_layernorm", layer.linear("self_attn.o_proj", attended))
        gated = layer.gated(layer.linear("mlp.gate_proj", h), layer.linear("mlp.up_proj", h))
        y = h + layer.norm("post_feedforward_layernorm", layer.linear("mlp.down_proj", gated))
        assert float((y - layer(x)).abs().max()) < 1e-13


def test_segments_hold_the_weights_of_one_layer(package: Path) -> None:
    rows = operations(ModelConfig.from_json(package / "config.json"))
    for path in ("onnx/model.onnx", quantized.GRAPH, "onnx/model_bf16.onnx"):
        model = ir.load(package / path)
        parts = find_segments(model, rows)
        assert [part.layer for part in parts] == [None, 0, 1, 2, None]
        for part in parts[1:4]:
            names = [n for n in cut(model, part).graph.initializers if n.endswith((".weight", ".packed"))]
            assert names
            assert all(f"model.layers.{part.layer}." in name for name in names)


@pytest.mark.parametrize("variant", ["fp16", "trt_fp16"])
def test_on_cuda_the_graph_is_looked_at_as_it_is(
    variant: str, package: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake(name: str) -> Device:
        asked.append(name)
        return find_device("cpu")

    monkeypatch.setattr(openers, "find_device", fake)
    both = with_trt_graph(package, tmp_path / "both", TrtOptions("fp16", CAPACITY))
    assert_nothing(locate(both, checkpoint, variant, device="cuda"))
    assert set(asked) == {"cuda"}
    for name in ("q4", "fp32"):
        with pytest.raises(UsageError, match=f"variant {name}: device cuda runs fp16, bf16, q4f16 and trt_"):
            locate(both, checkpoint, name, device="cuda")


def stand_in(path: Path) -> object:
    """Polygraphy's runner of a segment, on the CPU in the rounded form."""
    form = rounded_form(ir.load(path))
    ir.save(form, path.with_name("form.onnx"))
    return onnxruntime_runner(path.with_name("form.onnx"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_on_a_tensorrt_each_segment_is_compiled(
    precision: Precision, trt_package: Callable[[Precision], Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """onnxruntime stands in, through Polygraphy's interface; the one call of 16 tokens has no past."""
    opener = tensorrt_opener("trt_rtx", runner=stand_in)
    name = f"trt_{precision}"
    good = locate(trt_package(precision), checkpoint, name, backend="trt_rtx", opener=opener)
    assert_nothing(good)
    assert good.backend == "trt_rtx"
    bad = rebuilt_trt(trt_package(precision), tmp_path / "p", portable.query_scale_wrong, precision)
    found = locate(bad, checkpoint, name, backend="trt_rtx", opener=opener)
    if precision != "bf16":  # 2 % of the scale is less than its rounding
        assert found.first is not None
        assert (found.first.layer, found.first.operation) == (1, ATTENTION)
    with pytest.raises(UsageError, match="variant fp32: backend trt_rtx runs the graphs for TensorRT"):
        locate(bad, checkpoint, "fp32", backend="trt_rtx", opener=opener)


def test_an_opener_sees_one_segment_at_a_time(tiny_package: Path, checkpoint: Checkpoint) -> None:
    opened: list[list[str]] = []
    entry = open_package(tiny_package).variant("fp32")
    ours = onnxruntime_opener(tiny_package / entry.graph, entry)

    def opener(part: ir.Model) -> AbstractContextManager[Run]:
        opened.append([str(v.name) for v in part.graph.inputs])
        return ours(part)

    assert_nothing(locate(tiny_package, checkpoint, "fp32", opener=opener))
    assert len(opened) == 6  # the last of them once more, for two rows
    assert opened[0] == ["input_ids"]
    assert all("hidden" in names for names in opened[1:])
    assert "past_key_values.1.key" in opened[2]
    assert "past_key_values.0.key" not in opened[2]


def test_what_cannot_be_located_in_is_refused(tiny_package: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = open_checkpoint(str(make_checkpoint(tmp_path / "other", num_hidden_layers=2)))
    with pytest.raises(ConfigError, match="not of the reference's shape"):
        locate(tiny_package, other, "fp32")
    with pytest.raises(VariantNotFoundError, match="no variant for trt on cuda; run: olmo2-export build"):
        locate_all(tiny_package, checkpoint, backend="trt")
    short = with_trt_graph(tiny_package, tmp_path / "short", TrtOptions("fp32", 12))
    with pytest.raises(PackageError, match="a cache of 12 tokens; --locate needs 16"):
        locate(short, checkpoint, "trt_fp32")


def test_the_command_line(
    tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--reference", str(tiny_checkpoint), "--variant", "fp32", "--locate"]
    assert main(["verify", str(tiny_package), *words]) == 0
    assert "fp32: Nothing departs: every operation agrees with PyTorch's" in capsys.readouterr().out
    assert not (tiny_package / "parity.json").exists()
    bad = rebuilt(tiny_package, tmp_path / "p", portable.q_norm_ignored)
    assert main(["verify", str(bad), *words]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.endswith("<- the first that departs")]
    assert line.startswith("model.layers.1.self_attn.q_norm ")
    assert "fp32: In the graph as it is, the RMS norm of layer 1 (model.layers.1.self_attn.q_norm) is wrong" in out


def _residual(model: ir.Model, index: int) -> tuple[ir.Node, int, int]:
    """Return a residual add, and which of its inputs are the residual and what is added."""

    def normed(value: ir.Value | None) -> bool:
        producer = value.producer() if value is not None else None
        return producer is not None and producer.op_type == "RMSNormalization"

    node = [n for n in model.graph if n.op_type == "Add" and any(map(normed, n.inputs))][index]
    added = next(i for i, value in enumerate(node.inputs) if normed(value))
    return node, 1 - added, added


def _drop_residual(model: ir.Model, index: int) -> None:
    node, _, added = _residual(model, index)
    node.outputs[0].replace_all_uses_with(node.inputs[added])


def _subtract(model: ir.Model, index: int) -> None:
    _residual(model, index)[0].op_type = "Sub"


def _add_twice(model: ir.Model, index: int) -> None:
    node, residual, added = _residual(model, index)
    node.replace_input_with(residual, node.inputs[added])


@pytest.mark.parametrize(("variant", "graph"), [("fp32", "onnx/model.onnx"), ("q4", "onnx/model_q4_shared.onnx")])
@pytest.mark.parametrize(
    ("bug", "said"),
    [
        (_drop_residual, "the residual is not added"),
        (_subtract, "it subtracts"),
        (_add_twice, "it adds its other input twice, and no residual"),
    ],
)
@pytest.mark.parametrize(("index", "tensor"), [(2, "after_attention"), (3, "output")])
def test_a_wrong_residual_add_is_no_wrong_norm(
    bug: Callable[[ir.Model, int], None],
    said: str,
    index: int,
    tensor: str,
    variant: str,
    graph: str,
    package: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    bad = rebuilt(package, tmp_path / "bad", lambda model: bug(model, index), graph)
    first, explanation = first_of(bad, checkpoint, variant)
    assert (first.layer, first.name, first.operation) == (1, f"model.layers.1.{tensor}", "residual add")
    assert said in explanation


def test_a_rotary_table_that_is_wrong_late_is_found(package: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def late(model: ir.Model) -> None:
        value = model.graph.initializers["rotary_cos"]
        assert value.const_value is not None
        table = value.const_value.numpy().copy()
        table[100:] = np.roll(table[100:], 1, axis=0)
        value.const_value = ir.tensor(table, name=value.name)

    first, explanation = first_of(rebuilt(package, tmp_path / "bad", late), checkpoint, "fp32")
    assert (first.name, first.operation) == ("rotary_cos", "rotary table")
    assert "first at 100" in explanation


def test_the_cache_of_another_layer_is_named(package: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    def cross(model: ir.Model) -> None:
        inputs = {str(v.name): v for v in model.graph.inputs}
        wrong = inputs["past_key_values.2.key"]
        for node, index in [(u.node, u.idx) for u in inputs["past_key_values.1.key"].uses()]:
            node.replace_input_with(index, wrong)

    bad = rebuilt(package, tmp_path / "bad", cross)
    with pytest.raises(
        PackageError, match=r"attention of layer 1 reads past_key_values\.2\.key, the KV cache of another"
    ):
        locate(bad, checkpoint, "fp32")
