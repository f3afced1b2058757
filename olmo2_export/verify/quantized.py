"""Verify a quantised variant: first that the graph computes what its weights say, then what those weights cost.

| cases          | what runs                                       | against PyTorch with                    | gate    |
|----------------|-------------------------------------------------|-----------------------------------------|---------|
| prefill ...    | the decode graph, activations and cache in fp32 | the dequantised weights                 | fp32    |
| kernels ...    | the decode graph as it is                       | the same, inputs rounded block by block | kernels |
| int8 exact ... | the prefill graph, nothing rounded              | the int8 weights                        | fp32    |
| int8 ...       | the prefill graph as it is                      | the int8 weights, inputs rounded by row | kernels |
| weights        | -                                               | the checkpoint, block by block          | scale   |
| quality        | each graph as it is, and both on one cache      | the checkpoint in float32               | quality |

The exact ones find bugs that no measure of quality shows, such as a norm ignored, even where rounding costs so much
that no other error is seen behind it; `weights` finds a scale that is wrong; the last is what users get.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from olmo2_export.config import ModelConfig
from olmo2_export.graphs.shared import exact_form, stored_int8, stored_matrices
from olmo2_export.measure.parity import GATES, KERNELS, CaseResult, Check, ParityReport, PerplexityChange
from olmo2_export.measure.quality import gate_of, measure_quality, quality_check, quality_tokens
from olmo2_export.quantize.sweep import reference_logits
from olmo2_export.stored_graph import load_graph
from olmo2_export.truth.reference import int8_blocks, open_reference
from olmo2_export.verify.measure import LONGEST, Truth, ask_pytorch, draw_logits, feed, measure_runner
from olmo2_export.verify.weight_checks import check_int8, check_matrices
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.stored_names import EMBEDDING
from runtimes.errors import PackageError
from runtimes.manifest import ModelSpec, Variant, find_variant, load_manifest
from runtimes.ort.open import open_ort
from runtimes.ort.session import open_session
from runtimes.ort.shared import SharedRunner
from runtimes.sealed import check_files

LONG = 4096
"""tokens on which a quantised KV cache is measured, where the context holds them"""

_KV_ERROR_RATIO = {8: 4.0, 4: math.inf}  # where the cache is rounded too; what 4 bits cost, quality must tell


def measure_quantized(package: Path, name: str, checkpoint: Checkpoint, longest: int = LONGEST) -> ParityReport:
    """Run a quantised variant through every case and check.

    Args:
        package: the package folder.
        name: of the variant.
        checkpoint: the reference weights.
        longest: tokens of the longest rows, where the cache holds more.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
    """
    entry, files = find_variant(package, name)
    check_files(package, files, entry.files)
    spec = load_manifest(package).model
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    graph = load_graph(package / entry.graph)
    matrices = stored_matrices(graph)
    if entry.quantization is None or matrices.keys() != entry.quantization.tensors.keys():
        raise PackageError(f"{package}: {entry.graph} has other weights than its manifest; export it again")
    weights = {tensor: matrix.dequantize() for tensor, matrix in matrices.items()}
    capacity = min(entry.kv_cache.max_cache_length, longest)
    truth = ask_pytorch(package, checkpoint, {"fp32"}, capacity, weights=weights)
    with _open_exact(package, entry, spec, graph) as runner:
        report = measure_runner(runner, truth, "fp32", name, files[entry.graph].sha256)
    blocks = {tensor: m.form.block_size for tensor, m in matrices.items() if tensor != EMBEDDING}
    cases = [*report.cases, *_kernel_cases("kernels", package, entry, checkpoint, truth, weights, blocks)]
    checks = [check_matrices(matrices, checkpoint, config)]
    if entry.prefill is not None:
        int8_graph = load_graph(package / entry.prefill.graph)
        int8 = {tensor: torch.from_numpy(w) for tensor, w in stored_int8(int8_graph).items()}
        rows = dict.fromkeys(int8, 0) | {t: blocks[t] for t in blocks.keys() - int8.keys()}
        prefill = dataclasses.replace(entry, graph=entry.prefill.graph, data=entry.prefill.data)
        int8_truth = ask_pytorch(package, checkpoint, {"fp32"}, capacity, weights=weights | int8)
        with _open_exact(package, prefill, spec, int8_graph) as runner:
            found = feed(runner, int8_truth, int8_truth.exact, int8_truth.own["fp32"], GATES["fp32"], int8_truth.draws)
        cases += [dataclasses.replace(case, mode=f"int8 exact {case.mode}") for case in found]
        cases += _kernel_cases("int8", package, prefill, checkpoint, int8_truth, weights | int8, rows)
        checks.append(check_int8(int8, checkpoint, config))
    quality, change = _check_quality(package, entry, spec, checkpoint, config)
    checks += quality
    if entry.kv_cache.quantization is not None:
        checks.append(_check_cache_scales(package, entry))
    return dataclasses.replace(
        report, precision=entry.precision, cases=tuple(cases), checks=tuple(checks), perplexity=change
    )


@contextmanager
def _open_exact(package: Path, entry: Variant, spec: ModelSpec, graph: ir.Model) -> Iterator[SharedRunner]:
    """Run a graph's exact form, made in memory, on the package's weights."""
    cache = dataclasses.replace(entry.kv_cache, dtype="float32", quantization=None)
    variant = dataclasses.replace(entry, kv_cache=cache, prefill=None)
    proto = ir.to_proto(exact_form(graph)).SerializeToString()
    session = open_session(package / entry.graph, variant, None, proto)
    with SharedRunner(session, None, variant, spec) as runner:
        yield runner


def _kernel_cases(
    label: str,
    package: Path,
    entry: Variant,
    checkpoint: Checkpoint,
    truth: Truth,
    weights: Mapping[str, torch.Tensor],
    int8_inputs: Mapping[str, int],
) -> list[CaseResult]:
    """Feed one graph as it is; its error is measured in units of PyTorch's, with inputs rounded likewise."""
    rounding = {tensor: int8_blocks(block) for tensor, block in int8_inputs.items()}
    with open_reference(checkpoint, "fp32", weights, rounding) as reference:
        own = reference.logits(truth.sequences, truth.positions)
    limits = KERNELS
    if entry.kv_cache.quantization is not None:
        limits = dataclasses.replace(limits, error_ratio=_KV_ERROR_RATIO[entry.kv_cache.quantization.bits])
    variant = dataclasses.replace(entry, prefill=None)
    with open_ort(package, variant, load_manifest(package).model, None) as runner:
        draws = partial(draw_logits, checkpoint, truth.sequences, truth.positions, weights, rounding)
        cases = feed(runner, truth, truth.exact, own, limits, draws)
    return [dataclasses.replace(case, mode=f"{label} {case.mode}") for case in cases]


