"""Verify a static-cache graph, made for TensorRT, through onnxruntime's CPU provider, or CUDA's.

| cases, of a precision | what runs               | against PyTorch with                             | gate           |
|-----------------------|-------------------------|--------------------------------------------------|----------------|
| fp32, fp16: prefill   | the graph as it is      | the checkpoint, at that precision                | fp32, fp16     |
| bf16: prefill ...     | its rounded form        | the checkpoint, in bfloat16                      | bf16           |
| int4, int8, fp8       | its exact form          | the stored weights                               | fp32           |
| exact ...             | the exact form          | the stored weights (bf16, fp16)                  | fp32           |
| rounded ...           | the rounded form        | the same in bfloat16, inputs rounded likewise    | kernels        |
| weights, scales       | -                       | the checkpoint, rounded; block by block          | equal; scale   |
| input scales          | -                       | the manifest                                     | equal          |
| quality               | the rounded form        | the checkpoint in float32, on held-out text      | quality        |

On CUDA the graph runs as itself, as an engine does: bf16, fp16 and fp32 at their gates, and int4, int8 and fp8, in the
device form, at the gate of kernels. `static_forms` has the forms. The exact form finds bugs that rounding hides;
`weights` and `scales` find what both forms agree on because they read it from the same file; the last is what users
get.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from olmo2_export.config import ModelConfig
from olmo2_export.measure.parity import GATES, KERNELS, CaseResult, Check, Gate, ParityReport, PerplexityChange
from olmo2_export.measure.quality import Measured, gate_of, measure_quality, quality_check, quality_tokens
from olmo2_export.package.trt_variants import default_text
from olmo2_export.quantize.static import static_input_scales
from olmo2_export.quantize.sweep import reference_logits
from olmo2_export.stored_graph import load_graph
from olmo2_export.truth.reference import SCALED, open_reference
from olmo2_export.verify.measure import LONGEST, QUALITY_LENGTH, Truth, ask_pytorch, feed, measure_runner, with_quality
from olmo2_export.verify.weight_checks import check_linears, check_rounded
from olmo2_export.views.static_forms import (
    all_positions,
    all_weights,
    device_form,
    exact_form,
    rounded_form,
    stored_input_scales,
    stored_linears,
    stored_tensors,
)
from olmo2_export.weights.checkpoint import Checkpoint
from runtimes import Backend, Device, Runner, open_runner
from runtimes.errors import PackageError, UsageError
from runtimes.manifest import ModelSpec, Quantization, Variant, find_variant, load_manifest
from runtimes.ort.devices import find_device
from runtimes.ort.session import open_session
from runtimes.ort.static_session import OrtStaticSession
from runtimes.runners.runner import Logits, TokenIds
from runtimes.runners.static import StaticRunner
from runtimes.sealed import check_files, hash_file
from runtimes.targets import find_target

Form = Callable[[ir.Model], ir.Model]

_ENGINE = dataclasses.replace(KERNELS, near_tie=GATES["bf16"].near_tie)
_CALIBRATION_RATIO = 1.15  # two steps of clipping; the same tokens, summed in another order, seldom give one
_AS_IS = ("fp32", "fp16")  # precisions that the CPU provider has


def measure_static(
    package: Path,
    name: str,
    checkpoint: Checkpoint,
    truth: Truth | None,
    backend: Backend = "ort",
    device: Device | None = None,
    longest: int = LONGEST,
) -> ParityReport:
    """Run a static-cache graph, or the engine made of it, through every case and check.

    Args:
        package: the package folder.
        name: of the variant.
        checkpoint: the reference weights.
        truth: what `ask_pytorch` found for its precision; None where its weights are quantised.
        backend: ort, or the TensorRT whose engine is run as it is: it has no other forms.
        device: of ort: cpu, or cuda, where the graph is run as it is; None: the backend's first.
        longest: tokens of the longest rows, where the cache holds more.

    Raises:
        IntegrityError: the variant's files changed.
        PackageError: its graph is not one of this exporter.
        BackendError: the device is not there.
    """
    entry, files = find_variant(package, name)
    check_files(package, files, entry.files)
    config = ModelConfig.from_json(checkpoint.folder / "config.json")
    graph = load_graph(package / entry.graph)
    linears, tensors = stored_linears(graph, config), stored_tensors(graph)
    if linears.keys() != (entry.quantization.tensors.keys() if entry.quantization else set()):
        raise PackageError(f"{package}: {entry.graph} quantises other weights than its manifest says; build it again")
    static = StaticForms(package, entry, load_manifest(package).model, graph, backend, device)
    sha256 = files[entry.graph].sha256
    checks = [check_rounded(tensors, checkpoint, config)]
    if truth is not None:
        with static.open(None if entry.precision in _AS_IS else rounded_form) as runner:
            report = measure_runner(runner, truth, entry.precision, name, sha256, backend)
            measured = runner if static.as_itself else static.open_all_positions()
            report = with_quality(report, measured, checkpoint)
        checks += report.checks
        if entry.precision == "fp32" or static.as_itself:
            return dataclasses.replace(report, checks=tuple(checks))
    capacity, weights = min(entry.kv_cache.max_cache_length, longest), all_weights(linears, tensors)
    stored = ask_pytorch(package, checkpoint, {"fp32"}, capacity, weights=weights)
    if truth is not None:
        with static.open(exact_form) as runner:
            cases = _labelled("exact", runner, stored, stored.own["fp32"], GATES["fp32"])
        return dataclasses.replace(report, cases=(*report.cases, *cases), checks=tuple(checks))
    scales = entry.quantization.input_scales if entry.quantization else {}
    rounding = {tensor: SCALED[entry.precision](scale) for tensor, scale in scales.items()}
    with open_reference(checkpoint, "bf16", weights, rounding) as reference:
        own = reference.logits(stored.sequences, stored.positions)
    checks += [
        check_linears(linears, checkpoint, config),
        _check_input_scales(stored_input_scales(graph), scales),
    ]
    if entry.quantization is not None and scales:
        checks.append(_check_calibration(package, entry.precision, entry.quantization, checkpoint, config))
    cases = []
    if not static.as_itself:
        with static.open(exact_form) as runner:
            report = measure_runner(runner, stored, "fp32", name, sha256)
        with static.open(rounded_form) as runner:
            cases = _labelled("rounded", runner, stored, own, KERNELS)
        quality, change = _check_quality(static.open_all_positions(), entry, checkpoint, config)
    else:
        rounded = dataclasses.replace(stored, own={entry.precision: own})
        with static.open(rounded_form) as runner:
            report = measure_runner(runner, rounded, entry.precision, name, sha256, backend, _ENGINE)
            quality, change = _check_quality(runner, entry, checkpoint, config)
    return dataclasses.replace(
        report,
        precision=entry.precision,
        cases=(*report.cases, *cases),
        checks=(*checks, quality),
        perplexity=change,
    )


class StaticForms:
    """A variant whose graph is opened on a backend and a device, where that is a CPU in forms made in memory."""

    def __init__(
        self,
        package: Path,
        entry: Variant,
        spec: ModelSpec,
        graph: ir.Model,
        backend: Backend = "ort",
        device: Device | None = None,
    ) -> None:
        self.entry, self._package, self._spec, self._graph = entry, package, spec, graph
        self._target = find_target(backend, device)
        self.as_itself = self._target.on_gpu
        """it has one form alone"""
        cache = dataclasses.replace(entry.kv_cache, dtype="float32")
        self._changed = dataclasses.replace(entry, kv_cache=cache)

    @contextmanager
    def open(self, form: Form | None) -> Iterator[Runner]:
        """Run the graph in a form, None: as it is; or, where there is no other, as itself."""
        on_device = self.as_itself and not self._target.needs_engine
        if on_device and self.entry.quantization is not None:
            form, variant = device_form, self.entry
        elif form is None or self.as_itself:
            target = self._target
            with open_runner(
                self._package, variant=self.entry.name, backend=target.backend, device=target.device
            ) as runner:
                yield runner
            return
        else:
            variant = self._changed
        session = OrtStaticSession(
            self._session(form(self._graph), variant), variant, memory=find_device(self._target.device).memory
        )
        with StaticRunner(session, variant, self._spec) as static:
            yield static

    def open_all_positions(self) -> _AllPositions:
        """Run the rounded form, all positions in one call."""
        entry = self._changed
        inputs = tuple(spec for spec in entry.inputs if spec.name != "logit_index")
        outputs = tuple(spec for spec in entry.outputs if not spec.name.startswith("top_"))
        variant = dataclasses.replace(entry, inputs=inputs, outputs=outputs)
        return _AllPositions(self._session(all_positions(rounded_form(self._graph)), variant), variant)

    def _session(self, model: ir.Model, variant: Variant) -> Any:
        proto = ir.to_proto(model).SerializeToString()
        return open_session(
            self._package / self.entry.graph, variant, None, proto, device=find_device(self._target.device)
        )


class _AllPositions:
    """Feeds one sequence to a graph of all positions; implements `quality.Measured`."""

    def __init__(self, session: Any, variant: Variant) -> None:
        self._session = session
        spec = variant.kv_cache
        shape = (1, spec.num_key_value_heads, spec.max_cache_length, spec.head_dim)
        self._empty = np.zeros(shape, np.float32)
        self._names = [f"{n}.{kind}" for n in range(spec.num_layers) for kind in ("key", "value")]
        self.reset()

    def reset(self) -> None:
        self._length = 0
        self._caches = dict.fromkeys(self._names, self._empty)

    def prefill(self, sequences: Sequence[TokenIds], *, all_positions: bool = False) -> list[Logits]:
        if len(sequences) != 1 or not all_positions:
            raise UsageError("this graph is for one sequence, and gives all of its positions")
        feeds = {
            "input_ids": np.asarray(sequences[0], np.int64)[None],
            "write_indices": np.array([self._length], np.int64),
            **{f"past_key_values.{name}": array for name, array in self._caches.items()},
        }
        wanted = ["logits", *(f"present.{name}" for name in self._names)]
        logits, *presents = self._session.run(wanted, feeds)
        self._caches = dict(zip(self._names, presents, strict=True))
        self._length += len(sequences[0])
        return [logits[0]]

    def decode_block(self, token_ids: TokenIds) -> Logits:
        return self.prefill([token_ids], all_positions=True)[0]


def _labelled(label: str, runner: Runner, truth: Truth, own: Sequence[np.ndarray], gate: Gate) -> list[CaseResult]:
    cases = feed(runner, truth, truth.exact, own, gate)
    return [dataclasses.replace(case, mode=f"{label} {case.mode}") for case in cases]


def _check_input_scales(stored: Mapping[str, float], expected: Mapping[str, float]) -> Check:
    """Compare the scales in the graph with the manifest's, which the reference rounds with."""
    wrong = [name for name in sorted(stored.keys() | expected.keys()) if stored.get(name) != expected.get(name)]
    failures = [f"{n}: {stored.get(n)}, the manifest says {expected.get(n)}" for n in wrong[:5]]
    return Check("input scales", f"{len(stored)} in the graph, {len(wrong)} not the manifest's", tuple(failures))


