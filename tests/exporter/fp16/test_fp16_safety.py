"""What overflows float16 is named, the islands are the smallest that help, and the graph with them is finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support import fp16_models
from support.cases import large
from support.fp16_models import State, changed
from support.matrix import refused
from torch import nn
from transformers import Olmo2ForCausalLM

from olmo2_export.architecture import operations
from olmo2_export.cli import main
from olmo2_export.config import ModelConfig
from olmo2_export.fp16.safety import LIMIT, Safety, measure_safety, safety_tokens
from olmo2_export.fp16.simulate import simulate
from olmo2_export.fp16.values import Float32Islands, islands_of
from olmo2_export.fuse import DEVICE, op_counts
from olmo2_export.fuse.float32_islands import float32_islands
from olmo2_export.graphs.device import device_graph
from olmo2_export.graphs.files import save_graph
from olmo2_export.graphs.shared import shared_graph
from olmo2_export.graphs.trace import trace
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions, write_trt_variant
from olmo2_export.package.weight_choice import Options
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain
from olmo2_export.truth.torch_layers import reference_logits
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.views.static_forms import rounded_form
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import open_runner
from runtimes.errors import FailedError, FusionError, NumericError
from runtimes.package import open_package

L0, L1, L2 = (f"model.layers.{i}." for i in range(3))
STREAM = [f"{p}{n}_residual" for p in (L0, L1, L2) for n in ("attention", "mlp")]
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")

# model -> tensors that must stay float32, and all operations that compute in float32 for it
ISLANDS: dict[str, tuple[set[str], set[str]]] = {
    "safe": (set(), set()),
    "scores": (set(), set()),
    "product": ({f"{L0}mlp.product"}, {f"{L0}mlp.product", f"{L0}mlp.down_proj"}),
    "margin": ({f"{L1}mlp.down_proj"}, {f"{L1}mlp.down_proj", f"{L1}post_feedforward_layernorm"}),
    "weight": ({f"{L2}self_attn.o_proj.weight"}, {f"{L2}self_attn.o_proj"}),
    "bias": (
        {f"{L0}self_attn.o_proj.bias", f"{L0}self_attn.o_proj"},
        {f"{L0}self_attn.o_proj", f"{L0}post_attention_layernorm"},
    ),
    "residual": (
        {f"{L1}post_feedforward_layernorm", *STREAM[3:]},
        {f"{L1}post_feedforward_layernorm", *STREAM[3:], *(L2 + linear for linear in LINEARS), "model.norm"},
    ),
    "embedding": (
        {"model.embed_tokens.weight", "model.embed_tokens", *STREAM},
        {"model.embed_tokens", *STREAM, *(p + n for p in (L0, L1, L2) for n in LINEARS), "model.norm"},
    ),
}
IDS = np.random.default_rng(0).integers(0, 131, 256, dtype=np.int64)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The checkpoint of a name in `fp16_models`, made once."""
    root, made = tmp_path_factory.mktemp("fp16"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            change: Callable[[State], None] = getattr(fp16_models, name)
            made[name] = changed(root / name, change, attention_bias=name == "bias")
        return made[name]

    return folder


def measured(folder: Path, **options: Any) -> Safety:
    config = ModelConfig.from_json(folder / "config.json")
    return measure_safety(open_checkpoint(str(folder)), config, tokens=256, **options)


def test_the_numbers_are_those_of_transformers(folders: Folders) -> None:
    """Under the names of its modules; the residual stream is the output of a layer."""
    folder = folders("residual")
    found = measured(folder)
    (ids,), origin = safety_tokens(
        open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json"), None, 256
    )
    assert origin == "random ids"
    model: Any = Olmo2ForCausalLM.from_pretrained(folder)
    largest: dict[str, float] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            largest[name] = float(first.abs().max())

        return hook

    names = [name for name, module in model.named_modules() if not list(module.children())]
    for name in [*names, *(f"model.layers.{i}" for i in range(3))]:
        model.get_submodule(name).register_forward_hook(remember(name))
    with torch.no_grad():
        model(torch.from_numpy(ids)[None])
    compared = {f"{n}.mlp_residual" if n.endswith((".0", ".1", ".2")) else n: x for n, x in largest.items()}
    shared = compared.keys() & found.peaks.keys()
    assert len(shared) == 3 * (4 + 2 + 2 + 4 + 1) + 3
    for name in shared:
        assert found.peaks[name].largest == pytest.approx(compared[name], rel=1e-4), name
    for name, weight in model.named_parameters():
        assert found.peaks[name].largest == float(weight.detach().abs().max()), name
    assert found.peaks[f"{L1}mlp_residual"].channel == fp16_models.CHANNEL


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_are_those_and_no_more(folders: Folders, name: str) -> None:
    islands, operations_wide = ISLANDS[name]
    found = measured(folders(name), prove=True)
    assert {i.peak.name for i in found.islands} == islands
    config = ModelConfig.from_json(folders(name) / "config.json")
    assert found.wide.operations(operations(config)) == operations_wide
    assert found.safe == (not islands)
    assert found.blocked == ()
    assert found.bare is not None
    assert found.held is not None
    assert found.held.finite
    if name != "scores":  # a softmax of scores that large is all or nothing, and float16 turns some of it over
        assert found.held.failures == ()
        assert found.held.kl_mean < 5e-5
    if name in ("safe", "scores", "margin"):
        assert found.bare.finite
        assert all(i.breaks is None for i in found.islands)  # for the margin alone
    else:
        assert not found.bare.finite
        assert found.bare.bad_positions > 0
        for island in found.islands:  # each is needed: without it alone, that very operation is not finite any more
            assert island.breaks == island.operation.name, island.peak.name
            assert island.peak.largest > LIMIT


def test_the_numbers_of_each_overflow(folders: Folders) -> None:
    assert measured(folders("weight")).peaks[f"{L2}self_attn.o_proj.weight"].largest == 7e4
    found = measured(folders("product")).peaks
    gate, up, product = (found[f"{L0}mlp.{n}"].largest for n in ("gate_proj", "up_proj", "product"))
    assert max(gate, up) < 2000
    assert LIMIT < product < gate * up
    near = measured(folders("margin"))
    assert 30000 < near.peaks[f"{L1}mlp.down_proj"].largest < LIMIT
    assert "beyond the margin" in near.islands[0].reason
    assert measured(folders("margin"), margin=LIMIT).safe
    stream = measured(folders("residual")).islands[1]
    assert stream.peak.name == f"{L1}mlp_residual"
    assert stream.peak.largest > 8e4
    assert f"read by {L2}self_attn.q_proj, {L2}self_attn.k_proj" in stream.reason


def test_scores_are_kept_by_the_kernel_and_would_break_without(folders: Folders) -> None:
    folder = folders("scores")
    found = measured(folder)
    assert [p.name for p in found.kept_anyway] == [f"{L1}self_attn.scores"]
    assert found.kept_anyway[0].largest > 5e5
    checkpoint, config = open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json")
    sequences, _ = safety_tokens(checkpoint, config, None, 256)
    (kept,) = simulate(checkpoint, config, sequences, [Float32Islands()])
    (rounded,) = simulate(checkpoint, config, sequences, [Float32Islands()], round_scores=True)
    assert kept.finite
    assert rounded.first_not_finite == f"{L1}self_attn.scores"
    assert rounded.bad_positions > 200


def test_squares_inside_every_norm_are_seen(folders: Folders) -> None:
    folder = folders("residual")
    found = measured(folder)
    norms = [row for row in operations(ModelConfig.from_json(folder / "config.json")) if row.kind == "rms_norm"]
    assert [p.name for p in found.squares] == [f"{row.name}.squares" for row in norms]
    assert [p.largest for p in found.squares] == [found.peaks[row.reads[0]].largest ** 2 for row in norms]
    assert found.kept_anyway[-1].name == "model.norm.squares"
    assert found.kept_anyway[-1].largest > 6.4e9  # of 8e4


def test_what_the_attention_reads_cannot_be_an_island(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(folders("values"))
    assert {p.name for p in found.blocked} == {f"{L1}self_attn.v_proj", f"{L1}self_attn.attention"}
    out = tmp_path / "out"
    assert main(["fp16", str(folders("values")), "--tokens", "256", "--apply", "--out", str(out)]) == 1
    assert not out.exists()
    said = capsys.readouterr().out
    assert "export it with --variant bf16" in said
    assert json.loads(said.splitlines()[-1])["applied"] is False
    with pytest.raises(FailedError, match=r"use bf16.*no float32 kernel"):
        export(open_checkpoint(str(folders("values"))), out, variants=("fp16",), options=Options(fp16_islands=True))


@cache
def shared_of(config: ModelConfig) -> ir.Model:
    """Trace once for all weights of a shape."""
    return shared_graph(trace(config), operations(config), DEVICE)


def graph_logits(folder: Path, wide: Float32Islands, tmp_path: Path) -> np.ndarray:
    """Run the graph that is exported, every result rounded to float16 where the graph says so."""
    checkpoint, config = open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json")
    model, _, _ = device_graph(shared_of(config), checkpoint, config, ir.DataType.FLOAT16, wide=wide)
    save_graph(model, tmp_path / "model.onnx")
    save_graph(rounded_form(ir.load(tmp_path / "model.onnx")), tmp_path / "rounded.onnx")
    session = ort.InferenceSession(tmp_path / "rounded.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS[None], "attention_mask": np.ones_like(IDS[None])}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0][0]
    return logits


@pytest.mark.parametrize("name", ["residual", "product", "weight", "embedding", "bias"])
def test_the_graph_itself_turns_into_exclamation_marks_without_islands(
    folders: Folders, tmp_path: Path, name: str
) -> None:
    """The exported graph, not a model of it: token 0, which OLMo 2 writes as "!", is what argmax makes of NaN."""
    bare = graph_logits(folders(name), Float32Islands(), tmp_path)
    broken = ~np.isfinite(bare).all(axis=1)
    assert broken.sum() > 100
    assert (bare[broken].argmax(axis=1) == 0).all()
    wide = islands_of(ISLANDS[name][0])
    held = graph_logits(folders(name), wide, tmp_path)
    assert np.isfinite(held).all()
    config = ModelConfig.from_json(folders(name) / "config.json")
    (exact,) = reference_logits(open_checkpoint(str(folders(name))), config, [IDS])
    assert np.mean((held - exact) ** 2) < 1e-4 * exact.var()
    for value in sorted(wide.values)[:2]:  # and each of them is needed there too
        assert not np.isfinite(graph_logits(folders(name), wide.without(value, weight=False), tmp_path)).all(), value


@pytest.mark.usefixtures("little_text")
def test_apply_writes_a_package_that_verifies(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = folders("residual"), tmp_path / "out"
    command = ["fp16", str(folder), "--tokens", "256", "--apply", "--out", str(out)]
    assert main([*command, "--variant", "fp16", "--variant", "q4f16"]) == 0
    said = capsys.readouterr().out
    assert "OVERFLOWS" in said
    assert f"residual stream, {STREAM[3]} .. {STREAM[5]} (3 tensors)" in said
    document = json.loads(said.splitlines()[-1])
    assert document["applied"] is True
    assert document["safe"] is False
    assert {island["name"] for island in document["islands"]} == ISLANDS["residual"][0]
    assert document["without_islands"]["bad_positions"] > 0
    assert document["with_islands"]["finite"] is True
    assert document["largest"]["name"] in ISLANDS["residual"][0]

    variants = open_package(out).manifest.variants
    for variant in variants.values():
        assert variant.float32_islands.keys() == ISLANDS["residual"][0]
        assert "read by model.norm" in variant.float32_islands[f"{L2}mlp_residual"]
    assert variants["q4f16"].op_counts["com.microsoft::MatMulNBits"] == 7 * 3 + 1 - 5
    assert variants["q4f16"].op_counts["MatMul"] == 2  # q, k and v as one; gate and up
    assert f"float32 {L1}mlp_residual: max" in " ".join(plain(describe(out)).split())
    model = ir.load(out / "onnx/model_fp16.onnx")
    wide = [n.op_type for n in model.graph if n.op_type != "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT]
    assert wide == [
        "ReduceSum",  # the mask's
        *("RMSNormalization", "Add"),  # layer 1
        *("MatMul", "Split", "Add", "MatMul", "Split", "Add"),  # layer 2
        *("Slice", "RMSNormalization", "TopK"),
    ]
    assert {v.dtype for v in model.graph.inputs if str(v.name).startswith("past")} == {ir.DataType.FLOAT16}
    (report,) = verify(out, open_checkpoint(str(folder)), variants=["fp16"], longest=64)
    assert report.passed
    assert max(case.error_ratio for case in large(report)) < 1.3
    assert report.own_error_of.startswith("this project's layers, rounded as transformers rounds")
    assert "err/torch: in units of the error of this project's layers" in format_reports([report])
    with open_runner(out, variant="q4f16", threads=1) as runner:
        assert np.isfinite(runner.prefill([[1, 2, 3, 4, 5]])[0]).all()

    assert main([*command, "--variant", "fp16"]) == 2  # it is there
    assert main([*command, "--force"]) == 0
    assert [*open_package(out).manifest.variants] == ["fp16"]


@pytest.mark.usefixtures("little_text", "short_rows")
def test_verify_sees_an_island_that_is_missing(folders: Folders, tmp_path: Path) -> None:
    """The CPU's kernels round to float16 between operators, so that an unprotected residual stream shows even there."""
    folder, out = folders("residual"), tmp_path / "out"
    found = measured(folder)
    less = Safety(found.tokens, found.tokens_from, found.margin, found.peaks, found.islands[:2], ())
    options = Options(fp16_islands=True, fp16_safety=less)
    export(open_checkpoint(str(folder)), out, variants=("fp16",), options=options)
    (report,) = verify(out, open_checkpoint(str(folder)), variants=["fp16"], longest=64)
    assert not report.passed


def test_an_export_that_would_overflow_is_refused(
    folders: Folders, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, out = folders("product"), tmp_path / "out"
    for name in ("fp16", "q4f16"):
        with pytest.raises(
            FailedError, match=rf"variant {name}: 1 tensors.*{L0}mlp\.product .*use bf16.*islands"
        ) as caught:
            export(open_checkpoint(str(folder)), out, variants=(name,))
        remedy = str(caught.value).partition("; ")[2]  # before it stand numbers, which another CPU sums otherwise
        refused(request, f"`{name}` where activations overflow", remedy)
    assert main(["export", str(folder), "--out", str(out), "--variant", "fp16"]) == 1
    assert not out.exists()
    assert main(["export", str(folder), "--out", str(out), "--variant", "fp16", "--fp16-islands"]) == 0
    assert open_package(out).manifest.variants["fp16"].float32_islands.keys() == ISLANDS["product"][0]
    assert main(["export", str(folder), "--out", str(tmp_path / "bf16"), "--variant", "bf16", "--fp16-islands"]) == 2


def test_a_safe_model_is_exported_as_ever(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fp16", str(folders("safe")), "--tokens", "256"]) == 0
    said = capsys.readouterr().out
    assert "fits float16" in said
    assert json.loads(said.splitlines()[-1])["islands"] == []
    export(open_checkpoint(str(folders("safe"))), tmp_path / "out", variants=("fp16",))
    assert open_package(tmp_path / "out").manifest.variants["fp16"].float32_islands == {}


def test_the_demo_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where on the text: the token is named. A margin of 100 calls a model unsafe that is not."""
    text = tmp_path / "text.txt"
    text.write_text("And Moses said unto the people, Fear ye not, stand still. " * 60, encoding="utf-8")
    assert main(["fp16", "demo", "--text", str(text), "--tokens", "256", "--margin", "100"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["tokens"] == 256
    assert document["tokens_from"] == "text"
    assert 100 < document["largest"]["largest"] < 2000
    assert document["largest"]["token"]
    assert document["without_islands"]["finite"] is True
    assert document["with_islands"]["kl_mean"] < 5e-5
    assert document["islands"]
    assert all(island["first_not_finite_without"] is None for island in document["islands"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--apply"], "--apply and --out DIR go together"),
        (["--out", "somewhere"], "--apply and --out DIR go together"),
        (["--force"], "--variant and --force are of --apply"),
        (["--variant", "fp16"], "--variant and --force are of --apply"),
        (["--variant", "bf16"], "invalid choice"),
        (["--margin", "70000"], "no more than 65504"),
        (["--margin", "0"], "more than 0"),
        (["--tokens", "100"], "expected 256 or more"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--revision", "main"], "revision"),
    ],
)
def test_usage(folders: Folders, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fp16", str(folders("safe")), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_not_finite_in_float32_is_no_matter_of_float16(tmp_path: Path) -> None:
    def huge(state: State) -> None:
        state["model.layers.1.mlp.up_proj.weight"] *= 1e38

    with pytest.raises(NumericError, match=r"up_proj: not finite in float32|product: not finite in float32"):
        measured(changed(tmp_path / "huge", huge))


def test_the_pass_refuses_what_cannot_be_wide(folders: Folders) -> None:
    config = ModelConfig.from_json(folders("safe") / "config.json")
    shared, rows = shared_of(config).clone(), operations(config)
    before = op_counts(shared)
    assert float32_islands(shared, rows, (), ()) == 0
    assert op_counts(shared) == before
    with pytest.raises(FusionError, match=r"no nodes of model\.layers\.7\.mlp\.product"):
        float32_islands(shared.clone(), rows, ["model.layers.7.mlp.product"], ())
    with pytest.raises(FusionError, match="GroupQueryAttention, would read float32"):
        float32_islands(shared.clone(), rows, [f"{L1}self_attn.v_proj"], [f"{L1}self_attn.v_proj"])
    assert float32_islands(shared, rows, [f"{L1}mlp.product", f"{L1}mlp.down_proj"], [f"{L1}mlp.product"]) == 2
    casts = op_counts(shared)["Cast"] - before["Cast"]
    assert casts == 3  # SiLU and up on the way in, what down_proj gives on the way out


def test_a_tensorrt_graph_that_would_overflow_is_refused(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(open_checkpoint(str(folders("product"))), out)
    with pytest.raises(
        FailedError, match=rf"precision fp16: 1 tensors.*{L0}mlp\.product 5.*use bf16, which has the range of float32$"
    ):
        write_trt_variant(out, open_package(out).manifest, tmp_path / "trt", TrtOptions("fp16", 64))
