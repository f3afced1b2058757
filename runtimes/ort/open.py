"""Which runner a variant of a package gets on onnxruntime, and which variant a device runs where none is named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeAlias

import onnxruntime as ort  # type: ignore[import-untyped]

from runtimes.errors import BackendError, PackageError, UsageError
from runtimes.huge_pages import HugePages
from runtimes.manifest import ModelSpec, Variant
from runtimes.ort.adapters import Adapters
from runtimes.ort.concat import ConcatRunner
from runtimes.ort.device import MAX_COMPILED_ROWS, DeviceRunner, compiled_shapes
from runtimes.ort.devices import find_device
from runtimes.ort.prepared import PreparedGraph
from runtimes.ort.session import open_session
from runtimes.ort.shared import SharedRunner
from runtimes.ort.static_session import OrtStaticSession
from runtimes.ort.versions import choose_cache, new_enough, without_too_new
from runtimes.package import Package
from runtimes.runners.slots import DEFAULT_SLOTS
from runtimes.runners.static import StaticRunner
from runtimes.targets import engine_backend_words, find_target, ort_targets, runnable, runs

FileCheck: TypeAlias = Callable[[Sequence[str]], None]
"""gets paths in the package; raises IntegrityError"""

logger = logging.getLogger(__name__)


def default_variant(package: Package, device: str) -> str | None:
    """Return the variant that a device runs where none is named: the fastest that is verified, of those that it runs.

    Variants that were made for the device go before others; what parity.json says passed, before what it does not
    know, and that before what it says failed.

    Args:
        package: which.
        device: cpu, cuda or nv-rtx.

    Raises:
        BackendError: a GPU, and no variant for it.
    """
    target, manifest = find_target("ort", device), package.manifest
    able = runnable(package, target)
    if not able and not target.takes_others:
        raise BackendError(
            f"device {device}: the package has {', '.join(manifest.variants)}; "
            f"export it with --variant {target.variants[0]}"
        )
    able = able or list(manifest.variants)  # opening it says why not
    able = [name for name in able if new_enough(manifest.variants[name], ort.__version__)] or able
    passed = package.verdicts
    ranked = sorted(able, key=lambda name: {True: 0, None: 1, False: 2}[passed.get(name)])  # stable: the fastest first
    for name in able[: able.index(ranked[0])] if ranked else ():
        said = "not verified yet" if passed.get(name) is None else "failed when it was verified"
        logger.info("variant %s: %s; %s is taken", name, said, ranked[0])
    if ranked and passed.get(ranked[0]) is False:
        logger.warning("variant %s failed when it was verified, and there is no other", ranked[0])
    return ranked[0] if ranked else None


def with_cache(variant: Variant, name: str | None) -> Variant:
    """Return a variant with one of its KV caches alone; None: the default, see `versions.choose_cache`.

    Raises:
        UsageError: it has no such cache.
    """
    return choose_cache(variant, name, ort.__version__)


def open_ort(
    package: Path,
    variant: Variant,
    model: ModelSpec,
    threads: int | None,
    check: FileCheck | None = None,
    device: str = "cpu",
    *,
    max_slots: int | None = None,
    exact: bool = False,
    adapters: Mapping[str, str] | None = None,
    huge_pages: bool = False,
    prepared: Callable[[str, Sequence[str]], PreparedGraph | None] | None = None,
    spinning: bool = True,
) -> ConcatRunner | StaticRunner | SharedRunner:
    """Load a variant's graph, or two, on one device.

    A prefill graph is loaded in the background; the first step that is meant for it waits until it is there, and raises
    what is wrong with it.

    Args:
        package: the package folder; the caller has checked presence and size of the variant's files.
        variant: which.
        model: the manifest's.
        threads: of an operator on the CPU; None leaves it to onnxruntime.
        check: compares files of the package with the manifest; called with the graph before it is opened, and with its
            data while it is loaded. None: nothing is checked.
        device: cpu, cuda or nv-rtx.
        max_slots: sequences at once, for a server; None: `DEFAULT_SLOTS`, or what the device takes.
        exact: answers do not depend on each other; see `runtimes.runners.slots`.
        adapters: LoRA adapters of the package, by name, and their files in it; None: none.
        huge_pages: on a CPU, have the weights in huge pages after the first step; see `runtimes.huge_pages`.
        prepared: returns a graph as it was prepared for this machine, by its path in the package and those of its data,
            or None; it is taken where it is intact. None: there are none.
        spinning: threads wait for work without giving their core away.

    Raises:
        UsageError: the device takes fewer slots.
        IntegrityError: a file is not the one that was exported.
        PackageError: onnxruntime cannot load the graph, or it has other inputs and outputs than the manifest says.
        BackendError: the device, its provider or its libraries are not there, it does not run this variant, or
            onnxruntime is too old for it.
    """
    spec, target = variant.kv_cache, find_target("ort", device)
    known = dict.fromkeys(form for other in ort_targets() for form in other.caches)
    if spec.form not in known:
        raise PackageError(f"variant {variant.name}: KV cache form {spec.form!r}, this version runs {', '.join(known)}")
    if spec.form == "static" and variant.quantization is not None:
        raise BackendError(
            f"variant {variant.name}: onnxruntime has no kernel that dequantises to {spec.dtype}; run an engine of it "
            f"with {engine_backend_words()}"
        )
    if not runs(variant, target):
        others = [other.device for other in ort_targets() if runs(variant, other)]
        raise BackendError(
            f"variant {variant.name}: a {spec.dtype} KV cache does not run on device {device}; "
            f"it runs on {', '.join(others) or 'none'}, and {', '.join(target.variants)} are made for {device}"
        )
    if device == "nv-rtx" and any(tensor.role == "lora_a" for tensor in variant.inputs):
        raise BackendError(
            f"variant {variant.name}: takes LoRA adapters at run time, which device nv-rtx does not; use device "
            "cuda, or export it with --lora, which merges"
        )
    variant = without_too_new(variant, ort.__version__, device)
    found = find_device(device)
    capture = device == "cuda" and spec.form == "shared"
    shapes = compiled_shapes(spec, model.hidden_size) if device == "nv-rtx" else None
    if shapes is not None:  # a classifier has fewer
        shapes = {tensor.name: shapes[tensor.name] for tensor in variant.inputs}

    pages = HugePages(wanted=huge_pages) if (huge_pages or prepared) and device == "cpu" else None

    def load(graph: str, data: Sequence[str]) -> ort.InferenceSession:
        def opened(path: Path, mapped: Path | None = None) -> ort.InferenceSession:
            with pages.loading(mapped) if pages is not None else nullcontext():
                return open_session(
                    path, variant, threads, device=found, capture=capture, shapes=shapes, spinning=spinning
                )

        if prepared is not None and device == "cpu" and (ready := prepared(graph, data)) is not None:
            try:
                session = _load_checked(lambda: opened(ready.graph, ready.data), ready.check)
            except PackageError as error:
                logger.warning("%s; until then the package's own graph is taken", error)
            else:
                logger.info("variant %s: weights mapped from %s", variant.name, ready.data)
                return session
        if check is not None:
            check([graph])
        return _load_checked(lambda: opened(package / graph), partial(check, data) if check is not None else None)

    most = MAX_COMPILED_ROWS if shapes else None
    slots = max_slots or min(DEFAULT_SLOTS, most or DEFAULT_SLOTS)
    if most is not None and slots > most:
        raise UsageError(f"max_slots {slots}: device {device} takes {most}")
    lora = Adapters(package, adapters, variant, check, found.memory) if adapters else None
    session = load(variant.graph, variant.data)
    match spec.form:
        case "concat":
            return ConcatRunner(session, variant, model, slots, exact=exact, adapters=lora, pages=pages)
        case "static":
            static = OrtStaticSession(session, variant, memory=found.memory)
            return StaticRunner(static, variant, model, slots, exact=exact, pages=pages)
        case _ if found.memory is not None:
            return DeviceRunner(
                session,
                variant,
                model,
                found.memory,
                capture=capture,
                max_rows=most,
                max_slots=slots,
                adapters=lora,
            )
        case _:
            prefill: Future[ort.InferenceSession] | None = None
            if variant.prefill is not None:
                pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefill-graph")
                prefill = pool.submit(load, variant.prefill.graph, variant.prefill.data)
                pool.shutdown(wait=False)
            return SharedRunner(session, prefill, variant, model, slots, exact=exact, adapters=lora, pages=pages)


def _load_checked(load: Callable[[], ort.InferenceSession], check: Callable[[], None] | None) -> ort.InferenceSession:
    """Load a graph while its data is checked; what the check finds goes before what onnxruntime says."""
    if check is None:
        return load()
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(check)
        try:
            return load()
        finally:
            pending.result()
