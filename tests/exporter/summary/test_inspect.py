"""inspect: what graphs and engines are made of, in numbers, as text and as JSON; nothing large is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.checkpoints import OLMO3, make_checkpoint

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.fuse import op_counts
from olmo2_export.graphs.trace import trace
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.summary import graph as graph_summary
from olmo2_export.summary.graph import op_changes, portable_ops
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain, short_name, size
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.command import printable
from runtimes.package import open_package


@pytest.fixture(scope="module")
def package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, hidden 96, 6 heads (2 KV) of 16, vocabulary 131; fp32, q4 with a prefill graph, and an engine."""
    out = tmp_path_factory.mktemp("inspect") / "tiny"
    export(
        open_checkpoint(str(tiny_checkpoint)),
        out,
        variants=["fp32", "q4", "bf16"],
        options=Options(kv_caches=("float32",)),
    )
    build(out, EngineOptions(compute_capabilities=["8.9"], max_cache_length=64), progress=False)
    return out


@pytest.fixture(scope="module")
def document(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = describe(package).to_document()
    return json.loads(json.dumps(found, allow_nan=False))  # type: ignore[no-any-return]  # an object


def test_operators_before_and_after(document: dict[str, Any]) -> None:
    portable = document["portable_ops"]
    assert (portable["MatMul"], portable["Attention"], portable["RotaryEmbedding"]) == (22, 3, 6)
    q4 = document["variants"]["q4"]["graphs"][0]
    assert (q4["ops"]["com.microsoft::MatMulNBits"], q4["ops"]["com.microsoft::GroupQueryAttention"]) == (22, 3)
    assert q4["nodes"] == sum(q4["ops"].values()) < sum(portable.values())
    changes = {c["op"]: (c["before"], c["after"]) for c in q4["op_changes"]}
    assert changes["MatMul"] == (22, 0)
    assert changes["com.microsoft::MatMulNBits"] == (0, 22)
    assert changes["RMSNormalization"] == (13, 13)
    assert document["variants"]["fp32"]["graphs"][0]["ops"] == portable


def test_order_of_changes() -> None:
    changes = op_changes({"A": 5, "B": 1, "C": 2}, {"B": 3, "C": 2, "New": 1})
    assert [(c.op, c.before, c.after) for c in changes] == [("New", 0, 1), ("A", 5, 0), ("C", 2, 2), ("B", 1, 3)]


def test_portable_operators_without_the_portable_graph(package: Path) -> None:
    """Traced with one layer and two, they are those of the graph with three."""
    config = ModelConfig.from_json(package / "config.json")
    manifest = open_package(package).manifest
    read, origin = portable_ops(package, manifest, config)
    assert origin == "onnx/model.onnx"
    del manifest.variants["fp32"]
    traced, origin = portable_ops(package, manifest, config)
    assert traced == read
    assert "traced" in origin


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ({"num_hidden_layers": 1}, []),
        ({"num_hidden_layers": 1}, [0, -1]),
        (OLMO3, []),
        (OLMO3, [0, 2, 4]),
        (OLMO3, [1]),
    ],
    ids=["one layer", "one layer, both states", "windows", "windows, the last state too", "windows, one state"],
)
def test_they_are_those_of_every_shape(
    shape: dict[str, Any], numbers: list[int], package: Path, tmp_path: Path
) -> None:
    """A model of one layer could not be described, nor one with hidden states; masks of a late kind were left out."""
    config = ModelConfig.from_json(make_checkpoint(tmp_path, **shape) / "config.json").giving(numbers)
    manifest = open_package(package).manifest
    del manifest.variants["fp32"]
    assert portable_ops(package, manifest, config)[0] == op_counts(trace(config))


def test_weights_by_dtype_and_size(document: dict[str, Any]) -> None:
    fp32 = document["variants"]["fp32"]["graphs"][0]
    layer = 96 * (96 + 32 + 32 + 96 + 3 * 160) + 96 + 32 + 2 * 96
    tables = 2 * 256 * 8
    assert fp32["weights"][0] | {"share": 0} == {
        "dtype": "float32",
        "tensors": 3 * 11 + 5,
        "elements": 3 * layer + 2 * 131 * 96 + 96 + tables,
        "nbytes": 4 * (3 * layer + 2 * 131 * 96 + 96 + tables),
        "share": 0,
    }
    assert sum(g["nbytes"] for g in fp32["weights"]) == fp32["nbytes"]
    assert sum(g["share"] for g in fp32["weights"]) == pytest.approx(1)
    first = fp32["largest"][0]
    assert (first["name"], first["nbytes"], first["count"]) == ("model.layers.N.mlp.down_proj.weight", 4 * 160 * 96, 3)
    assert first["share"] == pytest.approx(3 * first["nbytes"] / fp32["nbytes"])