def _check_quality(
    package: Path, entry: Variant, spec: ModelSpec, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[list[Check], PerplexityChange]:
    """Measure each graph, and both in turns on one cache; a quantised cache on the whole context, or 4096 tokens."""
    long = LONG if entry.kv_cache.quantization is not None else None
    sequences, origin = quality_tokens(checkpoint, config, length=long)
    wanted = list(reference_logits(checkpoint, config, sequences))
    views = [("quality", dataclasses.replace(entry, prefill=None), False)]
    if entry.prefill is not None:
        views += [("int8 quality", entry, False), ("quality of both in turns", entry, True)]
    checks, changes = [], []
    for name, variant, alternate in views:
        with open_ort(package, variant, spec, None) as runner:
            measured = measure_quality(runner, sequences, wanted, origin, alternate=alternate)
        checks.append(quality_check(name, measured, len(sequences[0]), gate_of(entry, config)))
        changes.append(measured.perplexity)
    return checks, changes[0]


def _check_cache_scales(package: Path, entry: Variant) -> Check:
    """Every graph rounds the cache with the scales of the manifest."""
    assert entry.kv_cache.quantization is not None  # the caller has seen to it
    scales = entry.kv_cache.quantization.scales
    failures = []
    for path in (entry.graph, entry.prefill.graph) if entry.prefill else (entry.graph,):
        initializers = load_graph(package / path).graph.initializers
        for name, text in scales.items():
            value = initializers.get(f"kv_cache.{name}.scale")
            stored = None if value is None or value.const_value is None else value.const_value.numpy()
            if stored is None or stored.astype("<f4").tobytes() != base64.b64decode(text):
                failures.append(f"{path}: kv_cache.{name}.scale is not the manifest's")
    return Check("cache scales", f"{len(scales)} in each graph", tuple(failures[:5]))
