"""Who takes part in `compare`: variants of a package, and of each peer what is like them.

| peer               | runs                                                           | is like            |
|--------------------|----------------------------------------------------------------|--------------------|
| transformers       | the checkpoint in float32, and in bfloat16 where that is fast  | fp32, bf16         |
| optimum-onnx       | its own export, by its own runner; not grouped-query attention | fp32               |
| onnxruntime-genai  | its own int4 build of a Llama of this shape                    | q4                 |
| openvino-genai     | optimum-intel's own int4 export                                | q4                 |
| llama.cpp          | GGUF in Q4_K_M, Q8_0, or F16, whichever is like our variants;  | q4, q8, bf16, fp16 |
|                    | with an F16 KV cache, and with one in Q8_0                     |                    |

onnxruntime-genai's builder has no OLMo 2: a Llama of the same sizes with made-up weights stands in for it, which lacks
the norms of queries and keys. Speed and memory are those of the shape; text and quality are not the model's.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from olmo2_export.bench.bytes_moved import Traffic, WeightBytes, graph_weight_bytes, package_traffic
from olmo2_export.bench.contenders import (
    GENAI_VENV,
    LLAMA_8_BIT_CACHE,
    LLAMA_VENV,
    OPENVINO_VENV,
    OPTIMUM_VENV,
    Contender,
    Workshop,
    left_out,
    llama_build,
    peer_python,
)
from olmo2_export.bench.machine import multiplies_bfloat16
from olmo2_export.bench.processes import worker
from olmo2_export.catalog import known, like_peer, run_by
from olmo2_export.config import ModelConfig
from olmo2_export.dtypes import FloatRow, float_dtype
from olmo2_export.weights.checkpoint import open_checkpoint
from runtimes.errors import FailedError
from runtimes.manifest import Variant
from runtimes.package import Package
from runtimes.targets import Target, runnable

POINTS = "points"
"""the task that every entry is measured in"""

_NO_COST: dict[str, float] = {}


@dataclass(frozen=True)
class Entry:
    """A contender with what is known of it before anything is measured."""

    contender: Contender
    ours: bool
    like: tuple[str, ...]
    """our variants whose weights have as many bits; of ours, its own name"""
    disk_bytes: int
    traffic: Traffic
    note: str = ""
    """what a reader must know to judge its figures"""

    @property
    def name(self) -> str:
        return self.contender.name


def our_entries(package: Package, name: str, target: Target) -> list[Entry]:
    """Return a variant of a package where it runs, with each of its KV caches, the default first."""
    return [
        _our_entry(package, variant, target, number) for number, variant in enumerate(package.variant(name).each_cache)
    ]


def _our_entry(package: Package, variant: Variant, target: Target, number: int) -> Entry:
    """Return a variant with one KV cache; `number`: which of its own."""
    folder, name = package.folder.resolve(), variant.name
    files = package.files_of(variant)
    sizes = [files[path].size for path in variant.files]
    if target.needs_engine:
        engines = package.trt.engines.values() if package.trt is not None else ()
        sizes = [files[e.plan].size for e in engines if (e.variant, e.backend) == (name, target.backend)]
    arguments, key, title = (str(folder), name, *target.flags), f"ours_{name}", f"ours {name}"
    if number:
        cache = variant.kv_cache.name
        arguments, key = (*arguments, "--kv-cache", cache), f"{key}_{cache}"
        title = f"{title}, {cache} KV cache"
    contender = Contender(key, title, Path(sys.executable), "ours", arguments, (POINTS,), _NO_COST)
    return Entry(contender, True, (name,), sum(sizes), package_traffic(folder, variant))


@dataclass(frozen=True)
class Made:
    """What became of the peers that were asked for."""

    entries: tuple[Entry, ...]
    left_out: tuple[str, ...]
    """a line for each that is not there"""
    failures: tuple[str, ...]
    """a line for each whose model could not be made"""


def peer_entries(
    wanted: Sequence[str], variants: Sequence[str], workshop: Workshop, folder: Path, threads: int, device: str
) -> Made:
    """Return the peers, their models made; one that cannot make its model does not stop the others.

    Args:
        wanted: out of `arguments.PEERS`.
        variants: of ours, which they are like.
        workshop: where models are made, of its checkpoint.
        folder: where `make peers` put its venvs.
        threads: of onnxruntime-genai, which are part of its model's folder.
        device: cpu or cuda; on the latter there is transformers alone.
    """
    entries: list[Entry] = []
    absent, failures = [], []
    makers = {
        "transformers": lambda: _transformers(workshop, device),
        "optimum-onnx": lambda: _optimum(workshop, folder),
        "onnxruntime-genai": lambda: _genai(workshop, folder, threads),
        "openvino-genai": lambda: _openvino(workshop, folder),
        "llama.cpp": lambda: _llama(workshop, folder, variants),
    }
    for peer in dict.fromkeys(wanted):
        if device != "cpu" and peer != "transformers":
            absent.append(f"{peer} is left out: make peers installs it for CPUs")
        elif line := _missing(peer, folder):
            absent.append(line)
        else:
            try:
                entries += makers[peer]()
            except (FailedError, OSError, ValueError, KeyError) as error:  # whatever its environment does
                failures.append(f"{peer}, making its model: {' '.join(str(error).split())}")
    return Made(tuple(entries), tuple(absent), tuple(failures))


def _missing(peer: str, folder: Path) -> str | None:
    venvs = {
        "optimum-onnx": OPTIMUM_VENV,
        "onnxruntime-genai": GENAI_VENV,
        "openvino-genai": OPENVINO_VENV,
        "llama.cpp": LLAMA_VENV,
    }
    if peer == "transformers":
        there = importlib.util.find_spec("transformers") is not None
        return None if there else "transformers is left out: it is not installed; pip install 'olmo2-export[export]'"
    return None if peer_python(folder, venvs[peer]) else left_out(peer, folder / venvs[peer])


def _transformers(workshop: Workshop, device: str) -> Iterator[Entry]:
    checkpoint = workshop.checkpoint("olmo2")
    for dtype in map(float_dtype, run_by("transformers")):
        if not _fast(dtype, device):
            continue
        arguments = ("transformers", str(checkpoint), dtype.name, device)
        contender = Contender(
            f"transformers_{dtype.precision}",
            f"transformers {dtype.precision}",
            Path(sys.executable),
            "hugging_face",
            arguments,
            (POINTS,),
            _NO_COST,
        )
        disk = sum((checkpoint / name).stat().st_size for name in open_checkpoint(str(checkpoint)).files)
        traffic = Traffic(
            ((1, _checkpoint_weights(checkpoint, dtype.size)),),
            _cache_bytes(checkpoint, dtype.size),
            None,
            f"the checkpoint's tensors at {dtype.size} bytes a weight",
        )
        alike = like_peer("transformers", dtype.name)
        yield Entry(contender, False, alike, disk, traffic, f"transformers {version('transformers')}, eager")


def _fast(dtype: FloatRow, device: str) -> bool:
    """A GPU is fast in 16 bits, a CPU in float32, and in bfloat16 if it multiplies that."""
    return dtype.size == 2 if device != "cpu" else dtype.size == 4 or multiplies_bfloat16()


def _optimum(workshop: Workshop, folder: Path) -> Iterator[Entry]:
    python = _python(folder, OPTIMUM_VENV)
    path, made = workshop.optimum(python)
    arguments = ("optimum", str(path), "float32", "cpu")
    contender = Contender("optimum", "optimum-onnx fp32", python, "hugging_face", arguments, (POINTS,), made)
    traffic = Traffic(
        ((1, graph_weight_bytes(path / "model.onnx")),),
        _cache_bytes(workshop.checkpoint("olmo2"), 4),
        None,
        "initializers of its ONNX graph; every step copies the KV cache besides, which is not counted",
    )
    note = "its graph computes the logits of every position of a prompt"
    yield Entry(contender, False, like_peer("optimum-onnx", "fp32"), _folder_bytes(path), traffic, note)


def _genai(workshop: Workshop, folder: Path, threads: int) -> Iterator[Entry]:
    python = _python(folder, GENAI_VENV)
    path, made = workshop.genai(python, threads)
    contender = Contender("genai", "onnxruntime-genai int4", python, "genai", (str(path),), (POINTS,), made)
    traffic = Traffic(
        ((1, graph_weight_bytes(path / "model.onnx")),),
        _cache_bytes(workshop.checkpoint("llama"), 4),
        None,
        "initializers of its ONNX graph",
    )
    note = "a Llama of this shape with made-up weights: its builder has no OLMo 2"
    yield Entry(contender, False, like_peer("onnxruntime-genai", "int4"), _folder_bytes(path), traffic, note)


def _openvino(workshop: Workshop, folder: Path) -> Iterator[Entry]:
    python = _python(folder, OPENVINO_VENV)
    path, made = workshop.openvino(python)
    contender = Contender("openvino", "OpenVINO GenAI int4", python, "openvino", (str(path),), (POINTS,), made)
    checkpoint = workshop.checkpoint("olmo2")
    config = ModelConfig.from_json(checkpoint / "config.json")
    weights, row = (path / "openvino_model.bin").stat().st_size, config.hidden_size  # 8 bits of the embedding
    traffic = Traffic(
        ((1, WeightBytes(weights - row * config.vocab_size, row)),),
        _cache_bytes(checkpoint, 1),
        None,
        "openvino_model.bin, int8 KV cache",
    )
    note = "optimum-intel's defaults for int4 weights, continuous batching, int8 KV cache"
    yield Entry(contender, False, like_peer("openvino-genai", "int4"), _folder_bytes(path), traffic, note)


def _llama(workshop: Workshop, folder: Path, variants: Sequence[str]) -> Iterator[Entry]:
    python = _python(folder, LLAMA_VENV)
    built = llama_build(python)
    checkpoint = workshop.checkpoint("olmo2")
    config = ModelConfig.from_json(checkpoint / "config.json")
    rows = [row for row in map(known, variants) if row is not None]
    types = [row.peers["llama.cpp"] for row in rows if "llama.cpp" in row.peers]
    for ftype in dict.fromkeys(types or run_by("llama.cpp")[:1]):
        path, made = workshop.gguf(python, ftype)
        sizes = worker(python, "convert_llama", ["sizes", path])
        step = sizes["tensor_bytes"] - (0 if sizes["head_is_embedding"] else sizes["embedding_bytes"])
        weights = WeightBytes(step, sizes["embedding_bytes"] / config.vocab_size)
        arguments, name = ("task", str(path)), f"llama.cpp {ftype}"
        contender = Contender(f"llama_{ftype}", name, python, "llama", arguments, (POINTS,), made)
        traffic = Traffic(((1, weights),), _cache_bytes(checkpoint, 2), None, "tensors of the GGUF file, F16 KV cache")
        alike = like_peer("llama.cpp", ftype)
        note = "; ".join(filter(None, ["C defaults: mmap, F16 KV cache, flash attention auto", built]))
        yield Entry(contender, False, alike, sizes["bytes"], traffic, note)
        cached = Contender(
            f"llama_{ftype}_q8_0",
            f"{name}, q8_0 KV cache",
            python,
            "llama",
            (*arguments, *LLAMA_8_BIT_CACHE),
            (POINTS,),
            made,
        )
        traffic = Traffic(
            ((1, weights),), _cache_bytes(checkpoint, 1) * 34 // 32, None, "tensors of the GGUF file, Q8_0 KV cache"
        )
        note = "; ".join(filter(None, ["mmap, Q8_0 KV cache, flash attention on", built]))
        yield Entry(cached, False, alike, sizes["bytes"], traffic, note)


def _python(folder: Path, venv: str) -> Path:
    python = peer_python(folder, venv)
    if python is None:
        raise FailedError(left_out(venv, folder / venv))
    return python


def _checkpoint_weights(checkpoint: Path, size: int) -> WeightBytes:
    tensors = open_checkpoint(str(checkpoint)).tensors
    counts = {name: math.prod(info.shape) for name, info in tensors.items()}
    embedding = counts["model.embed_tokens.weight"]
    tied = "lm_head.weight" not in counts
    hidden_size = tensors["model.embed_tokens.weight"].shape[-1]
    return WeightBytes(size * (sum(counts.values()) - (0 if tied else embedding)), size * hidden_size)


def _cache_bytes(checkpoint: Path, size: int) -> int:
    """Return the bytes of a token in the cache of a row; also of a checkpoint that is a Llama."""
    shape = json.loads((checkpoint / "config.json").read_text())
    heads = shape["num_attention_heads"]
    kv_size = shape["hidden_size"] // heads * shape.get("num_key_value_heads", heads)
    return 2 * int(shape["num_hidden_layers"]) * int(kv_size) * size


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def default_variants(package: Package, target: Target) -> list[str]:
    """Return the variants of a package that are measured where none is named: those made for the target."""
    names = runnable(package, target)
    return [name for name in names if name in target.variants or target.needs_engine]
