"""Polygraphy's command line on one of the two TensorRTs.

    python -m olmo2_export.debug.polygraphy_tool trt_rtx inspect capability model.onnx
    python -m olmo2_export.debug.polygraphy_tool trt_rtx parse model.onnx          exit code 1 if it cannot be parsed

TensorRT for RTX comes as the module of its bindings; Polygraphy looks for `tensorrt_rtx`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from runtimes.command import run_command
from runtimes.trt.nvidia import TensorRT, load_tensorrt, tensorrt_backend


def main(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    backend = tensorrt_backend(arguments[0])
    tensorrt = load_tensorrt(backend)
    if arguments[1] == "parse":
        return 0 if parses(tensorrt, arguments[2]) else 1
    if backend == "trt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        sys.modules.setdefault("tensorrt_rtx", tensorrt.module)
    from polygraphy.tools import main as polygraphy  # type: ignore[import-untyped]  # after the choice

    sys.argv = ["polygraphy", *arguments[1:]]
    return int(polygraphy() or 0)


def parses(tensorrt: TensorRT, graph: str) -> bool:
    """Tell whether TensorRT parses a graph; what it says goes to standard error."""
    trt = tensorrt.module
    builder = trt.Builder(tensorrt.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, tensorrt.log)
    parsed = bool(parser.parse_from_file(graph))
    for index in range(parser.num_errors):
        sys.stderr.write(f"{parser.get_error(index).desc()}\n")
    return parsed


if __name__ == "__main__":
    sys.exit(
        run_command("polygraphy_tool", lambda: main(sys.argv[1:]), debug=True)
    )  # read by `debug.py`, not by people
