"""The model card of a made-up package, word for word; and what a name in it may not do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from olmo2_export.publish.card import make_card
from olmo2_export.publish.contents import Contents
from olmo2_export.summary.package import ParityVerdict
from runtimes.manifest import (
    AdapterSource,
    KVCacheSpec,
    Manifest,
    ModelSpec,
    Quantization,
    Source,
    SwitchableAdapter,
    Variant,
)
from runtimes.package import Package

GOLDEN = """\
---
license: "other"
license_name: "made up"
base_model: "owner/base"
base_model_relation: quantized
library_name: onnxruntime
pipeline_tag: text-generation
tags:
- "olmo2-export"
- "onnx"
- "olmo2"
---

# base-onnx

ONNX graphs for onnxruntime of [owner/base](https://huggingface.co/owner/base), made by olmo2-export.

## Run it

```sh
pip install 'olmo2-export[cpu,hub]'
olmo2-run generate hf:me/base-onnx --prompt "In the beginning"
```

```python
from runtimes import open_runner

with open_runner("hf:me/base-onnx") as runner:
    logits = runner.prefill([[1, 2, 3]])[0]
```

The files of one variant are downloaded, and each is compared with the manifest; `--variant` names which. \
`hf:me/base-onnx@COMMIT` stays what it is when this repository changes.

## Variants

| variant | weights | KV cache | needs | size | verified |
|---|---|---|---|---:|---|
| fp32 | fp32 | concat, float32 | onnxruntime 1.23.1 | 4.0 MB | passed |
| q4 | int4, 4.50 bits, search | shared, float32 |  | 1.0 kB | not verified |

## What was verified

Against owner/base in PyTorch, on the same tokens, at all positions: prompts at once, in pieces and token by token, \
alone and in a ragged batch. Errors are against float64, in units of PyTorch's own; each number is the worst of all \
cases, its limit in brackets. Kernel parity: the graph computes what its weights say, and KL and top-1 are of that. \
Quality, in the second table and the last column: what these weights cost beside the checkpoint's. Lines with another \
name behind the variant's are of another form of its graph, such as the one for prompts, at limits of its own.

| variant | on | kernel parity | quality | error / PyTorch | KL mean | top-1 | perplexity |
|---|---|---|---|---:|---:|---:|---:|
| fp32 | ort | passed | passed | 1.50 (≤ 4) | 2.0e-12 (≤ 1e-10) | 99.5% (≥ 99.0%) | +0.55% |
| fp32, int8 |  | FAILED |  | 3.00 | 1.0e-3 | 90.0% |  |

| variant | check | found | verdict |
|---|---|---|---|
| fp32 | quality | perplexity 39.6 \\| 4080 tokens | passed |
| fp32 | greedy | 72 of 72 tokens equal over 3 prompts | passed |

All numbers: `parity.json`.

## What was not

- q4: not compared with PyTorch.
- fp32: texts of more than 64 tokens; its cache holds 1,024.
- fp32: layers one at a time.
- fp32: tokens of a text; these were random ids.
- Any other backend or device than ort, and any other machine.
- Other runtimes than olmo2-run, also those whose config files are here.
- Tasks, languages, biases, safety: the comparison is with the checkpoint, and says nothing of what it can do.

## Where it is from

- Weights: [owner/base](https://huggingface.co/owner/base), commit `0123abc`; the sha256 of each file that was read is \
in `manifest.json`.
- Made by olmo2-export 9.8.7, with numpy 1.2.3, torch 4.5.6+cpu.
- Export `c0ffee`: two exports of the same checkpoint are the same to the byte.
- Licence: made up, as the checkpoint's.
"""


def case(mode: str, error_ratio: float, kl_mean: float, top1: float, *failures: str) -> dict[str, Any]:
    measured = {"error_ratio": error_ratio, "kl_mean": kl_mean, "top1": top1}
    return {"mode": mode, "batch_size": 1, "length": 61, "failures": list(failures), **measured}


REPORT: dict[str, Any] = {
    "variant": "fp32",
    "backend": "ort",
    "passed": True,
    "verdicts": {"kernel parity": True, "quality": True},
    "gate": {"error_ratio": 4.0, "kl_mean": 1e-10, "top1": 0.99},
    "cases": [
        case("prefill", 1.5, 1e-12, 1.0),
        case("prefix reuse", 1.25, 2e-12, 0.995),
        case("int8 decode", 3.0, 1e-3, 0.9, "top-1"),
    ],
    "perplexity": {"relative": 0.0055},
    "checks": [{"name": "quality", "found": "perplexity 39.6 | 4080 tokens", "failures": []}],
    "greedy": {"prompts": 3, "equal": 72, "tokens": 72, "failures": []},
    "capacity": 64,
    "max_cache_length": 1024,
    "coverage": "layers one at a time",
    "tokens_from": "random ids",
}


def contents() -> Contents:
    """Two variants of a model of the Hub, of which one was verified."""
    cache = KVCacheSpec("concat", "float32", 2, 2, 16, 1024)
    fp32 = Variant("fp32", "fp32", "onnx/a", ("onnx/b",), 23, (), (), cache, {}, min_onnxruntime="1.23.1")
    quantization = Quantization("search", None, 4.5, {})
    shared = dataclasses.replace(cache, form="shared")
    q4 = Variant("q4", "int4", "onnx/c", (), 23, (), (), shared, {}, quantization)
    manifest = Manifest(
        format_version=4,
        exporter_version="9.8.7",
        source=Source("owner/base", "hub", "0123abc", {}),
        model=ModelSpec("olmo2", 131, 96, 2, 6, 2, 16, 1024),
        variants={"fp32": fp32, "q4": q4},
        libraries={"numpy": "1.2.3", "torch": "4.5.6+cpu"},
        files={},
    )
    return Contents(
        package=Package(Path("nowhere"), manifest, "c0ffee"),
        files={"onnx/a": 1_000_000, "onnx/b": 3_000_000, "onnx/c": 1_000},
        left_out=(),
        trt_left_out=False,
        variants=manifest.variants,
        engines={},
        verdicts={"fp32": ParityVerdict("fp32", "ort", True, False, 1.5)},
        reports={"fp32": REPORT},
        reference="owner/base",
    )


def test_the_card_is_this_one() -> None:
    assert make_card(contents(), "me/base-onnx", {"license": "other", "license_name": "made up"}) == GOLDEN


def of(source: Source, **model: Any) -> Contents:
    base = contents()
    manifest = base.package.manifest
    manifest = dataclasses.replace(manifest, source=source, model=dataclasses.replace(manifest.model, **model))
    return dataclasses.replace(base, package=Package(Path("nowhere"), manifest, "c0ffee"))


def test_names_from_elsewhere_are_text_and_no_markup() -> None:
    evil = 'a|b\n---\n<script>x</script>[y](z) `"\x1b[2J'
    base = of(Source(evil, "folder", None, {}), model_type=f"{evil}: - x")
    report = {**REPORT, "backend": evil, "coverage": evil, "checks": [{"name": evil, "found": evil, "failures": []}]}
    card = make_card(dataclasses.replace(base, reports={"fp32": report}), "me/x", {"license": evil})
    assert "<script>" not in card.partition("\n---\n")[2]
    assert "\x1b" not in card
    assert "[y](z)" not in card.partition("\n---\n")[2]
    head = yaml.safe_load(card.split("\n---\n")[0])
    assert head["license"] == evil
    assert head["tags"] == ["olmo2-export", "onnx", f"{evil}: - x"]
    assert "base_model" not in head  # a folder's name is no id


def test_adapters_and_the_form_of_the_checkpoint_are_named() -> None:
    lora = AdapterSource("chat", "you/chat", "hub", "beef", None, {})
    merged = dataclasses.replace(lora, name="law", model="law", kind="folder", revision=None)
    base = contents()
    source = dataclasses.replace(base.package.manifest.source, adapters=(merged,), quantized="GPTQ, 4 bits")
    adapters = {"chat": SwitchableAdapter("adapters/chat.onnx_adapter", lora)}
    manifest = dataclasses.replace(base.package.manifest, source=source, adapters=adapters)
    found = dataclasses.replace(base, package=Package(Path("nowhere"), manifest, "c0ffee"))
    lines = make_card(found, "me/base-onnx", {}).partition("## Where it is from")[2].splitlines()
    assert lines[3:6] == [
        "- They were stored as GPTQ, 4 bits.",
        "- Merged into them: the LoRA adapter in a folder, law.",
        "- Chosen for each sequence, `--adapter chat`: the LoRA adapter [you/chat](https://huggingface.co/you/chat), "
        "commit `beef`.",
    ]


def test_a_classifier_is_scored_and_an_unknown_licence_is_said() -> None:
    card = make_card(of(Source("demo", "demo", None, {}), labels=("good", "bad")), "me/x", {})
    head = yaml.safe_load(card.split("\n---\n")[0])
    assert head["pipeline_tag"] == "text-classification"
    assert "license" not in head
    assert "olmo2-run score hf:me/x texts.txt\n" in card
    assert "- Licence: that of the checkpoint; it was not known when this was published.\n" in card


def test_a_package_that_nobody_verified_says_so() -> None:
    card = make_card(dataclasses.replace(contents(), verdicts={}, reports={}, reference=None), "me/x", {})
    assert "## What was verified\n\nNothing: this package was not compared with PyTorch.\n\n" in card
    assert "- fp32: not compared with PyTorch.\n- q4: not compared with PyTorch.\n" in card
