"""What other runtimes find in a package, and onnxruntime alone on it; the others: tests/interop, make test-interop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.packages import sequences
from support.plain_loop import parted, plain_loop
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from olmo2_export.config import ModelConfig
from olmo2_export.package.texts import write_texts
from olmo2_export.rope import both_forms
from olmo2_export.summary.package import describe
from olmo2_export.summary.text import plain
from runtimes import open_runner
from runtimes.errors import UsageError
from runtimes.manifest import Variant
from runtimes.manifest_file import read_manifest, to_document
from runtimes.package import open_package
from runtimes.sealed import seal

DEMO = Path(__file__).parents[3] / "olmo2_export" / "demo"
TEXTS = ("In the beginning God created", "The", "And it came to pass in those days, that")
COUNT = 12


def greedy_of_pytorch(checkpoint: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, pad_token_id=1
        )
    return list(map(int, found[0, len(prompt) :]))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_onnxruntime_alone_gives_pytorchs_tokens_in_padded_batches(
    demo_two_package: Path, prompts: list[list[int]], side: str
) -> None:
    tokens, gaps = plain_loop()(demo_two_package / "onnx/model.onnx", prompts, COUNT, side)
    for prompt, found, near in zip(prompts, tokens, gaps, strict=True):
        assert parted(greedy_of_pytorch(DEMO, prompt), found, near, 1e-3) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_of_q4_gives_the_tokens_of_each_row_alone(
    demo_two_package: Path, prompts: list[list[int]], side: str
) -> None:
    """It gave other tokens for rows that were padded on the left."""
    with open_runner(demo_two_package, variant="q4") as runner:
        alone = [[int(runner.prefill([prompt])[0][-1].argmax())] for prompt in prompts[:1]]
        for _ in range(COUNT - 1):
            alone[0].append(int(runner.decode([alone[0][-1]])[0].argmax()))
    generate, graph = plain_loop(), demo_two_package / "onnx/model_q4.onnx"
    batch, gaps = generate(graph, prompts, COUNT, side)
    assert parted(alone[0], batch[0], gaps[0], 0.05) is None  # as a runner of this project
    for prompt, found, near in zip(prompts, batch, gaps, strict=True):
        assert parted(list(generate(graph, [prompt], COUNT)[0][0]), found, near, 0.05) is None


@pytest.mark.parametrize(
    ("package", "graph"),
    [("tiny", "model.onnx"), ("tiny_q8", "model_quantized.onnx"), ("tiny_q4_caches", "model_q4.onnx")],
)
def test_rows_of_a_random_model_are_those_of_each_alone(
    package_of: Callable[[str], Path], package: str, graph: str
) -> None:
    """Three query heads for each of keys and values; of several caches, the portable graph has that of float32."""
    generate, path = plain_loop(), package_of(package) / "onnx" / graph
    rows = [list(map(int, ids)) for ids in sequences()]
    for side in ("left", "right"):
        batch, gaps = generate(path, rows, 5, side)
        for row, found, near in zip(rows, batch, gaps, strict=True):
            assert parted(list(generate(path, [row], 5)[0][0]), found, near, 0.2) is None


def test_the_portable_graph_is_in_the_manifest_and_described(demo_two_package: Path) -> None:
    package = open_package(demo_two_package)
    q4, fp32 = package.variant("q4"), package.variant("fp32")
    assert q4.portable is not None
    assert fp32.portable is None
    assert (q4.graph, q4.portable.graph) == ("onnx/model_q4_shared.onnx", "onnx/model_q4.onnx")
    assert q4.portable.graph not in q4.files
    assert package.manifest.files[q4.portable.graph].size < 100_000
    assert q4.data_of("model_q4_shared.onnx") == "model_q4.onnx_data"
    assert q4.data_of("another.onnx") == "another.onnx_data"
    assert {spec.dtype for spec in q4.portable.inputs if spec.role == "past"} == {"float32"}
    assert "onnx/model_q4.onnx, the same weights for other runtimes" in plain(describe(package, "q4"))


def test_a_package_from_before_the_portable_graph_is_read(demo_two_package: Path, tmp_path: Path) -> None:
    manifest, _ = read_manifest(demo_two_package)
    document = to_document(manifest)
    for entry in document["variants"].values():
        del entry["portable"]
    (tmp_path / "manifest.json").write_bytes(seal(document))
    again, _ = read_manifest(tmp_path)
    assert again.variants["q4"] == dataclasses.replace(manifest.variants["q4"], portable=None)
    assert all(isinstance(entry, Variant) for entry in again.variants.values())


# Texts


def written(tmp_path: Path, variants: list[str], default: str | None = None, **files: str) -> Path:
    """The demo's texts, with other files in their place, as a package has them."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((DEMO / name).read_text())
    for name, text in files.items():
        (source / name.replace("__", ".")).write_text(text)
    write_texts(source, ModelConfig.from_json(source / "config.json"), out, variants, default)
    return out


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize(
    ("variants", "default", "graph", "one_buffer", "dtype"),
    [
        (["fp32", "q4", "q8"], None, "onnx/model.onnx", False, None),
        (["fp32", "q4", "q8"], "q8", "onnx/model_quantized.onnx", True, "q8"),
        (["q4"], None, "onnx/model_q4.onnx", True, "q4"),
        (["bf16"], None, "onnx/model_bf16.onnx", True, None),
    ],
)
def test_the_default_variant_is_what_others_open(
    tmp_path: Path, variants: list[str], default: str | None, graph: str, one_buffer: bool, dtype: str | None
) -> None:
    out = written(tmp_path, variants, default)
    genai, javascript = read(out / "genai_config.json"), read(out / "config.json")["transformers.js_config"]
    assert genai["model"]["decoder"]["filename"] == graph
    assert genai["search"]["past_present_share_buffer"] is one_buffer
    assert ("position_ids" in genai["model"]["decoder"]["inputs"]) is not one_buffer
    assert javascript.get("dtype") == dtype
    names = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx", "bf16": "model_bf16.onnx"}
    assert javascript["use_external_data_format"] == {names[name]: 1 for name in variants}


