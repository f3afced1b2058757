"""verify, end to end: every checkpoint form passes, every report is written, and nothing unequal is compared."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import make_checkpoint
from support.rebuilt_packages import with_trt_graph
from transformers import Olmo2ForCausalLM

from olmo2_export import atomic, cli
from olmo2_export.locate.locate import locate_all
from olmo2_export.package.export import export
from olmo2_export.package.trt_variants import TrtOptions
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain
from olmo2_export.truth.reference import open_reference
from olmo2_export.verify import verify as verify_module
from olmo2_export.verify.feeds import LENGTHS, MIN_CAPACITY, MODES
from olmo2_export.verify.verify import format_reports, verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes import sealed
from runtimes.errors import ConfigError, IntegrityError, PackageError, UsageError, VariantNotFoundError
from runtimes.package import open_package
from runtimes.sealed import FileEntry, read_sealed

pytestmark = pytest.mark.usefixtures("remembered")

SHORT = 64
"""tokens of the longest rows of tests that look at something else"""

FORMS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 6},
    "mqa-bias": {"num_key_value_heads": 1, "attention_bias": True},
    "tied-shards": {"tie_word_embeddings": True, "shards": 3},
    "old-config-bf16": {"old_config": True, "dtype": torch.bfloat16},
    "eps-theta": {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
    "head-dim": {"head_dim": 20},
    "short-context": {"max_position_embeddings": 16, "num_hidden_layers": 1},
}


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_checkpoint_verifies(tmp_path: Path, fields: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", **{"num_hidden_layers": 2} | fields)))
    export(checkpoint, tmp_path / "p")
    (report,) = verify(tmp_path / "p", checkpoint)
    assert report.passed, format_reports([report])
    capacity = fields.get("max_position_embeddings", 256)
    odd = min(61, capacity - 1)
    lengths = (1, odd, capacity - 1, capacity)
    cases = {(c.mode, c.batch_size, c.length) for c in report.cases}
    assert cases == {(mode, rows, length) for mode in MODES for rows in (1, 3) for length in lengths}
    assert len(report.cases) == 32
    assert report.verdicts == {"kernel parity": True, "quality": True}
    assert report.greedy.tokens == (33 if "max_position_embeddings" in fields else 72)


@pytest.fixture
def copy(tiny_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_package, tmp_path / "copy"))


def test_the_demo_verifies_on_text_and_the_report_says_how(demo_package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_package, tmp_path / "copy"))
    (report,) = verify(copy, open_checkpoint("demo"), variants=["fp32", "fp32"])
    assert report.passed
    assert report.tokens_from == "text, the last row random ids"
    assert report.sequences == (1024, *LENGTHS[1:])
    assert (report.capacity, report.max_cache_length) == (1024, 1024)
    positions = {(c.mode, c.batch_size, c.length): c.positions for c in report.cases}
    assert [positions[mode, 1, 61] for mode in MODES] == [61] * 4
    assert [positions[mode, 3, 61] for mode in MODES] == [111] * 4
    assert [positions[mode, 3, 1] for mode in MODES] == [51] * 4
    assert [positions[mode, 1, 1024] for mode in MODES] == [1, 11, 3, 2]
    assert all(c.top1 == c.top5 == c.top10 == 1.0 for c in report.cases)
    assert all(c.relative_error < 1e-6 and c.kl_max < 1e-10 for c in report.cases)
    assert report.perplexity is not None
    assert report.perplexity.tokens == 4080
    assert report.perplexity.reference == pytest.approx(39.625, abs=0.001)
    assert report.perplexity.low < report.perplexity.relative < report.perplexity.high
    assert abs(report.perplexity.relative) < 1e-6
    assert all(c.kl_mean < 1e-10 and c.max_abs < 1e-3 for c in report.cases)
    document = read_sealed(copy / "parity.json")["variants"]["fp32"]
    assert document["passed"] is True
    assert document["gate"]["error_ratio"] == 4.0
    assert len(document["cases"]) == 32
    assert document["verdicts"] == {"kernel parity": True, "quality": True}
    assert document["perplexity"]["tokens_from"] == "text"
    assert "fp32     passed on ort" in plain(describe(copy))
    table = format_reports([report])
    assert "72 of 72 tokens equal over 3 prompts" in table
    assert "FAIL" not in table


@pytest.mark.usefixtures("little_text", "short_rows")
def test_parity_json_is_sealed_and_bound_to_its_export(copy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    verify(copy, open_checkpoint(str(tiny_checkpoint)), longest=SHORT)
    raw = (copy / "parity.json").read_bytes()
    (copy / "parity.json").write_bytes(raw.replace(b"true", b"TRUE"[:0] + b"true ", 1))
    with pytest.raises(IntegrityError, match=r"parity\.json"):
        plain(describe(copy))
    other = make_checkpoint(tmp_path / "other", seed=3)
    export(open_checkpoint(str(other)), tmp_path / "new")
    (tmp_path / "new" / "parity.json").write_bytes(raw)
    with pytest.raises(IntegrityError, match="of another export"):
        plain(describe(tmp_path / "new"))
    verify(tmp_path / "new", open_checkpoint(str(other)), longest=SHORT)  # and is simply replaced
    assert "passed" in plain(describe(tmp_path / "new"))


@pytest.mark.usefixtures("little_text", "short_rows")
def test_other_weights_fail(copy: Path, tmp_path: Path) -> None:
    (report,) = verify(copy, open_checkpoint(str(make_checkpoint(tmp_path / "other", seed=1))), longest=SHORT)
    assert not report.passed
    assert read_sealed(copy / "parity.json")["variants"]["fp32"]["passed"] is False
    assert "FAILED" in plain(describe(copy))
    assert "FAIL" in format_reports([report])


def test_another_vocabulary_is_not_compared(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size differ"):
        verify(copy, open_checkpoint(str(make_checkpoint(tmp_path / "other", vocab_size=137))))


def test_a_context_too_short_to_tell_the_cases_apart_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "c", max_position_embeddings=15, num_hidden_layers=1)))
    export(checkpoint, tmp_path / "p")
    with pytest.raises(PackageError, match="a cache of 15 tokens; verification needs 16"):
        verify(tmp_path / "p", checkpoint)


@pytest.mark.usefixtures("little_text")
def test_a_cache_shorter_than_the_sequences_is_verified_within_it(
    copy: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    package = with_trt_graph(copy, tmp_path / "package", TrtOptions("fp32", 33))
    (report,) = verify(package, open_checkpoint(str(tiny_checkpoint)), variants=["trt_fp32"])
    assert report.passed
    assert report.sequences == (33, 29, 13)
    assert (report.capacity, report.max_cache_length) == (33, 33)


@pytest.mark.usefixtures("little_text")
def test_rows_can_be_shorter_than_the_cache(copy: Path, tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    (report,) = verify(copy, checkpoint, longest=40)
    assert report.passed
    assert (report.capacity, report.max_cache_length) == (40, 256)
    assert {c.length for c in report.cases} == {1, 39, 40}
    assert "first of 1, 39, 40 tokens; its cache holds 256" in format_reports([report])
    with pytest.raises(UsageError, match="longest rows of 15 tokens: verification needs 16"):
        verify(copy, checkpoint, longest=15)


@pytest.mark.usefixtures("little_text", "short_rows")
def test_a_package_replaced_meanwhile_gets_no_verdict(
    copy: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_checkpoint(str(make_checkpoint(tmp_path / "other", seed=1)))
    measure = verify_module.measure_variant

    def measure_then_replace(*arguments: Any, **options: Any) -> Any:
        report = measure(*arguments, **options)
        export(other, copy, force=True)
        return report

    monkeypatch.setattr(verify_module, "measure_variant", measure_then_replace)
    with pytest.raises(PackageError, match="was replaced while it was verified"):
        verify(copy, open_checkpoint(str(tiny_checkpoint)), longest=SHORT)
    assert not (copy / "parity.json").exists()


def test_unknown_variants_are_named(copy: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(VariantNotFoundError, match="no variant 'q4'; it has fp32"):
        verify(copy, open_checkpoint(str(tiny_checkpoint)), variants=["q4"])


def test_a_damaged_package_is_not_measured(copy: Path, tiny_checkpoint: Path) -> None:
    with (copy / "onnx" / "model.onnx_data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    with pytest.raises(IntegrityError, match=r"model\.onnx_data"):
        verify(copy, open_checkpoint(str(tiny_checkpoint)))
    assert not (copy / "parity.json").exists()


def test_float64_reference_is_exact_in_the_norms_too(tiny_checkpoint: Path) -> None:
    """transformers' own float64 model still rounds every norm to float32: 1e-7, as large as what is measured."""
    ids = [np.arange(31, dtype=np.int64)]
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with open_reference(checkpoint, "fp64") as reference:
        exact = reference.logits(ids)[0]
    with open_reference(checkpoint, "fp32") as reference:
        single = reference.logits(ids)[0]
    naive = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    with torch.inference_mode():
        rounded = naive(torch.from_numpy(ids[0])[None]).logits[0].numpy()
    assert exact.dtype == np.float64
    assert single.dtype == np.float32
    own_error = np.abs(single - exact).max()
    assert 1e-8 < np.abs(rounded - exact).max() < own_error < 1e-5


