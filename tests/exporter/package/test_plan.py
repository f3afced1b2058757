"""What `export --dry-run` says, against what exports write; and a disk that is too small, said at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from support.checkpoints import OLMO3, make_checkpoint
from support.hub import REPOSITORY, local_hub

from olmo2_export import cli
from olmo2_export.catalog import exported, find
from olmo2_export.config import ModelConfig
from olmo2_export.engine.options import MAX_CACHE_LENGTH
from olmo2_export.graphs.predicted import cache_bytes_per_token
from olmo2_export.package import graph_sizes, plan
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.package.trt_variants import TrtOptions, write_trt_variant
from olmo2_export.package.variants import cache_spec
from olmo2_export.package.weight_choice import Options
from olmo2_export.summary.plan_text import plan_lines
from olmo2_export.weights import stored_tensors
from olmo2_export.weights.checkpoint import open_checkpoint, open_headers
from olmo2_export.weights.stored_names import weight_shapes
from runtimes.errors import CheckpointError, ResourceError

GRAPH, TEXTS = 0.04, 0.06
"""how far a predicted ONNX file, and texts with a manifest, may be from the real ones, relative"""

SHAPES = {
    "padded": {"num_hidden_layers": 4, "hidden_size": 272, "intermediate_size": 1060, "vocab_size": 1031},
    "tied": {"num_hidden_layers": 1, "tie_word_embeddings": True},
    "biased": {"num_hidden_layers": 3, "attention_bias": True, "vocab_size": 997},
}
"""tensors beyond a page, whose padding depends on the order; one layer; more tensors in a layer"""


@pytest.fixture(scope="module", params=list(SHAPES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = SHAPES[request.param]
    sizes = {"num_attention_heads": 17, "num_key_value_heads": 17} if "hidden_size" in fields else {}
    folder = tmp_path_factory.mktemp("plan") / request.param
    return make_checkpoint(folder, **{**fields, **sizes})


pytestmark = pytest.mark.usefixtures("hardly_judged")


def close(predicted: int, real: int, within: float) -> bool:
    return abs(predicted - real) <= within * real


def test_every_variant_is_predicted_to_the_byte(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    names = exported()
    said = plan_export(opened, variants=names)
    manifest = export(opened, tmp_path / "out", variants=names)
    assert [variant.name for variant in said.variants] == names
    for variant in said.variants:
        entry = manifest.variants[variant.name]
        assert variant.cache_bytes_per_token == cache_bytes_per_token(entry.kv_cache)
        written = {entry.graph: entry.data[0]}
        if entry.prefill is not None:
            written[entry.prefill.graph] = entry.prefill.data[0]
        assert list(variant.graphs)[: len(written)] == list(written)  # the gate may have left the prefill graph out
        for path, data in written.items():
            files = variant.graphs[path]
            assert files.data == manifest.files[data].size, path
            assert close(files.graph, manifest.files[path].size, GRAPH), path
        if entry.quantization is not None:
            assert abs(variant.bits_per_weight - entry.quantization.bits_per_weight) < 0.3  # scales of 16 bits on GPUs
    texts = [path for path in manifest.files if not path.startswith("onnx/")]
    real = sum(manifest.files[path].size for path in texts) + (tmp_path / "out" / "manifest.json").stat().st_size
    assert close(said.texts, real, TEXTS)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("q4", Options(kv_caches=("int8",))),
        ("q8", Options(kv_caches=("float32", "int4"), prefill_graph=False)),
        ("q4", Options(block_size=32, recipe="rtn", prefill_graph=False, kv_caches=("float32",))),
    ],
)
def test_options_are_predicted_too(tiny_checkpoint: Path, tmp_path: Path, variant: str, options: Options) -> None:
    opened = open_checkpoint(str(tiny_checkpoint))
    said = plan_export(opened, variants=[variant], options=options).variants[0]
    manifest = export(opened, tmp_path / "out", variants=[variant], options=options)
    entry = manifest.variants[variant]
    assert said.graphs[entry.graph].data == manifest.files[entry.data[0]].size
    assert said.cache_bytes_per_token == cache_bytes_per_token(entry.kv_cache)
    assert entry.quantization is not None
    assert said.bits_per_weight == pytest.approx(entry.quantization.bits_per_weight, rel=1e-9)


def test_layers_that_keep_a_window_alone_are_counted_so(tmp_path: Path) -> None:
    """Runners of q4 give back what no later token sees; those of the other variants keep all, and manifests say so."""
    opened = open_headers(str(make_checkpoint(tmp_path / "model", **OLMO3)))
    config = ModelConfig.from_json(opened.folder / "config.json")
    kept = {name: cache_spec(config, find(name), "float32").windows for name in exported()}
    assert kept == {"fp32": (), "q4": (8, 8, 8, 0), "q8": (8, 8, 8, 0), "bf16": (), "fp16": (), "q4f16": ()}
    said = plan_export(opened, variants=["fp32", "q4"])
    a_layer = 2 * 2 * 16 * 4  # keys and values of a token
    assert [v.cache_bytes for v in said.variants] == [4 * 256 * a_layer, (256 + 3 * 8) * a_layer]
    lines = list(plan_lines(said))
    fp32, q4 = (next(line for line in lines if line.startswith(f"{name}: ")) for name in ("fp32", "q4"))
    assert fp32.endswith("; KV cache 1.0 kB per token")
    assert q4.endswith("; KV cache 1.0 kB per token, 71.7 kB for all, as 3 layers keep a window alone")


def test_a_budget_is_an_upper_bound(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(tiny_checkpoint))
    options = Options(recipe="mixed", size_budget=7.0, prefill_graph=False, kv_caches=("float32",))
    said = plan_export(opened, variants=["q4"], options=options).variants[0]
    manifest = export(opened, tmp_path / "out", variants=["q4"], options=options)
    real = manifest.files["onnx/model_q4.onnx_data"].size
    assert said.at_most
    assert real <= said.graphs["onnx/model_q4_shared.onnx"].data <= 1.05 * real


def test_distilling_takes_files_and_time(tiny_checkpoint: Path) -> None:
    opened = open_checkpoint(str(tiny_checkpoint))
    gptq, distilled, longer = (
        plan_export(opened, variants=["q4"], options=options)
        for options in (
            Options(recipe="gptq"),
            Options(recipe="distill"),
            Options(recipe="distill", distill_steps=1_000_000),
        )
    )
    shapes = weight_shapes(ModelConfig.from_json(tiny_checkpoint / "config.json"))
    padded = sum(rows * -(-columns // 128) * 128 for rows, columns in shapes.values())  # some blocks are smaller
    extra = distilled.disk - gptq.disk - 4 * 272 * 256 * 96
    assert 0.7 * 8 * padded < extra <= 8 * padded
    assert longer.disk == distilled.disk
    assert longer.costs.seconds > distilled.costs.seconds + 1
    assert gptq.costs.seconds < distilled.costs.seconds


def test_graphs_for_engines_are_predicted_to_the_byte(tmp_path: Path) -> None:
    assert graph_sizes.STATIC_CACHE == MAX_CACHE_LENGTH
    sizes = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 512}
    opened = open_checkpoint(str(make_checkpoint(tmp_path / "model", num_hidden_layers=3, **sizes)))
    engines = {engine.precision: engine for engine in plan_export(opened).engines}
    assert engines.keys() == {"bf16", "fp16", "fp32", "int4", "int8", "fp8"}
    manifest = export(opened, tmp_path / "out")
    for precision in ("bf16", "fp32", "int4", "int8"):
        folder = tmp_path / precision
        folder.mkdir()
        write_trt_variant(tmp_path / "out", manifest, folder, TrtOptions(precision, 256))
        data = next(folder.glob("*.onnx_data")).stat().st_size
        assert engines[precision].plan == data, precision
        graph = next(folder.glob("*.onnx")).stat().st_size
        assert close(engines[precision].graph - data, graph, GRAPH), precision


def test_nothing_but_headers_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    for name in ("read_tensor", "read_rows", "_pieces"):
        monkeypatch.setattr(stored_tensors, name, refuse)
    out = tmp_path / "out"
    assert cli.main(["export", str(tiny_checkpoint), "--dry-run", "--json", "--variant", "q4", "--out", str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["variants"][0]["name"] == "q4"
    assert said["package"] == said["variants"][0]["nbytes"] + said["texts"]
    assert said["disk"] > said["package"]
    assert said["costs"]["memory"] > 100e6
    assert said["costs"]["seconds"] > 1
    assert not out.exists()
    assert cli.main(["export", str(tiny_checkpoint), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "KV cache 768 B per token" in printed  # 2 x 3 layers x 2 heads x 16 x 4 bytes
    assert "engine int8" in printed
    assert "NOT ENOUGH" not in printed


def test_what_a_dry_run_needs(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tiny_checkpoint)]) == 2
    assert "--out: missing" in capsys.readouterr().err
    assert cli.main(["export", str(tiny_checkpoint), "--out", "x", "--json"]) == 2
    assert "--json: only with --dry-run" in capsys.readouterr().err


def test_headers_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 161}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight: shape \[160, 96\], expected \[161, 96\]"):
        plan_export(open_headers(str(folder)))


def test_a_disk_too_small_is_said_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, usage = open_checkpoint(str(tiny_checkpoint)), namedtuple("usage", "total used free")
    said = plan_export(opened, variants=["fp32", "q4"])
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage(1, 0, said.disk - 1))
    monkeypatch.setattr(type(opened), "validate", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ResourceError, match=rf"needs {said.disk:,} bytes \(model.onnx .*{said.disk - 1:,} are free"):
        export(opened, tmp_path / "out", variants=["fp32", "q4"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage(1, 0, said.disk))
    export(opened, tmp_path / "out", variants=["fp32", "q4"])


def test_of_a_hub_only_texts_and_headers_are_read(tmp_path: Path) -> None:
    served = make_checkpoint(tmp_path / "served", shards=2, vocab_size=60_000)
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "olmo2_export", "export", REPOSITORY, "--dry-run", "--json"]
    with local_hub(served) as hub:
        done = subprocess.run(
            command, env=environment | {"HF_ENDPOINT": hub.url}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["source_bytes"] == open_checkpoint(str(served)).nbytes
    shards = [wanted for name, wanted in hub.downloads if name.endswith(".safetensors")]
    assert shards
    assert set(shards) == {"bytes=0-100000"}
    kept = [path.name for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert kept == []
