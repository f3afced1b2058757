"""Verify a quantised variant: first that the graph computes what its weights say, then what those weights cost.

| cases          | what runs                                       | against PyTorch with                    | gate    |
|----------------|-------------------------------------------------|-----------------------------------------|---------|
| prefill ...    | the decode graph, activations and cache in fp32 | the dequantised weights                 | fp32    |
| kernels ...    | the decode graph as it is                       | the same, inputs rounded block by block | kernels |
| int8 ...       | the prefill graph as it is                      | the int8 weights, inputs rounded by row | kernels |
| weights        | -                                               | the checkpoint, block by block          | scale   |
| quality        | each graph as it is, and both on one cache      | the checkpoint in float32               | quality |

The first finds bugs that no measure of quality shows, such as a norm ignored; `weights` finds a scale that is wrong;
the last is what users get.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.checkpoint import Checkpoint
from olmo2_export.config import ModelConfig
from olmo2_export.measure import Truth, ask_pytorch, feed, measure_runner
from olmo2_export.ort_graph import exact_form, stored_int8, stored_matrices
from olmo2_export.parity import KERNELS, CaseResult, Check, ParityReport
from olmo2_export.quality import broken_limits, gate, measure_quality, quality_tokens
from olmo2_export.quantize.blocks import QuantizedMatrix
from olmo2_export.quantize.encode import cut
from olmo2_export.quantize.names import EMBEDDING, stored_weight
from olmo2_export.quantize.sweep import reference_logits
from olmo2_export.reference import open_reference
from runtimes.errors import PackageError
from runtimes.manifest import ModelSpec, Variant, check_files, find_variant, load_manifest
from runtimes.ort_runner import open_ort
from runtimes.ort_session import open_session
from runtimes.shared_runner import SharedRunner

LONG = 4096
"""tokens on which a quantised KV cache is measured, where the context holds them"""

_SCALE_ERROR = 0.25  # a block's scale against the one that fits its codes best; seen: 0.1 with GPTQ
_KV_ERROR_RATIO = {8: 4.0, 4: math.inf}  # where the cache is rounded too; what 4 bits cost, quality must tell
_ROWS = 4096


def measure_quantized(package: Path, name: str, checkpoint: Checkpoint) -> ParityReport:
    """Run a quantised variant through every case and check.

    Args:
        package: the package folder.
        name: of the variant.
        checkpoint: the reference weights.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
    """
    entry, files = find_variant(package, name)
    check_files(package, files, entry.files)
    spec = load_manifest(package).model
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    graph = ir.load(package / entry.graph)
    matrices = stored_matrices(graph)
    if entry.quantization is None or matrices.keys() != entry.quantization.tensors.keys():
        raise PackageError(f"{package}: {entry.graph} has other weights than its manifest; export it again")
    weights = {tensor: matrix.dequantize() for tensor, matrix in matrices.items()}
    truth = ask_pytorch(package, checkpoint, {"fp32"}, entry.kv_cache.max_cache_length, weights=weights)
    with _open_exact(package, entry, spec, graph) as runner:
        report = measure_runner(runner, truth, "fp32", name, files[entry.graph].sha256)
    blocks = {tensor: m.form.block_size for tensor, m in matrices.items() if tensor != EMBEDDING}
    cases = [*report.cases, *_kernel_cases("kernels", package, entry, checkpoint, truth, weights, blocks)]
    checks = [_check_weights(matrices, checkpoint, config)]
    if entry.prefill is not None:
        int8 = {
            tensor: torch.from_numpy(w) for tensor, w in stored_int8(ir.load(package / entry.prefill.graph)).items()
        }
        rows = dict.fromkeys(int8, 0) | {t: blocks[t] for t in blocks.keys() - int8.keys()}
        prefill = dataclasses.replace(entry, graph=entry.prefill.graph, data=entry.prefill.data)
        exact = _exact_logits(checkpoint, truth.sequences, weights | int8)
        int8_truth = dataclasses.replace(truth, exact=exact)
        cases += _kernel_cases("int8", package, prefill, checkpoint, int8_truth, weights | int8, rows)
        checks.append(_check_int8(int8, checkpoint, config))
    checks += _check_quality(package, entry, spec, checkpoint, config)
    if entry.kv_cache.quantization is not None:
        checks.append(_check_cache_scales(package, entry))
    return dataclasses.replace(report, precision=entry.precision, cases=tuple(cases), checks=tuple(checks))


@contextmanager
def _open_exact(package: Path, entry: Variant, spec: ModelSpec, graph: ir.Model) -> Iterator[SharedRunner]:
    """Run the decode graph's exact form, made in memory, on the package's weights."""
    cache = dataclasses.replace(entry.kv_cache, dtype="float32", quantization=None)
    variant = dataclasses.replace(entry, kv_cache=cache, prefill=None)
    proto = ir.to_proto(exact_form(graph)).SerializeToString()
    session = open_session(package / entry.graph, variant, None, proto)
    with SharedRunner(session, None, variant, spec) as runner:
        yield runner


def _exact_logits(
    checkpoint: Checkpoint, sequences: list[np.ndarray], weights: Mapping[str, torch.Tensor]
) -> list[np.ndarray]:
    with open_reference(checkpoint, "fp32", weights) as reference:  # much closer than the rounding that is measured
        return reference.logits(sequences)


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
    with open_reference(checkpoint, "fp32", weights, int8_inputs) as reference:
        own = reference.logits(truth.sequences)
    limits = KERNELS
    if entry.kv_cache.quantization is not None:
        limits = dataclasses.replace(limits, error_ratio=_KV_ERROR_RATIO[entry.kv_cache.quantization.bits])
    variant = dataclasses.replace(entry, prefill=None)
    with open_ort(package, variant, load_manifest(package).model, None) as runner:
        cases = feed(runner, truth.sequences, truth.exact, own, limits)
    return [dataclasses.replace(case, mode=f"{label} {case.mode}") for case in cases]


def _check_weights(matrices: Mapping[str, QuantizedMatrix], checkpoint: Checkpoint, config: ModelConfig) -> Check:
    """Compare each block's scale with the one that fits its codes to the checkpoint's weights best."""
    worst = 0.0
    failures: list[str] = []
    for name, matrix in matrices.items():
        source = stored_weight(checkpoint, config, name)
        for start in range(0, matrix.rows, _ROWS):
            truth = cut(source[start : start + _ROWS], matrix.form)
            stored = cut(matrix.dequantize(start, start + _ROWS), matrix.form)
            off = _scale_error(truth, stored)
            worst = max(worst, float(off.max()))
            if bool((off > _SCALE_ERROR).any()):
                block = int(off.argmax())
                row, column = divmod(block, matrix.form.blocks(matrix.columns))
                failures.append(
                    f"{name}: row {start + row}, block {column}: its scale is off by {float(off.max()):.0%}"
                )
                break
    return Check("weights", f"{len(matrices)} tensors, scales within {worst:.1%} of the best", tuple(failures[:5]))


def _check_int8(weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint, config: ModelConfig) -> Check:
    """The same for the int8 weights, whose scales are per output channel."""
    worst = 0.0
    failures: list[str] = []
    for name, stored in weights.items():
        off = _scale_error(stored_weight(checkpoint, config, name).float(), stored)
        worst = max(worst, float(off.max()))
        if worst > _SCALE_ERROR and not failures:
            failures.append(f"{name}: channel {int(off.argmax())}: its scale is off by {float(off.max()):.0%}")
    return Check("int8 weights", f"{len(weights)} tensors, scales within {worst:.1%} of the best", tuple(failures))


def _scale_error(truth: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return per row |<truth, stored> / <stored, stored> - 1|: 0 where the scale is the least-squares one."""
    energy = stored.square().sum(1)
    fit = (truth * stored).sum(1) / energy.clamp_min(1e-30)
    lost = (energy <= 1e-12 * truth.square().sum(1)) & (truth.square().sum(1) > 1e-30)  # all zero where weights were
    return torch.where(lost, torch.ones_like(energy), torch.where(energy > 1e-30, (fit - 1).abs(), energy))


