"""A sweep gives what exports and evaluations one by one give, writes only weights, and goes on where it ended."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import full_tensorrt
from support.checkpoints import make_checkpoint
from support.hub import REPOSITORY, commit_of, local_hub, point_to

from olmo2_export import cli
from olmo2_export.evaluate import revision_packages, revisions
from olmo2_export.evaluate.evaluate import evaluate, token_text
from olmo2_export.evaluate.models import open_package_model, open_torch_model
from olmo2_export.evaluate.revision_packages import open_revision
from olmo2_export.evaluate.revisions import RevisionResult, in_order, sweep
from olmo2_export.evaluate.revisions_plot import draw
from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.verbs.sweep import table
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import BackendError, CheckpointNotFoundError, ConfigError, FusionError, UsageError
from runtimes.package import open_package
from runtimes.sealed import hash_file

NAMES = [f"stage1-step{step}-tokens{step // 500}B" for step in (1000, 2000, 10000)]
SHAPE = {"num_hidden_layers": 2, "num_key_value_heads": 6, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three revisions of one shape, random weights, a folder each."""
    root = tmp_path_factory.mktemp("revisions")
    for seed, name in enumerate(NAMES):
        make_checkpoint(root / name, seed=seed, **SHAPE)
    return root


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 131, 700))
    return path


@pytest.fixture(scope="module")
def swept(folder: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RevisionResult], Path]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return sweep(str(folder), NAMES[::-1], out, text=ids, context=64), out


def test_each_is_what_an_export_of_its_own_gives(
    swept: tuple[list[RevisionResult], Path], folder: Path, ids: Path, tmp_path: Path
) -> None:
    results, out = swept
    assert [r.revision for r in results] == NAMES  # by their steps
    assert [r.step for r in results] == [1000, 2000, 10000]
    assert [r.tokens_b for r in results] == [2, 4, 20]
    packages = []
    for result in results:
        package, checkpoint = tmp_path / result.revision, open_checkpoint(str(folder / result.revision))
        export(checkpoint, package)
        tokens = token_text(package, ids)
        with open_package_model(package) as tested, open_torch_model(checkpoint) as reference:
            references = [reference]
            found = evaluate(tested, tokens, references=references, context=64, progress=False)
        assert result.perplexity == found.perplexity.value
        assert result.perplexity_se == found.perplexity.se
        assert result.pytorch_perplexity == pytest.approx(found.comparisons[0].perplexity.value, rel=1e-6)
        assert result.kl_mean_nats < 1e-10
        assert result.top1_share == 1.0
        assert result.graph_sha256 == hash_file(package / "onnx/model.onnx").sha256
        packages.append(package)
    assert len({r.perplexity for r in results}) == 3
    assert len({r.graph_sha256 for r in results}) == 1

    with open_package_model(packages[1]) as before, open_package_model(packages[2]) as this:
        found = evaluate(this, token_text(packages[2], ids), references=[before], context=64, progress=False)
    assert results[0].change_kl_mean_nats is None
    assert results[2].previous == NAMES[1]
    assert results[2].change_kl_mean_nats == found.comparisons[0].kl.value > 0.1

    # What is left is the last package, byte for byte what an export writes.
    (left,) = (out / "packages").iterdir()
    assert open_package(left).manifest.files == open_package(packages[2]).manifest.files
    for name in open_package(left).manifest.files:
        assert hash_file(left / name) == hash_file(packages[2] / name)


