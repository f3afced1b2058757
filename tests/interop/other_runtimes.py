"""The packages in other people's runtimes, each in a process of its own: `make test-interop` installs them.

Not among the tests of every run: what they bring is large, and takes minutes. Tokens of fp32 are compared with PyTorch,
those of q4 and q8 with onnxruntime alone on the same graph; where two tokens are nearly equal they may part.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from support.adapters import factors, write_adapter
from support.packages import sequences
from support.plain_loop import parted, plain_loop
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from olmo2_export.package.export import export
from olmo2_export.package.weight_choice import Options
from olmo2_export.weights.checkpoint import open_checkpoint
from olmo2_export.weights.merged import open_merged
from runtimes import open_runner

Job: TypeAlias = dict[str, Any]
WORKERS = Path(__file__).parent / "workers"
DEMO = Path(__file__).parents[2] / "olmo2_export" / "demo"
TEXTS = ("In the beginning God created", "The", "And it came to pass in those days, that")
COUNT, PAD = 16, 1
NEVER = 129
"""the end of a text of the random model: an id that it does not say here, as who may not end does not say it either"""
FILES = {"fp32": "model.onnx", "q4": "model_q4.onnx", "q8": "model_quantized.onnx"}
MARGIN = {"fp32": 1e-3, "q4": 0.1, "q8": 0.1}
"""of logits: kernels of another version, or of more rows, round otherwise"""
SYSTEM = [{"role": "user", "content": 'Say "hi".'}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RENDERED = '<|im_start|>user\nSay "hi".<|im_end|>\n<|im_start|>assistant\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and package of the demo, 8 heads and 4 of keys and values, and of a random model, 6 and 2."""
    folder = tmp_path_factory.mktemp("interop")
    demo = Path(shutil.copytree(DEMO, folder / "checkpoint"))
    (demo / "chat_template.jinja").write_text(CHATML)
    tiny = Path(shutil.copytree(tiny_checkpoint, folder / "random"))
    for name in ("config.json", "generation_config.json"):
        document = json.loads((tiny / name).read_text())
        (tiny / name).write_text(json.dumps({**document, "eos_token_id": NEVER}))
    found = {}
    for name, checkpoint in (("demo", demo), ("tiny", tiny)):
        export(open_checkpoint(str(checkpoint)), folder / name, variants=list(FILES))
        found[name] = checkpoint, folder / name
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, list[list[int]]]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    demo = [tokenizer.encode(text).ids for text in TEXTS]
    return {"demo": demo, "tiny": [[int(i) for i in ids] for ids in sequences()]}


