"""The oldest onnxruntime that runs a graph, and why; what an older one gets instead. Standard library only.

| what a graph has                        | oldest | what an older one lacks                                           |
|-----------------------------------------|--------|-------------------------------------------------------------------|
| opset 23 (concat and shared)            | 1.23   | RMSNormalization, RotaryEmbedding and Attention of opset 23       |
| Attention, in concat                    | 1.23.1 | 1.23.0 computes other logits and says nothing: off by 17          |
| rows of several lengths, in concat      | 1.24   | Attention gives NaN where a mask hides every key, as in padding   |
| a prefill graph                         | 1.24   | QuantizeLinear of opset 23                                        |
| opset 24 (static, from a build)         | 1.25   | TensorScatter on a CPU                                            |
| a KV cache of 8 or 4 bits               | 1.27   | GroupQueryAttention that reads one on a CPU; see `choose_cache`   |
| device nv-rtx                           | 1.28   | OrtValues in the memory of a plugin's device                      |

Seen on a CPU with the demo model in every variant that runs there (bf16 does not, and what GPUs need beyond this was
not seen), and for caches of 8 and 4 bits with heads of 128 and 3,500 tokens: onnxruntime 1.20.1, 1.21.1, 1.22.1,
1.23.0 to 1.23.2, 1.24.1, 1.24.4, 1.25.0, 1.25.1, 1.26.0, 1.27.0, 1.28.0, 1.29.0, 1.30.0, 1.31.1 and 1.32.0, a venv
each. From the oldest on, the logits of a prompt, a long one, a batch, blocks and decode steps differ from those of
1.31.1 by rounding: at most 2e-5 in fp32, 0.02 in fp16 and q4f16, 0.14 in q4 and q8, 0.22 with a cache of 8 bits and
1.0 with one of 4; the likeliest token is another in three positions of a hundred at most.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from runtimes.errors import BackendError
from runtimes.manifest import KVCacheSpec, Variant
from runtimes.targets import engine_backend_words

logger = logging.getLogger(__name__)

_FORMS = {"concat": "1.23.1", "shared": "1.23", "static": "1.25"}
_PADDED_ROWS = "1.24"
_PREFILL_GRAPH = "1.24"
_QUANTIZED_CACHE = "1.27"
_PLUGIN_DEVICE = "1.28"


def oldest_onnxruntime(cache: KVCacheSpec, *, prefill: bool = False) -> str:
    """Return the oldest onnxruntime, as 1.24 or 1.23.1, that runs a graph with this KV cache.

    Args:
        cache: of the variant.
        prefill: its prefill graph, not its first one.
    """
    needed = [_FORMS[cache.form]]
    if cache.quantization is not None:
        needed.append(_QUANTIZED_CACHE)
    if prefill:
        needed.append(_PREFILL_GRAPH)
    return max(needed, key=release)


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 1.24, 1.23.1 or 1.32.0.dev20261101, to be compared."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def without_too_new(variant: Variant, found: str, device: str) -> Variant:
    """Return what an onnxruntime runs of a variant: without its prefill graph, and a warning, where that is too new.

    Args:
        variant: of a form that this version knows.
        found: the version of the onnxruntime that is there.
        device: cpu, cuda or nv-rtx.

    Raises:
        BackendError: it is too old for the variant or the device.
    """
    cache, prefill = variant.kv_cache, variant.prefill
    if device == "nv-rtx" and release(found) < release(_PLUGIN_DEVICE):
        raise BackendError(_too_old("device nv-rtx", _PLUGIN_DEVICE, found, device))
    needed = variant.min_onnxruntime or oldest_onnxruntime(cache)
    if release(found) < release(needed):
        way_out = f", or run an engine of it with {engine_backend_words()}" if cache.form == "static" else ""
        if cache.quantization is not None:
            way_out = ", or export and run it with --kv-cache float32"
        raise BackendError(_too_old(f"variant {variant.name}", needed, found, device) + way_out)
    if prefill is None or device != "cpu":
        return variant
    needed = prefill.min_onnxruntime or oldest_onnxruntime(cache, prefill=True)
    if release(found) >= release(needed):
        return variant
    logger.warning(
        "%s, or export it with --no-prefill-graph; until then it runs without, and reads prompts more slowly",
        _too_old(f"the prefill graph of variant {variant.name}", needed, found, device),
    )
    return replace(variant, prefill=None)


def new_enough(variant: Variant, found: str) -> bool:
    """Tell whether an onnxruntime runs a variant with some KV cache, with its prefill graph or without."""
    return any(_runs(own, found) for own in variant.each_cache)


def choose_cache(variant: Variant, name: str | None, found: str) -> Variant:
    """Return a variant with one of its KV caches alone.

    Args:
        variant: of a package.
        name: of the cache; None: the default, or where that is too new, the first that the onnxruntime runs.
        found: the version of the onnxruntime that is there.

    Raises:
        UsageError: it has no such cache.
    """
    default = variant.with_cache(name)
    if name is not None or _runs(default, found):
        return default
    older = next((own for own in variant.each_cache if _runs(own, found)), None)
    if older is None:
        return default
    needed = default.min_onnxruntime or oldest_onnxruntime(default.kv_cache)
    logger.warning(
        "%s; until then its KV cache is in %s",
        _too_old(f"the {default.kv_cache.name} KV cache of variant {variant.name}", needed, found, "cpu"),
        older.kv_cache.name,
    )
    return older


def _runs(variant: Variant, found: str) -> bool:
    return release(found) >= release(variant.min_onnxruntime or oldest_onnxruntime(variant.kv_cache))


def takes_padded_rows(found: str) -> bool:
    """Tell whether an onnxruntime computes rows of several lengths in one call of a `concat` graph."""
    return release(found) >= release(_PADDED_ROWS)


def check_padded_rows(variant: Variant, found: str) -> None:
    """Refuse rows of several lengths in one call of a `concat` graph, where onnxruntime gives NaN for padding.

    Raises:
        BackendError: it does.
    """
    if not takes_padded_rows(found):
        raise BackendError(
            _too_old(f"variant {variant.name}, in a batch of several lengths,", _PADDED_ROWS, found, "cpu")
            + ", or give it the sequences one at a time"
        )


def _too_old(what: str, needed: str, found: str, device: str) -> str:
    library = "onnxruntime-gpu" if device == "cuda" else "onnxruntime"
    return f"{what} needs onnxruntime {needed} or newer, this is {found}: pip install --upgrade '{library}>={needed}'"
