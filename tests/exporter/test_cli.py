"""olmo2-export as a user runs it: every flag, every exit code, one line per error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from support.checkpoints import make_checkpoint

from olmo2_export import cli
from olmo2_export.atomic import locked
from olmo2_export.catalog import precisions
from olmo2_export.engine import build as engine
from olmo2_export.engine.options import EngineOptions, Profile
from runtimes.errors import UsageError
from runtimes.manifest import EngineBackend
from runtimes.package import open_package


def test_export_verify_inspect(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(tiny_checkpoint), "--out", str(out), "--variant", "fp32"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "13 RMSNormalization, 6 RotaryEmbedding, 3 Attention" in printed.out
    assert "exported tiny to" in printed.out
    assert "peak memory" in printed.out
    assert "checking weights" in printed.err  # the progress bars
    assert "writing model.onnx" in printed.err

    assert cli.main(arguments) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert cli.main([*arguments, "--force"]) == 0
    capsys.readouterr()

    command = ["verify", str(out), "--reference", str(tiny_checkpoint), "--variant", "fp32", "--backend", "ort"]
    assert cli.main([*command, "--longest", "64"]) == 0
    printed = capsys.readouterr()
    assert "verified:" in printed.out
    assert "first of 1, 61, 63, 64 tokens; its cache holds 256" in printed.out
    assert "verifying" in printed.err
    assert cli.main(["inspect", str(out)]) == 0
    described = capsys.readouterr().out
    for expected in ("every file intact", "past_key_values.N.key", "onnx/model.onnx_data", "passed on ort"):
        assert expected in described


def test_a_failed_gate_is_exit_code_1(tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(tiny_package, tmp_path / "copy")
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert cli.main(["verify", str(copy), "--reference", str(other)]) == 1
    printed = capsys.readouterr().out
    assert "NOT verified" in printed
    assert "error_ratio" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "no/such", "--out", "x", "--revision"], "expected one argument"),
        (["export", "demo"], "--out"),
        (["export", "demo", "--out", "x", "--turbo"], "--turbo"),
        (["build", "x", "--precision", "int3"], "int3"),
        (["verify", "x"], "--reference"),
        (["verify", "x", "--reference", "demo", "--backend", "gpu"], "gpu"),
        (["frobnicate"], "frobnicate"),
        ([], "VERB"),
    ],
)
def test_bad_usage_is_exit_code_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{tmp}/nothing", "--out", "{tmp}/out"], "no such folder"),
        (["export", "demo", "--out", "{tmp}/out", "--revision", "main"], "only Hub ids have revisions"),
        (["export", "demo", "--out", "{tmp}/out", "--variant", "q3"], "variant q3"),
        (["export", "demo", "--out", "{tmp}/file/out"], "cannot be created"),
        (["verify", "{tmp}", "--reference", "demo"], "not a package"),
        (["inspect", "{tmp}/nothing"], "no such folder"),
        (["build", "{tmp}/nothing"], "no such folder"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.startswith("olmo2-export: error: ")
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_run_raises_what_main_reports(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        cli.run(cli.parse_args(["export", "demo", "--out", str(tmp_path / "x"), "--variant", "q3"]))


def test_a_reader_that_has_seen_enough_is_no_error(tiny_package: Path) -> None:
    command = f"{sys.executable} -m olmo2_export inspect '{tiny_package}' | head -1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode in (0, 141), found.stderr) == (True, "")


def test_module_and_script_are_the_same_and_light() -> None:
    """Help must not wait for torch."""
    code = "import sys; from olmo2_export.cli import parse_args; parse_args(['inspect', 'x']); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    for command in ([sys.executable, "-m", "olmo2_export"], [str(Path(sys.executable).parent / "olmo2-export")]):
        result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("usage: olmo2-export")
        assert all(verb in result.stdout for verb in ("export", "verify", "build", "inspect"))


def test_spaces_and_unicode_in_paths(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "ein Modell ü")
    out = tmp_path / "ein Paket 模型"
    assert cli.main(["export", str(source), "--out", str(out)]) == 0
    assert open_package(out).manifest.source.model == "ein Modell ü"
    assert cli.main(["verify", str(out), "--reference", str(source)]) == 0


@pytest.fixture(scope="module")
def built(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny package with the TensorRT graphs and engines of two precisions."""
    package = Path(shutil.copytree(tiny_package, tmp_path_factory.mktemp("built") / "package"))
    for precision in ("fp32", "fp16"):
        arguments = ["--precision", precision, "--compute-capability", "8.9", "--compute-capability", "12.0"]
        assert cli.main(["build", str(package), *arguments, "--max-batch-size", "3", "--max-cache-length", "64"]) == 0
    return package


def test_every_flag_of_build_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[EngineOptions] = []

    def build(package: Path, options: EngineOptions) -> None:
        assert package == tmp_path
        asked.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(engine, "build", build)
    flags = [
        "--precision",
        "int4",
        "--backend",
        "trt",
        "--compute-capability",
        "9.0",
        "--compute-capability",
        "current",
    ]
    flags += ["--profile", "compact", "--max-batch-size", "7", "--max-cache-length", "33", "--prefill-chunk", "9"]
    flags += ["--top-k", "5", "--recipe", "gptq", "--calibration", "text", "--weight-streaming", "--portable"]
    flags += ["--refit", "--timing-cache", "cache"]
    assert cli.main(["build", str(tmp_path), *flags]) == 2
    assert cli.main(["build", str(tmp_path)]) == 2
    expected = EngineOptions(
        "int4", "trt", ["9.0", "current"], "compact", 7, 33, 9, 5, "gptq", Path("text"), True, True, True, Path("cache")
    )
    assert asked == [expected, EngineOptions()]


