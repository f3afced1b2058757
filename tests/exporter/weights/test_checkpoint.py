"""Locating and reading checkpoints: everything that is wrong is named, nothing hostile is followed or executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from olmo2_export.config import ModelConfig
from olmo2_export.package.export import check_weights
from olmo2_export.truth.reference import open_reference
from olmo2_export.weights import hub, stored_tensors
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.stored_tensors import count_non_finite, read_header
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
        weights["model.layers.3.self_attn.q_norm.weight"] = torch.ones(96)
        weights["model.norm.weight"] = torch.ones(95)
        weights["model.layers.2.post_attention_layernorm.weight"] = torch.ones(96, dtype=torch.int64)
        weights["lm_head.weight"][5, 7] = float("nan")
        weights["model.layers.0.mlp.up_proj.weight"][0, :2] = float("inf")

    edit(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        check(folder)
    for expected in (
        "missing: model.layers.1.self_attn.q_norm.weight",
        "not of this model: model.layers.3.self_attn.q_norm.weight",
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


def test_a_tensor_that_differs_between_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=2)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    changed = tensor.clone()
    changed.view(-1)[-1] += 1
    for other in (torch.ones(1), changed):
        save_file(load_file(last) | {name: other}, last)
        with pytest.raises(CheckpointError, match="is both in"):
            open_checkpoint(str(folder))


def test_the_index_says_which_copy_counts_and_what_is_of_no_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=2)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor, "stray.num_batches": torch.zeros(1)}, last)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors[name].file == first.name
    check(folder)
    assert "not used, as in transformers: stray.num_batches" in caplog.text


def test_a_file_beside_the_index_is_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=2)
    (folder / "consolidated.safetensors").write_bytes(b"something else")
    assert "consolidated.safetensors" not in open_checkpoint(str(folder)).files
    check(folder)


def rename(weights: dict[str, torch.Tensor], change: Callable[[str], str]) -> None:
    renamed = {change(name): tensor for name, tensor in weights.items()}
    weights.clear()
    weights.update(renamed)


@pytest.mark.parametrize("change", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["none", "twice"])
def test_a_prefix_that_is_missing_or_there_twice_is_read_as_transformers_does(
    folder: Path, change: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    before = open_checkpoint(str(folder))
    edit(folder, lambda weights: rename(weights, change))
    after = open_checkpoint(str(folder))
    assert after.tensors.keys() == before.tensors.keys()
    check(folder)
    assert "names lack 'model.' or have it twice" in caplog.text
    with open_reference(after, "fp32") as changed:
        (logits,) = changed.logits([np.arange(9)])
    with open_reference(open_checkpoint(str(before.folder.parent / "copy")), "fp32") as same:
        np.testing.assert_array_equal(same.logits([np.arange(9)])[0], logits)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_wrapper_around_the_model_is_named(folder: Path, prefix: str) -> None:
    edit(folder, lambda weights: rename(weights, lambda name: prefix + name))
    with pytest.raises(CheckpointError, match=rf"the names begin with {prefix.split('.')[0]}\.: saved from"):
        check(folder)


def test_buffers_that_are_computed_and_leftovers_of_training_are_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extras = {
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 4, 16),
        "model.layers.0.mlp.up_proj.bias": torch.zeros(160),
        "v_head.summary.weight": torch.ones(1, 96),
    }
    edit(folder, lambda weights: weights.update(extras))
    check(folder)
    assert all(name in caplog.text for name in sorted(extras)[:5])
    with open_reference(open_checkpoint(str(folder)), "fp32") as reference:
        assert len(reference.logits([np.arange(3)])) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapter such as LoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight", "adapter such as LoRA"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantised weights"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "quantised weights"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "quantised weights"),
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias"),
        ("model.layers.0.input_layernorm.weight", "not of this model"),
        ("model.layers.3.self_attn.q_proj.weight", "not of this model"),
    ],
)
def test_a_tensor_that_would_change_the_model_is_refused(folder: Path, name: str, said: str) -> None:
    edit(folder, lambda weights: weights.update({name: torch.full((96, 96), 0.5)}))
    with pytest.raises(CheckpointError, match=said) as caught:
        check(folder)
    assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="could not load"), open_reference(open_checkpoint(str(folder)), "fp32"):
        pass


def test_a_reward_model_is_said_to_be_one(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        del weights["lm_head.weight"]
        weights["score.weight"] = torch.zeros(1, 96)

    edit(folder, spoil)
    with pytest.raises(CheckpointError, match="a reward model or classifier; if it is one, say so in config"):
        check(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_floats_are_read_as_they_are(folder: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda weights: weights.update({n: w.to(dtype) for n, w in weights.items() if "up_proj" in n}))
    check(folder)
    assert "read into float32 as they are: model.layers.0.mlp.up_proj.weight" in caplog.text
    checkpoint = open_checkpoint(str(folder))
    stored = load_file(folder / "model.safetensors")
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.tensor(name).double(), stored[name].double())
    with open_reference(checkpoint, "fp32") as reference:
        assert np.isfinite(reference.logits([np.arange(5)])[0]).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_every_nan_and_infinity_is_counted_and_nothing_else(tmp_path: Path, dtype: torch.dtype) -> None:
    """All bit patterns of the short dtypes, the borders of the long ones, of both signs; over more than one piece."""
    if dtype.itemsize <= 2:
        codes = torch.arange(1 << (8 * dtype.itemsize), dtype=torch.int32)
        values = codes.to(torch.uint16 if dtype.itemsize == 2 else torch.uint8).view(dtype)
    else:
        largest = torch.finfo(dtype).max
        values = torch.tensor([0.0, -0.0, 1e-45, largest, -largest, torch.inf, -torch.inf, torch.nan, -torch.nan])
        values = values.to(dtype)
    values = values.repeat((1 << 19) // (values.numel() * dtype.itemsize) + 2)
    path = tmp_path / "x.safetensors"
    save_file({"finite": torch.zeros(70_000, dtype=dtype), "odd": values}, path)
    header = read_header(path, path.name)
    assert count_non_finite(path, header["finite"]) == 0
    assert count_non_finite(path, header["odd"]) == int((~torch.isfinite(values.double())).sum()) > 0
    for at in (0, len(values) - 1):
        for bad in (-torch.inf, torch.nan) if dtype != torch.float8_e4m3fn else (torch.nan,):
            one = torch.zeros(len(values)).to(dtype)
            one[at] = bad
            save_file({"one": one}, path)
            assert count_non_finite(path, read_header(path, path.name)["one"]) == 1


@pytest.mark.parametrize("length", [0x80, 0x280, 0xF80])
def test_a_header_that_begins_as_a_pickle_does_is_safetensors(folder: Path, length: int) -> None:
    """One valid file in 32 has a header length whose low byte is 0x80, with which a pickle begins."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    padded = size + (length - size) % 0x1000
    path.write_bytes(struct.pack("<Q", padded) + whole[8 : 8 + size].ljust(padded) + whole[8 + size :])
    assert path.read_bytes()[0] == 0x80
    check(folder)
    path.write_bytes(struct.pack("<Q", padded) + whole[8 : 8 + size].rjust(padded) + whole[8 + size :])
    check(folder)
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"a": list(range(5000))}, protocol=protocol))
        with pytest.raises(CheckpointError, match="a pickle"):
            open_checkpoint(str(folder))


