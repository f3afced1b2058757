"""What revisions a model has, in which order, and which of them names and patterns mean; against a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.hub import COMMIT, REPOSITORY, commit_of, local_hub

from olmo2_export import cli
from olmo2_export.weights import hub, revisions
from olmo2_export.weights.revision_names import read_name, training_order
from olmo2_export.weights.revisions import Chosen, choose, list_revisions, thinned
from runtimes.errors import CheckpointNotFoundError, UsageError
from runtimes.package import open_package
from runtimes.sealed import hash_file

STEPS = [f"stage1-step{step}-tokens{step // 500}B" for step in (0, 1000, 2000, 9000, 10000)]
SOUP = [f"stage2-ingredient{i}-step{step}-tokens{step // 500}B" for i, step in ((1, 1000), (1, 11931), (2, 1000))]
IN_ORDER = ["step150-tokens1B", *STEPS, *SOUP, "main", "v1.0"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stage1-step1000-tokens3B", (1, None, 1000, 3)),
        ("stage2-ingredient1-step11931-tokens50B", (2, 1, 11931, 50)),
        ("step_250_lr1e-6", (None, None, 250, None)),
        ("step_0050", (None, None, 50, None)),
        ("step1200000-tokens5033B", (None, None, 1200000, 5033)),
        ("stage3-step11921", (3, None, 11921, None)),
        ("stage2-ingredient3", (2, 3, None, None)),
        ("global_step500", (None, None, 500, None)),
        ("main", (None, None, None, None)),
        ("v1.0", (None, None, None, None)),
        ("steps", (None, None, None, None)),
    ],
)
def test_what_a_name_says(name: str, said: tuple[int | None, ...]) -> None:
    assert astuple(read_name(name)) == said


def test_names_are_sorted_by_numbers_and_what_has_none_comes_last() -> None:
    assert sorted(sorted(IN_ORDER), key=training_order) == IN_ORDER
    assert sorted(["stage1-soup", "stage1-step9", "stage2-step1"], key=training_order) == [
        "stage1-step9",
        "stage1-soup",
        "stage2-step1",
    ]


@pytest.mark.parametrize(
    ("count", "every", "kept"),
    [
        (25, 10, [0, 10, 20, 24]),
        (21, 10, [0, 10, 20]),
        (1, 10, [0]),
        (2, 10, [0, 1]),
        (11, 10, [0, 10]),
        (4, 1, [0, 1, 2, 3]),
    ],
)
def test_the_first_and_the_last_are_always_kept(count: int, every: int, kept: list[int]) -> None:
    assert thinned(range(count), every) == kept


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def served(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Hub, with branches in no order, two tags, and a branch and a tag of one name; gives its address."""
    branches = {name: tiny for name in sorted(IN_ORDER, reverse=True) if name not in ("main", "v1.0")}
    with local_hub(tiny, branches, {"v1.0": tiny, STEPS[0]: tiny}) as running:
        monkeypatch.setattr(hub, "HfApi", lambda: RealApi(endpoint=running.url))
        yield running.url


RealApi = hub.HfApi


