"""Locating and reading checkpoints: everything that is wrong is named, nothing hostile is followed or executed."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from olmo2_export import checkpoint as checkpoint_module
from olmo2_export.checkpoint import open_checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.package import check_weights
from runtimes.errors import CheckpointError, CheckpointNotFoundError, UsageError


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check(folder: Path) -> None:
    check_weights(open_checkpoint(str(folder)), ModelConfig.from_json(folder / "config.json"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_from_one_file_or_many(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(str(folder))
    assert len(checkpoint.files) >= shards
    assert (checkpoint.kind, checkpoint.model, checkpoint.revision) == ("folder", "c", None)
    stored = {k: v for file in checkpoint.files for k, v in load_file(folder / file).items()}
    assert stored.keys() == checkpoint.tensors.keys()
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    check(folder)


def test_tied_checkpoint_has_no_head_and_passes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(str(folder)).tensors
    check(folder)


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", tie_word_embeddings=True)
    edit(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    check(folder)
    edit(folder, lambda w: w.update({"lm_head.weight": w["lm_head.weight"] * 2}))
    with pytest.raises(CheckpointError, match=r"tied to model\.embed_tokens\.weight"):
        check(folder)


def test_everything_wrong_is_listed_at_once(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.self_attn.q_norm.weight"]
        weights["model.layers.0.rotary_emb.inv_freq"] = torch.ones(8)
        weights["model.norm.weight"] = torch.ones(95)
        weights["model.layers.2.post_attention_layernorm.weight"] = torch.ones(96, dtype=torch.int64)
        weights["lm_head.weight"][5, 7] = float("nan")
        weights["model.layers.0.mlp.up_proj.weight"][0, :2] = float("inf")

    edit(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    for expected in (
        "missing: model.layers.1.self_attn.q_norm.weight",
        "not of this model: model.layers.0.rotary_emb.inv_freq",
        "model.norm.weight: shape [95], expected [96]",
        "model.layers.2.post_attention_layernorm.weight: dtype I64",
        "lm_head.weight: 1 NaN or Inf of 12576",
        "model.layers.0.mlp.up_proj.weight: 2 NaN or Inf of 15360",
    ):
        assert expected in str(caught.value)


def test_infinities_of_both_signs_do_not_cancel(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"][0, 0], weights["lm_head.weight"][0, 1] = float("inf"), float("-inf")

    edit(folder, spoil)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: 2 NaN or Inf"):
        check(folder)


def test_large_finite_weights_are_not_mistaken_for_infinite(folder: Path) -> None:
    edit(folder, lambda w: w["lm_head.weight"].fill_(3e38))
    check(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("EXECUTED",))


def test_pickle_is_never_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointNotFoundError, match=r"pytorch_model\.bin is never read"):
        open_checkpoint(str(folder))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="a pickle"):
        open_checkpoint(str(folder))
    assert "EXECUTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04 archive", "a pickle archive"),
        (b"", "truncated"),
        (struct.pack("<Q", 17 << 20) + b" " * (17 << 20), "a header of 17825792 bytes"),
        (struct.pack("<Q", 9) + b'{"a": 1}\n', "damaged header entry 'a'"),
        (
            struct.pack("<Q", 58) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}} ',
            "damaged header entry 'w'",
        ),
        (struct.pack("<Q", 12) + b'{"a":1,"a":2', "not valid JSON"),
    ],
    ids=["lfs", "html", "zip", "empty", "bomb", "entry", "infinite", "json"],
)
def test_disguised_and_broken_files_are_refused_with_a_hint(folder: Path, content: bytes, hint: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=hint):
        open_checkpoint(str(folder))


def test_truncated_and_overlong_files_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:1000]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"promises|truncated"):
            open_checkpoint(str(folder))


def test_duplicate_keys_in_a_header_are_refused(folder: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"w":{entry},"w":{entry}}}'.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="'w' occurs twice"):
        open_checkpoint(str(folder))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=2)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    weights = load_file(last) | {next(iter(load_file(first))): torch.ones(1)}
    save_file(weights, last)
    with pytest.raises(CheckpointError, match="is both in"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "evil.bin"])
def test_shards_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"a shard is a \.safetensors file in the same folder"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_one_error(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(str(folder))


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        open_checkpoint(str(folder))
    weights.unlink()
    weights.hardlink_to(outside)
    with pytest.raises(CheckpointError, match="a hard link"):
        open_checkpoint(str(folder))


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(folder, home / "snapshots" / "c0ffee"))
    blob = (snapshot / "model.safetensors").rename(home / "blobs" / "1234")
    (snapshot / "model.safetensors").symlink_to(blob)
    check(snapshot)


@pytest.mark.parametrize("model", ["no/such/place", "nowhere", "a b/c", "https://x.y/z", "../up"])
def test_nonsense_is_not_asked_of_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        open_checkpoint(model)


def test_a_file_is_not_a_checkpoint(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="a file"):
        open_checkpoint(str(tiny_checkpoint / "config.json"))


def test_a_folder_without_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_revision_of_a_folder_means_nothing(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="only Hub ids have revisions"):
        open_checkpoint(str(tiny_checkpoint), revision="main")


def test_demo_is_a_complete_checkpoint() -> None:
    checkpoint = open_checkpoint("demo")
    assert (checkpoint.kind, checkpoint.model) == ("demo", "demo")
    assert sum((checkpoint.folder / f).stat().st_size for f in checkpoint.files) <= 16_000_000
    check(checkpoint.folder)
    norms = [checkpoint.tensor(n) for n in checkpoint.tensors if n.endswith("norm.weight")]
    assert min(np.std(n.float().numpy()) for n in norms) > 0.01  # trained: a graph that ignores a norm shows