def test_refit_from_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, Path, EngineOptions]] = []

    def refit(package: Path, source: Path, options: EngineOptions) -> None:
        asked.append((package, source, options))
        raise UsageError("enough")

    monkeypatch.setattr(engine, "refit", refit)
    assert cli.main(["build", "new", "--backend", "trt", "--refit-from", "old"]) == 2
    assert asked == [(Path("new"), Path("old"), EngineOptions(backend="trt"))]


@pytest.mark.parametrize("flag", ["precision", "backend", "profile"])
def test_choices_are_those_of_the_library(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = {"precision": precisions(), "backend": get_args(EngineBackend), "profile": get_args(Profile)}[flag]
    for value in known:
        assert getattr(cli.parse_args(["build", "x", f"--{flag}", value]), flag) == value
    assert cli.main(["build", "x", f"--{flag}", "other"]) == 2
    shown = capsys.readouterr().err
    assert all(value in shown for value in known)


@pytest.mark.usefixtures("little_text")
def test_build_verify_inspect(built: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["--variant", "trt_fp32", "--variant", "trt_fp16"]
    assert cli.main(["verify", str(built), "--reference", str(tiny_checkpoint), *variants]) == 0
    assert "72 of 72 tokens equal" in capsys.readouterr().out
    assert cli.main(["inspect", str(built)]) == 0
    described = " ".join(capsys.readouterr().out.split())
    for expected in (
        "variant trt_fp16 graph trt/model_fp16.onnx, fp16, ",
        "engine trt_rtx_fp32 plan trt/model_fp32.trt_rtx.engine, ",
        "needs trt_rtx 1.7.1.116",
        "compute capability 8.9, 12.0 needs",
        "built as portable: no, refit: no, weight streaming: no",
        "profile compact: batch up to 3, cache 64 tokens, prefill of 64 tokens",
        "3 ATTENTION_INPUT, 6 KV_CACHE_UPDATE",
        "prefill input_ids [1, 1] [1, 64] [3, 64]",
        "trt_fp32 passed on ort",
    ):
        assert expected in described


@pytest.mark.parametrize(
    "name", ["manifest.json", "model_fp16.onnx", "model_fp16.onnx_data", "model_fp16.trt_rtx.engine"]
)
def test_one_flipped_bit_of_an_engine_is_refused_by_name(
    built: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    data = bytearray((copy / "trt" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "trt" / name).write_bytes(data)
    assert cli.main(["inspect", str(copy)]) == 2
    assert f"trt/{name}" in capsys.readouterr().err


@pytest.mark.usefixtures("little_text", "short_rows")
def test_a_verdict_on_an_earlier_graph_is_not_shown(
    built: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    assert cli.main(["verify", str(copy), "--reference", str(tiny_checkpoint), "--variant", "trt_fp32"]) == 0
    assert cli.main(["build", str(copy), "--precision", "fp32", "--max-cache-length", "72"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(copy)]) == 0
    assert "trt_fp32 of an earlier graph; verify it again" in capsys.readouterr().out


@pytest.mark.usefixtures("little_text", "short_rows")
def test_bf16_is_verified_where_onnxruntime_has_none(
    built: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    assert cli.main(["build", str(copy), "--compute-capability", "8.9"]) == 0  # bf16 is the default
    assert cli.main(["verify", str(copy), "--reference", str(tiny_checkpoint), "--variant", "trt_bf16"]) == 0
    assert capsys.readouterr().out.count("trt_bf16  exact") == 4  # a line per mode


def test_a_package_is_not_replaced_while_an_engine_is_built(built: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    with locked(copy):
        assert cli.main(["export", str(tiny_checkpoint), "--out", str(copy), "--force"]) == 1
        assert cli.main(["build", str(copy), "--compute-capability", "8.9"]) == 1
    assert cli.main(["inspect", str(copy)]) == 0


def test_a_folder_that_must_not_be_replaced_is_said_before_float16_is_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr("olmo2_export.fp16.safety.measure_safety", None)
    assert cli.main(["fp16", str(tiny_checkpoint), "--apply", "--out", str(tmp_path)]) == 2
    assert "not empty and not a package (thesis.tex)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "MODEL", "--revisions", "main", "--out", "file/sweep"], "file/sweep: cannot be created"),
        (["debug", "reduce", "PACKAGE", "--variant", "trt_fp32", "--out", "nowhere/x"], "nowhere/x: expected a file"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    built: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    paths = {"MODEL": str(tiny_checkpoint), "PACKAGE": str(built)}
    assert cli.main([paths.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_package_that_may_not_be_written_is_not_built(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    access = os.access
    monkeypatch.setattr(
        "olmo2_export.atomic.os.access",
        lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path).resolve() in (copy, copy / "trt")),
    )
    monkeypatch.setattr("runtimes.package.Package.check", None)
    assert cli.main(["build", str(copy), "--compute-capability", "8.9"]) == 2
    assert f"{copy}/trt: it is not writable; choose another" in capsys.readouterr().err
