"""A layer at a time: the numbers of the whole model, in the memory of a layer."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint

from olmo2_export import cli
from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import ParityReport
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.truth.reference import int8_blocks, open_reference
from olmo2_export.verify import by_layer
from olmo2_export.verify import verify as verify_module
from olmo2_export.verify.by_layer import why_by_layer
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.package import open_package

HEAD, UP = "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("changed", [False, True], ids=["stored", "replaced"])
def test_pytorch_by_layer_is_pytorch_bit_for_bit(tiny_checkpoint: Path, precision: str, changed: bool) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    random = np.random.default_rng(3)
    sequences = [random.integers(0, 131, n) for n in (29, 17)]
    positions = [np.array([0, 3, 28]), np.arange(17)]
    weights = {UP: checkpoint.tensor(UP) * 1.5, HEAD: checkpoint.tensor(HEAD) * 0.5} if changed else {}
    rounding = {UP: int8_blocks(32), HEAD: int8_blocks(32)} if changed and precision in ("fp32", "fp64") else {}
    ours = LayeredReference(checkpoint, config, precision, weights, rounding)
    with open_reference(checkpoint, precision, weights, rounding) as whole:
        for where in (None, positions):
            for one, other in zip(ours.logits(sequences, where), whole.logits(sequences, where), strict=True):
                assert one.dtype == other.dtype == (np.float64 if precision == "fp64" else np.float32)
                np.testing.assert_array_equal(one, other)


def by_case(report: ParityReport) -> dict[tuple[str, int], tuple[float, ...]]:
    metrics = "max_abs nmse relative_error top1 top5 kl_mean kl_max".split()
    return {
        (case.mode, case.length): tuple(getattr(case, name) for name in metrics)
        for case in report.cases
        if case.batch_size == 1 and "prefix reuse" not in case.mode
    }


@pytest.mark.usefixtures("remembered", "little_text")
@pytest.mark.parametrize("variant", ["fp32", "q4", "bf16"])
def test_both_ways_give_the_same_numbers(
    package_of: Callable[[str], Path], tiny_checkpoint: Path, variant: str
) -> None:
    package, checkpoint = package_of("tiny_all"), open_checkpoint(str(tiny_checkpoint))
    out = Path("/dev/null")
    (whole,) = verify(package, checkpoint, variants=[variant], longest=64, out=out)
    (layered,) = verify(package, checkpoint, variants=[variant], longest=64, out=out, low_memory=True)
    assert layered.verdicts == whole.verdicts
    first, second = by_case(whole), by_case(layered)
    same = [key for key in second if key in first and key[1] == 61]
    assert len(same) >= 3
    for key in same:
        assert second[key] == pytest.approx(first[key], rel=0.05 if variant == "bf16" else 1e-12, abs=1e-15), key
    assert layered.greedy.prompts == 0
    assert "ragged batches" in layered.coverage
    assert whole.coverage == ""
    lengths = {case.length for case in layered.cases}
    assert lengths == {13, 37, 61, 64}
    found = {check.name: check.found for check in layered.checks}
    expected = {check.name: check.found for check in whole.checks}
    assert found.keys() == expected.keys() - {"quality of both in turns"}
    for name, said in found.items():
        assert said == expected[name] or variant == "bf16", name


@pytest.mark.usefixtures("little_text", "short_rows")
def test_another_model_fails(tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    copy = shutil.copytree(tiny_package, tmp_path / "copy")
    assert cli.main(["verify", str(copy), "--reference", str(other), "--low-memory"]) == 1
    printed = capsys.readouterr().out
    assert "error_ratio" in printed
    assert "fp32 coverage: layers one at a time, as --low-memory asks" in printed
    assert "greedy:" not in printed


@pytest.mark.usefixtures("little_text")
def test_free_memory_decides(tiny_package: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = open_package(tiny_package)
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    entries = [package.variant("fp32")]
    weights = sum(info.size // 4 for info in open_checkpoint(str(tiny_checkpoint)).tensors.values())
    for free, expected in ((12 * weights, ""), (12 * weights - 1, "the whole model needs some 0.0 GB"), (None, "")):
        monkeypatch.setattr(by_layer, "available_memory", lambda free=free: free)
        assert why_by_layer(package, entries, config, low_memory=False).startswith(expected)
        assert bool(why_by_layer(package, entries, config, low_memory=False)) == bool(expected)
    monkeypatch.setattr(by_layer, "available_memory", lambda: 1)
    reports = verify(package, open_checkpoint(str(tiny_checkpoint)), variants=["fp32"], out=Path("/dev/null"))
    assert reports[0].passed
    assert "0.0 GB are free" in reports[0].coverage
    assert verify_module.LONGEST_BY_LAYER == reports[0].capacity == 256


PEAK = """
import resource, sys
import numpy as np
from olmo2_export.config import ModelConfig
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.weights.checkpoint import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
config = ModelConfig.from_json(checkpoint.folder / "config.json")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
LayeredReference(checkpoint, config, "fp64").logits([np.arange(9)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.alone
def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """24 layers of 6.3 M weights and a vocabulary of 40,000: 1.9 GB in float64, 50 MB a layer."""
    sizes = {"vocab_size": 40_007, "hidden_size": 512, "intermediate_size": 3404, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    small = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **{**sizes, **heads, "num_hidden_layers": 1})
    config = ModelConfig.from_json(small / "config.json")
    write_zeros(small, 24)
    weights = 24 * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    weights += 2 * config.vocab_size * config.hidden_size
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small)], capture_output=True, text=True, check=True, timeout=300
    )
    taken = int(done.stdout) * 1024
    assert 8 * weights > 1.5e9
    assert taken < 350e6


def write_zeros(folder: Path, layers: int) -> None:
    """Give a checkpoint of one layer so many, all of it zeros in a file of holes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    new: dict[str, object] = {}
    end = 0
    for name, entry in header.items():
        for layer in range(layers) if ".layers.0." in name else (0,):
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            new[name.replace(".layers.0.", f".layers.{layer}.")] = {**entry, "data_offsets": [end, end + size]}
            end += size
    blob = json.dumps(new).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + end)
