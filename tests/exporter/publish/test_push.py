"""Packages published with huggingface_hub itself, on a hub on this machine, and run from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hub import COMMIT, TOKEN, Hub, Repository, fetched, local_hub, point_to

import runtimes.cli
from olmo2_export import cli
from olmo2_export.publish import push as push_file
from runtimes.errors import PackageNotFoundError
from runtimes.manifest import PARITY_NAME
from runtimes.manifest_file import read_manifest
from runtimes.package import Package, open_package
from runtimes.sealed import hash_file, seal

NAME = "owner/tiny-onnx"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload


def verified(package: Path, *, failed: tuple[str, ...] = ()) -> Path:
    """Give a package a report in which all variants passed but some."""
    opened = open_package(package)
    reports = {}
    for name, variant in opened.manifest.variants.items():
        case = {"mode": "prefill", "error_ratio": 1.5, "kl_mean": 1e-12, "top1": 1.0, "failures": []}
        report = {"backend": "ort", "passed": name not in failed, "cases": [case], "tokens_from": "text"}
        reports[name] = {**report, "graph_sha256": opened.manifest.files[variant.graph].sha256}
    document = {"format_version": 4, "package_checksum": opened.checksum, "reference": {"model": "tiny"}}
    (package / PARITY_NAME).write_bytes(seal({**document, "variants": reports}))
    return package


@pytest.fixture
def package(tiny_package: Path, tmp_path: Path) -> Path:
    return verified(Path(shutil.copytree(tiny_package, tmp_path / "package")))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With no repository, and somebody who is logged in."""
    with local_hub() as hub:
        point_to(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(package: Path, *more: str, name: str = NAME) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["push", str(package), name, "--license", "apache-2.0", *more])
        said = capsys.readouterr()
        return code, said.out, "\n".join(line for line in said.err.splitlines() if line.startswith("olmo2-export"))

    return run


Push = Callable[..., tuple[int, str, str]]


def large(package: Path) -> set[str]:
    """sha256 of what goes to the large file storage."""
    return {hash_file(p).sha256 for p in package.rglob("*") if p.is_file() and p.stat().st_size >= 4096}