def _check_calibration(
    package: Path, precision: str, quantization: Quantization, checkpoint: Checkpoint, config: ModelConfig
) -> Check:
    """Calibrate again where the text is at hand, and compare: quality hardly shows one scale that is off by 2."""
    text = default_text(package)
    if quantization.calibration != (None if text is None else hash_file(text).sha256):
        return Check("calibration", "on a text that is not at hand: not repeated", ())
    again = static_input_scales(checkpoint, config, precision, text)
    ratios = {name: scale / again[name] for name, scale in quantization.input_scales.items()}
    off = {name: ratio for name, ratio in ratios.items() if not 1 / _CALIBRATION_RATIO < ratio < _CALIBRATION_RATIO}
    failures = [f"{name}: its input scale is {ratio:.2f} x what calibration gives" for name, ratio in off.items()]
    worst = max(max(ratio, 1 / ratio) for ratio in ratios.values())
    return Check(
        "calibration", f"{len(ratios)} input scales repeated, within a factor {worst:.3f}", tuple(failures[:5])
    )


def _check_quality(
    runner: Measured, entry: Variant, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[Check, PerplexityChange]:
    length = min(config.max_position_embeddings, entry.kv_cache.max_cache_length, QUALITY_LENGTH)
    sequences, origin = quality_tokens(checkpoint, config, length=length)
    measured = measure_quality(runner, sequences, reference_logits(checkpoint, config, sequences), origin)
    return quality_check("quality", measured, length, gate_of(entry, config)), measured.perplexity
