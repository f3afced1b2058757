"""Packages on the Hub, through huggingface_hub itself, against a hub on this machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from support.hub import COMMIT, REPOSITORY, TOKEN, Hub, commit_of, fetched, local_hub, point_to

from runtimes import open_runner
from runtimes.cli import main
from runtimes.errors import BackendError, IntegrityError, PackageNotFoundError, UsageError
from runtimes.manifest import PARITY_NAME
from runtimes.package import is_on_hub, open_package
from runtimes.sealed import seal
from runtimes.text.tokenizer import Tokenizer

NAME = f"hf:{REPOSITORY}"
TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
Q4 = sorted(["manifest.json", "model_q4.onnx_data", "model_q4_shared.onnx", *TEXTS])


@pytest.fixture
def hub(demo_two_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The demo in fp32 and q4, verified by nobody, with a cache that is empty."""
    with local_hub(demo_two_package, tags={"v1.0": demo_two_package}) as hub:
        point_to(monkeypatch, hub.url, tmp_path)
        yield hub


@dataclass
class Runs:
    """`olmo2-run generate` in this process."""

    capsys: pytest.CaptureFixture[str]
    caplog: pytest.LogCaptureFixture

    def __call__(self, package: object, *more: str) -> tuple[int, str, list[str]]:
        """Return the exit code, the text, and what stderr says beside the bars of downloads."""
        self.capsys.readouterr()
        self.caplog.clear()
        code = main(["generate", str(package), "--prompt", "In the beginning", "--max-new-tokens", "5", *more])
        said = self.capsys.readouterr()
        lines = [record.getMessage() for record in self.caplog.records if record.name == "runtimes.hub"]
        return code, said.out, lines + [line for line in said.err.splitlines() if line.startswith("olmo2-run")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Runs:
    return Runs(capsys, caplog)


def test_a_published_package_runs_with_the_files_of_its_variant_alone(
    demo_two_package: Path, hub: Hub, run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text, said = run(demo_two_package, "--variant", "q4")
    assert (code, said) == (0, [])
    assert run(NAME) == (0, text, [f"{NAME}: commit {COMMIT}"])
    assert fetched(hub) == Q4
    assert run(f"{NAME}@{COMMIT}", "--skip-hash-check") == (0, text, [f"{NAME}@{COMMIT}: commit {COMMIT}"])
    assert fetched(hub) == []
    drafted = run(NAME, "--variant", "fp32", "--draft", f"{NAME}@v1.0")
    assert drafted[2] == [f"{NAME}: commit {COMMIT}", f"{NAME}@v1.0: commit {commit_of('v1.0')}"]
    graphs = ["model.onnx", "model.onnx_data", "model_q4.onnx_data", "model_q4_shared.onnx"]
    assert fetched(hub) in (
        ["config.json", "manifest.json", *graphs],
        ["model.onnx", "model.onnx_data"],
    )

    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    assert run(NAME) == (0, text, [f"{NAME}: commit {COMMIT}"])
    away = "the Hub cannot be reached and the cache has no copy; check the network or HF_HUB_OFFLINE"
    lacking = run(f"{NAME}@v1.0", "--variant", "fp32")
    assert lacking == (2, "", [f"{NAME}@v1.0: commit {commit_of('v1.0')}", f"olmo2-run: error: {NAME}@v1.0: {away}"])
    assert run("hf:owner/other") == (2, "", [f"olmo2-run: error: hf:owner/other: {away}"])


def test_open_runner_and_the_tokenizer_take_the_name_too(hub: Hub) -> None:
    with open_runner(Path(NAME), variant="q4") as runner:
        assert runner.variant.name == "q4"
    assert Tokenizer.from_package(NAME).encode("In the beginning")
    assert open_package(NAME).on_hub
    assert hub.downloads


def test_what_was_verified_is_known_before_a_variant_is_chosen(
    demo_two_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(demo_two_package, tmp_path / "copy"))
    variants = {"fp32": {"passed": True}, "q4": {"passed": False}}
    document = {"format_version": 4, "package_checksum": open_package(copy).checksum, "variants": variants}
    (copy / PARITY_NAME).write_bytes(seal(document))
    with local_hub(copy) as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        with open_runner(NAME) as runner:
            assert runner.variant.name == "fp32"
        assert fetched(hub) == ["config.json", "manifest.json", "model.onnx", "model.onnx_data", "parity.json"]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("hf:owner", UsageError, "hf:owner: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
        (f"{NAME}@", UsageError, f"{NAME}@: expected hf:OWNER/NAME"),
        ("hf:owner/a/b", UsageError, "expected hf:OWNER/NAME"),
        ("hf:owner/nothing", PackageNotFoundError, "404, no such repository, or a private one; check the name, or log"),
        (f"{NAME}@v9", PackageNotFoundError, f"{NAME}@v9: 404, no such revision; expected a branch, a tag or a commit"),
        ("hf:owner/gated", PackageNotFoundError, "ask for it at {url}/owner/gated, then log in: hf auth login"),
        ("hf:owner/private", PackageNotFoundError, "no such repository, or a private one"),
        ("hf:owner/checkpoint", PackageNotFoundError, "not a package (no manifest.json); of a checkpoint one is made"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    hub: Hub, name: str, error: type[Exception], said: str, run: Runs
) -> None:
    served = hub.repositories[REPOSITORY]
    for kind in ("gated", "private", "checkpoint"):
        hub.repositories[f"owner/{kind}"] = type(served)(served.branches, {}, {COMMIT: {"config.json": b"{}"}})
    hub.repositories["owner/gated"].gated = hub.repositories["owner/private"].private = True
    with pytest.raises(error):
        open_package(name)
    code, out, (line,) = run(name)
    assert (code, out) == (2, "")
    assert said.format(url=hub.url) in line


def test_a_private_package_opens_with_its_token_and_not_with_another(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[REPOSITORY].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_package(NAME).on_hub
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(PackageNotFoundError, match="the Hub refuses the token; log in with another: hf auth login"):
        open_package(f"{NAME}@v1.0")


def test_a_file_that_changed_in_the_cache_is_refused_with_the_way_out(hub: Hub, tmp_path: Path) -> None:
    package = open_package(NAME)
    package.check(["config.json"])
    blob = (package.folder / "config.json").resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(IntegrityError, match=r"config\.json: sha256 .*: delete (.*) to download it again") as caught:
        open_package(NAME).check(["config.json"])
    assert f"delete {tmp_path / 'hub' / 'models--owner--tiny-olmo2'} to" in str(caught.value)
    assert hub.downloads


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "runtimes.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match=r"hf:owner/x: huggingface_hub cannot be imported .*'olmo2-export\[hub\]'"):
        open_package("hf:owner/x")


def test_a_folder_needs_no_hub(demo_two_package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor does one whose name begins like a name on the Hub."""
    monkeypatch.delitem(sys.modules, "runtimes.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    Path("hf:owner").mkdir()
    shutil.copytree(demo_two_package, "hf:owner/x")
    folder = Path("hf:owner/x").absolute()
    assert [is_on_hub(name) for name in ("hf:owner/x", Path("hf:owner/x"), folder)] == [True, True, False]
    assert not open_package(folder).on_hub
