"""Open graphs on onnxruntime: sessions, their errors, and the check of their inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from runtimes.errors import PackageError, first_names
from runtimes.linked_data import follow_link
from runtimes.manifest import Variant
from runtimes.ort.devices import Device, Shapes, find_device

# What loading raises; these have no common base but Exception. NotFound is new in 1.23.
_LOAD_ERRORS = tuple(
    getattr(ort_state, name)
    for name in (
        "EPFail",
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoModel",
        "NoSuchFile",
        "NotFound",
        "NotImplemented",
        "RuntimeException",
    )
    if hasattr(ort_state, name)
)
_SAVE_PACKED = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": "{name}_data",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
_ERRORS_ONLY = 4  # onnxruntime's log severity "fatal": errors reach the caller as exceptions, once


def open_session(
    graph: Path,
    variant: Variant,
    threads: int | None,
    changed: bytes | None = None,
    *,
    device: Device | None = None,
    capture: bool = False,
    shapes: Shapes | None = None,
    save_as: Path | None = None,
    spinning: bool = True,
) -> ort.InferenceSession:
    """Load a graph on one device.

    Args:
        graph: the ONNX file; the caller has checked it and its data.
        variant: says which inputs and outputs it must have.
        threads: of an operator; None leaves it to onnxruntime.
        changed: run this graph instead, on the data of that file; without fusions that round in another way.
        device: where; None means the CPU.
        capture: prepare it for CUDA graphs, which takes a graph that computes on the device alone.
        shapes: of its inputs, where the device compiles for some; None: any.
        save_as: write it there as it was optimised, its weights beside it, plain and packed, in the same name with
            `_data`; None: do not.
        spinning: threads wait for work without giving their core away.

    Raises:
        PackageError: onnxruntime cannot load the graph, or it has other inputs and outputs than the manifest says.
        BackendError: onnxruntime runs it elsewhere.
    """
    device = device or find_device("cpu")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = changed
    if changed is not None or device.name != "nv-rtx":  # a compiler reads the weights itself, by the graph's path
        source, folder = follow_link(graph, changed, variant.data_of(graph.name))
        if source is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if changed is not None:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
        for key, value in _SAVE_PACKED.items():
            options.add_session_config_entry(key, value.format(name=save_as.name))
    try:
        providers = device.configure(options, capture=capture, shapes=shapes)
        session = ort.InferenceSession(
            graph if source is None else source, options, providers=providers, enable_fallback=0
        )
    except _LOAD_ERRORS as error:
        raise PackageError(f"{graph}: onnxruntime cannot load it ({one_line(error)}); export it again") from error
    device.check(session.get_providers())
    inputs = [*session.get_inputs(), *session.get_overridable_initializers()]
    _check_names(graph, "inputs", [v.name for v in inputs], [t.name for t in variant.inputs])
    _check_names(graph, "outputs", [v.name for v in session.get_outputs()], [t.name for t in variant.outputs])
    return session


def one_line(error: Exception) -> str:
    """Return an error of onnxruntime as a short line."""
    return str(error).strip().replace("\n", " ")[:300]


def _check_names(graph: Path, kind: str, found: list[str], expected: list[str]) -> None:
    """Refuse a graph whose inputs or outputs are not those of the manifest."""
    if set(found) == set(expected):
        return
    missing = first_names(sorted(set(expected) - set(found))) or "none"
    extra = first_names(sorted(set(found) - set(expected))) or "none"
    raise PackageError(
        f"{graph.name}: its {kind} are not the manifest's (missing: {missing}; unexpected: {extra}); "
        "export the package again"
    )
