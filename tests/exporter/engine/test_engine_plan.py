"""Which kernels the plans of every precision and head layout launch, as their text says; built without a GPU."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.matrix import seen

from olmo2_export.catalog import precisions
from olmo2_export.engine.build import build
from olmo2_export.engine.options import EngineOptions
from olmo2_export.engine.plan import Kernel, count_kernels, materialized_weights, read_kernels, reads_cache_in_place
from olmo2_export.package.export import export
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import EngineBuildError
from runtimes.manifest import Precision

# An even vocabulary, and rows of more than one block of 128: else int4 weights are dequantised apart.
SHAPES: dict[str, dict[str, Any]] = {
    "16/16": {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 16, "num_key_value_heads": 16},
    "40/8": {"hidden_size": 640, "intermediate_size": 256, "num_attention_heads": 40, "num_key_value_heads": 8},
}
LAYERS = {"16/16": 2, "40/8": 1}

# Kernels of a decode step of two layers, by precision and rows: about eleven a layer, four of them products, and five.
DECODE = {
    ("fp32", 4): 28,
    ("bf16", 1): 27,
    ("bf16", 4): 26,
    ("fp16", 4): 26,
    ("int4", 1): 27,
    ("int4", 4): 28,
    ("int8", 1): 27,
    ("int8", 4): 28,
    ("fp8", 1): 30,
    ("fp8", 4): 26,
}


@pytest.fixture(scope="module", params=SHAPES)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    tokens = {"vocab_size": 132, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
    layers = LAYERS[request.param]
    checkpoint = make_checkpoint(folder / "c", num_hidden_layers=layers, **tokens, **SHAPES[request.param])
    export(open_checkpoint(str(checkpoint)), folder / "package")
    return request.param, folder / "package"


def built_kernels(package: Path, precision: Precision, **options: Any) -> dict[str, list[Kernel]]:
    chosen = EngineOptions(precision, compute_capabilities=["8.9"], max_cache_length=64, **options)
    report = build(package, chosen, progress=False)
    kernels = read_kernels(package / report.engine.plan)
    assert report.engine.kernels == {profile: len(listed) for profile, listed in kernels.items()}
    return kernels


def check_decode(kernels: list[Kernel], layers: int, *, products: int = 4, writers: int = 1) -> None:
    """What makes a step fast: few kernels a layer, of which one reads the cache where it is, and one writes to it."""
    assert sum(map(reads_cache_in_place, kernels)) == layers
    written = [k for k in kernels if any(layer.endswith("_written") for layer in k.layers)]
    assert len(written) == writers * layers
    for kernel in written if writers == 1 else []:
        text = " ".join(kernel.layers)
        assert all(part in text for part in ("key_written", "value_written", "rotary_embedding", "rms_norm"))
    first: dict[str, int] = {}  # product -> the kernel that computes it
    for index, kernel in enumerate(kernels):
        for layer in kernel.layers:
            if re.fullmatch(r"node_(layers\.\d+\.)?linear(_\d+)?(_merged)?", layer):
                first.setdefault(layer, index)
    assert len(set(first.values())) == products * layers + 1  # and the head


@pytest.mark.parametrize("precision", precisions())
def test_kernels_of_every_precision_and_head_layout(
    package: tuple[str, Path], precision: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = package
    with caplog.at_level(logging.WARNING, "olmo2_export.engine.plan"):
        kernels = built_kernels(folder, precision)
    assert not [r for r in caplog.records if r.name == "olmo2_export.engine.plan"]
    assert {profile: materialized_weights(listed) for profile, listed in kernels.items()} == {
        "decode": [],
        "prefill": [],
    }
    products = 5 if precision == "fp32" else 4  # q and k in one, v apart
    check_decode(kernels["decode"], LAYERS[name], products=products)
    prefill_attention = sum("_mha" in kernel.name for kernel in kernels["prefill"])
    assert prefill_attention == (0 if precision == "fp32" else LAYERS[name])
    if name == "16/16":
        assert len(kernels["decode"]) == DECODE[precision, 4]


@pytest.mark.parametrize("precision", [p for p, batch in DECODE if batch == 1])
def test_kernels_of_profile_latency(
    package: tuple[str, Path], precision: Precision, request: pytest.FixtureRequest
) -> None:
    name, folder = package
    if name != "16/16":
        pytest.skip("the layouts differ in the attention kernel only, which the other test looks at")
    kernels = built_kernels(folder, precision, profile="latency")
    assert not materialized_weights(kernels["decode"])
    check_decode(kernels["decode"], LAYERS[name], writers=2 if precision == "fp8" else 1)
    assert len(kernels["decode"]) == DECODE[precision, 1]
    seen(request, "olmo2", "TensorRT for RTX", precision, "compiled")


def plan_of(tmp_path: Path, *lines: str) -> Path:
    """A plan with the text of two programs, and of the inside of a kernel."""
    body = "\n".join(lines)
    other = '  function={ name=__myl_Fc args={ "x [profile 1]" } layers="[ONNX Layer: node_b [profile 1]]" }'
    inside = '  fully_connected={ name="node_a" layers="[ONNX Layer: node_a]" }'
    programs = [f" label bb77:\n{body}", f" label bb1:\n{inside}", f" label bb78:\n{other}"]
    path = tmp_path / "plan"
    path.write_bytes(b"\0\xff" + "".join(f"\nmain {{\n{program}\n}}\n" for program in programs).encode() + b"\0\xff")
    return path


def test_text_of_a_plan(tmp_path: Path) -> None:
    kernel = (
        '  runtime_fusion={ name=__myl_CastFc input_args={ "x" } layers="[ONNX Layer: node_a][ONNX Layer: node_c]" }'
    )
    assert read_kernels(plan_of(tmp_path, ' shape_call={ name="s" }', kernel)) == {
        "decode": [Kernel("CastFc", ("node_a", "node_c"))],
        "prefill": [Kernel("Fc", ("node_b",))],
    }


def test_plan_without_text(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(bytes(1000))
    with pytest.raises(EngineBuildError, match=r"plan: no text of its kernels, though TensorRT 1\.7\.1\.116 writes it"):
        read_kernels(tmp_path / "plan")


def test_weights_dequantised_apart() -> None:
    fused = Kernel("ReplCastMulCastFc", ("node_q.weight.dequantized", "node_linear"))
    apart = Kernel("ReplCastMul", ("node_q.weight.dequantized",))
    assert materialized_weights([fused, Kernel("Resh", ())]) == []
    assert materialized_weights([fused, apart]) == ["node_q.weight.dequantized"]


def test_slow_kernels_are_warned_of(tiny_package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it does with int4 weights of one block a row, and with a head of odd size."""
    package = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    report = build(package, EngineOptions(compute_capabilities=["8.9"]), progress=False)
    apart = '  function={ name=__myl_Mul layers="[ONNX Layer: node_lm_head.weight.dequantized]" }'
    plan = plan_of(tmp_path, apart)
    caplog.clear()
    assert count_kernels(plan, report.engine) == {"decode": 1, "prefill": 1}
    assert "plan: decode writes dequantised weights to memory in every step: node_lm_head.weight" in caplog.text
    assert "plan: 0 of 3 layers of decode read the cache in place" in caplog.text
    assert count_kernels(plan, replace(report.engine, backend_version="1.8.0.1")) == {}