def test_gaps_and_overlaps_in_a_file_are_refused(folder: Path) -> None:
    for first, second in (((0, 4), (8, 12)), ((0, 8), (4, 12)), ((4, 8), (8, 12))):
        entries = {
            "a": {"dtype": "F32", "shape": [(first[1] - first[0]) // 4], "data_offsets": first},
            "b": {"dtype": "F32", "shape": [1 if second == (8, 12) else 2], "data_offsets": second},
        }
        header = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)
        with pytest.raises(CheckpointError, match="a gap or an overlap"):
            open_checkpoint(str(folder))


def test_a_shape_of_other_bytes_is_refused(folder: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)
    with pytest.raises(CheckpointError, match="damaged header entry 'a'"):
        open_checkpoint(str(folder))


def test_a_file_that_is_replaced_after_its_header_was_read_is_caught(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    edit(folder, lambda weights: weights["lm_head.weight"].mul_(2))
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        checkpoint.tensor("lm_head.weight")


def test_rows_are_the_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "_ROWS", 5000)
    checkpoint = open_checkpoint(str(folder))
    for name in ("lm_head.weight", "model.norm.weight"):
        blocks = [block.clone() for block in checkpoint.rows(name)]
        assert torch.equal(torch.cat(blocks), checkpoint.tensor(name))
    assert [len(block) for block in checkpoint.rows("lm_head.weight")] == [13] * 10 + [1]


@pytest.mark.alone
def test_a_file_larger_than_memory_is_checked_in_little_memory(tmp_path: Path) -> None:
    """A hole of a file: 64 GB that take no disk; what would map or hold it fails under this limit of address space."""
    size = 64 << 30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    code = """
import resource, sys
from itertools import islice
from pathlib import Path
from olmo2_export.weights.stored_tensors import read_header, read_rows, _pieces
path = Path(sys.argv[1])
info = read_header(path, path.name)["w"]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
assert sum(len(piece) for piece in islice(_pieces(path, info), 100)) == 100 << 18
assert len(next(read_rows(path, info))) == 4 << 20
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "evil.bin"])
def test_shards_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"a shard is a \.safetensors file in the same folder"):
        open_checkpoint(str(folder))


def test_an_index_may_say_that_its_files_are_here(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", shards=3)
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    named = {tensor: f"./{file}" for tensor, file in document["weight_map"].items()}
    index.write_text(json.dumps(document | {"weight_map": named}))
    assert len(open_checkpoint(str(folder)).files) >= 3
    check(folder)


def test_an_index_that_cannot_be_read_is_one_error(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        open_checkpoint(str(folder))
    index.unlink()
    index.symlink_to(tmp_path / "disk" / "index")
    with pytest.raises(CheckpointError, match=r"index\.json: a link to .*/disk/index, which is not there"):
        open_checkpoint(str(folder))
    index.unlink()
    index.mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json: Is a directory"):
        open_checkpoint(str(folder))


def test_biases_of_minus_zero_change_nothing(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.full((160,), -0.0)}))
    check(folder)
    edit(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.bias": torch.full((160,), 1e-45)}))
    with pytest.raises(CheckpointError, match="biases"):
        check(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_one_error(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(str(folder))


def test_links_are_followed_and_judged_by_what_they_lead_to(folder: Path, tmp_path: Path) -> None:
    """Data disks, backups by hard links, deduplicated stores: where a file lies is no matter."""
    weights = folder / "model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    check(folder)
    weights.unlink()
    weights.hardlink_to(outside)
    check(folder)
    (tmp_path / "alias").symlink_to(folder)
    assert open_checkpoint(str(tmp_path / "alias")).model == "copy"
    check(tmp_path / "alias")


def test_a_link_to_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.unlink()
    (tmp_path / "secret").write_text("of another user, and no safetensors")
    for target, said in ((tmp_path / "secret", "not safetensors"), (Path("/dev/zero"), "not a file")):
        weights.symlink_to(target)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(str(folder))
        weights.unlink()
    weights.symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointNotFoundError, match="is its disk mounted"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "a LoRA adapter"),
        (("model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "config.json"), "a checkpoint of OLMo-core"),
        (("config.yaml", "model.pt"), "a checkpoint of AI2's OLMo trainer"),
        (("config.json", "manifest.json", "onnx/model.onnx"), "a package or another export"),
        (("model-q4_k_m.gguf",), "GGUF files"),
        (("snapshots/0123/config.json", "refs/main"), "the cache of a Hub repository"),
        (("zero_to_fp32.py", "global_step7/rank0.pt"), "a DeepSpeed checkpoint"),
        (("checkpoint-9/config.json", "checkpoint-500/config.json", "trainer_state.json"), r"checkpoint-500$"),
        (("config.json", "model-00001-of-00002.safetensors"), "which says what belongs together"),
        (("config.json", "model.pt"), r"model\.pt is never read"),
        (("config.json",), r"--revision refs/pr/1"),
    ],
)
def test_what_people_give_by_mistake_is_named(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match=said):
        open_checkpoint(str(tmp_path))


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(folder, home / "snapshots" / "c0ffee"))
    blob = (snapshot / "model.safetensors").rename(home / "blobs" / "1234")
    (snapshot / "model.safetensors").symlink_to(blob)
    check(snapshot)


@pytest.mark.parametrize("model", ["no/such/place", "nowhere", "a b/c", "https://x.y/z", "../up"])
def test_nonsense_is_not_asked_of_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
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