def test_greedy_of_the_reference_is_generate(tiny_checkpoint: Path) -> None:
    prompt = np.array([3, 1, 4, 1, 5], dtype=np.int64)
    with open_reference(open_checkpoint(str(tiny_checkpoint)), "fp32") as reference:
        tokens, gaps = reference.greedy(prompt, 9)
    model: Any = Olmo2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert tokens.tolist() == expected[0, 5:].tolist()
    assert (gaps >= 0).all()


def test_reference_config_of_old_form_is_read_by_transformers_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", old_config=True)
    assert "rope_theta" in json.loads((folder / "config.json").read_text())


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder be one that may not be written, for whoever runs the tests."""
    access = os.access

    def denied(path: Any, mode: int) -> bool:
        return access(path, mode) and not (mode & os.W_OK and Path(path).resolve() == folder)

    monkeypatch.setattr(atomic.os, "access", denied)


@pytest.mark.usefixtures("little_text", "short_rows")
def test_a_read_only_package_gets_its_verdict(
    copy: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model volume, or a layer of an image."""
    read_only(copy, monkeypatch)
    before = sorted(p.name for p in copy.iterdir())
    assert cli.main(["verify", str(copy), "--reference", str(tiny_checkpoint), "--longest", "64"]) == 0
    out = capsys.readouterr().out
    assert "fp32 on ort: kernel parity passed, quality passed" in out
    assert f"verified: {copy} against" in out
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy} is not writable: the report is not kept; --out FILE writes it elsewhere"
    ]
    assert sorted(p.name for p in copy.iterdir()) == before