def listed_by(url: str, model: str, *, cache: Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own, as huggingface_hub reads the environment once."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "olmo2_export", "revisions", model]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.usefixtures("served")
def test_branches_and_tags_are_listed_in_the_order_of_training() -> None:
    found = list_revisions(REPOSITORY)
    assert [revision.name for revision in found] == [*IN_ORDER[:2], *IN_ORDER[1:]]
    assert [revision.kind for revision in found if revision.name == STEPS[0]] == ["branch", "tag"]
    assert {revision.kind for revision in found if revision.name == "v1.0"} == {"tag"}
    assert {revision.name: revision.commit for revision in found}["main"] == COMMIT
    assert all(revision.commit == commit_of(revision.name) for revision in found)


def test_the_verb_prints_a_table_or_json(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert served
    assert cli.main(["revisions", REPOSITORY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["revision", "stage", "ingredient", "step", "tokens", "kind", "commit"]
    row = next(line for line in lines if line.startswith(SOUP[1]))
    assert row.split() == [SOUP[1], "2", "1", "11931", "23B", "branch", commit_of(SOUP[1])[:12]]
    assert next(line for line in lines if line.startswith("main")).split()[1:5] == ["-"] * 4
    assert lines[-1] == f"{REPOSITORY}: 12 of 12 revisions"

    assert cli.main(["revisions", REPOSITORY, "--json", "--match", "stage1-*", "--match", "main", "--every", "3"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == REPOSITORY
    assert [revision["name"] for revision in document["revisions"]] == [STEPS[0], STEPS[2], STEPS[4], "main"]
    assert document["revisions"][1] == {
        "name": STEPS[2],
        "kind": "branch",
        "commit": commit_of(STEPS[2]),
        "stage": 1,
        "ingredient": None,
        "step": 2000,
        "tokens_b": 4,
    }


@pytest.mark.usefixtures("served")
def test_what_a_pattern_does_not_match_or_every_does_not_mean_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--match", "stage9-*"], "no revision matches 'stage9-*'; it has step150-tokens1B, stage1-step0-tokens0B"),
        (["--every", "0"], "--every 0: expected at least 1"),
    ):
        assert cli.main(["revisions", REPOSITORY, *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.usefixtures("served")
def test_a_sweep_takes_patterns_beside_names() -> None:
    assert choose(REPOSITORY, ["main", "stage1-*", "c0ffee"]) == [
        Chosen("main", 1, ("main",)),
        Chosen("stage1-*", 5, tuple(STEPS)),
        Chosen("c0ffee", 1, ("c0ffee",)),
    ]
    assert choose(REPOSITORY, ["stage1-*", "*-ingredient?-*"], every=2) == [
        Chosen("stage1-*", 5, (STEPS[0], STEPS[2], STEPS[4])),
        Chosen("*-ingredient?-*", 3, (SOUP[0], SOUP[2])),
    ]
    # what was named, or matched by an earlier pattern, is taken once
    assert choose(REPOSITORY, ["stage1-step1*", STEPS[1], "stage[1]-*"]) == [
        Chosen("stage1-step1*", 2, (STEPS[4],)),
        Chosen(STEPS[1], 1, (STEPS[1],)),
        Chosen("stage[1]-*", 5, (STEPS[0], STEPS[2], STEPS[3])),
    ]
    with pytest.raises(CheckpointNotFoundError, match=r"no revision matches 'stage7\*'"):
        choose(REPOSITORY, ["main", "stage7*"])


def test_names_are_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions, "list_refs", lambda _: pytest.fail("asked the Hub"))
    assert [one.names for one in choose(REPOSITORY, ["main", "refs/pr/1"])] == [("main",), ("refs/pr/1",)]
    with pytest.raises(UsageError, match=r"--every 10: thins out what a pattern .* give one, in quotes"):
        choose(REPOSITORY, ["main"], every=10)
    with pytest.raises(UsageError, match="--every 0: expected at least 1"):
        choose(REPOSITORY, ["*"], every=0)


def test_a_folder_of_revisions_is_listed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*STEPS[::-1], "main"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    (tmp_path / "runs" / "logs").mkdir()
    found = list_revisions(str(tmp_path / "runs"))
    assert [(revision.name, revision.kind, revision.commit) for revision in found] == [
        (name, "folder", None) for name in (*STEPS, "main")
    ]
    assert choose(str(tmp_path / "runs"), ["stage1-*"], every=4)[0].names == (STEPS[0], STEPS[4])
    assert cli.main(["revisions", str(tmp_path / "runs")]) == 0
    assert "6 of 6 revisions" in capsys.readouterr().out


def test_a_folder_with_a_newline_in_its_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs\n" / "step1\nstep2").mkdir(parents=True)
    (tmp_path / "runs\n" / "step1\nstep2" / "config.json").write_text("{}")
    assert cli.main(["revisions", str(tmp_path / "runs\n")]) == 0
    _, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[0] == r"step1\nstep2"
    assert last == rf"{tmp_path}/runs\n: 1 of 1 revisions"
    assert cli.main(["revisions", str(tmp_path / "runs\n"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["revisions"][0]["name"] == "step1\nstep2"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("demo", "demo: one checkpoint; revisions have a Hub id"),
        ("CHECKPOINT", "one checkpoint; revisions have a Hub id"),
        ("EMPTY", "no revisions; expected branches on the Hub, or folders of checkpoints"),
        ("nowhere", "nowhere: no such folder, and not a Hub id"),
    ],
)
def test_what_has_no_revisions_is_named(
    model: str, said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"CHECKPOINT": str(tiny), "EMPTY": str(tmp_path)}.get(model, model)
    assert cli.main(["revisions", asked]) == 2
    assert said in capsys.readouterr().err


def test_what_the_hub_cannot_list_is_one_line(tiny: Path, tmp_path: Path) -> None:
    with local_hub(tiny) as running:
        unknown = listed_by(running.url, "owner/nothing", cache=tmp_path)
        offline = listed_by(running.url, REPOSITORY, cache=tmp_path, offline=True)
    down = listed_by("http://127.0.0.1:9", REPOSITORY, cache=tmp_path)
    for result, said in (
        (unknown, "owner/nothing: 404"),
        (offline, f"{REPOSITORY}: its revisions are listed by the Hub, and HF_HUB_OFFLINE is set; unset it"),
        (down, "which does not answer as expected"),
    ):
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert said in result.stderr


def test_an_answer_that_is_no_list_is_one_line(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served
    for error in (ValueError("no JSON"), KeyError("branches"), ConnectionResetError("reset")):

        class Broken:
            def list_repo_refs(self, _: str, error: Exception = error) -> None:
                raise error

        monkeypatch.setattr(hub, "HfApi", Broken)
        with pytest.raises(CheckpointNotFoundError, match="check the network, or name the revisions"):
            list_revisions(REPOSITORY)


@pytest.mark.usefixtures("traces", "hardly_judged")
def test_export_takes_a_branch_a_tag_and_a_commit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    branch = make_checkpoint(tmp_path / "branch", seed=1)
    tag = make_checkpoint(tmp_path / "tag", seed=2)
    with local_hub(tiny, {STEPS[1]: branch}, {"v1.0": tag}) as running:
        there = partial(hub.snapshot_download, endpoint=running.url, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(hub, "snapshot_download", there)
        monkeypatch.setattr(hub, "HfApi", partial(RealApi, endpoint=running.url))
        for revision, folder, commit in (
            (STEPS[1], branch, commit_of(STEPS[1])),
            ("v1.0", tag, commit_of("v1.0")),
            (commit_of("v1.0"), tag, commit_of("v1.0")),
            (COMMIT, tiny, COMMIT),
        ):
            out = tmp_path / "out" / revision
            assert cli.main(["export", REPOSITORY, "--revision", revision, "--out", str(out)]) == 0
            source = open_package(out).manifest.source
            assert (source.kind, source.model, source.revision) == ("hub", REPOSITORY, commit)
            assert source.files["model.safetensors"] == hash_file(folder / "model.safetensors")
    packages = [open_package(path).manifest.files["onnx/model.onnx_data"] for path in (tmp_path / "out").iterdir()]
    assert len({entry.sha256 for entry in packages}) == 3  # the tag and its commit are one
