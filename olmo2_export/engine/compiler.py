"""Compile one ONNX graph to one TensorRT plan: parse, check, build, write."""

from __future__ import annotations

import logging
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from olmo2_export.engine.builder import (
    OnProgress,
    build_to_file,
    progress_monitor,
    set_compute_capabilities,
    set_flags,
    timing_cache,
)
from olmo2_export.peak_memory import peak_bytes
from runtimes.errors import EngineBuildError, FusionError, first_names
from runtimes.manifest import EngineBackend, ProfileRange
from runtimes.trt.nvidia import Message, TensorRT, load_tensorrt

# What TensorRT says when it leaves something out of the network that the graph says: never acceptable.
_CHANGES_MEANING = re.compile(r"unused|ignor|not supported|unsupported|clamp|truncat|overflow|lossy", re.IGNORECASE)


@dataclass(frozen=True)
class CompileRequest:
    """What to compile."""

    backend: EngineBackend
    graph: str
    """path of the ONNX file, its data beside it"""
    plan: str
    """path of the file to write"""
    profiles: dict[str, tuple[ProfileRange, ...]]
    """in the order of the plan's profile indices"""
    compute_capabilities: tuple[str, ...]
    layer_counts: dict[str, int]
    """layers of the TensorRT network that must be there, by type; `A|B` counts both together"""
    flags: tuple[str, ...] = ()
    """portable, refit, weight_streaming"""
    timing_cache: str | None = None
    """absolute path of a file"""


@dataclass(frozen=True)
class CompileResult:
    """What came of it."""

    backend_version: str
    layer_counts: dict[str, int]
    aliases: dict[str, str]
    """network outputs that TensorRT writes into the memory of that input"""
    peak_rss: int | None
    """bytes, of this process, where the system counts them; the mapped weights are part of it"""


def compile_plan(request: CompileRequest, on_progress: OnProgress) -> CompileResult:
    """Parse the graph, check the network, build the plan and write it.

    Args:
        request: what to compile.
        on_progress: called as the build goes on.

    Raises:
        BackendError: the library is not installed, or does not know a compute capability.
        EngineBuildError: TensorRT refused the graph, left a part of it out, or failed to build; with its own words.
        FusionError: the network does not have the layers it must have.
    """
    tensorrt = load_tensorrt(request.backend)
    trt = tensorrt.module
    builder = trt.Builder(tensorrt.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, tensorrt.log)
    on_progress("Parsing the graph", 0.0)
    with mapped_weights(Path(request.graph)) as (model, weights):
        _parse(tensorrt, parser, model, weights)
        _check_inputs(network)
        counts = check_layers(_layer_types(network), request.layer_counts)
        config = builder.create_builder_config()
        set_flags(tensorrt, config, request.flags)
        set_compute_capabilities(tensorrt, config, request.compute_capabilities)
        for ranges in request.profiles.values():
            _add_profile(builder, config, ranges)
        config.progress_monitor = monitor = progress_monitor(tensorrt, on_progress)
        cache = Path(request.timing_cache) if request.timing_cache else None
        with (
            tensorrt.collected() as messages,
            Path(request.plan).open("wb") as file,
            timing_cache(config, cache),
        ):
            built = build_to_file(tensorrt, builder, network, config, file)
        del monitor  # it had to live until here: TensorRT does not keep it alive
        if not built:
            raise EngineBuildError(f"TensorRT {tensorrt.version} could not build the engine: {texts(messages)}")
        check_messages(messages)
    return CompileResult(
        backend_version=tensorrt.version,
        layer_counts=counts,
        aliases=_aliases(trt, network),
        peak_rss=peak_bytes(),
    )


def check_layers(found: Mapping[str, int], expected: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of the expected layers.

    Raises:
        FusionError: one is there more or less often than expected; it names all of them.
    """
    counts = {names: sum(found.get(name, 0) for name in names.split("|")) for names in expected}
    if wrong := [f"{name}: expected {n}, found {counts[name]}" for name, n in expected.items() if counts[name] != n]:
        raise FusionError(f"TensorRT network: {'; '.join(wrong)}")
    return counts


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a network of which TensorRT said that it left something out.

    Raises:
        EngineBuildError: with what it said.
    """
    fatal = [m for m in messages if m.level >= logging.ERROR or _CHANGES_MEANING.search(m.text)]
    if fatal:
        raise EngineBuildError(f"TensorRT would not compute what the graph says: {texts(fatal)}")


@contextmanager
def mapped_weights(graph: Path) -> Iterator[tuple[bytes, dict[str, tuple[int, int]]]]:
    """Yield the serialised graph, and the address and size of each weight, mapped read-only while the body runs."""
    serialised = graph.read_bytes()
    model = onnx.load_model_from_string(serialised)
    with (graph.parent / f"{graph.name}_data").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, dtype=np.uint8)
    base: int = data.ctypes.data
    weights: dict[str, tuple[int, int]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            weights[tensor.name] = (base + int(entry["offset"]), int(entry["length"]))
    del model
    try:
        yield serialised, weights
    finally:
        del data
        mapped.close()


def _parse(tensorrt: TensorRT, parser: Any, model: bytes, weights: Mapping[str, tuple[int, int]]) -> None:
    """Build the network from the graph and the mapped weights."""
    with tensorrt.collected() as messages:
        ok = parser.load_model_proto(model)
        refused = [
            name for name, (address, size) in weights.items() if not parser.load_initializer(name, address, size)
        ]
        if refused:
            raise EngineBuildError(f"TensorRT {tensorrt.version} did not take the weights {first_names(refused)}")
        ok = ok and parser.parse_model_proto()
    errors = [parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    if not ok or errors:
        raise EngineBuildError(
            f"TensorRT {tensorrt.version} cannot parse the graph: {'; '.join(errors) or texts(messages)}"
        )
    check_messages(messages)


def parser_error(error: Any) -> str:
    where = f" at {error.node_operator()} {error.node_name()}" if error.node_operator() else ""
    return f"{error.desc()}{where}"


def _check_inputs(network: Any) -> None:
    """Refuse a network that does not read all of its inputs: the parser has left something out.

    Raises:
        EngineBuildError: naming them.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    tensors = [layer.get_input(index) for layer in layers for index in range(layer.num_inputs)]
    read = {tensor.name for tensor in tensors if tensor is not None}
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    if unused := [name for name in inputs if name not in read]:
        raise EngineBuildError(f"TensorRT would not compute what the graph says: unused input {', '.join(unused)}")


def _add_profile(builder: Any, config: Any, ranges: Sequence[ProfileRange]) -> None:
    profile = builder.create_optimization_profile()
    for r in ranges:
        profile.set_shape(r.name, r.min, r.opt, r.max)
    if config.add_optimization_profile(profile) < 0:
        raise EngineBuildError(f"TensorRT refused the optimization profile {[asdict(r) for r in ranges]}")


def _layer_types(network: Any) -> Counter[str]:
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def _aliases(trt: Any, network: Any) -> dict[str, str]:
    """Return output -> input for each cache that is updated in place."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    return {layer.get_output(0).name: layer.get_input(0).name for layer in updates}


def texts(messages: Sequence[Message]) -> str:
    return "; ".join(dict.fromkeys(m.text.strip() for m in messages)) or "it did not say why"