def test_a_default_that_is_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="default variant q8: not among those of this export, fp32, q4"):
        written(tmp_path, ["fp32", "q4"], "q8")


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}\n"


@pytest.mark.parametrize("where", ["file", "field", "named"])
def test_the_chat_template_is_in_both_places_and_equal(tmp_path: Path, where: str) -> None:
    said = {"field": TEMPLATE, "named": [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]}
    config = {"eos_token": "<|endoftext|>", "tokenizer_file": "/home/someone/tokenizer.json"}
    config |= {"chat_template": said[where]} if where in said else {"chat_template": "older"}
    files = {"tokenizer_config__json": json.dumps(config)} | (
        {} if where in said else {"chat_template__jinja": TEMPLATE}
    )
    out = written(tmp_path, ["fp32"], **files)
    found = read(out / "tokenizer_config.json")
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert found["chat_template"] == (said["named"] if where == "named" else TEMPLATE)
    assert found["model_input_names"] == ["input_ids", "attention_mask"]
    assert "tokenizer_file" not in found


def test_a_tokenizer_config_that_is_no_json_stays_as_it_is(tmp_path: Path) -> None:
    out = written(tmp_path, ["fp32"], tokenizer_config__json="{,}")
    assert (out / "tokenizer_config.json").read_text() == "{,}"
    assert not (out / "chat_template.jinja").exists()


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
NESTED = {"full_attention": YARN | {"rope_theta": 500000.0}, "sliding_attention": PLAIN}


@pytest.mark.parametrize(
    ("raw", "olmo3", "both"),
    [
        (
            {"rope_parameters": PLAIN},
            False,
            {"rope_theta": 500000.0, "rope_scaling": None, "rope_parameters": PLAIN},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
            False,
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0},
            },
        ),
        (  # transformers 4 reads the original length in the table alone
            {
                "rope_theta": 1e6,
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "yarn", "factor": 8.0},
            },
            False,
            {
                "rope_theta": 1e6,
                "rope_scaling": YARN,
                "rope_parameters": {"rope_theta": 1e6} | YARN,
            },
        ),
        ({"rope_parameters": NESTED}, True, {"rope_theta": 500000.0, "rope_scaling": YARN}),
        ({"rope_theta": 500000, "rope_scaling": YARN}, True, {}),  # AI2's own form, read by both
        ({"rope_parameters": NESTED | {"sliding_attention": PLAIN | {"rope_theta": 1e4}}}, True, {}),
        ({"rope_parameters": NESTED | {"sliding_attention": NESTED["full_attention"]}}, True, {}),
    ],
)
def test_rope_is_said_in_both_forms_where_they_can_agree(
    raw: dict[str, Any], olmo3: bool, both: dict[str, Any]
) -> None:
    assert both_forms(raw, by_layer_type=olmo3) == both


@pytest.mark.parametrize("rope", [{"rope_parameters": NESTED}, {"rope_theta": 500000, "rope_scaling": YARN}])
def test_transformers_reads_both_forms_as_the_one(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Olmo 3, where rope_scaling goes over one of two tables."""
    shape = {"model_type": "olmo3", "sliding_window": 8, "num_hidden_layers": 4, "num_attention_heads": 6}
    tables = []
    for name, fields in (("one", rope), ("both", rope | both_forms(rope, by_layer_type=True))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape | {"hidden_size": 96} | fields))
        tables.append(AutoConfig.from_pretrained(tmp_path / name).rope_parameters)
    assert tables[0] == tables[1]
    assert tables[0]["sliding_attention"]["rope_type"] == "default"
    assert tables[0]["full_attention"]["rope_type"] == "yarn"


def test_near_ties_are_told_from_other_tokens() -> None:
    wanted, gaps = np.array([4, 5, 6]), np.array([1.0, 0.01, 1.0])
    assert parted([4, 5, 6], wanted, gaps, 0.05) is None
    assert parted([4, 9, 9], wanted, gaps, 0.05) is None
    assert parted([4, 9, 9], wanted, gaps, 0.001) == 1
    assert parted([4, 5], wanted, gaps, 0.05) == 2
