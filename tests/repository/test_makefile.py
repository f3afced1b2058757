"""make export: what a user writes arrives as it is, and none of it runs. make peers: llama.cpp without AMX."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make_export(folder: Path, *assignments: str, environment: dict[str, str] | None = None) -> list[list[str]]:
    """Run `make export` on programs that write down their arguments; return these, a list per program that ran."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("olmo2-export", "olmo2-run"):
        (programs / name).write_text("#!/bin/sh\nprintf '%s\\0' \"$0\" \"$@\" >>calls; printf '\\n\\0' >>calls\n")
        (programs / name).chmod(0o755)
    stamp = folder / ".venv" / ".installed-dev"
    stamp.touch()
    os.utime(stamp, (2**31, 2**31))  # newer than what it depends on
    subprocess.run(
        ["make", "-s", "export", *assignments],
        cwd=folder,
        check=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"], **(environment or {})},
    )
    calls = (folder / "calls").read_text().split("\0\n\0")[:-1]
    return [call.split("\0")[1:] for call in calls]


PROMPTS = [
    'say "hi" to him',
    "it's 50% off",
    "run `touch PWNED` now",
    "run $(touch PWNED) now",
    "run $(shell touch PWNED) now",
    "a\\nb\\",
    "costs $5, or $$6, ${HOME} and $(MODEL)",
    "a # b; touch PWNED & c > d | e * ?",
    "two  blanks ",
    "café 東京",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_it_is_and_does_not_run(tmp_path: Path, prompt: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").touch()
    *_, generate = make_export(tmp_path, "OUT=out", f"PROMPT={prompt}")
    assert generate[:4] == ["generate", "out", "--prompt", prompt]
    assert not (tmp_path / "PWNED").exists()


def test_a_prompt_from_the_environment_arrives_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").touch()
    *_, generate = make_export(tmp_path, "OUT=out", environment={"PROMPT": 'a "$5" `touch PWNED`'})
    assert generate[3] == 'a "$5" `touch PWNED`'
    assert not (tmp_path / "PWNED").exists()


def test_model_folder_and_revision_arrive_as_they_are(tmp_path: Path) -> None:
    model, out, revision = 'my "models"/it\'s $5', "out `touch PWNED`", "a;touch PWNED"
    export, verify, build = make_export(tmp_path, f"MODEL={model}", f"OUT={out}", f"REVISION={revision}")
    variants = ["--variant", "fp32", "--variant", "q4"]
    assert export == ["export", model, "--out", out, "--force", "--revision", revision, *variants]
    assert verify == ["verify", out, "--reference", model, "--revision", revision]
    assert build == ["build", out, "--precision", "bf16"]
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    ("model", "out"),
    [("demo", "packages/demo"), ("allenai/OLMo-2-0425-1B", "packages/OLMo-2-0425-1B"), ("my models/b/", "packages/b")],
)
def test_the_folder_has_the_name_of_the_model(tmp_path: Path, model: str, out: str) -> None:
    export, *_ = make_export(tmp_path, f"MODEL={model}")
    assert export == ["export", model, "--out", out, "--force", "--variant", "fp32", "--variant", "q4"]


@pytest.mark.parametrize("amx", [True, False])
def test_llama_cpp_is_built_without_amx_where_the_processor_has_it(tmp_path: Path, amx: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : fpu avx512_vnni {'amx_tile amx_int8' if amx else 'amx_int8x'} sse2\n")
    command = ["make", "-n", "-C", str(ROOT), "-W", "constraints.txt", ".venv-peers-llama/.installed"]
    said = subprocess.run(
        [*command, f"CPUINFO={tmp_path / 'cpuinfo'}"], check=True, capture_output=True, text=True
    ).stdout
    assert ("llama.cpp is built without, because with it it dies of SIGSEGV" in said) == amx
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if amx else ""
    assert f"'-DCMAKE_C_FLAGS={flags}' '-DCMAKE_CXX_FLAGS={flags}'" in said
    assert "--parallel 2" in said