@pytest.mark.usefixtures("little_text", "short_rows")
def test_the_report_of_a_read_only_package_goes_elsewhere(
    copy: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_only(copy, monkeypatch)
    out = tmp_path / "report.json"
    command = ["verify", str(copy), "--reference", str(tiny_checkpoint), "--longest", "64", "--out", str(out)]
    assert cli.main(command) == 0
    assert caplog.records == []
    document = read_sealed(out)
    assert document["package_checksum"] == read_sealed(copy / "manifest.json")["checksum"]
    version = f"transformers {transformers.__version__}"
    assert document["reference"]["kernel_parity"] == f"{version}, its whole model"
    assert document["reference"]["quality"] == f"{version}, its layers one at a time"
    assert list(document["variants"]) == ["fp32"]
    assert not (copy / "parity.json").exists()


@pytest.mark.parametrize("out", ["nowhere/report.json", "copy"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_run(
    copy: Path, tiny_checkpoint: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "ask_pytorch", None)
    with pytest.raises(UsageError, match=rf"--out {tmp_path / out}: expected a file that can be written"):
        verify(copy, open_checkpoint(str(tiny_checkpoint)), out=tmp_path / out)


def test_locate_writes_no_report(copy: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(copy), "--reference", str(tiny_checkpoint), "--locate", "--out", "report.json"]
    assert cli.main(command) == 2
    assert "--out: --locate writes no report" in capsys.readouterr().err


@pytest.mark.usefixtures("little_text", "short_rows")
def test_a_full_disk_does_not_take_the_verdict(
    copy: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, _: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.Path, "write_bytes", full)
    assert cli.main(["verify", str(copy), "--reference", str(tiny_checkpoint), "--longest", "64"]) == 1
    said = capsys.readouterr()
    assert f"verified: {copy} against" in said.out
    last = said.err.splitlines()[-1]
    assert "parity.json: writing failed (No space left on device)" in last
    assert sorted(p.name for p in copy.iterdir() if "parity" in p.name) == []


@pytest.mark.usefixtures("little_text")
def test_verify_and_locate_hash_each_file_once(
    tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_package, tmp_path / "copy"))
    counts: Counter[str] = Counter()
    hash_file = sealed.hash_file

    def counting(path: Path) -> FileEntry:
        counts[path.relative_to(copy).as_posix()] += 1
        return hash_file(path)

    monkeypatch.setattr(sealed, "hash_file", counting)
    verify(copy, open_checkpoint(str(tiny_checkpoint)), longest=MIN_CAPACITY)
    assert counts == Counter(open_package(copy).manifest.files.keys())
    counts.clear()
    locate_all(copy, open_checkpoint(str(tiny_checkpoint)))
    assert counts == Counter(open_package(copy).manifest.variants["fp32"].files)
