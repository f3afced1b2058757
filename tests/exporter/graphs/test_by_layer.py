"""A graph that is run layer by layer gives what the whole graph gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.packages import VOCAB, sequences

from olmo2_export.architecture import operations
from olmo2_export.config import ModelConfig
from olmo2_export.graphs.by_layer import Call, Recorded, in_pieces, logits_by_layer
from olmo2_export.measure import quality
from olmo2_export.package import variants
from olmo2_export.package.export import export
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import PackageError
from runtimes.ort.open import open_ort
from runtimes.package import open_package


@pytest.mark.parametrize("variant", ["fp32", "q4", "q8", "q4f16", "fp16"])
def test_pieces_on_one_cache(package_of: Callable[[str], Path], variant: str) -> None:
    package = open_package(package_of("tiny_all"))
    entry = package.variant(variant)
    rows = operations(ModelConfig.from_json(package.folder / "config.json"))
    plans = in_pieces(sequences(), 7)
    found = logits_by_layer(package.folder / entry.graph, entry, rows, plans)
    assert [[len(x) for x in pieces] for pieces in found] == [[7, 7, 3], [5], [7, 7, 7, 7, 1]]
    with open_ort(package.folder, entry, package.model, None) as runner:
        for plan, pieces in zip(plans, found, strict=True):
            runner.reset()
            for call, ours in zip(plan, pieces, strict=True):
                whole = runner.decode_block(call.ids)
                if entry.kv_cache.dtype == "float16":  # of the whole graph a CPU keeps some results in float32
                    np.testing.assert_allclose(ours, whole, rtol=0, atol=0.01)
                else:
                    np.testing.assert_array_equal(ours, whole)


def test_a_call_may_stand_behind_less_than_the_cache_holds(q8_package: Path) -> None:
    package = open_package(q8_package)
    entry = package.variant("q8")
    rows = operations(ModelConfig.from_json(package.folder / "config.json"))
    ids = sequences()[2]
    reused = [Call(ids[:11], 0), Call(ids[11:][::-1], 11, wanted=False), Call(ids[11:], 11)]
    plain = [Call(ids[:11], 0), Call(ids[11:], 11)]
    first, second = logits_by_layer(package.folder / entry.graph, entry, rows, [reused, plain])
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_recorded_answers_are_those_of_the_calls() -> None:
    plans = in_pieces([np.arange(5)], 3)
    logits = [[np.full((3, VOCAB), 1.0, np.float32), np.full((2, VOCAB), 2.0, np.float32)]]
    recorded = Recorded(plans, logits)
    assert recorded.prefill([np.arange(3)], all_positions=True)[0][0, 0] == 1
    with pytest.raises(AssertionError):
        recorded.decode_block(np.array([7, 7]))
    assert recorded.decode_block(np.array([3, 4]))[0, 0] == 2


def test_a_static_cache_is_refused(trt_package: Callable[[str], Path]) -> None:
    package = open_package(trt_package("bf16"))
    entry = package.variant("trt_bf16")
    rows = operations(ModelConfig.from_json(package.folder / "config.json"))
    with pytest.raises(PackageError, match="a static cache"):
        logits_by_layer(package.folder / entry.graph, entry, rows, [])


def test_a_large_graph_is_judged_by_layer_with_the_same_numbers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_MOST_TOKENS", 512)
    opened = open_checkpoint(str(tiny_checkpoint))
    whole = export(opened, tmp_path / "whole", variants=["q4"]).variants["q4"]
    monkeypatch.setattr(variants, "LARGE_GRAPH", 0)
    monkeypatch.setattr(variants, "open_ort", None)
    by_layer = export(opened, tmp_path / "by_layer", variants=["q4"]).variants["q4"]
    assert by_layer == whole
    assert whole.quality is not None
    assert whole.quality.kl_mean > 0