def _check_quality(
    package: Path, entry: Variant, spec: ModelSpec, checkpoint: Checkpoint, config: ModelConfig
) -> list[Check]:
    """Measure each graph, and both in turns on one cache; a quantised cache on the whole context, or 4096 tokens."""
    long = LONG if entry.kv_cache.quantization is not None else None
    sequences, origin = quality_tokens(checkpoint, config, length=long)
    wanted = list(reference_logits(checkpoint, config, sequences))
    views = [("quality", dataclasses.replace(entry, prefill=None), False)]
    if entry.prefill is not None:
        views += [("int8 quality", entry, False), ("quality of both in turns", entry, True)]
    checks = []
    for name, variant, alternate in views:
        with open_ort(package, variant, spec, None) as runner:
            measured = measure_quality(runner, sequences, wanted, origin, alternate=alternate)
        rise = measured.perplexity / measured.reference_perplexity - 1
        found = (
            f"KL {measured.kl_mean:.2g}, p99 {measured.kl_p99:.2g}, top-1 {measured.top1:.1%}, perplexity "
            f"{measured.perplexity:.3f} ({rise:+.2%}) on {measured.tokens} tokens of {origin} in {len(sequences[0])}s"
        )
        checks.append(Check(name, found, tuple(broken_limits(measured, gate(entry.precision, config)))))
    return checks


def _check_cache_scales(package: Path, entry: Variant) -> Check:
    """Every graph rounds the cache with the scales of the manifest."""
    assert entry.kv_cache.quantization is not None  # the caller has seen to it
    scales = entry.kv_cache.quantization.scales
    failures = []
    for path in (entry.graph, entry.prefill.graph) if entry.prefill else (entry.graph,):
        initializers = ir.load(package / path).graph.initializers
        for name, text in scales.items():
            value = initializers.get(f"kv_cache.{name}.scale")
            stored = None if value is None or value.const_value is None else value.const_value.numpy()
            if stored is None or stored.astype("<f4").tobytes() != base64.b64decode(text):
                failures.append(f"{path}: kv_cache.{name}.scale is not the manifest's")
    return Check("cache scales", f"{len(scales)} in each graph", tuple(failures[:5]))