def run(pytestconfig: pytest.Config, runtime: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Give jobs to a runtime; skips where it is not installed."""
    peers: Path = pytestconfig.getoption("--peers")
    command = [str(peers / f".venv-peers-{runtime}/bin/python"), str(WORKERS / f"run_{runtime}.py")]
    needed = Path(command[0])
    if runtime == "transformers_js":
        needed = peers / "build/interop/node_modules"
        command = [shutil.which("node") or "node", str(WORKERS / f"run_{runtime}.mjs"), str(needed)]
    if not needed.exists():
        pytest.skip(f"no {needed}: make test-interop")
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def job(package: Path, variant: str, rows: list[list[int]], padding: str = "left", **more: Any) -> Job:
    return {
        **{"package": str(package), "file": FILES[variant], "dtype": variant, "rows": rows, "padding": padding},
        **{"count": COUNT, "pad": PAD, "kv_heads": True, **more},
    }


def check(found: dict[str, Any], asked: Job, checkpoint: Path) -> None:
    """Compare the tokens of each row with those of that row alone."""
    assert "error" not in found, found["error"]
    package = Path(asked["package"])
    graph, margin = package / "onnx" / asked["file"], MARGIN[asked["dtype"]]
    ends = json.loads((package / "generation_config.json").read_text())["eos_token_id"]
    for row, tokens in zip(asked["rows"], found["tokens"], strict=True):
        (wanted,), (gaps,) = plain_loop()(graph, [row], COUNT)
        if asked["dtype"] == "fp32":
            wanted = greedy_of_pytorch(checkpoint, row)
        assert not np.isin(wanted, ends).any(), "an end, which they are told not to say"
        assert parted(tokens, wanted, gaps, margin) is None, (tokens, wanted)


def greedy_of_pytorch(checkpoint: Path, prompt: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    seen = torch.ones_like(ids)  # else tokens of the padding's id are taken for padding
    options = {"max_new_tokens": COUNT, "min_new_tokens": COUNT, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=seen, **options)
    return np.asarray(found[0, len(prompt) :])


def test_optimum_and_transformers_js_take_left_padded_batches(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]]
) -> None:
    """min_new_tokens bans the end of a text, as in PyTorch, where the loop does not: the demo does not end so soon."""
    asked = [job(models["demo"][1], variant, part) for variant in FILES for part in (rows["demo"][:1], rows["demo"])]
    asked += [job(models["tiny"][1], variant, rows["tiny"]) for variant in FILES]
    for runtime in ("optimum", "transformers_js"):
        for found, one in zip(run(pytestconfig, runtime, asked), asked, strict=True):
            check(found, one, models["demo" if "demo" in one["package"] else "tiny"][0])


def test_optimum_sizes_an_empty_cache_by_all_heads(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]]
) -> None:
    """Its own fault; what it says of the tokenizer is ours: no token_type_ids."""
    package = models["demo"][1]
    asked = [job(package, "q4", rows["demo"][:1], kv_heads=False), job(package, "q4", rows["demo"][:1], text="In")]
    failed, right = run(pytestconfig, "optimum", asked)
    assert "index: 1 Got: 8 Expected: 4" in failed["error"]
    assert right["names"] == ["attention_mask", "input_ids"]


def test_transformers_js_finds_the_template_and_the_default_variant(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    checkpoint = models["demo"][0]
    export(open_checkpoint(str(checkpoint)), tmp_path / "small", variants=["q8"])  # without fp32, its own default
    asked = job(tmp_path / "small", "q8", rows["demo"], chat=SYSTEM)
    (found,) = run(pytestconfig, "transformers_js", [{**asked, "dtype": None}])
    check(found, asked, checkpoint)
    assert found["text"] == RENDERED


def of_genai(package: Path, copy: Path, variant: str) -> Path:
    """Copy a package; genai opens this variant of it."""
    shutil.copytree(package, copy)
    config = json.loads((copy / "genai_config.json").read_text())
    if variant != "fp32":  # the edit that docs/interop.md shows; --default-variant writes the same
        config["model"]["decoder"]["filename"] = f"onnx/{FILES[variant]}"
        del config["model"]["decoder"]["inputs"]["position_ids"]
        config["search"]["past_present_share_buffer"] = True
    (copy / "genai_config.json").write_text(json.dumps(config))
    return copy


def test_genai_opens_the_default_variant_and_pads_on_the_right(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    for name, (checkpoint, package) in models.items():
        asked = []
        for variant in FILES:
            copy = of_genai(package, tmp_path / name / variant, variant)
            asked += [job(copy, variant, part, "right") for part in (rows[name][:1], rows[name])]
        if name == "demo":
            asked[0]["chat"] = SYSTEM
        found = run(pytestconfig, "genai", asked)
        for one, what in zip(found, asked, strict=True):
            check(one, what, checkpoint)
        if name == "demo":
            assert found[0]["text"] == RENDERED


def test_genai_reads_a_batch_padded_on_the_left_as_padded_on_the_right(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]]
) -> None:
    """Its own fault, of fp32: it makes the mask from the padding's id, and positions without it."""
    checkpoint, package = models["demo"]
    asked = job(package, "fp32", rows["demo"], "left")
    (found,) = run(pytestconfig, "genai", [asked])
    with pytest.raises(AssertionError):
        check(found, asked, checkpoint)


def test_genai_loads_adapter_files_as_they_are(
    pytestconfig: pytest.Config, models: dict[str, tuple[Path, Path]], rows: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """Into fp32 and q4; its logits were to the bit the runner's, which `verify` compares with PyTorch."""
    checkpoint, row = models["tiny"][0], rows["tiny"][0]
    adapter = write_adapter(tmp_path / "chat", factors(checkpoint))
    merged = open_merged(str(checkpoint), switchable=[str(adapter)])
    export(merged, tmp_path / "package", variants=["fp32", "q4"], options=Options(prefill_graph=False))
    tokens = {}
    for variant in ("fp32", "q4"):
        copy = of_genai(tmp_path / "package", tmp_path / variant, variant)
        asked = [job(copy, variant, [row], "right"), job(copy, variant, [row], "right", adapter="chat")]
        with open_runner(copy, variant=variant, kv_cache="float32") as runner:
            for one, found in zip(asked, run(pytestconfig, "genai", asked), strict=True):
                assert "error" not in found, found["error"]
                runner.reset()
                logits, wanted, gaps = runner.prefill([row], adapter=one.get("adapter"))[0][-1], [], []
                for _ in range(COUNT):
                    logits[NEVER] = -np.inf
                    wanted.append(int(logits.argmax()))
                    gaps.append(np.diff(np.sort(logits)[-2:])[0])
                    logits = runner.decode(wanted[-1:])[0]
                assert parted(found["tokens"][0], np.array(wanted), np.array(gaps), MARGIN[variant]) is None
                tokens[variant, one.get("adapter")] = wanted
        assert tokens[variant, "chat"] != tokens[variant, None]
