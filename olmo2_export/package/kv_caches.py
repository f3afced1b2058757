"""Which KV caches a variant is written with, and which of them runners take where none is named."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import olmo2_export.catalog as catalog
from olmo2_export.catalog import KVCacheFormat, QualityGate, VariantRow
from olmo2_export.config import ModelConfig
from olmo2_export.measure.quality import broken_limits
from olmo2_export.package.weight_choice import Options
from runtimes.manifest import OtherCache, Variant

logger = logging.getLogger(__name__)


def written_caches(row: VariantRow, config: ModelConfig, options: Options) -> tuple[KVCacheFormat, ...]:
    """Return the KV caches that a variant is written with; what a quantised one costs a classifier, nobody measures."""
    found = catalog.kv_caches(options.kv_caches)
    if row.quantized_cache and (options.kv_caches or not config.labels):
        return found
    return tuple(cache for cache in catalog.KV_CACHES if cache.bits is None)


def with_default(written: Sequence[Variant], gate: QualityGate | None) -> Variant:
    """Return one variant with all of its KV caches: first the preferred one if it passes, else the first that is there.

    Args:
        written: the variant with each of its KV caches alone, in the catalog's order, measured.
        gate: of the variant; None: nothing was measured.
    """
    default, preferred = written[0], [cache.name for cache in catalog.KV_CACHES if cache.preferred]
    missed = [_missed(own, written[0], gate) for own in written]
    for own, words in zip(written[1:], missed[1:], strict=True):
        name = own.kv_cache.name
        if name in preferred and own.quality is not None and not words:
            default = own
        elif name in preferred and words:
            logger.warning(
                "%s: its KV cache is %s where none is named, as %s misses the quality gate: %s",
                *(own.name, written[0].kv_cache.name, name, "; ".join(words)),
            )
    others = (_as_other(own, words) for own, words in zip(written, missed, strict=True) if own is not default)
    return dataclasses.replace(default, other_caches=tuple(others))


def _missed(variant: Variant, first: Variant, gate: QualityGate | None) -> tuple[str, ...]:
    """Return what keeps a variant from being the default, in words."""
    broken = [] if variant.quality is None or gate is None else broken_limits(variant.quality, gate)
    return (*broken, *(["no prefill graph"] if variant.prefill is None and first.prefill is not None else ()))


def _as_other(variant: Variant, missed: tuple[str, ...]) -> OtherCache:
    return OtherCache(
        graph=variant.graph,
        inputs=variant.inputs,
        outputs=variant.outputs,
        kv_cache=variant.kv_cache,
        quality=variant.quality,
        prefill=variant.prefill,
        min_onnxruntime=variant.min_onnxruntime,
        missed=missed,
    )
