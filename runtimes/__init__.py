"""Run the packages that olmo2-export writes: numpy, tokenizers and one backend, nothing of the exporter.

    with open_runner("packages/olmo2-1b") as runner:
        logits = runner.prefill([[100257, 644, 279, 7314]])[0]

Text in and text out: `runtimes.generation.generate`. Command line: `olmo2-run`, or `python -m runtimes`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import runtimes.telemetry  # noqa: F401  # before any onnxruntime: every import of runtimes.x comes through here first
from runtimes.errors import (
    BackendError,
    ContextLengthError,
    InputError,
    IntegrityError,
    NumericError,
    Olmo2ExportError,
    PackageError,
    PackageNotFoundError,
    UsageError,
    VariantNotFoundError,
)
from runtimes.integers import as_integer
from runtimes.package import AnyPackage, Package, open_package
from runtimes.runners.runner import Runner
from runtimes.runners.slots import Slots
from runtimes.targets import Backend, Device, find_target
from runtimes.threads import default_threads

if TYPE_CHECKING:
    from runtimes.ort.prepared import PreparedGraph

__all__ = [
    "Backend",
    "BackendError",
    "ContextLengthError",
    "Device",
    "InputError",
    "IntegrityError",
    "NumericError",
    "Olmo2ExportError",
    "Package",
    "PackageError",
    "PackageNotFoundError",
    "Runner",
    "Slots",
    "UsageError",
    "VariantNotFoundError",
    "open_package",
    "open_runner",
    "prepare_variant",
]

_MOST_THREADS_PER_CPU = 4  # a hundred thousand stop the machine


def open_runner(
    package: AnyPackage,
    *,
    variant: str | None = None,
    backend: Backend = "ort",
    device: Device | None = None,
    check_hashes: bool = True,
    threads: int | None = None,
    max_slots: int | None = None,
    exact: bool = False,
    kv_cache: str | None = None,
    huge_pages: bool = True,
    prepared: bool = True,
    spinning: bool = True,
) -> Slots:
    """Open one graph of a package; close it, or use it in a `with`.

    Args:
        package: the package folder, or `hf:OWNER/NAME[@REVISION]`, of which the Hub's cache gets the files that this
            variant needs; or one that is open: its files are then hashed once for all its runners.
        variant: which; None means the fastest verified one that the device runs: of those that parity.json says passed,
            the first of q4, q8, fp32 on a CPU, or of bf16, fp16, q4f16 on another device of ort; of those not verified
            yet, if none is; one that failed only where there is no other. With a TensorRT backend the first by name
            with an engine for it.
        backend: what runs it, see `runtimes.targets`. The TensorRT backends run engines made by `olmo2-export build`.
        device: where; None means the CPU for ort. The TensorRT backends run on the GPU alone, as device cuda.
        check_hashes: read the graph and the weights once more to compare them with the manifest; without it only their
            presence and size are checked.
        threads: CPU threads of an operator, for ort; None means one per physical core that this process may use.
        max_slots: sequences at once where it is used by slots, see `runtimes.runners.slots`; None means 8 for ort, and
            with a TensorRT backend what the engine was built for.
        exact: the logits of a sequence are to the bit those that it gets alone, whoever else is there and however its
            prompt is cut. On the CPU alone; a step of one row takes the time of two. Of slots: a
            batch of several rows, or in several calls of `prefill`, may have other bits.
        kv_cache: what keys and values are stored in, out of those that the variant was exported with, as float32 or
            int8; None means the one that the manifest names first, or where onnxruntime is too old for that, the first
            that it runs.
        huge_pages: on a CPU, have the weights in huge pages soon after the first step, where the system can; False
            leaves them as they are. `memory_note` of the runner says what became of it.
        prepared: on a CPU, map the weights from a file where `olmo2-run prepare` has made one for this machine and this
            onnxruntime, so that processes share them; False takes the package's own files.
        spinning: threads of ort on the CPU wait for work without giving their core away. Where other processes want
            the same cores a step takes half the time without.

    Returns:
        The runner, with an empty cache.

    Raises:
        UsageError: threads or max_slots out of range, exact is no bool, a KV cache that the variant has not, or a
            device, threads, exact or KV cache that the backend has no use for.
        BackendError: an unknown backend or device, or one whose library or GPU is not there; huggingface_hub is not.
        PackageNotFoundError, VariantNotFoundError: no such package, no such variant in it; the Hub does not give it.
        IntegrityError: a file is not the one that was exported.
        PackageError: the backend cannot load the graph, or it is not the graph the manifest describes.
        ResourceError: the GPU's memory does not hold the engine and its KV cache.
    """
    most = _MOST_THREADS_PER_CPU * (os.cpu_count() or 1)
    count = as_integer(threads)
    if threads is not None and (count is None or not 1 <= count <= most):
        raise UsageError(f"threads {threads!r}: expected an integer from 1 to {most}, {_MOST_THREADS_PER_CPU} a CPU")
    target = find_target(backend, device)
    if threads is not None and not target.takes_threads:
        raise UsageError(f"threads {threads}: backend {backend} runs on the GPU; leave them out")
    slots = as_integer(max_slots)
    if max_slots is not None and (slots is None or slots < 1):
        raise UsageError(f"max_slots {max_slots!r}: expected an integer of at least 1")
    if not isinstance(exact, bool):
        raise UsageError(f"exact {exact!r}: expected True or False")
    if exact and target.device != "cpu":
        raise UsageError(f"exact: backend {backend} runs on device {target.device}, where answers depend on each other")
    if kv_cache is not None and target.needs_engine:
        raise UsageError(f"KV cache {kv_cache}: an engine of backend {backend} has that of its graph; leave it out")
    match target.backend:
        case "ort":
            try:
                from runtimes.ort.open import default_variant, open_ort, with_cache
                from runtimes.ort.prepared import find_prepared
            except ImportError as error:
                raise BackendError(
                    f"backend ort: onnxruntime cannot be imported ({error}); {target.install}"
                ) from error
            opened = open_package(package)
            chosen = with_cache(opened.variant(variant or default_variant(opened, target.device)), kv_cache)
            opened.check(chosen.files, hashes=False)

            def check(names: Sequence[str]) -> None:
                opened.check(names, hashes=check_hashes)

            return open_ort(
                opened.folder,
                chosen,
                opened.model,
                count or default_threads(),
                check,
                target.device,
                max_slots=slots,
                exact=exact,
                adapters={name: entry.file for name, entry in opened.manifest.adapters.items()},
                huge_pages=huge_pages,
                prepared=partial(find_prepared, opened, hashes=check_hashes) if prepared else None,
                spinning=spinning,
            )
        case "trt_rtx" | "trt":
            try:
                from runtimes.trt.open import open_trt
            except ImportError as error:
                raise BackendError(
                    f"backend {backend}: cuda-bindings cannot be imported ({error}); {target.install}"
                ) from error
            return open_trt(open_package(package), target.backend, variant, check_hashes=check_hashes, max_slots=slots)


def prepare_variant(
    package: AnyPackage, *, variant: str | None = None, kv_cache: str | None = None, check_hashes: bool = True
) -> Iterator[tuple[PreparedGraph, bool]]:
    """Write the graphs of a variant as this machine's CPU reads them; see `runtimes.ort.prepared`.

    Args:
        package: as of `open_runner`.
        variant: likewise.
        kv_cache: likewise.
        check_hashes: read the files once more to compare them with the manifest.

    Yields:
        Each graph, and whether it was written now; False: it was there.

    Raises:
        UsageError: a KV cache that the variant has not.
        ResourceError: the disk is full, or there is no folder that can be written.
        BackendError: onnxruntime is not there, or too old; or the variant does not run on a CPU.
        PackageNotFoundError, VariantNotFoundError, IntegrityError, PackageError: as of `open_runner`.
    """
    target = find_target("ort", "cpu")
    try:
        from runtimes.ort.open import default_variant, with_cache
        from runtimes.ort.prepared import prepare
    except ImportError as error:
        raise BackendError(f"backend ort: onnxruntime cannot be imported ({error}); {target.install}") from error
    opened = open_package(package)
    chosen = with_cache(opened.variant(variant or default_variant(opened, target.device)), kv_cache)
    opened.check(chosen.files, hashes=check_hashes)
    yield from prepare(opened, chosen, default_threads())
