"""A package's float32 weights, by the checkpoint's names and in its layout."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from olmo2_export.stored_graph import load_graph
from olmo2_export.weights.stored_names import EMBEDDING
from runtimes.errors import PackageError
from runtimes.manifest import Manifest


class PackageWeights:
    """Implements `quantize.source.WeightSource`: one tensor in memory at a time."""

    def __init__(self, package: Path, manifest: Manifest) -> None:
        self.folder = package
        self.kind = manifest.source.kind
        self._graph = package / manifest.variants["fp32"].graph
        self._last: tuple[str, torch.Tensor] | None = None

    @cached_property
    def _initializers(self) -> dict[str, ir.TensorProtocol]:
        values = load_graph(self._graph).graph.initializers.items()
        return {name: value.const_value for name, value in values if value.const_value is not None}

    def tensor(self, name: str) -> torch.Tensor:
        """Return one weight, float32, copied out of the file; products' weights are stored transposed.

        Raises:
            PackageError: the graph has no such weight.
        """
        if self._last is not None and self._last[0] == name:  # whoever quantises a weight then measures its error
            return self._last[1]
        stored = self._initializers.get(name)
        if stored is None:
            raise PackageError(f"{self._graph}: no weight {name}; export the package again")
        array = np.array(stored.numpy())
        if isinstance(stored, ir.ExternalTensor):
            stored.release()  # it has mapped the whole file
        tensor = torch.from_numpy(array)
        self._last = (name, tensor.T.contiguous() if tensor.ndim == 2 and name != EMBEDDING else tensor)
        return self._last[1]

    def picked(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of one weight, float32; of an embedding only these are read."""
        stored = self._initializers.get(name)
        if stored is None or name != EMBEDDING:
            return self.tensor(name)[rows]
        array = torch.from_numpy(np.asarray(stored.numpy())[rows.numpy()])
        if isinstance(stored, ir.ExternalTensor):
            stored.release()
        return array
