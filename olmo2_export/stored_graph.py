"""Read a graph of a package, wherever its weights lie."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


def load_graph(path: Path) -> ir.Model:
    """Load an ONNX file; its weights stay on disk until they are asked for.

    onnx-ir reads no weights through a link that leads out of the graph's folder, as all links of a Hub cache do. What a
    package's links lead to is checked against its manifest, so that the weights are read where they are.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        real = Path(tensor.path).resolve()
        if real == path.parent.resolve() / tensor.location:
            continue
        value.const_value = ir.ExternalTensor(
            real.name,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir=real.parent,
        )
    return model
