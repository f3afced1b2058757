"""OLMo 1 and Olmo 3 against transformers: our equations, every variant in every way it is fed, and what locate says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import OLMO1, OLMO3, YARN, make_checkpoint
from support.matrix import seen, seen_rope
from support.own_model import load_model
from transformers import AutoModelForCausalLM

from olmo2_export.catalog import find, precisions
from olmo2_export.config import ModelConfig
from olmo2_export.locate.locate import format_location, locate
from olmo2_export.measure.parity import KERNEL_PARITY, ParityReport
from olmo2_export.package.export import export
from olmo2_export.package.plan import plan_export
from olmo2_export.package.weight_choice import Options
from olmo2_export.truth.layered import LayeredReference
from olmo2_export.truth.reference import open_reference
from olmo2_export.verify.verify import verify
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.package import open_package

VARIANTS = ["fp32", "q4", "q8", "bf16", "fp16", "q4f16"]
SHAPES: dict[str, dict[str, Any]] = {
    "OLMo 1, clipped": OLMO1,
    "OLMo 1, no clip, tied": OLMO1 | {"clip_qkv": None, "tie_word_embeddings": True, "num_key_value_heads": 6},
    "OLMo 1, biases": OLMO1 | {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "Olmo 3": OLMO3,
    "Olmo 3, windows as wide as the context": OLMO3 | {"sliding_window": 256},
    "Olmo 3, one RoPE, first layer full": OLMO3
    | {
        "rope_parameters": None,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
    "Olmo 3, all sliding": OLMO3 | {"layer_types": ["sliding_attention"] * 4, "sliding_window": 1},
}


def assert_parity(report: ParityReport) -> None:
    failed = [(c.mode, c.batch_size, c.length, c.error_ratio) for c in report.cases if not c.passed]
    assert report.verdicts[KERNEL_PARITY], (report.variant, failed, report.greedy, report.checks)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_logits_and_cache_are_those_of_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path / "c", **fields)
    model, config = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (2, 41), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids, use_cache=False).logits

    past = [(torch.zeros(2, config.num_key_value_heads, 0, 16),) * 2 for _ in range(config.num_hidden_layers)]
    ones, positions = torch.ones(2, 41, dtype=torch.int64), torch.arange(41).expand(2, -1)
    first, past = model(ids[:, :27], ones[:, :27], positions[:, :27], past, 0)
    second, past = model(ids[:, 27:], ones, positions[:, 27:], past, 3)
    # float32 rounding in another order of summation
    torch.testing.assert_close(first, expected[:, :27], atol=4e-5, rtol=0)
    torch.testing.assert_close(second, expected[:, 38:], atol=4e-5, rtol=0)
    assert past[-1][0].shape == (2, config.num_key_value_heads, 41, 16)


@torch.inference_mode()
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_a_window_counts_tokens_and_no_padding(tmp_path: Path, side: str) -> None:
    folder = make_checkpoint(tmp_path / "c", **OLMO3)
    model, config = load_model(folder)
    ids = torch.randint(0, config.vocab_size, (1, 33), generator=torch.Generator().manual_seed(1))
    past = [(torch.zeros(1, config.num_key_value_heads, 0, 16),) * 2 for _ in range(config.num_hidden_layers)]
    alone, _ = model(ids, torch.ones(1, 33, dtype=torch.int64), torch.arange(33)[None], past, 0)
    kept = {"left": range(5, 38), "right": range(33), "middle": [*range(20), *range(25, 38)]}[side]
    mask = torch.zeros(1, 38, dtype=torch.int64)
    mask[:, list(kept)] = 1
    padded, positions = torch.zeros(1, 38, dtype=torch.int64), torch.zeros(1, 38, dtype=torch.int64)
    padded[:, list(kept)], positions[:, list(kept)] = ids, torch.arange(33)
    logits, _ = model(padded, mask, positions, past, 0)
    torch.testing.assert_close(logits[:, list(kept)], alone, atol=4e-5, rtol=0)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["olmo", "olmo2", "olmo3"])
def test_every_variant_computes_what_its_weights_say(
    name: str,
    family_checkpoint: Callable[[str], Path],
    family_package: Callable[[str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = open_checkpoint(str(family_checkpoint(name)))
    reports = verify(family_package(name), checkpoint, longest=64, out=tmp_path / "parity.json")
    assert [report.variant for report in reports] == sorted(VARIANTS)
    for report in reports:
        assert_parity(report)
        seen(request, name, "onnxruntime", report.variant, "verified")
    seen_rope(request, json.loads((checkpoint.folder / "config.json").read_text()), "verified")
    assert open_package(family_package(name)).manifest.model.model_type == name


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("precision", precisions())
@pytest.mark.parametrize("name", ["olmo", "olmo3"])
def test_every_graph_for_tensorrt_computes_what_its_weights_say(
    name: str,
    precision: str,
    family_checkpoint: Callable[[str], Path],
    family_trt_package: Callable[[str, str], Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = open_checkpoint(str(family_checkpoint(name)))
    package = family_trt_package(name, precision)
    (report,) = verify(package, checkpoint, variants=[f"trt_{precision}"], out=tmp_path / "parity.json")
    assert_parity(report)
    if precision in ("bf16", "int4"):
        location = locate(package, checkpoint, f"trt_{precision}")
        assert location.first is None, format_location(location)
    seen(request, name, "graph for TensorRT", precision, "verified")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["olmo", "olmo3"])
def test_nothing_departs_in_a_good_variant(
    name: str, variant: str, family_checkpoint: Callable[[str], Path], family_package: Callable[[str], Path]
) -> None:
    location = locate(family_package(name), open_checkpoint(str(family_checkpoint(name))), variant)
    assert location.first is None, format_location(location)


@pytest.mark.usefixtures("short_rows", "hardly_judged")
@pytest.mark.parametrize(
    "fields",
    [
        OLMO1
        | {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": True}
        | {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        OLMO3
        | {"num_attention_heads": 3, "num_key_value_heads": 1}
        | {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 100.0,
            }
        },
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1000.0}},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.1, 1.2, 1.4, 1.8, 2.0, 2.5, 3.0],
                "long_factor": [2.0] * 8,
                "rope_theta": 1000.0,
            }
        },
    ],
    ids=["OLMo 1, tied and biased, linear", "Olmo 3, all sliding", "yarn", "llama3", "dynamic", "longrope"],
)
def test_other_shapes_and_every_rope_pass_parity(
    fields: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "model", **fields)))
    export(checkpoint, tmp_path / "package", variants=["fp32", "q8"], options=Options(kv_caches=("float32",)))
    for report in verify(tmp_path / "package", checkpoint, longest=64):
        assert_parity(report)
    seen_rope(request, json.loads((checkpoint.folder / "config.json").read_text()), "verified")


@pytest.mark.parametrize("name", ["olmo", "olmo3"])
def test_what_an_export_writes_is_predicted(
    name: str, family_checkpoint: Callable[[str], Path], family_package: Callable[[str], Path]
) -> None:
    checkpoint, package = open_checkpoint(str(family_checkpoint(name))), family_package(name)
    opened = open_package(package)
    for variant in plan_export(checkpoint, variants=VARIANTS, options=Options(kv_caches=("float32",))).variants:
        for path, files in variant.graphs.items():
            if not (package / path).is_file():  # a prefill graph that missed its gate
                continue
            row = find(variant.name)
            data = row.data if path == row.path else f"{path}_data"
            assert files.data == (package / data).stat().st_size, path
            assert abs(files.graph / (package / path).stat().st_size - 1) < 0.06, path
        assert variant.portable.keys() == {p.graph for p in [opened.variant(variant.name).portable] if p is not None}
        for path, nbytes in variant.portable.items():
            assert abs(nbytes / (package / path).stat().st_size - 1) < 0.06, path


@pytest.mark.parametrize("name", ["olmo", "olmo3"])
def test_pytorch_by_layer_is_the_whole_model_bit_for_bit(name: str, family_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(family_checkpoint(name)))
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    sequences = [np.arange(40, dtype=np.int64), np.arange(7, 20, dtype=np.int64)]
    for precision in ("fp32", "fp64", "bf16"):
        ours = LayeredReference(checkpoint, config, precision)
        with open_reference(checkpoint, precision) as whole:
            for one, other in zip(ours.logits(sequences), whole.logits(sequences), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("name", ["olmo", "olmo3"])
def test_by_layer_it_is_verified_too(
    name: str, family_checkpoint: Callable[[str], Path], family_package: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, out = open_checkpoint(str(family_checkpoint(name))), tmp_path / "parity.json"
    for report in verify(family_package(name), checkpoint, variants=["fp32", "q4"], out=out, low_memory=True):
        assert_parity(report)
