"""Verify a graph made for GPUs: on a GPU as it is, without one through onnxruntime's CPU provider.

| variant | on the CPU        | against PyTorch with                          | gate    |
|---------|-------------------|-----------------------------------------------|---------|
| fp16    | the graph         | the checkpoint, in float16, with its islands  | fp16    |
| bf16    | its rounded form  | the checkpoint, in bfloat16                   | bf16    |
| q4f16   | the graph         | the dequantised weights, in float16           | fp16    |
|         | -                 | the checkpoint, block by block                | scale   |
|         | the graph         | the checkpoint in float32, on held-out text   | quality |

The rounded form computes in float32 and rounds where the graph has bfloat16, but for what GroupQueryAttention rounds
inside and for the keys in its cache. A float16 graph on the CPU says nothing of overflows on a GPU: the operators of
this one sum in float32 there, see `graphs/device.py`; `verify --device cuda` shows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from olmo2_export.config import ModelConfig
from olmo2_export.fp16.simulate import simulated_logits
from olmo2_export.fp16.values import wide_of
from olmo2_export.graphs.shared import stored_matrices
from olmo2_export.measure.parity import ParityReport
from olmo2_export.measure.quality import gate_of, measure_quality, quality_check, quality_tokens
from olmo2_export.quantize.sweep import reference_logits
from olmo2_export.stored_graph import load_graph
from olmo2_export.verify.measure import LONGEST, Truth, ask_pytorch, measure_runner, with_quality
from olmo2_export.verify.weight_checks import check_matrices
from olmo2_export.views.static_forms import rounded_form
from olmo2_export.weights.checkpoint import Checkpoint
from olmo2_export.weights.source import Replaced
from runtimes import Device, Runner, open_runner
from runtimes.errors import PackageError
from runtimes.manifest import Variant, find_variant, load_manifest
from runtimes.ort.session import open_session
from runtimes.ort.shared import SharedRunner
from runtimes.sealed import check_files


def measure_device(
    package: Path,
    name: str,
    checkpoint: Checkpoint,
    truth: Truth | None,
    device: Device = "cpu",
    longest: int = LONGEST,
) -> ParityReport:
    """Run a graph made for GPUs through every case and check.

    Args:
        package: the package folder.
        name: of the variant.
        checkpoint: the reference weights.
        truth: what `ask_pytorch` found for its precision; None where its weights are quantised.
        device: where onnxruntime runs it.
        longest: tokens of the longest rows, where the cache holds more.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
        BackendError: the device is not there.
    """
    entry, files = find_variant(package, name)
    check_files(package, files, entry.files)
    sha256 = files[entry.graph].sha256
    if truth is not None:
        truth = _with_islands(truth, entry, checkpoint)
        with open_device_graph(package, entry, device) as runner:
            return with_quality(measure_runner(runner, truth, entry.precision, name, sha256), runner, checkpoint)
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    matrices = stored_matrices(load_graph(package / entry.graph))
    if entry.quantization is None or matrices.keys() != entry.quantization.tensors.keys():
        raise PackageError(f"{package}: {entry.graph} has other weights than its manifest; export it again")
    weights = {tensor: matrix.dequantize() for tensor, matrix in matrices.items()}
    capacity = min(entry.kv_cache.max_cache_length, longest)
    stored = ask_pytorch(package, checkpoint, {"fp16"}, capacity, weights=weights)
    stored = _with_islands(stored, entry, checkpoint, weights)
    sequences, origin = quality_tokens(checkpoint, config)
    wanted = list(reference_logits(checkpoint, config, sequences))
    with open_device_graph(package, entry, device) as runner:
        report = measure_runner(runner, stored, "fp16", name, sha256)
        quality = measure_quality(runner, sequences, wanted, origin)
    limits = gate_of(entry, config)
    checks = (
        check_matrices(matrices, checkpoint, config),
        quality_check("quality", quality, len(sequences[0]), limits),
    )
    return dataclasses.replace(report, precision=entry.precision, checks=checks, perplexity=quality.perplexity)


def _with_islands(
    truth: Truth, entry: Variant, checkpoint: Checkpoint, weights: Mapping[str, Tensor] | None = None
) -> Truth:
    """Where the graph has islands, replace the logits of PyTorch in float16, which overflow, by those with the same
    islands; so that the error is measured in units of PyTorch's own with the same tensors in float32."""
    if not entry.float32_islands:
        return truth
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    source = Replaced(checkpoint, weights or {})
    whole = simulated_logits(source, config, truth.sequences, wide_of(entry.float32_islands))
    logits = [rows[positions] for rows, positions in zip(whole, truth.positions, strict=True)]
    return dataclasses.replace(truth, own=truth.own | {"fp16": logits})


@contextmanager
def open_device_graph(package: Path, entry: Variant, device: Device) -> Iterator[Runner]:
    """Run the graph as it is, or, where the CPU has no such arithmetic, its rounded form."""
    if device != "cpu" or entry.kv_cache.dtype != "bfloat16":
        with open_runner(package, variant=entry.name, device=device) as runner:
            yield runner
        return
    variant = dataclasses.replace(entry, kv_cache=dataclasses.replace(entry.kv_cache, dtype="float32"))
    form = ir.to_proto(rounded_form(load_graph(package / entry.graph))).SerializeToString()
    session = open_session(package / entry.graph, variant, None, form)
    with SharedRunner(session, None, variant, load_manifest(package).model) as shared:
        yield shared