def test_bits_of_every_layer(document: dict[str, Any]) -> None:
    parts = document["variants"]["q4"]["graphs"][0]["parts"]
    assert [p["name"] for p in parts] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    assert parts[1]["schemes"] == ["4 bits, blocks of 128, symmetric x 7"]
    assert parts[1]["weights"] == 96 * (96 + 32 + 32 + 96 + 3 * 160)
    rows = 96 + 32 + 32 + 96 + 160 + 160  # one block of 128 holds 96 columns; down_proj has two for its 160
    assert parts[1]["nbytes"] == (rows + 2 * 96) * (64 + 4)
    assert parts[1]["bits_per_weight"] == pytest.approx(8 * parts[1]["nbytes"] / parts[1]["weights"])
    assert 0 < parts[1]["worst_nmse"] < 0.05
    for part in document["variants"]["fp32"]["graphs"][0]["parts"]:
        assert (part["bits_per_weight"], part["worst_nmse"]) == (32, None)
    merged = document["variants"]["bf16"]["graphs"][0]["parts"][1]
    assert (merged["schemes"], merged["bits_per_weight"]) == (["bfloat16 x 7"], 16)


def test_prefill_graph_is_described_as_it_is_stored(package: Path, document: dict[str, Any]) -> None:
    graphs = document["variants"]["q4"]["graphs"]
    if open_package(package).manifest.variants["q4"].prefill is None:
        assert len(graphs) == 1
        return
    assert graphs[1]["parts"][1]["schemes"] == ["8 bits, per channel, symmetric x 7"]


def test_inputs_outputs_and_cache(document: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in document["variants"]["q4"]["io"]}
    key = rows["past_key_values.N.key"]
    assert (key["count"], key["dtype"], key["direction"]) == (3, "float32", "input")
    assert key["shape"] == ["batch_size", 2, "past_sequence_length", 16]
    assert rows["logits"]["shape"][-1] == 131
    assert all(row["meaning"] for row in rows.values())
    caches = {name: v["kv_cache"]["bytes_per_token"] for name, v in document["variants"].items()}
    assert caches == {"fp32": 768, "q4": 768, "bf16": 384, "trt_bf16": 384}  # 2 x 3 layers x 2 heads x 16 x size


def test_engine_without_a_gpu(document: dict[str, Any]) -> None:
    engine = document["engines"]["trt_rtx_bf16"]
    assert engine["compute_capabilities"] == ["8.9"]
    assert engine["capabilities"] == {"portable": False, "refit": False, "weight_streaming": False}
    decode = {r["name"]: (r["min"], r["opt"], r["max"]) for r in engine["profiles"]["decode"]}
    assert decode["input_ids"] == ([1, 1], [1, 1], [4, 1])
    assert decode["past_key_values.N.key"] == ([1, 2, 64, 16], [1, 2, 64, 16], [4, 2, 64, 16])
    assert engine["in_place"] == 6
    assert engine["layers"]["ATTENTION_INPUT"] == 3
    for profile in ("decode", "prefill"):
        assert sum(row[profile] for row in engine["kernel_table"]) == engine["kernels"][profile] > 0
    kinds = {row["kind"]: row["decode"] for row in engine["kernel_table"]}
    assert kinds["attention, cache read in place"] == 3


def test_text_says_the_same(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(package)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "[batch_size," in text  # a shape is no markup
    assert "22 com.microsoft::MatMulNBits" in " ".join(text.split())  # in a sentence that goes on in the next line
    for line in (
        "layers 0-2, each   4 bits, blocks of 128,",
        "engine trt_rtx_bf16",
        "compute capability 8.9",
        "attention, cache read in place",
        "portable: no, refit: no, weight streaming: no",
        "parity: never verified",
    ):
        assert line in text


def test_json_and_one_variant(package: Path, capsys: pytest.CaptureFixture[str], document: dict[str, Any]) -> None:
    assert cli.main(["inspect", str(package), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert cli.main(["inspect", str(package), "--variant", "q4", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (list(one["variants"]), one["engines"]) == (["q4"], {})
    assert one["variants"]["q4"] == document["variants"]["q4"]
    assert cli.main(["inspect", str(package), "--variant", "trt_bf16", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["engines"]) == ["trt_rtx_bf16"]
    assert cli.main(["inspect", str(package), "--variant", "q3"]) == 2
    assert "no variant 'q3'; it has" in capsys.readouterr().err


def test_weights_are_not_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: ir.ExternalTensor) -> None:
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr(ir.ExternalTensor, "_load", read)
    entry = open_package(package).manifest.variants["q4"]
    config = ModelConfig.from_json(package / "config.json")
    assert graph_summary.summarize_graph(package, entry.graph, config, entry.quantization).nodes > 0


def test_a_plan_without_text_is_described(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "copy"))
    monkeypatch.setattr("olmo2_export.summary.engine.RTX_VERSION", "9.9")
    summary = describe(copy, "trt_bf16")
    assert summary.engines[0].kernel_table == ()
    assert "trt_rtx 1.7.1.116" in plain(summary)


def test_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 26_238_976, 5_940_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "26.2 MB",
        "5.9 GB",
    ]
    merged = "model.layers.N.mlp.gate_proj.weight+model.layers.N.mlp.up_proj.weight.codes"
    assert short_name(merged) == "model.layers.N.mlp.gate_proj+up_proj.weight.codes"
    assert short_name("lm_head.weight") == "lm_head.weight"
    assert printable("a\x1b[31m\nü") == "a\\x1b[31m\\nü"
