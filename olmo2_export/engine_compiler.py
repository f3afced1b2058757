"""Compile one ONNX graph to one TensorRT plan, in a process of its own.

    python -m olmo2_export.engine_compiler REQUEST.json

Why a process of its own: TensorRT numbers things in the order of their addresses, so that two plans of one graph are
byte-identical only if memory is laid out in the same way, which has to be arranged before a process starts; what
TensorRT allocates, more than twice the plan, is given back whole; and a build can be killed at any time.

Standard output carries one JSON message a line: {"phase": name}, {"log": level, "text": text}, and last either
{"result": CompileResult} or {"error": class name of `runtimes.errors`, "text": text}.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx

from runtimes.errors import EngineBuildError, FusionError, Olmo2ExportError, first_names
from runtimes.manifest import ProfileRange
from runtimes.nvidia import Message, TensorRT, TensorRTBackend, load_tensorrt

logger = logging.getLogger(__name__)

# What TensorRT says when it leaves something out of the network that the graph says: never acceptable.
_CHANGES_MEANING = re.compile(r"unused|ignor|not supported|unsupported|clamp|truncat|overflow|lossy", re.IGNORECASE)
_ADDR_NO_RANDOMIZE = 0x0040000  # of personality(2)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class CompileRequest:
    """What to compile."""

    backend: TensorRTBackend
    graph: str
    """path of the ONNX file, its data beside it"""
    plan: str
    """path of the file to write"""
    profiles: dict[str, tuple[ProfileRange, ...]]
    """in the order of the plan's profile indices"""
    compute_capabilities: tuple[str, ...]
    layer_counts: dict[str, int]
    """layers of the TensorRT network that must be there, by type; `A|B` counts both together"""


@dataclass(frozen=True)
class CompileResult:
    """What came of it."""

    backend_version: str
    layer_counts: dict[str, int]
    aliases: dict[str, str]
    """network outputs that TensorRT writes into the memory of that input"""
    peak_rss: int
    """bytes, of this process; the mapped weights are part of it"""


def compile_plan(request: CompileRequest, on_phase: Callable[[str], None]) -> CompileResult:
    """Parse the graph, check the network, build the plan and write it.

    Args:
        request: what to compile.
        on_phase: called with the name of each phase of the build.

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
    on_phase("Parsing the graph")
    with _mapped_weights(Path(request.graph)) as (model, weights):
        _parse(tensorrt, parser, model, weights)
        _check_inputs(network)
        counts = check_layers(_layer_types(network), request.layer_counts)
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        tensorrt.set_compute_capabilities(config, request.compute_capabilities)
        for ranges in request.profiles.values():
            _add_profile(builder, config, ranges)
        config.progress_monitor = monitor = tensorrt.progress_monitor(on_phase)
        with tensorrt.collected() as messages, Path(request.plan).open("wb") as file:
            built = tensorrt.build_to_file(builder, network, config, file)
        del monitor  # it had to live until here: TensorRT does not keep it alive
        if not built:
            raise EngineBuildError(f"TensorRT {tensorrt.version} could not build the engine: {_texts(messages)}")
        check_messages(messages)
    return CompileResult(
        backend_version=tensorrt.version,
        layer_counts=counts,
        aliases=_aliases(trt, network),
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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
        raise EngineBuildError(f"TensorRT would not compute what the graph says: {_texts(fatal)}")


@contextmanager
def _mapped_weights(graph: Path) -> Iterator[tuple[bytes, dict[str, tuple[int, int]]]]:
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
    errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    if not ok or errors:
        raise EngineBuildError(
            f"TensorRT {tensorrt.version} cannot parse the graph: {'; '.join(errors) or _texts(messages)}"
        )
    check_messages(messages)


def _parser_error(error: Any) -> str:
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


def _texts(messages: Sequence[Message]) -> str:
    return "; ".join(dict.fromkeys(m.text.strip() for m in messages)) or "it did not say why"


def main(arguments: Sequence[str]) -> int:
    """Compile what the request file says; return the exit code. See the top of this file for what is printed."""
    reproducible = _be_reproducible()
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for the end of the build
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the messages
    logging.basicConfig(level=logging.DEBUG, handlers=[_ChannelHandler(channel)])
    if not reproducible:
        logger.info(
            "this system does not let a process arrange its memory: two plans of one graph can differ in some bytes"
        )

    def send(message: dict[str, object]) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        request = read_request(Path(arguments[0]))
        with ThreadPoolExecutor(max_workers=1) as pool:  # a thread allocates from a heap of its own, untouched so far
            result = pool.submit(compile_plan, request, lambda phase: send({"phase": phase})).result()
    except Olmo2ExportError as error:
        send({"error": type(error).__name__, "text": str(error)})
        return error.exit_code
    except OSError as error:
        send({"error": "ResourceError", "text": f"{error.filename or 'plan'}: {error.strerror or error}"})
        return 1
    send({"result": asdict(result)})
    return 0


def read_request(path: Path) -> CompileRequest:
    """Read a request that was written as the JSON of `asdict`."""
    document = json.loads(path.read_text())
    profiles = {
        name: tuple(ProfileRange(r["name"], tuple(r["min"]), tuple(r["opt"]), tuple(r["max"])) for r in ranges)
        for name, ranges in document["profiles"].items()
    }
    capabilities = tuple(document["compute_capabilities"])
    return CompileRequest(**{**document, "profiles": profiles, "compute_capabilities": capabilities})


class _ChannelHandler(logging.Handler):
    """Sends log records to the parent process."""

    def __init__(self, channel: TextIO) -> None:
        super().__init__()
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self.channel.write(json.dumps({"log": record.levelno, "text": record.getMessage()}) + "\n")


def _be_reproducible() -> bool:
    """Make this process allocate memory in the same way each time; tell whether the system let it.

    Addresses are not randomised, for which the process starts again, and TensorRT's threads take turns on one CPU
    without interrupting each other, which costs little: its work is serial but for the generation of kernels.
    """
    if sys.platform != "linux":
        return False
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except PermissionError:
        return False
    libc = ctypes.CDLL(None)
    current = libc.personality(0xFFFFFFFF)  # reads it
    if current != -1 and current & _ADDR_NO_RANDOMIZE:
        return True
    if current != -1 and libc.personality(current | _ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, sys.orig_argv)
    return False


def _die_with_parent() -> None:
    """Have the system kill this process if the one that waits for its plan is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
