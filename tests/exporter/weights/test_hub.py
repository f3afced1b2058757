"""The Hub path, through huggingface_hub itself, against a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.hub import COMMIT, REPOSITORY, local_hub, point_to

from olmo2_export import cli
from runtimes.package import open_package
from runtimes.sealed import hash_file


@dataclass(frozen=True)
class Result:
    """What is left of a process, or of a command that ran in this one."""

    returncode: int
    stdout: str
    stderr: str


Export = Callable[..., Result]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """`olmo2-export export` with a cache and a Hub of its own, in this process."""

    def run(cache: Path, url: str, out: Path, *arguments: str, offline: bool = False) -> Result:
        point_to(monkeypatch, url, cache, offline=offline)
        capsys.readouterr()
        code = cli.main(["export", *arguments, "--out", str(out)])
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


LOCATE = "import sys; from olmo2_export.weights.hub import locate; print(locate(*sys.argv[1:])[0])"


def in_a_process(cache: Path, url: str, *command: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python in the environment that a user sets."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    words = [sys.executable, *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("served") / "tiny", shards=2, vocab_size=60_000
    )  # more than huggingface_hub's 10 MB pieces
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 never downloaded")
    (folder / "consolidated.safetensors").write_bytes(b"never downloaded")
    return folder


def test_branch_is_resolved_and_a_cut_download_resumes_and_offline_works(
    served: Path, tmp_path: Path, export: Export
) -> None:
    cache, first, second = tmp_path / "cache", tmp_path / "first", tmp_path / "second"
    shard = max(served.glob("model-*.safetensors"), key=lambda p: p.stat().st_size).name
    with local_hub(served) as hub:
        hub.cut_once = shard
        result = export(cache, hub.url, first, REPOSITORY, "--revision", "main")
        if result.returncode != 0:  # the library may leave the retry to the user: the second run must resume
            result = export(cache, hub.url, first, REPOSITORY, "--revision", "main")
        assert result.returncode == 0, result.stderr
        assert COMMIT[:12] in result.stdout
        names = {name for name, _ in hub.downloads}
        assert "pytorch_model.bin" not in names
        assert "consolidated.safetensors" not in names
        resumed = [wanted for name, wanted in hub.downloads if name == shard and wanted]
        assert resumed, hub.downloads
        assert resumed[0] != "bytes=0-"

    source = open_package(first).manifest.source
    assert (source.kind, source.model, source.revision) == ("hub", REPOSITORY, COMMIT)
    assert source.files[shard] == hash_file(served / shard)

    # The server is gone.
    offline = export(cache, hub.url, second, REPOSITORY, "--revision", "main", offline=True)
    assert offline.returncode == 0, offline.stderr
    located = in_a_process(cache, hub.url, "-c", LOCATE, REPOSITORY, "main", offline=True)
    assert located.stdout.strip().endswith(f"/snapshots/{COMMIT}"), located.stderr
    unreachable = export(cache, hub.url, second, REPOSITORY, "--revision", COMMIT, "--force")
    assert unreachable.returncode == 0, unreachable.stderr
    assert (second / "manifest.json").read_bytes() == (first / "manifest.json").read_bytes()


def test_the_index_says_which_files_are_fetched_and_templates_come_along(tmp_path: Path, export: Export) -> None:
    """Shards by any name, weights that nobody names, several chat templates."""
    folder = make_checkpoint(tmp_path / "odd", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {name: f"part[{n}] of the model.safetensors" for n, name in enumerate(set(index["weight_map"].values()))}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"of another upload")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}\r\n")
    out = tmp_path / "out"
    with local_hub(folder) as hub:
        result = export(tmp_path / "cache", hub.url, out, REPOSITORY)
        assert result.returncode == 0, result.stderr
        fetched = {name for name, _ in hub.downloads}
    assert set(names.values()) <= fetched
    assert "model-00001-of-00009.safetensors" not in fetched
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"{{ tools }}\r\n"
    assert "additional_chat_templates/tool_use.jinja" in open_package(out).manifest.files


def test_a_repository_that_holds_no_model_is_named(tmp_path: Path, export: Export) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    bare = make_checkpoint(tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    for folder, said in ((tmp_path / "peft", "a LoRA adapter"), (bare, "--revision refs/pr/1")):
        with local_hub(folder) as hub:
            result = export(tmp_path / f"cache-{folder.name}", hub.url, tmp_path / "out", REPOSITORY)
        assert result.returncode == 2
        assert said in result.stderr


def test_what_the_hub_does_not_have_is_one_line(served: Path, tmp_path: Path, export: Export) -> None:
    """The first is asked for in a process of its own: what any library may write to its stderr is there too."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    with local_hub(served) as hub:
        branch, nothing = [REPOSITORY, "--revision", "no-such-branch"], ["owner/nothing"]
        alone = in_a_process(cache, hub.url, "-m", "olmo2_export", "export", *branch, "--out", str(out))
        for arguments, result in ((branch, alone), (nothing, export(cache, hub.url, out, *nothing))):
            assert result.returncode == 2
            assert result.stderr.count("\n") == 1, result.stderr
            assert arguments[0] in result.stderr
    offline = export(tmp_path / "empty", "http://127.0.0.1:9", tmp_path / "out", REPOSITORY, offline=True)
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE" in offline.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_changed_in_the_cache_is_caught(served: Path, tmp_path: Path, export: Export) -> None:
    """A truncated blob in the cache must not become a package."""
    cache = tmp_path / "cache"
    with local_hub(served) as hub:
        assert export(cache, hub.url, tmp_path / "out", REPOSITORY).returncode == 0
    blob = max((p for p in cache.rglob("blobs/*") if p.is_file()), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-100])
    result = export(cache, hub.url, tmp_path / "again", REPOSITORY, offline=True)
    assert result.returncode == 2
    assert "download it again" in result.stderr
    shutil.rmtree(cache)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["revision"] == COMMIT


@pytest.mark.parametrize("verb", [["export", "--dry-run", "--out", "x"], ["revisions"]])
def test_the_home_of_nobody_is_no_folder(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb[0], "~nobody-of-that-name/x", *verb[1:]]) == 2
    assert "no such folder" in capsys.readouterr().err
