"""The package folder: whole or not at all, the same bytes every time, and no file that can change unnoticed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.checkpoints import make_checkpoint
from support.static_model import write_package

from olmo2_export import atomic
from olmo2_export.atomic import replace_folder
from olmo2_export.package.export import export
from olmo2_export.summary.text import summarize
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    PackageError,
    PackageNotFoundError,
    ResourceError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.manifest import MANIFEST_NAME, TRT_FOLDER
from runtimes.package import open_package
from runtimes.sealed import check_files, read_sealed, seal
from runtimes.text.tokenizer import Tokenizer


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]


def test_folder_is_the_documented_one(demo_package: Path) -> None:
    assert contents(demo_package).keys() == {
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
    }
    manifest = open_package(demo_package).manifest
    check_files(demo_package, manifest.files)
    assert manifest.files.keys() | {MANIFEST_NAME} == contents(demo_package).keys()
    assert (manifest.source.kind, manifest.source.revision) == ("demo", None)
    assert manifest.variants["fp32"].op_counts == {"RMSNormalization": 25, "RotaryEmbedding": 12, "Attention": 6}
    assert manifest.variants["fp32"].kv_cache.max_cache_length == 1024
    assert json.loads((demo_package / "config.json").read_text())["transformers.js_config"] == {
        "use_external_data_format": {"model.onnx": 1}
    }


def test_genai_config_names_the_graph_and_its_tensors(demo_package: Path) -> None:
    config = json.loads((demo_package / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["type"], model["context_length"], model["vocab_size"], model["eos_token_id"]) == (
        "decoder",
        1024,
        4096,
        0,
    )
    assert (demo_package / decoder["filename"]).is_file()
    names = {spec.name for spec in open_package(demo_package).manifest.variants["fp32"].inputs}
    assert {decoder["inputs"]["past_key_names"] % 5, decoder["inputs"]["position_ids"]} <= names
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (8, 4, 32)
    assert config["search"]["past_present_share_buffer"] is False


def test_every_weight_is_exact(tiny_checkpoint: Path, tiny_package: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    model = ir.load(tiny_package / "onnx" / "model.onnx")
    for name in checkpoint.tensors:
        value = model.graph.initializers[name].const_value
        assert value is not None
        stored = checkpoint.tensor(name).numpy()
        is_linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        np.testing.assert_array_equal(value.numpy(), stored.T if is_linear else stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "c", dtype=dtype, tie_word_embeddings=True)
    export(open_checkpoint(str(folder)), tmp_path / "p")
    initializers = ir.load(tmp_path / "p" / "onnx" / "model.onnx").graph.initializers
    embedding = open_checkpoint(str(folder)).tensor("model.embed_tokens.weight").float().numpy()
    for name, expected in (("model.embed_tokens.weight", embedding), ("lm_head.weight", embedding.T)):
        value = initializers[name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), expected)


def run_export(model: Path | str, out: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "olmo2_export", "export", str(model), "--out", str(out), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        cwd=out.parent,
    )


def test_two_exports_are_byte_identical_and_hold_no_path(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    place = tmp_path / "ein Ordner mit ü"
    place.mkdir()
    copy = shutil.copytree(tiny_checkpoint, place / "tiny")
    process = run_export(copy, place / "out", PYTHONHASHSEED="12345")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert contents(place / "out") == contents(tiny_package)
    for name, data in contents(place / "out").items():
        for secret in (str(tmp_path), str(Path.home()), str(Path.cwd())):
            assert secret == "/" or secret.encode() not in data, name
    assert leftovers(place / "out") == []


def test_an_existing_package_is_replaced_only_by_force(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(UsageError, match="--force replaces it"):
        export(checkpoint, out)
    (out / "parity.json").write_text("{}")
    export(checkpoint, out, force=True)
    assert contents(out) == contents(tiny_package)
    assert leftovers(out) == []


def test_other_peoples_folders_are_never_replaced(tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "a web app has one, too"}')
    mixed = Path(shutil.copytree(tiny_package, tmp_path / "mixed"))
    (mixed / "notes.txt").write_text("kept beside the package")
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    for name in ("thesis", "file", "link", "web", "mixed"):
        with pytest.raises(UsageError):
            export(checkpoint, tmp_path / name, force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "web" / "manifest.json").exists()
    assert (mixed / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "mixed", "thesis", "web"]


def test_unknown_variants_write_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="variant q5: this version writes fp32, q4, q8, fp16, bf16, q4f16"):
        export(open_checkpoint(str(tiny_checkpoint)), tmp_path / "out", variants=["fp32", "q5"])
    assert list(tmp_path.iterdir()) == []


def test_a_bad_checkpoint_leaves_the_old_package(tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    bad = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"intermediate_size": 161}))
    with pytest.raises(CheckpointError, match="expected \\[161, 96\\]"):
        export(open_checkpoint(str(bad)), out, force=True)
    assert contents(out) == contents(tiny_package)
    assert leftovers(out) == []


def tokenizer(vocab: dict[str, int], kind: str = "BPE", **more: object) -> str:
    """Return a tokenizer.json."""
    model = {"type": kind, "vocab": vocab, **({"merges": []} if kind == "BPE" else {}), **more}
    if kind == "WordPiece":
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 0}
    return json.dumps({"version": "1.0", "model": model, "added_tokens": []})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "does not work"),
        (tokenizer({character: 5000 + n for n, character in enumerate("abcdef")}), "no id below 131"),
        (tokenizer({"un": 0, "do": 1}, kind="WordPiece", unk_token="[UNK]"), "wrong tokenizer|not work|no decoder"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "a Git LFS pointer"),
    ],
)
def test_a_broken_tokenizer_fails_the_export(tiny_checkpoint: Path, tmp_path: Path, content: str, said: str) -> None:
    bad = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bad"))
    (bad / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        export(open_checkpoint(str(bad)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("generation_config.json", {"eos_token_id": "x"}, r"generation_config\.json: expected .*: eos_token_id 'x'"),
        ("generation_config.json", {"bos_token_id": "257"}, r"bos_token_id '257' \(a token id\); correct them"),
        ("generation_config.json", {"eos_token_id": [1, "x"]}, r"eos_token_id \[1, 'x'\]"),
        ("config.json", {"transformers.js_config": "x"}, r"transformers\.js_config is no object"),
    ],
)
def test_bad_json_values_name_the_checkpoints_file(
    tiny_checkpoint: Path, tmp_path: Path, name: str, change: dict[str, object], said: str
) -> None:
    bad = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bad"))
    (bad / name).write_text(json.dumps(json.loads((bad / name).read_text()) | change))
    with pytest.raises(ConfigError, match=said) as caught:
        export(open_checkpoint(str(bad)), tmp_path / "out")
    assert "staging" not in str(caught.value)


@pytest.mark.parametrize("alphabet", ["acgt", "你好世界", "ßäöü", "ⲁⲃⲅ"])
def test_a_tokenizer_of_any_alphabet_is_judged_by_its_own_text(
    tiny_checkpoint: Path, tmp_path: Path, alphabet: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    (folder / "tokenizer.json").write_text(tokenizer({c: n for n, c in enumerate(alphabet)}))
    export(open_checkpoint(str(folder)), tmp_path / "out")
    assert Tokenizer.from_package(tmp_path / "out").encode(alphabet) == list(range(len(alphabet)))


def test_a_tokenizer_that_lowers_letters_is_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    document = json.loads(tokenizer({c: n for n, c in enumerate("abcxyzABCXYZ")}))
    (folder / "tokenizer.json").write_text(json.dumps(document | {"normalizer": {"type": "Lowercase"}}))
    export(open_checkpoint(str(folder)), tmp_path / "out")


def test_tokens_beyond_the_embedding_are_named(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    document = json.loads(tokenizer({chr(97 + n): n for n in range(131)}))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"] = [{"id": 131, "content": "<|extra|>", "special": True, **flags}]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    export(open_checkpoint(str(folder)), tmp_path / "out")
    assert "1 tokens are beyond the model's vocabulary of 131, as '<|extra|>'" in caplog.text


def end_of_text(folder: Path) -> tuple[object, list[int]]:
    """What genai_config.json says ends a text, and what our runner says."""
    said = json.loads((folder / "genai_config.json").read_text())["model"].get("eos_token_id")
    (folder / "tokenizer.json").exists() or pytest.fail("no tokenizer")
    return said, list(Tokenizer.from_package(folder).eos_token_ids)


@pytest.mark.parametrize(
    ("generation", "in_config", "expected"),
    [
        ({"eos_token_id": None, "pad_token_id": None}, 7, 7),
        ({"eos_token_id": 5}, 7, 5),
        ({"eos_token_id": [5, 6]}, 7, [5, 6]),
        ({}, [7, 8], [7, 8]),
        ("", 7, 7),
        ('{"eos_token_id": 5,}', 7, 7),
        ('\ufeff{"eos_token_id": 5}', 7, 7),
        (None, 7, 7),
    ],
)
def test_one_rule_says_what_ends_a_text(
    tiny_checkpoint: Path, tmp_path: Path, generation: object, in_config: object, expected: object
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    (folder / "tokenizer.json").write_text(tokenizer({chr(97 + n): n for n in range(26)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text)
    export(open_checkpoint(str(folder)), tmp_path / "out")
    assert end_of_text(tmp_path / "out") == (expected, expected if isinstance(expected, list) else [expected])


def test_ids_that_the_vocabulary_does_not_have_end_nothing(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers' own defaults, in a model trained with a smaller vocabulary."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    for name in ("config.json", "generation_config.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps(document | {"eos_token_id": 50279, "pad_token_id": 1, "bos_token_id": None})
        )
    export(open_checkpoint(str(folder)), tmp_path / "out")
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert "eos_token_id" not in model
    assert model["pad_token_id"] == 1
    assert "eos_token_id 50279 is not in the vocabulary" in caplog.text


def test_an_end_that_the_tokenizer_says_and_nothing_else_is_named(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    (folder / "tokenizer.json").write_text(tokenizer({chr(97 + n): n for n in range(26)}))
    for token, said in (("b", True), ({"content": "b"}, True), ("zz", False)):
        caplog.clear()
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        export(open_checkpoint(str(folder)), tmp_path / "out", force=True)
        assert ("eos_token 'b' is id 1, but what ends a text is 130" in caplog.text) == said


@pytest.mark.parametrize("text", ["", '{"eos_token": "b",}', '\ufeff{"eos_token": "b"}'])
def test_a_damaged_tokenizer_config_is_named_and_copied(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    (folder / "tokenizer.json").write_text(tokenizer({chr(97 + n): n for n in range(26)}))
    (folder / "tokenizer_config.json").write_text(text)
    export(open_checkpoint(str(folder)), tmp_path / "out")
    assert "tokenizer_config.json" in caplog.text
    assert "it is copied as it is" in caplog.text
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == text
    assert Tokenizer.from_package(tmp_path / "out").encode("ab") == [0, 1]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_text_whose_link_leads_nowhere_is_not_taken_for_missing(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "disk" / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a link to .*/disk/{name}, which is not there; is its disk"):
        export(open_checkpoint(str(folder)), tmp_path / "out")


def test_weights_of_a_package_whose_link_leads_nowhere(tiny_package: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny_package, tmp_path / "p"))
    data = package / "onnx" / "model.onnx_data"
    data.unlink()
    data.symlink_to(tmp_path / "disk" / "data")
    with pytest.raises(IntegrityError, match=r"model\.onnx_data: a link to .*/disk/data, which is not there"):
        check_files(package, open_package(package).manifest.files)


def test_what_the_package_does_not_need_is_left_out_of_its_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    config = json.loads((folder / "config.json").read_text())
    odd = {"quantization_config": {"quant_method": "gptq"}, "auto_map": {"a": "b"}, "_name_or_path": "/home/me/model"}
    (folder / "config.json").write_text(json.dumps(config | odd))
    checkpoint = open_checkpoint(str(folder))
    export(checkpoint, tmp_path / "out", variants=["fp32"])
    assert not odd.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    (report,) = verify(tmp_path / "out", checkpoint, variants=["fp32"], longest=20)
    assert report.passed


def test_the_folder_one_stands_in_is_not_replaced(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    monkeypatch.chdir(out / "onnx")
    with pytest.raises(UsageError, match="the folder you are in"):
        export(open_checkpoint(str(tiny_checkpoint)), out, force=True)


def test_a_full_disk_is_said_before_anything_is_written(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    usage = namedtuple("usage", "total used free")  # as shutil's
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 5 * 10**5, 5 * 10**5))
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes \(model.onnx [\d,]+\), 500,000 are free") as caught:
        export(open_checkpoint(str(tiny_checkpoint)), out, force=True)
    assert caught.value.exit_code == 1
    assert contents(out) == contents(tiny_package)
    assert leftovers(out) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_while_writing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 10**9))
        with pytest.raises(ResourceError, match="writing failed"):
            export(open_checkpoint(str(tiny_checkpoint)), disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.alone
def test_a_second_writer_is_kept_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out", force=False) as staging:
        (staging / "manifest.json").write_text("{}")
        process = run_export(tiny_checkpoint, tmp_path / "out")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert f"locked by pid {os.getpid()}" in errors
        assert errors.count("\n") == 1
    assert leftovers(tmp_path / "out") == []


def test_a_stale_lock_file_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("999999")
    with replace_folder(tmp_path / "out", force=False):
        pass
    assert (tmp_path / "out").is_dir()
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("exchange_works", [True, False])
def test_the_swap_replaces_everything(tmp_path: Path, exchange_works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange_works:
        monkeypatch.setattr(atomic.sys, "platform", "other")
    for content in ("one", "two"):
        with replace_folder(tmp_path / "out", force=True) as staging:
            manifest = {"format_version": 1, "exporter_version": "0", "checksum": "", "files": {content: {}}}
            (staging / "manifest.json").write_text(json.dumps(manifest))
            (staging / content).write_text(content)
    assert contents(tmp_path / "out").keys() == {"manifest.json", "two"}
    assert leftovers(tmp_path / "out") == []


@pytest.mark.alone
def test_killed_exports_leave_the_old_package_and_no_debris(
    tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    """SIGKILL cannot be caught: the target must be whole at every moment, and the next run sweeps."""
    other = make_checkpoint(tmp_path / "other", seed=1)
    out = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    whole = contents(tiny_package)
    dice = random.Random(0)
    for _ in range(3):
        process = run_export(other, out, "--force")
        time.sleep(dice.uniform(2.0, 5.0))
        process.kill()
        process.communicate()
        manifest = open_package(out).manifest
        check_files(out, manifest.files)
        if contents(out) != whole:  # it was done before the kill
            assert manifest.source.model == "other"
            shutil.rmtree(out)
            shutil.copytree(tiny_package, out)
    (tmp_path / ".out.staging-dead").mkdir()
    export(open_checkpoint(str(tiny_checkpoint)), out, force=True)
    assert contents(out) == whole
    assert leftovers(out) == []


@pytest.mark.alone
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_cleans_up(
    tmp_path: Path, number: signal.Signals, code: int, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    process = run_export(tiny_checkpoint, out)
    deadline = time.monotonic() + 60
    while not any(".staging-" in name for name in leftovers(out)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not out.exists()
    assert leftovers(out) == []


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "genai_config.json",
        "generation_config.json",
        "manifest.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
    ],
)
def test_one_flipped_bit_anywhere_is_refused_by_name(tiny_package: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(tiny_package, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    for position in (0, len(data) // 2, len(data) - 1):
        data[position] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(PackageError, match=Path(name).name):
            summarize(copy)
        data[position] ^= 1
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(PackageError, match=Path(name).name):
        summarize(copy)
    (copy / name).unlink()
    with pytest.raises(PackageError, match=Path(name).name):
        summarize(copy)


def test_a_manifest_of_another_format_says_so(tiny_package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_package, tmp_path / "copy"))
    document = read_sealed(copy / MANIFEST_NAME)
    (copy / MANIFEST_NAME).write_bytes(seal(document | {"format_version": 99}))
    with pytest.raises(PackageError, match="format_version 99, this version reads 3 and 4; update"):
        open_package(copy)


def test_a_manifest_of_engines_of_format_3_still_loads(tmp_path: Path) -> None:
    package = write_package(tmp_path / "package")
    path = package / TRT_FOLDER / MANIFEST_NAME
    new = open_package(package).trt
    document = read_sealed(path) | {"format_version": 3}
    for variant in document["variants"].values():
        del variant["min_onnxruntime"]
    path.write_bytes(seal(document))
    old = open_package(package).trt
    assert old is not None
    assert new is not None
    assert old.engines == new.engines
    assert [v.min_onnxruntime for v in old.variants.values()] == [None]
    path.write_bytes(seal(document | {"format_version": 5}))
    with pytest.raises(PackageError, match="format_version 5, this version reads 3 and 4; update olmo2-export, or"):
        _ = open_package(package).trt


def test_the_manifest_says_what_made_the_package(tiny_package: Path) -> None:
    libraries = open_package(tiny_package).manifest.libraries
    known = {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "tokenizers", "numpy", "python"}
    assert known <= set(libraries) <= known | {"onnxruntime", "onnxruntime-gpu"}
    assert libraries["python"] == platform.python_version()
    assert libraries["torch"] == torch.__version__


def test_a_manifest_with_other_fields_says_so(tiny_package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_package, tmp_path / "copy"))
    document = read_sealed(copy / MANIFEST_NAME)
    model = document["model"]
    for damaged in (
        document | {"model": {"size": 3}},
        document | {"model": model | {"head_dim": -1}},
        document | {"model": model | {"num_hidden_layers": "x"}},
        document | {"variants": {"fp32": document["variants"]["fp32"] | {"precision": 32}}},
        {k: v for k, v in document.items() if k != "files"},
    ):
        (copy / MANIFEST_NAME).write_bytes(seal(damaged))
        with pytest.raises(PackageError, match="not the fields of format 4"):
            open_package(copy)
    (copy / MANIFEST_NAME).write_bytes(seal(document | {"files": {}}))
    with pytest.raises(IntegrityError, match="not in the manifest"):
        summarize(copy)
    (copy / MANIFEST_NAME).write_bytes(seal(document | {"variants": {}}))
    with pytest.raises(VariantNotFoundError, match="it has none"):
        open_package(copy).variant(None)


def test_a_manifest_that_leads_outside_is_refused(tiny_package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_package, tmp_path / "copy"))
    document = read_sealed(copy / MANIFEST_NAME)
    document["files"]["../outside"] = {"sha256": "0", "size": 1}
    (copy / MANIFEST_NAME).write_bytes(seal(document))
    with pytest.raises(PackageError, match="leads out of the package"):
        open_package(copy)


def test_a_folder_without_manifest_is_no_package(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(PackageNotFoundError, match="olmo2-export export"):
            open_package(place)


@pytest.mark.alone
def test_the_lock_is_the_kernels_and_dies_with_its_process(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out", force=False):
        with (tmp_path / ".out.lock").open() as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ResourceError, match="locked by pid"), replace_folder(tmp_path / "out", force=False):
            pass


def test_integrity_error_is_bad_input() -> None:
    assert IntegrityError("x").exit_code == 2