def test_what_is_pushed_runs_from_there_with_the_same_text(
    demo_two_package: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    package = verified(Path(shutil.copytree(demo_two_package, tmp_path / "package")))
    words = ["--prompt", "In the beginning", "--max-new-tokens", "6"]
    assert runtimes.cli.main(["generate", str(package), *words]) == 0
    text = capsys.readouterr().out
    assert cli.main(["push", str(package), NAME, "--create", "--message", "the demo"]) == 0
    out = capsys.readouterr().out
    repository = hub.repositories[NAME]
    head = repository.branches["main"]
    assert out.splitlines()[-2:] == [
        f"published 14 files, 30.6 MB: {hub.url}/{NAME}/commit/{head}",
        f"run it with: hf:{NAME}, or for good: hf:{NAME}@{head}",
    ]
    assert repository.messages == ["the demo"]
    assert not repository.private
    assert fetched(hub) == []
    assert runtimes.cli.main(["generate", f"hf:{NAME}@{head}", *words]) == 0
    assert capsys.readouterr().out == text
    assert "model.onnx_data" not in fetched(hub)
    assert cli.main(["inspect", f"hf:{NAME}"]) == 0
    assert "every file intact" in capsys.readouterr().out
    assert b"base_model" not in repository.files["README.md"]
    assert repository.files["README.md"].startswith(b'---\nlicense: "apache-2.0"\n')


def test_the_repository_holds_the_files_of_the_manifest_and_the_card(package: Path, hub: Hub, push: Push) -> None:
    (package / "notes.txt").write_text("mine")
    (package / "trt").mkdir()
    (package / "trt" / "left over").write_text("mine")
    code, out, _ = push(package, "--create", "--private")
    assert code == 0
    assert "left out, as no manifest vouches for it: notes.txt, trt/left over\n" in out
    repository = hub.repositories[NAME]
    manifest = read_manifest(package)[0]
    assert repository.files.keys() == {*manifest.files, "manifest.json", "parity.json", "README.md", ".gitattributes"}
    for name in (*manifest.files, "manifest.json", "parity.json"):
        assert repository.files[name] == (package / name).read_bytes()
    assert repository.private
    assert repository.messages == ["fp32 of tiny, by olmo2-export"]
    assert set(hub.uploads) == large(package)


def test_an_upload_that_was_cut_off_goes_on_and_nothing_is_sent_twice(package: Path, hub: Hub, push: Push) -> None:
    hub.room = 1
    code, _, error = push(package, "--create")
    assert code == 1
    assert "nothing was published; run it again, and it goes on from here" in error
    assert error.count("\n") == 0
    assert hub.repositories[NAME].branches == {"main": COMMIT}
    hub.room = None
    assert push(package)[0] == 0
    assert sorted(hub.uploads) == sorted(large(package))  # each once
    head = hub.repositories[NAME].branches["main"]
    code, out, _ = push(package)
    assert (code, out.splitlines()[-2]) == (0, f"nothing has changed: {hub.url}/{NAME}/commit/{head}")
    assert sorted(hub.uploads) == sorted(large(package))
    assert len(hub.repositories[NAME].messages) == 1


def test_another_package_takes_the_place_of_the_one_before(
    package: Path, q8_package: Path, tmp_path: Path, hub: Hub, push: Push
) -> None:
    assert push(package, "--create")[0] == 0
    other = verified(Path(shutil.copytree(q8_package, tmp_path / "other")))
    code, out, _ = push(other)
    assert code == 0
    assert "deleted there: onnx/model.onnx, of the package before\n" in out
    names = hub.repositories[NAME].files
    assert not {"onnx/model.onnx", "onnx/model.onnx_data"} & names.keys()
    assert names["manifest.json"] == (other / "manifest.json").read_bytes()


@pytest.mark.parametrize("token", [None, "hf_of_another"])
def test_without_its_token_nothing_is_sent(
    package: Path, hub: Hub, push: Push, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    code, _, error = push(package, "--create")
    assert code == 2
    said = "nobody is logged in; run: hf auth login, or set HF_TOKEN" if token is None else "the Hub refuses the token"
    assert f"{NAME}: {said}" in error
    assert error.count("\n") == 0
    assert (hub.repositories, hub.uploads) == ({}, [])


def test_a_token_that_may_only_read_is_said_before_anything_is_sent(package: Path, hub: Hub, push: Push) -> None:
    hub.repositories["owner/there"] = Repository({"main": COMMIT}, {}, {COMMIT: {}})
    hub.read_only = True
    for name, more, code in ((NAME, ["--create"], 2), ("owner/there", [], 1)):
        found, _, error = push(package, *more, name=name)
        assert (found, error.count("\n")) == (code, 0)
        assert f"{name}: the token does not allow it; log in with another, or ask the owner for access" in error
    assert hub.uploads == []


def test_what_the_hub_says_of_the_commit_itself_is_told(package: Path, hub: Hub, push: Push) -> None:
    """Not the library's own message, whose two addresses leave no room for the Hub's words."""
    for status, words, said in (
        (401, "", "the Hub refuses the token; log in with another: hf auth login"),
        (403, "no room", "the token does not allow it; log in with another, or ask the owner for access"),
        (409, "", "the Hub answers 409 Conflict"),
        (412, "moved", "somebody else has changed the repository meanwhile"),
        (500, "a fault", "the Hub answers 500 Internal Server Error"),
    ):
        hub.refusals["/commit/main"] = status, words
        code, _, error = push(package, "--create")
        assert (code, error.count("\n")) == (1, 0)
        said += ": hf auth login" * (status == 403) + f" (the Hub: {words})" * bool(words)
        assert f"{NAME}: {said}; nothing was published; run it again, and it goes on from here" in error
    assert hub.repositories[NAME].branches == {"main": COMMIT}
    hub.refusals.clear()
    sent = len(hub.uploads)
    assert push(package)[0] == 0
    assert len(hub.uploads) == sent


def test_without_a_network_or_offline_it_says_so(
    package: Path, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for offline, said in ((False, "the Hub cannot be reached ("), (True, "HF_HUB_OFFLINE is set, and publishing")):
        point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=offline)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        code, _, error = push(package, "--create")
        assert (code, error.count("\n")) == (2, 0)
        assert f"{NAME}: {said}" in error


@pytest.mark.parametrize("damage", ["trt/manifest.json", "manifest.json"])
def test_engines_of_the_package_before_go_as_a_whole_even_where_their_manifest_is_damaged(
    package: Path, hub: Hub, push: Push, damage: str
) -> None:
    """Else a runner that asks for one would be refused, as they are of another export."""
    assert push(package, "--create")[0] == 0
    repository = hub.repositories[NAME]
    files = repository.commits[repository.branches["main"]]
    files.update({"trt/manifest.json": b"{}", "trt/model_bf16.onnx": b"x", "notes.txt": b"mine", damage: b"{}"})
    code, out, _ = push(package)
    assert code == 0
    assert "deleted there: trt/manifest.json" in out
    assert "deleted there: trt/model_bf16.onnx" in out
    assert [name for name in repository.files if name.startswith("trt/")] == []
    assert repository.files["notes.txt"] == b"mine"


def test_where_the_package_before_cannot_be_read_nothing_is_published(
    package: Path, hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its files would stay, half of an old package beside the new one."""
    assert push(package, "--create")[0] == 0
    before = dict(hub.repositories[NAME].branches)
    monkeypatch.setattr(push_file, "open_package", _away)
    code, _, error = push(package)
    assert (code, error.count("\n")) == (1, 0)
    assert "the Hub cannot be reached; nothing was published; run it again" in error
    assert hub.repositories[NAME].branches == before


def _away(name: str) -> Package:
    raise PackageNotFoundError(f"{name}: the Hub cannot be reached")


def test_what_stands_in_the_way_is_one_line_and_nothing_is_sent(package: Path, hub: Hub, push: Push) -> None:
    hub.repositories["owner/checkpoint"] = Repository(
        {"main": COMMIT}, {}, {COMMIT: {"config.json": b"{}", "model.safetensors": b"x", "README.md": b"y"}}
    )
    hub.repositories["owner/public"] = Repository({"main": COMMIT}, {}, {COMMIT: {}})
    for name, more, said in (
        (NAME, [], f"{NAME}: no such repository, or one that this token does not see; --create makes it"),
        ("owner/checkpoint", [], "holds something else than a package (config.json, model.safetensors)"),
        ("owner/public", ["--create", "--private"], "owner/public: is there, and public; leave out --private"),
        ("owner/public", ["--private"], "--private: of a repository that --create makes"),
        ("owner", [], "owner: expected OWNER/NAME"),
        (NAME, ["--engines"], "has none; run: olmo2-export build"),
    ):
        code, out, error = push(package, *more, name=name)
        assert (code, out, error.count("\n")) == (2, "", 0)
        assert said in error
    assert hub.uploads == []
    assert push(package, "--force", name="owner/checkpoint")[0] == 0
    assert hub.repositories["owner/checkpoint"].files["model.safetensors"] == b"x"  # of no package: it stays


def test_a_package_that_is_not_verified_or_was_changed_is_refused(
    package: Path, tiny_package: Path, hub: Hub, push: Push
) -> None:
    (package / PARITY_NAME).unlink()
    code, _, error = push(package, "--create")
    assert code == 2
    assert f"{package}: fp32 not verified; run: olmo2-export verify {package} --reference MODEL, or publish" in error
    verified(package, failed=("fp32",))
    assert "fp32 failed when verified" in push(package, "--create")[2]
    graph = package / "onnx" / "model.onnx_data"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x01")
    for more in ((), ("--unverified",), ("--unverified", "--force")):
        assert push(package, "--create", *more)[0] == 2
    assert "onnx/model.onnx_data: sha256" in push(package, "--unverified")[2]
    assert (hub.repositories, hub.uploads) == ({}, [])
    shutil.copyfile(tiny_package / "onnx" / "model.onnx_data", graph)
    assert push(package, "--create", "--unverified")[0] == 0
    assert b"- fp32: it failed; see parity.json.\n" in hub.repositories[NAME].files["README.md"]


def test_graphs_for_tensorrt_are_sent_when_asked_for(
    trt_package: Callable[[str], Path], push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    built = trt_package("fp32")
    code, out, _ = push(built, "--dry-run", "--unverified")
    assert (code, "  trt/" in out) == (0, False)
    assert "left out: trt/, its graphs and engines; --engines sends them\n" in out
    code, out, _ = push(built, "--dry-run", "--unverified", "--engines")
    assert code == 0
    for name in ("trt/manifest.json", "trt/model_fp32.onnx", "trt/model_fp32.onnx_data"):
        assert f"  {name}\n" in out
    assert "| trt\\_fp32 | fp32 | static, float32 |" in out
    assert "left out" not in out


def test_a_dry_run_shows_files_and_card_and_asks_nobody(
    package: Path, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    code, out, error = push(package, "--dry-run")
    assert (code, error) == (0, "")
    assert "  968.7 kB  onnx/model.onnx_data\n" in out
    assert f"would send 8 files, {out.split('files, ')[1].split(' to ')[0]} to {NAME}, and this card:\n\n---\n" in out
    assert out == push(package, "--dry-run")[1]


def test_the_licence_is_that_of_the_checkpoints_card(
    package: Path, hub: Hub, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    document = json.loads((package / "manifest.json").read_text())
    document["source"] |= {"model": "owner/base", "kind": "hub", "revision": COMMIT}
    (package / "manifest.json").write_bytes(seal(document))
    verified(package)
    assert cli.main(["push", str(package), NAME, "--dry-run"]) == 0
    assert "base_model_relation: quantized\n" in capsys.readouterr().out
    assert "the licence of owner/base is not known (owner/base: its licence is not known: 404" in caplog.text
    card = {"license": "other", "license_name": "ours", "license_link": "LICENSE", "datasets": ["x"]}
    hub.repositories["owner/base"] = Repository({"main": COMMIT}, {}, {COMMIT: {}}, card=card)
    assert cli.main(["push", str(package), NAME, "--dry-run"]) == 0
    said = '---\nlicense: "other"\nlicense_name: "ours"\nlicense_link: "LICENSE"\nbase_model: "owner/base"\n'
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["build"], ["bench"], ["debug", "compare"], ["push"]])
def test_what_writes_to_a_package_wants_a_folder(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["owner/other"] if verb == ["push"] else []
    assert cli.main([*verb, "hf:owner/x@v1", *more]) == 2
    error = capsys.readouterr().err
    assert "run: hf download owner/x --revision v1 --local-dir DIR, and give DIR" in error
    assert error.count("\n") == 1


def test_objects_are_what_their_names_say(package: Path, hub: Hub, push: Push) -> None:
    """Also of the local hub itself: a file is stored under the sha256 of its content."""
    assert push(package, "--create")[0] == 0
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in hub.objects.items())