def test_only_weights_are_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, alone = (tmp_path / name for name in ("first", "second", "alone"))
    export(open_checkpoint(str(folder / NAMES[0])), first)
    export(open_checkpoint(str(folder / NAMES[1])), alone)

    def no_graph(*_: object) -> None:
        raise AssertionError("a graph was written")

    monkeypatch.setattr("olmo2_export.package.variants.save_graph", no_graph)
    export(open_checkpoint(str(folder / NAMES[1])), second, graphs_of=first)
    assert (second / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()
    assert hash_file(second / "onnx/model.onnx") == hash_file(first / "onnx/model.onnx")
    assert hash_file(second / "onnx/model.onnx_data") != hash_file(first / "onnx/model.onnx_data")

    other = make_checkpoint(tmp_path / "other", **SHAPE | {"intermediate_size": 192})
    with pytest.raises(FusionError, match="does not fit"):
        export(open_checkpoint(str(other)), tmp_path / "third", graphs_of=first)


def test_a_quantised_variant_is_quantised_anew(folder: Path, ids: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    results = sweep(str(folder), NAMES[:2], out, variant="q4", text=ids, context=64, max_tokens=100)
    options = Options(kv_caches=("float32",))
    export(open_checkpoint(str(folder / NAMES[1])), alone, variants=["q4"], options=options)
    assert open_package(out / "packages" / NAMES[1]).manifest == open_package(alone).manifest
    assert results[0].graph_sha256 == results[1].graph_sha256
    assert all(1e-5 < r.kl_mean_nats < 0.5 for r in results)
    assert results[1].evaluated_tokens == 99


def test_an_interrupted_sweep_loses_nothing(
    folder: Path, ids: Path, tmp_path: Path, swept: tuple[list[RevisionResult], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, asked = revisions.evaluate, []

    def counted(*arguments: object, **options: object) -> object:
        asked.append(None)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(revisions, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(str(folder), NAMES, out, text=ids, context=64)
    assert [r["revision"] for r in json.loads((out / "sweep.json").read_text())["revisions"]] == NAMES[:1]

    def same(results: list[RevisionResult]) -> list[RevisionResult]:
        return [dataclasses.replace(r, export_s=0.0, evaluate_s=0.0) for r in results]

    assert same(sweep(str(folder), NAMES, out, text=ids, context=64)) == same(swept[0])
    assert len(asked) == 4
    assert same(sweep(str(folder), NAMES, out, text=ids, context=64)) == same(swept[0])
    assert len(asked) == 4
    with pytest.raises(UsageError, match=r"other settings \(context_tokens\)"):
        sweep(str(folder), NAMES, out, text=ids, context=32)


def test_revisions_of_the_hub(
    folder: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = {name: folder / name for name in NAMES}
    command = ["sweep", REPOSITORY, "--revisions", *NAMES[:2], "--out", str(tmp_path / "out")]
    command += ["--text", str(ids), "--context", "64", "--stride", "32", "--max-tokens", "200", "--device", "cpu"]
    with local_hub(folder / NAMES[0], served) as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        assert cli.main(command) == 0
    said = capsys.readouterr()
    document = json.loads(said.out.splitlines()[-1])
    assert [r["commit"] for r in document["revisions"]] == [commit_of(name) for name in NAMES[:2]]
    assert [r["evaluated_tokens"] for r in document["revisions"]] == [199, 199]
    assert "evaluating fp32" in said.err  # the progress bar
    assert NAMES[1] in said.out
    for name in document["files"]:
        assert Path(name).stat().st_size > 10_000


def test_the_command_line(folder: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--variant", "q4", "--recipe", "rtn", "--no-prefill-graph", "--low-memory", "--out", str(out)]
    begun = ["sweep", str(folder), "--text", str(ids), "--max-tokens", "100", *options]
    command = [*begun, "--hidden-states", "0,last", "--inputs-embeds"]
    assert cli.main([*command, "--revisions", NAMES[0]]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["settings"]["options"]["recipe"] == "rtn"
    manifest = open_package(out / "packages" / NAMES[0]).manifest
    assert manifest.variants["q4"].prefill is None
    assert (manifest.model.hidden_states, manifest.model.inputs_embeds) == ((0, 2), True)
    with (out / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["perplexity"]) == document["revisions"][0]["perplexity"]
    for arguments, said in (
        ([NAMES[0], NAMES[0]], "none of them twice"),
        (["a/b", "a_b"], "the names differ in signs"),
        (["absent"], "absent"),
    ):
        assert cli.main([*command, "--revisions", *arguments]) == 2
        assert said in capsys.readouterr().err
    for other in ([], ["--hidden-states", "0,last"], ["--hidden-states", "0", "--inputs-embeds"]):
        assert cli.main([*begun, *other, "--revisions", NAMES[0]]) == 2
        assert "a sweep with other settings (options)" in capsys.readouterr().err
    assert cli.main(["sweep", str(folder), "--revisions", NAMES[0], "--max-tokens", "0"]) == 2


def test_another_shape_or_tokenizer_is_refused(folder: Path, ids: Path, tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    for name in ("step1", "step2", "step3"):
        make_checkpoint(root / name, **SHAPE | {"rms_norm_eps": 1e-5 if name == "step2" else 1e-6})
    (root / "step3" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"norm_eps 1e-05 \(1e-06\)"):
        sweep(str(root), ["step1", "step2"], tmp_path / "out", text=ids, context=64, max_tokens=20)
    with pytest.raises(ConfigError, match=r"another tokenizer\.json"):
        sweep(str(root), ["step1", "step3"], tmp_path / "out", text=ids, context=64, max_tokens=20)
    with pytest.raises(CheckpointNotFoundError):
        open_revision(str(folder), "step7")
    with pytest.raises(UsageError, match="only Hub ids have revisions"):
        open_revision("demo", "step7")


def test_revisions_of_one_stage_are_taken_by_their_steps() -> None:
    assert in_order(["step10", "step9", "step100"]) == ["step9", "step10", "step100"]
    mixed = ["stage2-ingredient1-step1000-tokens3B", "stage1-step5000-tokens11B"]
    assert in_order(mixed) == mixed
    assert in_order(["main", "step1"]) == ["main", "step1"]


def test_the_drawing(swept: tuple[list[RevisionResult], Path], tmp_path: Path) -> None:
    """Two drawings are the same, show points in each colour, and say what the axes are."""
    results = swept[0]
    png, svg = draw(results, "a model", "fp32", tmp_path / "a")
    again = draw(results, "a model", "fp32", tmp_path / "b")
    assert [p.read_bytes() for p in (png, svg)] == [p.read_bytes() for p in again]
    assert svg.read_text().count("<path") > 50
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert image.size == (1200, 1350)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(axis=1).sum() > 200
    unnamed = [dataclasses.replace(r, step=None) for r in results[:1]]
    assert draw(unnamed, "a model", "fp32", tmp_path / "c")[0].stat().st_size > 10_000


# Engines


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Full TensorRT on a GPU of 9.0, as far as it is built with; what runs instead is its graph, on the CPU."""

    def opened(package: Path, *, variant: str, backend: str, device: None) -> object:
        assert (backend, device) == ("trt", None)
        return open_package_model(package, variant=variant)

    monkeypatch.setattr(revisions, "open_package_model", opened)
    monkeypatch.setattr(revision_packages, "load_tensorrt", lambda _: SimpleNamespace(version=full_tensorrt.VERSION))
    return full_tensorrt.pretend_installed(monkeypatch, revision_packages)


def test_engines_of_a_sweep_are_built_once_and_refitted(
    worker: list[Any], folder: Path, ids: Path, tmp_path: Path, swept: tuple[list[RevisionResult], Path]
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"variant": "trt_fp16", "backend": "trt", "text": ids, "context": 64}
    results = sweep(str(folder), NAMES, out, **options)
    assert [type(asked).__name__ for asked in worker] == ["CompileRequest", "RefitRequest", "RefitRequest"]
    assert [result.engine for result in results] == ["built", "refitted", "refitted"]
    plans = [out.resolve() / "packages" / name / "trt" / "model_fp16.trt.engine" for name in NAMES]
    assert [asked.refit_from for asked in worker[1:]] == [str(plan) for plan in plans[:2]]
    assert plans[2].read_bytes() == b"refitted"
    engines = open_package(out / "packages" / NAMES[2]).trt
    assert engines is not None
    (engine,) = engines.engines.values()
    assert (engine.max_batch_size, engine.max_cache_length, engine.flags) == (2, 64, ("refit",))
    for result, plain in zip(results, swept[0], strict=True):  # each has the weights of its own revision
        assert result.perplexity == pytest.approx(plain.perplexity, rel=0.01)
        assert result.pytorch_perplexity == plain.pytorch_perplexity
        assert 0 < result.kl_mean_nats < 1e-3
    assert results[2].change_kl_mean_nats == pytest.approx(swept[0][2].change_kl_mean_nats, rel=0.05)

    assert [line.split()[-1] for line in table(results).splitlines()] == ["engine", "built", "refitted", "refitted"]
    assert "engine" not in table(swept[0])

    # It goes on where it ended.
    assert sweep(str(folder), NAMES, out, **options) == results
    assert len(worker) == 3
    with pytest.raises(UsageError, match=r"other settings \(variant, backend\)"):
        sweep(str(folder), NAMES, out, text=ids, context=64)


def test_an_engine_that_is_there_is_kept_and_one_of_another_gpu_or_tensorrt_is_not(
    worker: list[Any], folder: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"variant": "trt_fp16", "backend": "trt", "text": ids, "context": 64, "max_tokens": 100}
    (first,) = sweep(str(folder), NAMES[:1], out, **options)
    assert (first.engine, len(worker)) == ("built", 1)
    plan = out / "packages" / NAMES[0] / "trt" / "model_fp16.trt.engine"

    (out / "sweep.json").unlink()  # as if it had ended before the first was evaluated
    assert sweep(str(folder), NAMES[:1], out, **options)[0].engine is None
    assert len(worker) == 1
    (out / "sweep.json").unlink()
    plan.write_bytes(b"damaged")
    assert sweep(str(folder), NAMES[:1], out, **options)[0].engine == "built"
    assert (plan.read_bytes(), len(worker)) == (b"plan", 2)

    (out / "sweep.json").unlink()
    monkeypatch.setattr(revision_packages, "load_tensorrt", lambda _: SimpleNamespace(version="99.0"))
    assert sweep(str(folder), NAMES[:1], out, **options)[0].engine == "built"
    assert len(worker) == 3
    monkeypatch.setattr(revision_packages, "load_tensorrt", lambda _: SimpleNamespace(version=full_tensorrt.VERSION))

    full_tensorrt.pretend_installed(monkeypatch, revision_packages, gpu="8.9")
    two = sweep(str(folder), NAMES[:2], out, **options)
    assert [result.engine for result in two] == ["built", "built"]  # the first was found in sweep.json
    engines = open_package(out / "packages" / NAMES[1]).trt
    assert engines is not None
    assert engines.engines["trt_fp16"].compute_capabilities == ("8.9",)


def test_what_a_sweep_of_engines_cannot_do_is_said_first(
    worker: list[Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(folder), "--revisions", NAMES[0], "--out", str(tmp_path / "out"), "--backend", "trt"]

    def no_gpu(_: str) -> str:
        raise BackendError("no GPU to ask; backend trt builds on the GPU itself") from BackendError("CUDA finds no GPU")

    for more, said in (
        (["--variant", "q4"], "variant q4: backend trt runs engines of trt_"),
        (["--inputs-embeds"], "backend trt: of an engine recipe and calibration can be chosen"),
        (["--no-prefill-graph"], "backend trt: of an engine recipe and calibration can be chosen"),
        (["--device", "cpu"], "device cpu: backend trt runs on the GPU"),
    ):
        assert cli.main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(revision_packages, "gpu_at_hand", no_gpu)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "a sweep runs its engines on this machine, and it has no GPU (CUDA finds no GPU); without --backend" in error
    assert error.count("\n") == 1
    assert not worker
    assert not (tmp_path / "out").exists()


def test_patterns_on_the_command_line(
    folder: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(folder), "--text", str(ids), "--max-tokens", "60", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--revisions", "stage1-*", "--every", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage1-*: 2 of 3 revisions that match\n")
    document = json.loads(out.splitlines()[-1])
    assert [r["revision"] for r in document["revisions"]] == [NAMES[0], NAMES[2]]
    for arguments, said in (
        (["--revisions", "stage2-*"], f"{folder}: no revision matches 'stage2-*'; it has {NAMES[0]}"),
        (["--revisions", NAMES[0], "--every", "2"], "--every 2: thins out what a pattern"),
    ):
        assert cli.main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
